//! Who has an export, who gets it next, and who is kept from it.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use farbus_fabric::wire::Epoch;
use farbus_shadow_mem::nvme::device::{DeviceHalf, Settings};
use farbus_vfio::Function;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{ClaimStatus, Export, Inner, Tally};

/// How long a claim waits for the end of the former one, of which there is no sign yet: that the
/// claimant has gone may be on its way.
const NO_SIGN: Duration = Duration::from_millis(100);
/// How long a claim waits for the former one that is being ended: longer than a reset takes, and
/// shorter than a claimant is patient.
const BEING_ENDED: Duration = Duration::from_secs(3);
/// How long a claimant that was evicted does not get the export again. Its agent asks at once, and
/// somebody else is to have it.
const EVICTED: Duration = Duration::from_secs(30);

/// Who has an export.
pub(super) struct Holder {
    /// As it names itself, and where it is.
    pub(super) name: String,
    pub(super) since: SystemTime,
    /// Ends the claim when it is signalled.
    evict: Arc<EventFd>,
    /// The claim is being brought to its end.
    ending: bool,
}

/// The exclusive right to an export, until it is dropped.
pub struct Claim {
    export: Arc<Export>,
    epoch: Epoch,
    evict: Arc<EventFd>,
}

impl Inner {
    /// Why this claimant does not get the export, although others would.
    fn keeps_out(&self, claimant: &str) -> Option<String> {
        let (host, when) = self.evicted.as_ref()?;
        let left = EVICTED.checked_sub(when.elapsed())?;
        (host == host_of(claimant)).then(|| {
            let seconds = left.as_secs() + 1;
            format!("this side was evicted, and can claim it again in {seconds} s")
        })
    }
}

/// A claimant without its port, which changes with each connection.
fn host_of(claimant: &str) -> &str {
    claimant.rsplit_once(':').map_or(claimant, |(host, _)| host)
}

/// Why an export could not be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Someone else has it.
    #[error(
        "export {export} is claimed by {holder} ({epoch}); detach it there first, or wait until that side is found dead"
    )]
    Busy {
        /// The export.
        export: String,
        /// Who has it.
        holder: String,
        /// That claim's epoch.
        epoch: Epoch,
    },
    /// It takes no new claims.
    #[error("export {export} takes no new claims: {why}")]
    Retired {
        /// The export.
        export: String,
        /// Why not.
        why: String,
    },
    /// Its function is gone, and not back.
    #[error("export {export} has failed: {why}; it can be claimed once the device is back")]
    Failed {
        /// The export.
        export: String,
        /// Why there is no function.
        why: String,
    },
}

impl Export {
    /// Takes the export from who has it, and keeps that side from getting it again for a moment.
    /// Returns who that was.
    pub fn evict(&self) -> Option<ClaimStatus> {
        let claim = self.status(false).claim?;
        let mut inner = self.lock();
        let holder = inner.holder.as_mut()?;
        // The counter of an eventfd is never full of ones.
        let _ = holder.evict.write(1);
        let name = holder.name.clone();
        inner.evicted = Some((host_of(&name).to_owned(), Instant::now()));
        Some(claim)
    }

    /// Claims the export for `claimant`, with an epoch higher than every one before; across a
    /// restart of this process, as long as the clock has not been set back. A function that
    /// was gone is opened again first.
    pub fn claim(
        self: &Arc<Self>,
        claimant: &str,
    ) -> Result<(Claim, Arc<dyn Function>), ClaimError> {
        let mut inner = self.wait_for_the_former();
        let export = || self.name.as_str().to_owned();
        let retired = inner.retired.clone();
        if let Some(why) = retired.or_else(|| inner.keeps_out(claimant)) {
            return Err(ClaimError::Retired {
                export: export(),
                why,
            });
        }
        match (&inner.holder, &inner.function) {
            // It is being closed, or opened again, or was for the last time.
            (_, Err(why)) if inner.holder.is_some() || inner.closing > 0 || inner.ended => {
                return Err(ClaimError::Failed {
                    export: export(),
                    why: why.clone(),
                });
            }
            (None, _) | (_, Err(_)) => {}
            (Some(holder), Ok(_)) => {
                return Err(ClaimError::Busy {
                    export: export(),
                    holder: holder.name.clone(),
                    epoch: inner.last_epoch,
                });
            }
        }
        let evict = EventFd::new(EFD_NONBLOCK).map_err(|error| ClaimError::Failed {
            export: export(),
            why: format!("an eventfd cannot be had: {error}"),
        })?;
        let evict = Arc::new(evict);
        let epoch = Epoch(clock_epoch().max(inner.last_epoch.0 + 1));
        inner.last_epoch = epoch;
        inner.holder = Some(Holder {
            name: claimant.into(),
            since: SystemTime::now(),
            evict: evict.clone(),
            ending: false,
        });
        let function = inner.function.clone();
        drop(inner);
        self.tell();
        let claim = Claim {
            export: self.clone(),
            epoch,
            evict,
        };
        let function = match function {
            Ok(function) => function,
            Err(why) => self.open_again(why).map_err(|why| ClaimError::Failed {
                export: export(),
                why,
            })?,
        };
        Ok((claim, function))
    }

    /// Waits for the end of a claim that is being ended, or is about to be.
    fn wait_for_the_former(&self) -> MutexGuard<'_, Inner> {
        let begun = Instant::now();
        let mut inner = self.lock();
        while let (Some(holder), Ok(_)) = (&inner.holder, &inner.function) {
            let patience = if holder.ending { BEING_ENDED } else { NO_SIGN };
            let left = patience.saturating_sub(begun.elapsed());
            if left.is_zero() {
                break;
            }
            let waited = self.ended.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        inner
    }
}

/// Microseconds since 1970.
fn clock_epoch() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(1, |now| now.as_micros() as u64)
}

impl Claim {
    /// The claim's epoch.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// How the function was set before its first tenant, if that is known.
    pub fn settings(&self) -> Option<Settings> {
        self.export.lock().settings.clone()
    }

    /// Remembers which drive it is, and how the function was set before its first tenant.
    pub fn remember(&self, half: &DeviceHalf) {
        self.export.learn(half);
    }

    /// The function cannot be used, although it is there.
    pub fn is_unusable(&self, why: &str) {
        self.export.lock().unusable = Some(why.to_owned());
    }

    /// Is readable once the claim is to end.
    pub fn evict(&self) -> &EventFd {
        &self.evict
    }

    /// The claim is being brought to its end: whoever claims the export next may wait for that.
    pub fn ending(&self) {
        if let Some(holder) = &mut self.export.lock().holder {
            holder.ending = true;
        }
        self.export.ended.notify_all();
    }

    /// What is claimed.
    pub fn export(&self) -> &Arc<Export> {
        &self.export
    }

    /// Where to count what comes of it.
    pub fn tally(&self) -> &Arc<Tally> {
        &self.export.tally
    }

    /// The function is gone. Whoever drives it drops it next, and the claim after that.
    pub fn fail(&self, why: &str) {
        self.export.fail(why);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.export.lock().holder = None;
        self.export.ended.notify_all();
        self.export.tell();
        // What was signalled since the claimant has last looked.
        self.export.look_after();
    }
}
