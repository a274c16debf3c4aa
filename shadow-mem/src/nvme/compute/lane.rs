//! One lane beside lane 0: a share of the guest's I/O queues with a link of its own, for a thread
//! of its own.
//!
//! The thread that serves it takes its lock once a round, and nobody else does but for what is
//! rare: queues that come and go, guest memory that changes, a doorbell that could not wait.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use farbus_fabric::wire::Message;
use farbus_fabric::{Counters, FabricError};
use farbus_vfio::{DmaWindow, FunctionError, Iova};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ComputeHalf;
use super::lanes::Bell;
use crate::remote::Found;
use crate::session::{LinkInterest, Session, Silence};

/// See the module's own description.
pub struct Lane {
    state: Mutex<LaneState>,
    /// Wakes the lane's thread.
    wake: EventFd,
    /// Has lane 0's thread look at this lane.
    bell: Arc<Bell>,
}

/// What a lane's lock guards.
pub(super) struct LaneState {
    pub(super) half: ComputeHalf,
    session: Option<Session>,
    /// Counts the links that it has had: a new one may have the last one's descriptor.
    links: u64,
    /// Why the link failed, until lane 0 knows.
    lost: Option<FabricError>,
    silence: Silence,
    /// The thread waits for an event.
    asleep: bool,
    /// Lane 0 waits for the end of commands.
    is_watched: bool,
    ended: bool,
}

impl LaneState {
    pub(super) fn take_lost(&mut self) -> Option<FabricError> {
        self.lost.take()
    }

    /// Does something over the link, if there is one; whether anything moved. Whether lane 0 must
    /// hear of what became of it, too.
    fn with_session(
        &mut self,
        act: impl FnOnce(&mut ComputeHalf, &mut Session) -> Result<(), FabricError>,
    ) -> (bool, bool) {
        let Some(session) = &mut self.session else {
            // What was held back has its time all the same.
            self.half.signal_interrupts();
            return (false, false);
        };
        let before = session.progress();
        let was = (self.half.life.phase, self.half.life.device);
        let done = act(&mut self.half, session);
        let moved = session.progress() != before;
        let mut news = was != (self.half.life.phase, self.half.life.device);
        if let Err(error) = done {
            self.session = None;
            self.lost = Some(error);
            news = true;
        }
        (moved, news || self.is_watched && moved)
    }
}

impl Lane {
    pub(super) fn new(half: ComputeHalf, bell: Arc<Bell>) -> std::io::Result<Self> {
        Ok(Self {
            state: Mutex::new(LaneState {
                half,
                session: None,
                links: 0,
                lost: None,
                silence: Silence::default(),
                asleep: false,
                is_watched: false,
                ended: false,
            }),
            wake: EventFd::new(EFD_NONBLOCK)?,
            bell,
        })
    }

    /// The state is whole between two rounds, and a panic within one ends the process.
    pub(super) fn lock(&self) -> MutexGuard<'_, LaneState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something over the link, and has lane 0 hear of what became of it.
    fn act(
        &self,
        act: impl FnOnce(&mut ComputeHalf, &mut Session) -> Result<(), FabricError>,
    ) -> bool {
        let (moved, news) = self.lock().with_session(act);
        if news {
            self.bell.ring();
        }
        moved
    }

    /// What to wait for on the link, while there is one; and its number, since a later one may
    /// have the same descriptor.
    pub fn link_interest(&self) -> Option<(LinkInterest, u64)> {
        let state = self.lock();
        let session = state.session.as_ref()?;
        Some((session.interest(), state.links))
    }

    /// As [`crate::remote::RemoteFunction::service`], for this lane.
    pub fn service(&self) -> Found {
        let mut more = false;
        let moved = self.act(|half, session| {
            more = session.receive_all(half)?;
            half.pump(session)
        });
        Found::of(moved, more)
    }

    /// As [`crate::remote::RemoteFunction::pump`], for this lane.
    pub fn pump(&self) -> bool {
        self.act(ComputeHalf::pump)
    }

    /// As [`crate::remote::RemoteFunction::may_sleep`], for this lane. After a yes the thread says
    /// when it is [`Self::awake`] again; whoever has something for it wakes it meanwhile.
    pub fn may_sleep(&self) -> bool {
        let mut state = self.lock();
        let rung = state.half.arm_doorbells();
        let mut quiet = true;
        let (_, news) = state.with_session(|half, session| {
            if rung {
                half.pump(session)?;
            }
            quiet = session.may_wait()?;
            Ok(())
        });
        state.asleep = !rung && quiet;
        if news {
            self.bell.ring();
        }
        state.asleep
    }

    /// The thread has slept.
    pub fn awake(&self) {
        self.lock().asleep = false;
    }

    /// When [`Self::pump`] must be called at the latest.
    pub fn due(&self) -> Option<Instant> {
        self.lock().half.due()
    }

    /// Once a second: as [`crate::remote::RemoteFunction::tick`], for this lane.
    pub fn tick(&self) {
        let mut silence = self.lock().silence;
        self.act(|_, session| silence.tick(session).map(drop));
        self.lock().silence = silence;
    }

    /// Is signalled when there is something for the thread that no link tells of.
    pub fn event(&self) -> &EventFd {
        &self.wake
    }

    /// Whether the thread is to end.
    pub fn has_ended(&self) -> bool {
        self.lock().ended
    }

    pub(super) fn wake(&self) {
        // A counter that is full has a signal waiting already.
        let _ = self.wake.write(1);
    }

    pub(super) fn doorbell(&self, queue: u16, completion: bool, value: u32) {
        let mut state = self.lock();
        state.half.doorbell(queue, completion, value);
        if std::mem::take(&mut state.asleep) {
            self.wake();
        }
    }

    /// Whether commands of a queue are not completed; if so, lane 0 hears of each change.
    pub(super) fn awaits_commands_of(&self, queue: u16) -> bool {
        let mut state = self.lock();
        let sq = state.half.queues.sq(queue);
        let waits = sq.is_some_and(|sq| sq.outstanding > 0);
        state.is_watched |= waits;
        waits
    }

    /// Lane 0 needs not hear of each change any more.
    pub(super) fn unwatch(&self) {
        self.lock().is_watched = false;
    }

    pub(super) fn link(&self, session: Session) {
        let mut state = self.lock();
        state.session = Some(session);
        state.links += 1;
        state.silence = Silence::default();
        state.lost = None;
        self.wake();
    }

    /// The claim is lost.
    pub(super) fn unlink(&self) {
        let mut state = self.lock();
        state.session = None;
        state.lost = None;
        state.is_watched = false;
        state.half.link_lost();
        self.wake();
    }

    pub(super) fn keep_looking(&self) {
        if let Some(session) = &mut self.lock().session {
            session.keep_looking();
        }
    }

    /// Gives the link back, and has the thread end.
    pub fn end(&self) {
        let mut state = self.lock();
        if let Some(mut session) = state.session.take() {
            // The end of the connection says the same, only less politely.
            let _ = session.send(&Message::Release);
            let _ = session.flush();
        }
        state.ended = true;
        self.wake();
    }

    /// The guest's memory is its own again, at once.
    pub(super) fn reset(&self) {
        self.lock().half.forget_interrupts();
        self.act(|half, session| session.revoke_all(half.windows()));
    }

    pub(super) fn map(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        self.lock().half.map(window)?;
        self.act(|_, session| session.register(window, window.iova.0));
        Ok(())
    }

    pub(super) fn unmap(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        let gone = self.lock().half.unmap(iova, len)?;
        self.act(|_, session| session.let_go(&gone));
        Ok(())
    }

    pub(super) fn counters(&self) -> Counters {
        let state = self.lock();
        state
            .session
            .as_ref()
            .map_or_else(Counters::default, Session::counters)
    }
}
