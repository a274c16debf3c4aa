//! What is exported, and who has claimed it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use farbus_fabric::wire::{Epoch, ExportName};
use farbus_vfio::Function;

/// One function that compute servers can claim.
pub struct Export {
    name: ExportName,
    function: Arc<dyn Function>,
    claims: Mutex<Claims>,
}

struct Claims {
    last_epoch: Epoch,
    /// Who has it now, as it names itself.
    holder: Option<String>,
}

/// The exclusive right to an export, until it is dropped.
pub struct Claim {
    export: Arc<Export>,
    epoch: Epoch,
}

/// Why an export could not be claimed.
#[derive(Debug, thiserror::Error)]
#[error(
    "export {export} is claimed by {holder} ({epoch}); detach it there first, or wait until that side is found dead"
)]
pub struct Busy {
    export: String,
    holder: String,
    epoch: Epoch,
}

impl Export {
    /// An export that nobody has claimed.
    pub fn new(name: ExportName, function: Arc<dyn Function>) -> Self {
        Self {
            name,
            function,
            claims: Mutex::new(Claims {
                last_epoch: Epoch(0),
                holder: None,
            }),
        }
    }

    /// The function that is exported.
    pub fn function(&self) -> &Arc<dyn Function> {
        &self.function
    }

    /// The export's name.
    pub fn name(&self) -> &ExportName {
        &self.name
    }

    /// Claims the export for `claimant`, with an epoch higher than every one before; across a
    /// restart of this process, as long as the clock has not been set back.
    pub fn claim(self: &Arc<Self>, claimant: &str) -> Result<Claim, Busy> {
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(holder) = &claims.holder {
            return Err(Busy {
                export: self.name.as_str().into(),
                holder: holder.clone(),
                epoch: claims.last_epoch,
            });
        }
        let epoch = Epoch(clock_epoch().max(claims.last_epoch.0 + 1));
        claims.last_epoch = epoch;
        claims.holder = Some(claimant.into());
        Ok(Claim {
            export: self.clone(),
            epoch,
        })
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

    /// What is claimed.
    pub fn export(&self) -> &Export {
        &self.export
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claims = self
            .export
            .claims
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        claims.holder = None;
    }
}

/// All exports of a device server, by name.
#[derive(Clone)]
pub struct Exports(Arc<[Arc<Export>]>);

impl Exports {
    /// From a list whose names differ.
    pub fn new(exports: Vec<Export>) -> Self {
        Self(exports.into_iter().map(Arc::new).collect())
    }

    /// The export of this name.
    pub fn find(&self, name: &ExportName) -> Option<&Arc<Export>> {
        self.0.iter().find(|export| export.name() == name)
    }

    /// The names, in the order of the list.
    pub fn names(&self) -> Vec<String> {
        let names = self.0.iter().map(|export| export.name().as_str());
        names.map(Into::into).collect()
    }
}
