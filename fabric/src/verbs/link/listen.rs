//! The receiving half: messages in the ring, what wakes the owner, and the end of the connection.

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use vm_memory::VolatileMemory;

use super::super::raw::{Completion, Region};
use super::{COMPLETIONS, DEVICE, LOOKS_PER_WAIT, MAX_FRAME, VerbsLink};
use crate::ring::{Arrived, Incoming, Outgoing, PREFIX, Prefix};
use crate::wire::{HEADER_LEN, Header, Kind, Message};
use crate::{FabricError, Received, Sink, Span};

impl VerbsLink {
    /// Takes completed receives off the queue: each is a message in the ring. How many there were.
    pub(super) fn poll(&mut self) -> Result<usize, FabricError> {
        let mut violation = None;
        let mut failed = None;
        let (incoming, outgoing) = (&mut self.incoming, &mut self.outgoing);
        let (arrived, ring) = (&mut self.arrived, &self.ring);
        let polled = self.received.poll(|completion: Completion| {
            let outcome = match (completion.failure, completion.immediate) {
                (Some(status), _) => {
                    failed.get_or_insert(status);
                    return;
                }
                (None, None) => Err(FabricError::violation("a message without immediate data")),
                (None, Some(immediate)) => arrive(incoming, outgoing, ring, immediate),
            };
            match outcome {
                Ok(message) => arrived.push_back(message),
                Err(error) => violation = violation.take().or(Some(error)),
            }
        });
        let count = polled.map_err(|source| FabricError::Io {
            what: "polling a completion queue",
            source,
        })?;
        if let Some(error) = violation {
            return Err(error);
        }
        if let Some(status) = failed {
            // Receives are only flushed; what ended the connection, the other queue or the device says.
            self.ended
                .flushed
                .get_or_insert_with(|| format!("receives end with: {status}"));
        }
        self.counters.receive_calls += count as u64;
        Ok(count)
    }

    /// Delivers the next message that has arrived; false if there is none.
    pub(super) fn take_next(
        &mut self,
        sink: &mut dyn Sink,
    ) -> Result<Option<Received>, FabricError> {
        while let Some(message) = self.arrived.pop_front() {
            let (memory, base) = self.ring.memory();
            let frame = self.frame.get_mut(..message.len).unwrap_or_default();
            let source = memory.get_slice(base + message.offset, message.len);
            source.map_err(|_| FabricError::Closed)?.copy_to(frame);
            self.incoming.consume(&message);
            self.quiet = 0;
            self.sends
                .get_mut()
                .pair()
                .post_receive()
                .map_err(|source| FabricError::Io {
                    what: "posting a receive",
                    source,
                })?;
            self.counters.bytes_received += (PREFIX + message.len) as u64;
            if self.incoming.owes() {
                self.put_frame([&[], &[]])?;
                self.sends.get_mut().ring();
            }
            if message.len > 0 && self.deliver(message.len, sink)? {
                return Ok(Some(Received::Message));
            }
        }
        Ok(None)
    }

    /// Hands the frame at hand to whom it is for; false if that is this link itself.
    pub(super) fn deliver(&mut self, len: usize, sink: &mut dyn Sink) -> Result<bool, FabricError> {
        let frame = self.frame.get(..len).unwrap_or_default();
        let Some((bytes, control)) = frame.split_first_chunk::<HEADER_LEN>() else {
            return Err(FabricError::Truncated { received: len });
        };
        let header = Header::decode(bytes)?;
        self.admission.admit(&header)?;
        if header.prefix_len() != len {
            return Err(FabricError::violation(format!(
                "a {} frame of {len} bytes declares {}",
                header.kind,
                header.prefix_len()
            )));
        }
        self.counters.messages_received += 1;
        self.counters.payload_received += u64::from(header.payload_len);
        self.counters.bytes_received += u64::from(header.payload_len);
        if header.kind != Kind::RdmaKeys {
            sink.deliver(&header, control)?;
            return Ok(true);
        }
        if let Message::RdmaKeys(keys) = Message::decode(&header, control)? {
            keys.iter().try_for_each(|key| self.keys.update(key))?;
        }
        Ok(false)
    }

    /// Has the channel tell of what completes from now on.
    pub(super) fn arm(&mut self) -> Result<(), FabricError> {
        let what = |source| FabricError::Io {
            what: "arming a completion queue",
            source,
        };
        if !std::mem::replace(&mut self.armed.received, true) {
            self.received.arm().map_err(what)?;
        }
        if !std::mem::replace(&mut self.armed.sent, true) {
            self.sends.get_mut().completions().arm().map_err(what)?;
        }
        Ok(())
    }

    /// Looks at what woke the owner; whether completions did.
    pub(super) fn attend(&mut self) -> bool {
        let mut woken = false;
        let event = epoll::Event {
            flags: EventFlags::empty(),
            data: EventData::new_u64(0),
        };
        let mut events = [event; 3];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let count = epoll::wait(&self.waiting, &mut events, Some(&now)).unwrap_or(0);
        for event in events.iter().take(count) {
            match event.data.u64() {
                COMPLETIONS => woken |= self.take_events(),
                DEVICE => self.take_device_events(),
                _ => self.look_at_control(),
            }
        }
        woken
    }

    pub(super) fn take_events(&mut self) -> bool {
        let mut woken = false;
        loop {
            let sends = self.sends.get_mut();
            match self
                .channel
                .take_event([&self.received, sends.completions()])
            {
                Some(0) => self.armed.received = false,
                Some(_) => self.armed.sent = false,
                None => return woken,
            }
            woken = true;
        }
    }

    pub(super) fn take_device_events(&mut self) {
        while let Some(event) = self.windows.domain().context().next_event() {
            let ours = event.port.is_none_or(|port| port == self.port);
            if event.fatal && ours {
                self.ended.event.get_or_insert(event.what);
            }
        }
    }

    pub(super) fn look_at_control(&mut self) {
        if self.ended.control.is_none() {
            self.ended.control = match self.control.receive(&mut NothingYet) {
                Ok(Received::Idle) => None,
                Ok(Received::Message) => Some(FabricError::violation(
                    "a message came on the control connection",
                )),
                Err(error) => Some(error),
            };
        }
    }

    /// Looks once for a message, then for the end of the connection.
    pub(super) fn look(&mut self, sink: &mut dyn Sink) -> Result<Received, FabricError> {
        loop {
            if let Some(received) = self.take_next(sink)? {
                return Ok(received);
            }
            if self.poll()? > 0 {
                continue;
            }
            self.sends.get_mut().reap();
            self.quiet = self.quiet.wrapping_add(1);
            if !self.looking {
                if !self.settle_down()? {
                    continue;
                }
            } else if self.quiet % LOOKS_PER_WAIT == 0 {
                // The queues are looked at anyway, so they need not tell.
                self.attend();
            }
            // What came before the end has been delivered by now, unless it came meanwhile.
            if self.has_ended() && self.poll()? == 0 {
                return Err(self.end());
            }
            if self.arrived.is_empty() {
                return Ok(Received::Idle);
            }
        }
    }

    /// Makes sure that the descriptor will tell of the next message; false if one has come meanwhile.
    pub(super) fn settle_down(&mut self) -> Result<bool, FabricError> {
        loop {
            self.arm()?;
            if self.poll()? > 0 {
                return Ok(false);
            }
            if !self.attend() {
                return Ok(true);
            }
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.control.is_some()
            || self.ended.event.is_some()
            || self.ended.flushed.is_some()
            || self.sends.borrow().failure().is_some()
    }

    /// The error that says how the connection ended.
    pub(super) fn end(&mut self) -> FabricError {
        self.sends.get_mut().reap();
        // The peer's own end is the cause of whatever the device says about it.
        self.look_at_control();
        if let Some(error) = self.ended.control.take() {
            return error;
        }
        // An event, such as a port that went down, is the cause of what work requests end with.
        self.take_device_events();
        let failure = self.sends.get_mut().failure();
        let failure = failure.or(self.ended.flushed.as_deref());
        let said: Vec<&str> = self
            .ended
            .event
            .as_deref()
            .into_iter()
            .chain(failure)
            .collect();
        let what = match said[..] {
            [] => "it is over".to_owned(),
            _ => said.join(": "),
        };
        FabricError::Rdma { what }
    }
}

/// A message is announced: finds it in the ring, and takes note of what the peer has consumed.
fn arrive(
    incoming: &mut Incoming,
    outgoing: &mut Outgoing,
    ring: &Region,
    immediate: u32,
) -> Result<Arrived, FabricError> {
    let offset = incoming.offset(immediate)?;
    let mut bytes = [0; PREFIX];
    let (memory, base) = ring.memory();
    let source = memory.get_slice(base + offset, PREFIX);
    source
        .map_err(|_| FabricError::violation("a message outside the ring"))?
        .copy_to(&mut bytes[..]);
    let prefix = Prefix::decode(&bytes);
    outgoing.acknowledge(prefix.consumed)?;
    incoming.arrive(offset, &prefix, MAX_FRAME)
}

/// Takes nothing: what comes now is out of place.
pub(super) struct NothingYet;

impl Sink for NothingYet {
    fn land(&mut self, header: &Header, _: &[u8], _: &mut Vec<Span>) -> Result<(), FabricError> {
        Err(out_of_place(header))
    }

    fn deliver(&mut self, header: &Header, _: &[u8]) -> Result<(), FabricError> {
        Err(out_of_place(header))
    }
}

fn out_of_place(header: &Header) -> FabricError {
    FabricError::violation(format!("a {} message is out of place", header.kind))
}
