//! What has happened to attachments: the last of it is kept, so that a client that was away for a
//! moment misses nothing.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use tokio::sync::watch;

use crate::api::{AttachmentState, Event};

/// Events kept. A client that was away for more of them misses the oldest.
const KEPT: usize = 1024;

/// See the module's own description.
#[derive(Debug)]
pub struct Events {
    /// The sequence number that this life begins after: higher than those of every former life, as
    /// long as the clock has not been set back, and exact in JSON.
    begin: u64,
    ring: Mutex<VecDeque<Event>>,
    /// The sequence number of the newest.
    newest: watch::Sender<u64>,
}

impl Default for Events {
    fn default() -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self::beginning(since.map_or(0, |since| since.as_millis() as u64))
    }
}

impl Events {
    fn beginning(begin: u64) -> Self {
        Self {
            begin,
            ring: Mutex::default(),
            newest: watch::Sender::new(begin),
        }
    }

    /// Something has happened.
    pub fn push(&self, attachment: &str, state: AttachmentState, reason: Option<String>) {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let sequence = ring.back().map_or(self.begin, |event| event.sequence) + 1;
        if ring.len() == KEPT {
            ring.pop_front();
        }
        ring.push_back(Event {
            sequence,
            time: farbus_rest::timestamp(SystemTime::now()),
            attachment: attachment.to_owned(),
            state,
            reason,
        });
        drop(ring);
        self.newest.send_replace(sequence);
    }

    /// What has happened after the event `last`. To who asks with one of a former life, or one that is
    /// yet to come, all is new.
    #[must_use]
    pub fn after(&self, last: u64) -> Vec<Event> {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = ring.back().map_or(self.begin, |event| event.sequence);
        let last = if last > newest { 0 } else { last };
        let later = ring.iter().filter(|event| event.sequence > last);
        later.cloned().collect()
    }

    /// The sequence number of the newest event, and when it changes.
    pub fn newest(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequences(events: &Events, last: u64) -> Vec<u64> {
        let events = events.after(last);
        events.iter().map(|event| event.sequence).collect()
    }

    #[test]
    fn events_after_the_last_one_seen_are_replayed() {
        let events = Events::beginning(0);
        for _ in 0..3 {
            events.push("a", AttachmentState::Ready, None);
        }

        assert_eq!(sequences(&events, 1), [2, 3]);
        assert!(sequences(&events, 3).is_empty());
        assert_eq!(*events.newest().borrow(), 3);
    }

    #[test]
    fn event_of_another_life_brings_everything() {
        let events = Events::beginning(0);
        events.push("a", AttachmentState::Ready, None);

        assert_eq!(sequences(&events, 4711), [1]);
        let next = Events::beginning(1000);
        next.push("a", AttachmentState::Ready, None);
        assert_eq!(sequences(&next, 1), [1001]);
    }

    #[test]
    fn memory_is_bounded() {
        let events = Events::beginning(0);
        for _ in 0..2 * KEPT {
            events.push("a", AttachmentState::Ready, None);
        }

        let kept = sequences(&events, 0);
        assert_eq!(kept.len(), KEPT);
        assert_eq!(kept.last(), Some(&(2 * KEPT as u64)));
    }
}
