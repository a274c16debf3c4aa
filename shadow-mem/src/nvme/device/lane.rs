//! One lane beside lane 0: a share of the device's I/O queues with a link of its own, for a thread
//! of its own.
//!
//! The thread that serves it takes its lock once a round. Lane 0's thread, which has the controller
//! and the admin queue, takes it when queues come and go, and when the controller stops: then,
//! under the lock, all that the lane had is forgotten. At the end of the claim it takes what the
//! lane knows of the device away, so that nothing is done to it after that.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farbus_fabric::wire::{
    CompleteEntry, Header, Kind, Message, Placement, QueueId, Submit, SubmitEntry, Tag, WireError,
};
use farbus_fabric::{Counters, FabricError, Received, Sink, Span};
use farbus_vfio::nvme::Status;
use log::debug;
use vmm_sys_util::eventfd::EventFd;

use super::MAX_OUTBOX;
use super::queues::Io;
use crate::session::{LinkInterest, Session};

/// Messages received before other work has its turn.
const RECEIVE_BURST: usize = 64;

/// How lanes make themselves heard by lane 0's thread.
pub(super) struct Bell {
    /// Lane 0's interrupt.
    pub(super) event: Arc<EventFd>,
    pub(super) rung: AtomicBool,
}

impl Bell {
    fn ring(&self) {
        self.rung.store(true, Ordering::Release);
        // A counter that is full has a signal waiting already.
        let _ = self.event.write(1);
    }
}

/// See the module's own description.
pub struct Lane {
    state: Mutex<LaneState>,
    /// The interrupt of its queues, which also wakes its thread for other reasons.
    event: Arc<EventFd>,
    bell: Arc<Bell>,
}

/// What a lane's lock guards.
pub(super) struct LaneState {
    /// Gone when the claim has ended.
    pub(super) half: Option<LaneHalf>,
    session: Option<Session>,
    /// Why the link ended, until lane 0 knows.
    lost: Option<FabricError>,
    is_taken: bool,
}

/// A lane's part of the device half.
pub(super) struct LaneHalf {
    pub(super) io: Io,
    /// Whether the controller is on.
    pub(super) on: bool,
    outbox: VecDeque<Message>,
    /// Commands of queues that were deleted while they were on their way: the deletion goes by lane 0's
    /// link. They are answered as the device answers those that it drops.
    overtaken: Vec<(Tag, QueueId)>,
}

/// What a round left.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// Something moved.
    pub moved: bool,
    /// More may have arrived: the link need not become readable for it.
    pub more: bool,
    /// What to wait for on the link.
    pub interest: LinkInterest,
    /// Whether to wait until it is readable, too.
    pub listens: bool,
    /// What the link has carried.
    pub counters: Counters,
}

impl LaneHalf {
    fn pump(&mut self, session: &mut Session) -> Result<(), FabricError> {
        while let Some(message) = self.outbox.front() {
            if session.is_congested() {
                break;
            }
            session.send(message)?;
            self.outbox.pop_front();
        }
        for (tag, queue) in self.overtaken.drain(..) {
            let entry = CompleteEntry {
                tag,
                queue,
                status: Status::ABORTED_SQ_DELETION.0,
                data_len: 0,
                result: 0,
            };
            self.io.append(&entry, 0, 0, session)?;
        }
        self.io.doorbells.function.service();
        self.io.send_completions(session)
    }

    fn is_backlogged(&self) -> bool {
        self.outbox.len() >= MAX_OUTBOX
    }

    fn place(&mut self, entry: &SubmitEntry<'_>) -> Result<(), FabricError> {
        let Placement { tag, queue, .. } = entry.placement;
        if queue.0 == 0 || self.io.submission.get(queue.0).is_some() {
            return self.io.place(entry, |_, _| {});
        }
        if self.overtaken.len() >= self.io.tags.count() {
            return Err(FabricError::violation(format!(
                "there are more commands of queue {}, which does not exist, than tags",
                queue.0
            )));
        }
        self.overtaken.push((tag, queue));
        Ok(())
    }

    /// The controller has stopped: nothing is at the device any more.
    pub(super) fn forget_commands(&mut self) {
        self.overtaken.clear();
        self.io.forget_commands();
    }

    fn receive(&mut self, session: &mut Session) -> Result<bool, FabricError> {
        for _ in 0..RECEIVE_BURST {
            // A peer that asks and does not listen waits, and with it what it asks.
            if self.is_backlogged() {
                break;
            }
            if session.receive(self)? == Received::Idle {
                return Ok(false);
            }
            // What the function did at once is on its way while the next message comes in.
            self.pump(session)?;
        }
        Ok(true)
    }
}

impl LaneState {
    fn round(&mut self, more: bool) -> Result<Round, FabricError> {
        let (Some(half), Some(session)) = (&mut self.half, &mut self.session) else {
            return Err(FabricError::Closed);
        };
        let before = session.progress();
        if session.is_congested() {
            session.flush()?;
        }
        let more = more && half.receive(session)?;
        half.pump(session)?;
        let backlogged = half.is_backlogged();
        // A one-sided link hears by its own descriptor that there is room again.
        let hears_of_room = session.is_one_sided() && session.is_congested();
        Ok(Round {
            moved: session.progress() != before,
            more: more && !backlogged,
            interest: session.interest(),
            listens: !backlogged || hears_of_room,
            counters: session.counters(),
        })
    }
}

impl Lane {
    pub(super) fn new(io: Io, event: Arc<EventFd>, bell: Arc<Bell>) -> Self {
        let tags = io.tags.count();
        let half = LaneHalf {
            io,
            on: false,
            outbox: VecDeque::with_capacity(2 * MAX_OUTBOX),
            overtaken: Vec::with_capacity(tags),
        };
        Self {
            state: Mutex::new(LaneState {
                half: Some(half),
                session: None,
                lost: None,
                is_taken: false,
            }),
            event,
            bell,
        }
    }

    /// The state is whole between two rounds; a panic within one ends the lane's thread, and its
    /// link with it.
    pub(super) fn lock(&self) -> MutexGuard<'_, LaneState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the place for a connection; each is taken once.
    pub fn take(&self) -> bool {
        let mut state = self.lock();
        state.half.is_some() && !std::mem::replace(&mut state.is_taken, true)
    }

    /// Begins with the link that has joined.
    pub fn begin(&self, mut session: Session) -> Result<(), FabricError> {
        let mut state = self.lock();
        let Some(half) = &state.half else {
            return Err(FabricError::Closed);
        };
        session.register(&half.io.shadow, 0)?;
        session.keep_looking();
        state.session = Some(session);
        Ok(())
    }

    /// The eventfd to wait for, beside the link.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Moves what there is to move, from the link to the function and back; `more` says whether
    /// something may have arrived.
    pub fn round(&self, more: bool) -> Result<Round, FabricError> {
        let mut state = self.lock();
        let done = state.round(more);
        let failed = state
            .half
            .as_ref()
            .is_some_and(|half| half.io.failed.is_some());
        drop(state);
        if failed {
            self.bell.ring();
        }
        done
    }

    /// Whether the thread may wait for the link; if not, something has arrived.
    pub fn may_wait(&self) -> Result<bool, FabricError> {
        match &mut self.lock().session {
            Some(session) => session.may_wait(),
            None => Err(FabricError::Closed),
        }
    }

    /// A sign of life for the peer.
    pub fn ping(&self) -> Result<(), FabricError> {
        match &mut self.lock().session {
            Some(session) if !session.is_congested() => session.send(&Message::Ping { nonce: 0 }),
            _ => Ok(()),
        }
    }

    /// What its link has carried.
    pub(super) fn carried(&self) -> Counters {
        let state = self.lock();
        let session = state.session.as_ref();
        session.map(Session::counters).unwrap_or_default()
    }

    /// The lane's end, which is that of the claim: lane 0 hears why.
    pub fn end(&self, why: FabricError) {
        let mut state = self.lock();
        state.session = None;
        state.lost.get_or_insert(why);
        drop(state);
        self.bell.ring();
    }

    /// Why the link has ended, if it has.
    pub(super) fn take_lost(&self) -> Option<FabricError> {
        self.lock().lost.take()
    }

    /// Does something to the half, while there is one.
    pub(super) fn with<R>(&self, act: impl FnOnce(&mut LaneHalf) -> R) -> Option<R> {
        self.lock().half.as_mut().map(act)
    }

    /// Does something to the half and its link, if both are there. An error is the link's end.
    pub(super) fn with_session(
        &self,
        act: impl FnOnce(&mut Io, &mut Session) -> Result<(), FabricError>,
    ) {
        let mut state = self.lock();
        let LaneState { half, session, .. } = &mut *state;
        let (Some(half), Some(session)) = (half, session) else {
            return;
        };
        if let Err(error) = act(&mut half.io, session) {
            state.session = None;
            state.lost = Some(error);
            drop(state);
            self.bell.ring();
        }
        // There may be something to send, or the end to see.
        self.wake();
    }

    fn wake(&self) {
        // A counter that is full has a signal waiting already.
        let _ = self.event.write(1);
    }

    /// The claim ends: the lane does nothing to the device from here on.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.half = None;
        state.session = None;
        drop(state);
        self.wake();
    }
}

impl Sink for LaneHalf {
    fn land(
        &mut self,
        header: &Header,
        control: &[u8],
        spans: &mut Vec<Span>,
    ) -> Result<(), FabricError> {
        for entry in Submit::decode(header, control)?.entries() {
            self.io.landing(&entry.placement, spans)?;
        }
        Ok(())
    }

    fn deliver(&mut self, header: &Header, control: &[u8]) -> Result<(), FabricError> {
        if header.kind == Kind::Submit {
            let batch = Submit::decode(header, control)?;
            if !self.on {
                // The controller was stopped while they were on their way here.
                debug!("dropped commands for a controller that is not enabled");
                return Ok(());
            }
            for entry in batch.entries() {
                self.place(&entry)?;
            }
            self.io.release();
            return Ok(());
        }
        match Message::decode(header, control)? {
            // The fence: what this lane had is forgotten since the controller has stopped.
            Message::Reset { .. } if self.on => {
                return Err(FabricError::violation(
                    "a lane is to be reset while its controller is enabled",
                ));
            }
            Message::Reset { request } => self.outbox.push_back(Message::ResetDone {
                request,
                outcome: Ok(()),
            }),
            Message::Ping { nonce } => self.outbox.push_back(Message::Pong { nonce }),
            Message::Pong { .. } => {}
            Message::Release => return Err(FabricError::Closed),
            other => {
                return Err(FabricError::Malformed(WireError::WrongPhase {
                    kind: other.kind(),
                    epoch: header.epoch,
                }));
            }
        }
        Ok(())
    }
}
