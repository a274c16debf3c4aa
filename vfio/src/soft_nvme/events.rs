//! Asynchronous events (NVMe 1.4 §5.2): what happened, and the commands that wait to hear it.

#![forbid(unsafe_code)]

use super::lock;
use std::sync::Mutex;

/// Asynchronous Event Requests that may be outstanding (Identify says it 0's based).
pub(super) const LIMIT: usize = 4;

/// What can happen here: event type, event information and the log page to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Write to a doorbell register that does not exist (figure 147).
    InvalidDoorbell,
    /// A doorbell was written with a value that its queue cannot have (figure 147).
    InvalidDoorbellValue,
    /// The subsystem is not as reliable as it was (figure 148).
    ReliabilityDegraded,
    /// The temperature crossed its threshold (figure 148).
    TemperatureThreshold,
    /// The namespace has another size (figure 150).
    NamespaceChanged,
}

/// The kinds of events; after one was reported, its kind is silent until its log is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Type 000b, Error Information log.
    Error,
    /// Type 001b, SMART log.
    Health,
    /// Type 010b, Changed Namespace List log.
    Notice,
}

impl Event {
    fn kind(self) -> Kind {
        match self {
            Self::InvalidDoorbell | Self::InvalidDoorbellValue => Kind::Error,
            Self::ReliabilityDegraded | Self::TemperatureThreshold => Kind::Health,
            Self::NamespaceChanged => Kind::Notice,
        }
    }

    /// Dword 0 of the completion (NVMe 1.4 figure 146).
    fn dword(self) -> u32 {
        let (kind, information, log) = match self {
            Self::InvalidDoorbell => (0, 0, 1),
            Self::InvalidDoorbellValue => (0, 1, 1),
            Self::ReliabilityDegraded => (1, 0, 2),
            Self::TemperatureThreshold => (1, 1, 2),
            Self::NamespaceChanged => (2, 0, 4),
        };
        kind | information << 8 | log << 16
    }
}

#[derive(Default)]
struct State {
    /// Command ids of the requests that wait; the oldest first.
    waiting: Vec<u16>,
    channels: [Channel; 3],
}

#[derive(Clone, Copy, Default)]
struct Channel {
    pending: Option<Event>,
    silent: bool,
}

/// The events and requests of one controller.
#[derive(Default)]
pub(super) struct Events(Mutex<State>);

impl Events {
    /// Takes a request in; false if there are as many as may be.
    pub(super) fn wait(&self, cid: u16) -> bool {
        let mut state = lock(&self.0);
        let room = state.waiting.len() < LIMIT;
        if room {
            state.waiting.push(cid);
        }
        room
    }

    /// Takes a request back; false if there is none with this id.
    pub(super) fn abort(&self, cid: u16) -> bool {
        let mut state = lock(&self.0);
        let before = state.waiting.len();
        state.waiting.retain(|waiting| *waiting != cid);
        state.waiting.len() < before
    }

    /// Notes what happened. Of several events of a kind, the first is reported.
    pub(super) fn raise(&self, event: Event) {
        lock(&self.0).channels[event.kind() as usize]
            .pending
            .get_or_insert(event);
    }

    /// The next report, if there is an event that may be reported and a request for it: the
    /// request's command id and the result. `permitted` is asked once both are there.
    pub(super) fn next_report(&self, permitted: impl FnOnce() -> bool) -> Option<(u16, u32)> {
        let mut state = lock(&self.0);
        let cid = *state.waiting.first()?;
        let channel = state
            .channels
            .iter_mut()
            .find(|c| !c.silent && c.pending.is_some())?;
        if !permitted() {
            return None;
        }
        let event = channel.pending.take()?;
        channel.silent = true;
        state.waiting.remove(0);
        Some((cid, event.dword()))
    }

    /// The log page of this kind is being read: what it says need not be reported, what
    /// happens from now on must be.
    pub(super) fn acknowledge(&self, kind: Kind) {
        lock(&self.0).channels[kind as usize] = Channel::default();
    }

    /// Forgets everything.
    pub(super) fn clear(&self) {
        *lock(&self.0) = State::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_silent_until_its_log_is_read() {
        let events = Events::default();
        assert!(events.wait(7) && events.wait(8));
        events.raise(Event::InvalidDoorbell);
        events.raise(Event::InvalidDoorbellValue);
        assert_eq!(events.next_report(|| true), Some((7, 0x01_00_00)));
        events.raise(Event::InvalidDoorbellValue);
        assert_eq!(events.next_report(|| true), None);
        events.acknowledge(Kind::Error);
        assert_eq!(events.next_report(|| true), None);
        events.raise(Event::InvalidDoorbellValue);
        assert_eq!(events.next_report(|| true), Some((8, 0x01_01_00)));
    }

    #[test]
    fn kinds_do_not_silence_each_other() {
        let events = Events::default();
        assert!(events.wait(1) && events.wait(2));
        events.raise(Event::InvalidDoorbell);
        events.raise(Event::TemperatureThreshold);
        assert_eq!(events.next_report(|| true), Some((1, 0x01_00_00)));
        assert_eq!(events.next_report(|| true), Some((2, 0x02_01_01)));
    }

    #[test]
    fn a_report_without_room_stays() {
        let events = Events::default();
        assert!(events.wait(1));
        events.raise(Event::InvalidDoorbell);
        assert_eq!(events.next_report(|| false), None);
        assert_eq!(events.next_report(|| true), Some((1, 0x01_00_00)));
    }

    #[test]
    fn the_fifth_request_is_one_too_many() {
        let events = Events::default();
        assert!((0..4).all(|cid| events.wait(cid)));
        assert!(!events.wait(4));
        assert!(events.abort(2) && !events.abort(2));
        assert!(events.wait(4));
    }
}
