//! The link: frames over one-sided writes.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use vm_memory::{MmapRegion, VolatileMemory};

use super::keys::RemoteKeys;
use super::prepare::Prepared;
use super::raw::{Channel, Completion, CompletionQueue, Piece, Region};
use super::ring::{Arrived, Incoming, Outgoing, PREFIX, Prefix, immediate};
use super::sends::Sends;
use super::windows::Windows;
use crate::link::check_frame;
use crate::wire::{
    Admission, Epoch, HEADER_LEN, Header, Kind, MAX_CONTROL, Message, RdmaEndpoint, RdmaKey, Side,
    Submit,
};
use crate::{Counters, FabricError, Frame, Link, Received, RemoteSpan, Sink, Span};

/// The longest frame in the ring.
const MAX_FRAME: usize = HEADER_LEN + MAX_CONTROL;
/// How long to wait for the device to be done with memory that is to be used otherwise: in health
/// it takes microseconds.
const SETTLE: Duration = Duration::from_millis(20);
/// How long a link that is dropped waits for its last messages to arrive.
const FAREWELL: Duration = Duration::from_millis(50);

/// Looks at the completion queue, which cost next to nothing, between two at the descriptors. An event
/// that was not taken off its channel leaves the descriptor readable: an owner that goes on looking pays
/// for none of them, one that sleeps wakes up a few times more before it sleeps for good.
const LOOKS_PER_WAIT: u32 = 32;

const COMPLETIONS: u64 = 0;
const DEVICE: u64 = 1;
const CONTROL: u64 = 2;

/// A [`Link`] over RDMA.
pub struct VerbsLink {
    /// Also needed where the link is only looked at, to see what has completed.
    sends: RefCell<Sends>,
    windows: Windows,
    keys: RemoteKeys,
    peer: RdmaEndpoint,
    outgoing: Outgoing,
    incoming: Incoming,
    /// Messages that are in the ring, in order.
    arrived: VecDeque<Arrived>,
    received: Arc<CompletionQueue>,
    channel: Arc<Channel>,
    ring: Region,
    admission: Admission,
    control: Box<dyn Link>,
    waiting: OwnedFd,
    /// The queues of which the channel will tell.
    armed: Armed,
    /// Looks since the last message that found nothing.
    quiet: u32,
    port: u8,
    counters: Counters,
    /// A frame that is being received: a copy that the peer cannot change any more.
    frame: Box<[u8]>,
    /// Scratch lists, used again for each frame.
    pieces: Vec<Piece>,
    news: Vec<RdmaKey>,
    ended: Ended,
}

#[derive(Clone, Copy, Default)]
struct Armed {
    received: bool,
    sent: bool,
}

/// What is known of the end of the connection.
#[derive(Default)]
struct Ended {
    /// The peer has closed the control connection, or it failed: with what.
    control: Option<FabricError>,
    /// What the device said.
    device: Option<String>,
    /// An error was returned: nothing is received any more.
    receiving: bool,
}

impl VerbsLink {
    pub(super) fn new(
        prepared: Prepared,
        control: Box<dyn Link>,
        side: Side,
        epoch: Epoch,
    ) -> Result<Self, FabricError> {
        let Some(peer) = prepared.peer else {
            return Err(FabricError::Closed);
        };
        let context = prepared.domain.context();
        let waiting = wait_for([
            (prepared.channel.descriptor(), COMPLETIONS),
            (context.event_descriptor(), DEVICE),
            (control.descriptor(), CONTROL),
        ])
        .map_err(|errno| FabricError::Io {
            what: "waiting for several descriptors",
            source: errno.into(),
        })?;
        let own = prepared.endpoint();
        let port = prepared.port();
        let mut admission = Admission::new(side);
        admission.set_epoch(epoch);
        let mut link = VerbsLink {
            windows: Windows::new(Arc::clone(&prepared.domain), side == Side::Device),
            keys: RemoteKeys::default(),
            outgoing: Outgoing::new(peer.ring_len, peer.slots),
            incoming: Incoming::new(own.ring_len, own.slots),
            arrived: VecDeque::with_capacity(own.slots.into()),
            sends: RefCell::new(prepared.sends),
            received: prepared.received,
            channel: prepared.channel,
            ring: prepared.ring,
            peer,
            admission,
            control,
            waiting,
            armed: Armed::default(),
            quiet: 0,
            port,
            counters: Counters::default(),
            frame: vec![0; MAX_FRAME].into_boxed_slice(),
            pieces: Vec::with_capacity(1024),
            news: Vec::new(),
            ended: Ended::default(),
        };
        // An owner that waits for the descriptor first must hear of the first message. None has
        // come yet: the peer's first waits for this side's keys, or for its description.
        link.arm()?;
        Ok(link)
    }

    /// Waits until the peer has given a key, without which nothing can be sent that has data.
    pub(crate) fn wait_for_key(&mut self, limit: Duration) -> Result<(), FabricError> {
        let until = Instant::now() + limit;
        while self.keys.is_empty() {
            self.look(&mut NothingYet)?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(FabricError::Timeout {
                    what: "the keys of the peer's memory",
                    after: limit,
                });
            }
            if self.keys.is_empty() {
                let timeout = Timespec::try_from(left).ok();
                let mut events = [epoll::Event {
                    flags: EventFlags::empty(),
                    data: EventData::new_u64(0),
                }];
                // Its outcome shows in the next look.
                let _ = epoll::wait(&self.waiting, &mut events, timeout.as_ref());
            }
        }
        Ok(())
    }

    /// Tells the peer about keys, in as many messages as it takes.
    fn send_news(&mut self) -> Result<(), FabricError> {
        if self.news.is_empty() {
            return Ok(());
        }
        let news = std::mem::take(&mut self.news);
        for keys in news.chunks(RdmaKey::MAX) {
            let mut control = Vec::new();
            let header = Message::RdmaKeys(keys.to_vec()).encode(&mut control)?;
            self.put(&header, &control)?;
        }
        Ok(())
    }

    /// That keys are dead, the peer hears with the next frame: the device refuses them already. Only
    /// when there are many it hears at once.
    fn bound_news(&mut self) {
        if self.news.len() < RdmaKey::MAX || !self.outgoing.has_room() {
            return;
        }
        if self.send_news().is_err() {
            self.fail("the peer cannot be told of keys that are dead");
        }
        self.sends.get_mut().ring();
    }

    /// Appends a message to the chain at hand.
    fn put(&mut self, header: &Header, control: &[u8]) -> Result<(), FabricError> {
        let header = Header {
            epoch: self.admission.epoch(),
            ..*header
        };
        let bytes = header.encode();
        self.put_frame([&bytes, control])?;
        self.counters.messages_sent += 1;
        self.counters.payload_sent += u64::from(header.payload_len);
        self.counters.bytes_sent += u64::from(header.payload_len);
        Ok(())
    }

    /// As [`Self::put`], or without a frame: then the message says what was consumed.
    fn put_frame(&mut self, frame: [&[u8]; 2]) -> Result<(), FabricError> {
        let len = frame[0].len() + frame[1].len();
        let sends = self.sends.get_mut();
        let place = self.outgoing.place(len).filter(|_| sends.has_room(1));
        let Some(place) = place else {
            return Err(FabricError::Backlog {
                frames: 1,
                control: len,
                spans: 0,
            });
        };
        let prefix = Prefix {
            consumed: self.incoming.tell(),
            len: len as u32,
        };
        let (piece, inline) = sends.compose(place.offset, &prefix, frame)?;
        let target = (self.peer.ring_address + place.offset, self.peer.ring_key);
        sends.push(&[piece], target, Some(immediate(place.offset)), inline);
        self.outgoing.fill(place);
        self.counters.bytes_sent += (PREFIX + len) as u64;
        Ok(())
    }

    /// Makes the peer able to write where the commands of a message want their data.
    fn expose(&mut self, header: &Header, control: &[u8]) -> Result<(), FabricError> {
        for entry in Submit::decode(header, control)?.entries() {
            for segment in entry.segments {
                self.windows.expose(&segment, &mut self.news)?;
            }
        }
        Ok(())
    }

    /// Appends the writes of a payload to the chain at hand.
    fn put_payload(&mut self, frame: &Frame<'_>) -> Result<(), FabricError> {
        let sends = self.sends.get_mut();
        let mut pieces = self.pieces.drain(..);
        let mut piece = pieces.next();
        let mut list = [Piece::default(); super::prepare::MAX_PIECES];
        for span in frame.remote {
            let mut span = *span;
            while span.len > 0 {
                let (key, good) = self.keys.resolve(&span)?;
                let (mut count, mut len) = (0, 0);
                while count < sends.max_pieces() && len < good {
                    let Some(next) = piece else {
                        return Err(lengths_differ(frame));
                    };
                    let (head, tail) = next.split_at(good - len);
                    list[count] = head;
                    count += 1;
                    len += head.len();
                    piece = if tail.is_empty() {
                        pieces.next()
                    } else {
                        Some(tail)
                    };
                }
                let list = list.get(..count).unwrap_or_default();
                sends.push(list, (span.address, key), None, false);
                span = RemoteSpan {
                    address: span.address + u64::from(len),
                    len: span.len - len,
                };
            }
        }
        match piece {
            None => Ok(()),
            Some(_) => Err(lengths_differ(frame)),
        }
    }

    fn post(&mut self, frame: &Frame<'_>) -> Result<(), FabricError> {
        if frame.header.kind == Kind::Submit {
            self.expose(&frame.header, frame.control)?;
        }
        self.pieces.clear();
        let user = self.sends.get_mut().next_id()
            + (frame.payload.len() + frame.remote.len() + self.news.len()) as u64;
        for span in frame.payload {
            self.windows
                .gather(span, user, &mut self.pieces, &mut self.news)?;
        }
        // Each span ends at most one request early, and each key cuts at most one in two.
        let requests = self.pieces.len() + 2 * frame.remote.len() + 16;
        if !self.sends.get_mut().has_room(requests) {
            return Err(FabricError::Backlog {
                frames: 1,
                control: frame.control.len(),
                spans: requests,
            });
        }
        self.send_news()?;
        self.put_payload(frame)?;
        self.put(&frame.header, frame.control)
    }

    /// Takes completed receives off the queue: each is a message in the ring. How many there were.
    fn poll(&mut self) -> Result<usize, FabricError> {
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
                .device
                .get_or_insert_with(|| format!("receives end with: {status}"));
        }
        self.counters.receive_calls += count as u64;
        Ok(count)
    }

    /// Delivers the next message that has arrived; false if there is none.
    fn take_next(&mut self, sink: &mut dyn Sink) -> Result<Option<Received>, FabricError> {
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
    fn deliver(&mut self, len: usize, sink: &mut dyn Sink) -> Result<bool, FabricError> {
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
    fn arm(&mut self) -> Result<(), FabricError> {
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
    fn attend(&mut self) -> bool {
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

    fn take_events(&mut self) -> bool {
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

    fn take_device_events(&mut self) {
        while let Some(event) = self.windows.domain().context().next_event() {
            let ours = event.port.is_none_or(|port| port == self.port);
            if event.fatal && ours {
                self.ended.device.get_or_insert(event.what);
            }
        }
    }

    fn look_at_control(&mut self) {
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
    fn look(&mut self, sink: &mut dyn Sink) -> Result<Received, FabricError> {
        loop {
            if let Some(received) = self.take_next(sink)? {
                return Ok(received);
            }
            if self.poll()? > 0 {
                continue;
            }
            self.sends.get_mut().reap();
            if !self.armed.received {
                self.arm()?;
                if self.poll()? > 0 {
                    continue;
                }
            }
            self.quiet = self.quiet.wrapping_add(1);
            if self.quiet % LOOKS_PER_WAIT == 0 && self.attend() {
                continue;
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

    fn has_ended(&self) -> bool {
        self.ended.control.is_some()
            || self.ended.device.is_some()
            || self.sends.borrow().failure().is_some()
    }

    /// The error that says how the connection ended.
    fn end(&mut self) -> FabricError {
        self.sends.get_mut().reap();
        // The peer's own end is the cause of whatever the device says about it.
        self.look_at_control();
        if let Some(error) = self.ended.control.take() {
            return error;
        }
        let sends = self.sends.get_mut();
        let what = sends.failure().map(str::to_owned);
        let what = what.or_else(|| self.ended.device.clone());
        FabricError::Rdma {
            what: what.unwrap_or_else(|| "it is over".to_owned()),
        }
    }

    /// Nothing may reach the other's memory any more.
    fn fail(&mut self, why: &str) {
        self.sends.get_mut().fail(why);
    }

    /// Where a write of nothing goes.
    fn nowhere(&self) -> (u64, u32) {
        (self.peer.ring_address, self.peer.ring_key)
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

fn lengths_differ(frame: &Frame<'_>) -> FabricError {
    FabricError::FrameLengths {
        kind: frame.header.kind,
        declared_control: frame.header.control_len as usize,
        control: frame.control.len(),
        declared_payload: frame.header.payload_len.into(),
        payload: frame.remote.iter().map(|span| u64::from(span.len)).sum(),
    }
}

fn wait_for(descriptors: [(BorrowedFd<'_>, u64); 3]) -> rustix::io::Result<OwnedFd> {
    let waiting = epoll::create(CreateFlags::CLOEXEC)?;
    for (descriptor, id) in descriptors {
        epoll::add(&waiting, descriptor, EventData::new_u64(id), EventFlags::IN)?;
    }
    Ok(waiting)
}

impl Link for VerbsLink {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.waiting.as_fd()
    }

    fn is_one_sided(&self) -> bool {
        true
    }

    fn set_epoch(&mut self, epoch: Epoch) {
        self.admission.set_epoch(epoch);
    }

    fn register(&mut self, span: &Span, address: u64) -> Result<(), FabricError> {
        self.windows.add(span, address, &mut self.news)?;
        self.send_news()?;
        self.sends.get_mut().ring();
        Ok(())
    }

    fn unregister(&mut self, _span: &Span, address: u64) {
        self.windows.remove(address, &mut self.news);
        self.bound_news();
    }

    fn revoke(&mut self, memory: &Arc<MmapRegion>, offset: usize, len: usize) {
        // What the device still reads there for us is let through, or cut off.
        let id = self.windows.last_use(memory, offset, len);
        let (address, key) = self.nowhere();
        if !self.sends.get_mut().settle(id, address, key, SETTLE) {
            self.fail("the device is not done with memory that was revoked");
        }
        self.windows.revoke(memory, offset, len, &mut self.news);
        self.bound_news();
    }

    fn is_sending(&self, memory: &Arc<MmapRegion>, offset: usize, len: usize) -> bool {
        let id = self.windows.last_use(memory, offset, len);
        let (address, key) = self.nowhere();
        let mut sends = self.sends.borrow_mut();
        !sends.is_done(id) && !sends.settle(id, address, key, SETTLE)
    }

    fn send(&mut self, frame: &Frame<'_>) -> Result<(), FabricError> {
        check_frame(frame)?;
        if self.sends.get_mut().is_half_full() {
            self.sends.get_mut().reap();
        }
        if !self.outgoing.has_room() {
            // The peer may have said that there is some.
            self.poll()?;
        }
        if self.has_ended() {
            return Err(self.end());
        }
        let sent = self.post(frame);
        // Also after an error: what was appended may belong to an earlier frame's keys.
        self.sends.get_mut().ring();
        if let Err(error) = &sent {
            if !matches!(error, FabricError::Backlog { .. }) {
                self.fail("a frame could not be sent");
            }
        }
        sent
    }

    fn is_congested(&self) -> bool {
        !self.outgoing.has_room() || self.sends.borrow().is_waiting()
    }

    fn flush(&mut self) -> Result<(), FabricError> {
        self.sends.get_mut().reap();
        if self.is_congested() {
            // Room comes with messages of the peer, which are left to be delivered.
            self.poll()?;
            if self.attend() || !self.armed.received {
                self.arm()?;
                self.poll()?;
            }
        }
        match self.sends.get_mut().failure() {
            Some(_) => Err(self.end()),
            None => Ok(()),
        }
    }

    fn receive(&mut self, sink: &mut dyn Sink) -> Result<Received, FabricError> {
        if self.ended.receiving {
            return Err(FabricError::Closed);
        }
        let received = self.look(sink);
        self.ended.receiving = received.is_err();
        received
    }

    fn counters(&self) -> Counters {
        let posted = self.sends.borrow().counts();
        Counters {
            send_calls: posted.requests,
            doorbells: posted.doorbells,
            ..self.counters
        }
    }
}

impl Drop for VerbsLink {
    /// The last messages, such as the news that a device has failed, should arrive.
    fn drop(&mut self) {
        let (address, key) = self.nowhere();
        let sends = self.sends.get_mut();
        let last = sends.next_id() - 1;
        if sends.failure().is_none() && self.ended.control.is_none() {
            sends.settle(last, address, key, FAREWELL);
        }
    }
}

/// Takes nothing: what comes now is out of place.
struct NothingYet;

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
