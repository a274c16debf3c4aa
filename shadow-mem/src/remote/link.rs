//! A remote function towards whoever runs its event loop: what to wait for, what to do then, and how
//! a link comes and goes.

use std::sync::Arc;
use std::time::Instant;

use farbus_fabric::Counters;
use farbus_fabric::session::ClaimedLink;
use farbus_fabric::wire::{Epoch, Message};
use vmm_sys_util::eventfd::EventFd;

use super::claim::{Grant, is_same_function, parse};
use super::error::RemoteError;
use super::{LostLink, RemoteFunction};
use crate::nvme::compute::{Changed, Lane};
use crate::nvme::record::Counter;
use crate::session::{LinkInterest, Session, Silence};

/// What a look at a link has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing was there to be moved.
    Nothing,
    /// All that had arrived was taken: the link's descriptor tells of what comes next, once
    /// [`RemoteFunction::may_sleep`] has said yes.
    All,
    /// More may have arrived than was taken, and the descriptor need not tell.
    More,
}

impl Found {
    /// From whether anything has moved, and whether there may be more.
    pub(crate) fn of(moved: bool, more: bool) -> Self {
        match (moved, more) {
            (_, true) => Self::More,
            (true, false) => Self::All,
            (false, false) => Self::Nothing,
        }
    }

    /// Whether there was anything.
    pub fn any(self) -> bool {
        self != Self::Nothing
    }
}

impl RemoteFunction {
    /// What to wait for, while there is a link.
    pub fn link_interest(&self) -> Option<LinkInterest> {
        let state = self.state();
        let session = state.session.as_ref()?;
        Some(session.interest())
    }

    /// The link's descriptor has events, or may have: receives, sends what waited, and goes on
    /// with what either made possible. If it returns [`Found::More`] it is to be called again without waiting.
    pub fn service(&self) -> Found {
        let mut state = self.state();
        let before = state.progress();
        let mut more = false;
        state.with_session(|half, session| {
            more = session.receive_all(half)?;
            half.pump(session)
        });
        Found::of(state.progress() != before, more)
    }

    /// As [`Self::service`], for when nothing can have arrived: goes on with what the guest has
    /// asked for since.
    pub fn pump(&self) -> bool {
        let mut state = self.state();
        let before = state.progress();
        state.pump();
        state.progress() != before
    }

    /// To be asked before a sleep: has the guest write its doorbells from here on. If it has
    /// rung one meanwhile, that is acted on, and the answer is no.
    pub fn may_sleep(&self) -> bool {
        let mut state = self.state();
        let rung = state.half.arm_doorbells();
        if rung {
            state.pump();
        }
        // A link that fails over this is seen to in the next round, not after the sleep.
        let mut quiet = state.session.is_none();
        state.with_session(|_, session| {
            quiet = session.may_wait()?;
            Ok(())
        });
        !rung && quiet
    }

    /// When [`Self::service`] must be called at the latest, whatever happens.
    pub fn due(&self) -> Option<Instant> {
        self.state().half.due()
    }

    /// The caller promises to call [`Self::service`] or [`Self::pump`] after each round of its
    /// event loop, and [`Self::may_sleep`] before each sleep. So a write to a doorbell waits
    /// for the end of the round, and all that have come lead to one message; and the guest is
    /// offered doorbells in its own memory. Other registers act at once as before.
    pub fn look_for_doorbells(&self) {
        let mut state = self.state();
        state.gathers_doorbells = true;
        state.half.offer_shadow_doorbells();
        drop(state);
        self.keep_looking();
    }

    /// The caller promises to call [`Self::service`] again and again, and [`Self::may_sleep`] before
    /// it waits for the link's descriptor after all. Looking costs less then.
    pub fn keep_looking(&self) {
        let mut state = self.state();
        state.keeps_looking = true;
        if let Some(session) = &mut state.session {
            session.keep_looking();
        }
    }

    /// Once a second: gives the peer a sign of life and asks for one, and gives up on a peer
    /// that has been silent for too long.
    pub fn tick(&self) {
        let mut state = self.state();
        let mut silence = state.silence;
        state.with_session(|half, session| {
            let asks = silence.tick(session)?;
            if let (true, Some(record)) = (asks, half.record_mut()) {
                record.ping();
            }
            Ok(())
        });
        state.silence = silence;
    }

    /// The lanes beside the first, each to be served by a thread of its own as this function is by
    /// its event loop; they are the same for as long as there is the function.
    pub fn lanes(&self) -> Vec<Arc<Lane>> {
        self.state().half.lanes().to_vec()
    }

    /// Is signalled when another lane has something for [`Self::pump`]; each signal is an event
    /// (edge-triggered), which nobody needs to read.
    pub fn lanes_event(&self) -> std::io::Result<EventFd> {
        self.state().half.lanes_event()
    }

    /// The link that failed since the last call, if one did.
    pub fn take_lost(&self) -> Option<LostLink> {
        self.state().lost.take()
    }

    /// Goes on over a new claim of the same export: the guest's controller is rebuilt, and
    /// what was outstanding is sent again.
    pub fn reconnect(&self, claimed: ClaimedLink) -> Result<(), RemoteError> {
        let (_, _, nvme) = parse(&claimed.description, Grant::of(&claimed))?;
        let mut state = self.state();
        if !is_same_function(&claimed.description, &self.description) {
            return Err(Changed::function().into());
        }
        if claimed.lanes.len() != state.half.lanes().len() {
            return Err(Changed::lanes().into());
        }
        state
            .half
            .link_up(&nvme, claimed.shadow_len, claimed.tags)?;
        let mut session = Session::new(claimed.link);
        for window in state.half.windows() {
            session.register(window, window.iova.0)?;
        }
        if state.keeps_looking {
            session.keep_looking();
        }
        if let Some(record) = state.half.record() {
            record.add_to(Counter::Reconnects, 1);
        }
        state.half.link_lanes(claimed.lanes)?;
        state.epoch = claimed.epoch;
        state.silence = Silence::default();
        state.session = Some(session);
        state.pump();
        Ok(())
    }

    /// The epoch of the claim at hand, or of the last one.
    pub fn epoch(&self) -> Epoch {
        self.state().epoch
    }

    /// What the link has carried, while there is one: of all lanes together.
    pub fn counters(&self) -> Option<Counters> {
        let state = self.state();
        let own = state.session.as_ref().map(Session::counters)?;
        Some(own.plus(state.half.lane_counters()))
    }

    /// Gives the export back: says so to the device server, without waiting for it.
    pub fn release(&self) {
        let mut state = self.state();
        if let Some(mut session) = state.session.take() {
            // The end of the connection says the same, only less politely.
            let _ = session.send(&Message::Release);
            let _ = session.flush();
        }
        state.half.end_lanes();
    }
}
