//! What changes of a remote function: the guest's side of it, and the link while there is one.

use farbus_fabric::FabricError;
use farbus_fabric::wire::Epoch;
use farbus_vfio::config::ConfigSpace;

use crate::nvme::compute::ComputeHalf;
use crate::session::{Session, Silence};

/// A link that has failed, for the event loop to let go of.
pub struct LostLink {
    /// Keeps the descriptor open until the event loop has forgotten it.
    pub session: Session,
    /// Why.
    pub error: FabricError,
}

pub(super) struct State {
    pub(super) config: ConfigSpace,
    pub(super) half: ComputeHalf,
    pub(super) session: Option<Session>,
    pub(super) lost: Option<LostLink>,
    pub(super) epoch: Epoch,
    pub(super) silence: Silence,
    /// See [`super::RemoteFunction::look_for_doorbells`].
    pub(super) gathers_doorbells: bool,
    /// See [`super::RemoteFunction::keep_looking`].
    pub(super) keeps_looking: bool,
}

impl State {
    /// With a link, or without one yet.
    pub(super) fn new(
        config: ConfigSpace,
        half: ComputeHalf,
        session: Option<Session>,
        epoch: Epoch,
    ) -> Self {
        Self {
            config,
            half,
            session,
            lost: None,
            epoch,
            silence: Silence::default(),
            gathers_doorbells: false,
            keeps_looking: false,
        }
    }

    /// Does something over the link, if there is one; an error is the end of that link.
    pub(super) fn with_session(
        &mut self,
        act: impl FnOnce(&mut ComputeHalf, &mut Session) -> Result<(), FabricError>,
    ) {
        let Some(session) = &mut self.session else {
            // What was held back has its time all the same.
            self.half.signal_interrupts();
            return;
        };
        if let Err(error) = act(&mut self.half, session) {
            self.half.link_lost();
            self.lost = self
                .session
                .take()
                .map(|session| LostLink { session, error });
        }
    }

    /// Rises with every byte that moves.
    pub(super) fn progress(&self) -> u64 {
        self.session.as_ref().map_or(0, Session::progress)
    }

    pub(super) fn pump(&mut self) {
        self.with_session(ComputeHalf::pump);
    }

    pub(super) fn record_config(&self) {
        if let Some(record) = self.half.record() {
            let mut bytes = vec![0; self.config.size().into()];
            // All of it, which is within its bounds.
            let _ = self.config.read(0, &mut bytes);
            record.set_config(&bytes);
        }
    }

    pub(super) fn reset(&mut self) {
        self.config.reset();
        self.record_config();
        self.half.reset();
        self.with_session(|half, session| {
            session.revoke_all(half.windows())?;
            half.pump(session)
        });
    }
}
