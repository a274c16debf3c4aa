//! A function that sits in another server, as a [`Function`](farbus_vfio::Function) like any local one.
//!
//! Everything a VMM asks is answered from here at once: configuration space and registers are
//! copies, and what needs the device waits as an outstanding command. The link may come and
//! go underneath; whoever runs the event loop reports its events ([`RemoteFunction::service`],
//! [`RemoteFunction::tick`]) and brings a new one ([`RemoteFunction::reconnect`]).
//!
//! | module | knows |
//! |---|---|
//! | `claim` | what a claim has brought: whether it can be, is the same as before, how it is written down |
//! | `state` | what changes, and the link underneath |
//! | `link` | what the event loop calls |
//! | `function` | what a VMM calls |

mod claim;
mod error;
mod function;
mod link;
mod state;

use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use farbus_fabric::session::ClaimedLink;
use farbus_fabric::wire::{Description, Epoch};
use farbus_vfio::FunctionInfo;

use self::claim::{Grant, decode_claim, encode_claim, info, parse};
pub use self::error::RemoteError;
pub use self::link::Found;
pub use self::state::LostLink;
use self::state::State;
use crate::nvme::compute::ComputeHalf;
use crate::nvme::record::{Record, RecordError};
pub use crate::session::LinkInterest;
use crate::session::Session;

/// See the module's own description.
pub struct RemoteFunction {
    info: FunctionInfo,
    description: Description,
    state: Mutex<State>,
}

impl RemoteFunction {
    /// The function of a claim. `label` says to people where it is.
    pub fn new(label: String, claimed: ClaimedLink) -> Result<Self, RemoteError> {
        let grant = Grant::of(&claimed);
        let (regions, config, nvme) = parse(&claimed.description, grant)?;
        let msix = config.msix().ok_or(RemoteError::NoMsix)?.vectors.into();
        let Grant {
            shadow_len,
            tags,
            lanes,
        } = grant;
        let mut half = ComputeHalf::with_lanes(nvme, shadow_len, tags, msix, lanes)
            .map_err(RemoteError::Memory)?;
        half.link_lanes(claimed.lanes)?;
        let session = Session::new(claimed.link);
        Ok(Self {
            info: info(label, &config, regions, msix),
            description: claimed.description,
            state: Mutex::new(State::new(config, half, Some(session), claimed.epoch)),
        })
    }

    /// As [`Self::new`], for a process that may be killed: what another one needs to go on is in
    /// memory that [`Self::record`] names.
    pub fn with_record(label: String, claimed: ClaimedLink) -> Result<Self, RemoteError> {
        let (description, grant) = (claimed.description.clone(), Grant::of(&claimed));
        if grant.lanes > 1 {
            return Err(RemoteError::RecordOfLanes(grant.lanes));
        }
        let remote = Self::new(label, claimed)?;
        let record = Record::create().map_err(RemoteError::Memory)?;
        if !record.set_claim(&encode_claim(&description, grant)) {
            return Err(RecordError::Broken("the description is too long").into());
        }
        let mut state = remote.state();
        state.half.keep_record(record);
        state.record_config();
        drop(state);
        Ok(remote)
    }

    /// The function of a process that was killed, from the memory that it left. It has no link yet. When
    /// the guest's memory is mapped and the interrupts are set as they were, and before anything
    /// else, [`Self::recover`] is to be called.
    pub fn resume(label: String, memory: OwnedFd) -> Result<Self, RemoteError> {
        let record = Record::open(memory)?;
        let (description, grant) = decode_claim(&record.claim())?;
        let (regions, mut config, nvme) = parse(&description, grant)?;
        let msix = config.msix().ok_or(RemoteError::NoMsix)?.vectors.into();
        let size = usize::from(config.size());
        // What software may not write stays, as it does when software writes.
        config.write(0, record.config().get(..size).unwrap_or_default())?;
        let half = ComputeHalf::resume(nvme, grant.shadow_len, grant.tags, msix, record)?;
        Ok(Self {
            info: info(label, &config, regions, msix),
            description,
            state: Mutex::new(State::new(config, half, None, Epoch::NONE)),
        })
    }

    /// Takes up the commands that the killed process had under way: they are sent again when there
    /// is a link, and what was done already is completed.
    pub fn recover(&self) -> Result<(), RemoteError> {
        Ok(self.state().half.recover()?)
    }

    /// The memory of the record, if one is kept.
    pub fn record(&self) -> Option<OwnedFd> {
        let state = self.state();
        let descriptor = state.half.record()?.descriptor()?;
        descriptor.try_clone_to_owned().ok()
    }

    /// Whether there is a link.
    pub fn is_linked(&self) -> bool {
        self.state().session.is_some()
    }

    /// A panic of another thread while it held the lock would have ended the process's one
    /// event loop, so the state behind it is whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
