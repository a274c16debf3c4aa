//! Opening one function of each kind, and what it must have.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use farbus_vfio::kernel::VfioFunction;
use farbus_vfio::soft_nvme::{SoftNvme, SoftNvmeConfig};
use farbus_vfio::user::UserFunction;
use farbus_vfio::{Function, PciAddress};

use super::SourceError;

/// How long a vfio-user server may take for one answer. It is as long as the fabric's other
/// side waits before it calls the device hung.
const USER_TIMEOUT: Duration = Duration::from_secs(2);

/// The PCI functions that this process has opened, as far as they are not closed: to drop one
/// only begins that.
#[derive(Default)]
pub(super) struct Opened(Mutex<Vec<(PciAddress, Weak<()>)>>);

impl Opened {
    pub(super) fn open(&self, address: PciAddress) -> Result<Arc<dyn Function>, SourceError> {
        let function = VfioFunction::open(address)?;
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(_, mark)| mark.strong_count() > 0);
        open.push((address, function.open_mark()));
        Ok(Arc::new(function))
    }

    pub(super) fn still_open(&self) -> Vec<PciAddress> {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let open = open.iter().filter(|(_, mark)| mark.strong_count() > 0);
        open.map(|(address, _)| *address).collect()
    }
}

/// A function that cannot be reset would show one tenant's data to the next.
pub(super) fn refuse_without_reset(function: &dyn Function) -> Result<(), SourceError> {
    let info = function.info();
    if info.resettable {
        return Ok(());
    }
    Err(SourceError::NoReset {
        what: info.label.clone(),
    })
}

pub(super) fn soft(config: &SoftNvmeConfig) -> Result<Arc<dyn Function>, SourceError> {
    let drive = SoftNvme::open(config).map_err(SourceError::SoftNvme)?;
    Ok(Arc::new(drive))
}

pub(super) fn user(path: &Path) -> Result<Arc<dyn Function>, SourceError> {
    let function =
        UserFunction::connect(path, USER_TIMEOUT).map_err(|source| SourceError::VfioUser {
            path: path.to_owned(),
            source,
        })?;
    Ok(Arc::new(function))
}
