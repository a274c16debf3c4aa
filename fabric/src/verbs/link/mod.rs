//! The link: frames over one-sided writes. Its sending half is in `speak`, its receiving half in `listen`.

mod listen;
mod speak;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use vm_memory::MmapRegion;

use self::listen::NothingYet;
use super::keys::RemoteKeys;
use super::prepare::Prepared;
use super::raw::{Channel, CompletionQueue, Piece, Region};
use super::sends::Sends;
use super::windows::Windows;
use crate::link::check_frame;
use crate::ring::{Arrived, Incoming, Outgoing};
use crate::wire::{Admission, Epoch, HEADER_LEN, MAX_CONTROL, RdmaEndpoint, RdmaKey, Side};
use crate::{Counters, FabricError, Frame, Link, Received, Sink, Span};

/// The longest frame in the ring.
const MAX_FRAME: usize = HEADER_LEN + MAX_CONTROL;
/// How long to wait for the device to be done with memory that is to be used otherwise: in health
/// it takes microseconds.
const SETTLE: Duration = Duration::from_millis(20);
/// How long a link that is dropped waits for its last messages to arrive.
const FAREWELL: Duration = Duration::from_millis(50);

/// Looks at the completion queue, which cost next to nothing, between two at the descriptors, while the
/// owner goes on looking.
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
    /// The owner goes on looking when there is nothing.
    looking: bool,
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
    /// The device has reported an event after which nothing works any more.
    event: Option<String>,
    /// What receives ended with.
    flushed: Option<String>,
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
            looking: false,
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

    fn keep_looking(&mut self) {
        self.looking = true;
    }

    fn may_wait(&mut self) -> Result<bool, FabricError> {
        let congested = self.is_congested();
        self.sends.get_mut().reap();
        let quiet = self.arrived.is_empty() && self.settle_down()? && !self.has_ended();
        // Room that has come just now is for what the owner has held back.
        Ok(quiet && congested == self.is_congested())
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
