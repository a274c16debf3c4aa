//! An export that is shared: each of its slices is an export of its own.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use farbus_fabric::wire::ExportName;
use farbus_vfio::Function;
use farbus_vfio::shared::{SharedDrive, SliceSpec};
use log::info;

use super::open::refuse_without_reset;
use super::{OrderError, SourceError};
use crate::exports::{Export, Reopen};
use crate::slices::{LimitSpec, SliceConfig};

/// Opens a drive's function.
type Open = Box<dyn Fn() -> Result<Arc<dyn Function>, SourceError> + Send + Sync>;

/// A drive that is divided, for as long as one of its portions is open.
struct Divided {
    open: Open,
    specs: Vec<SliceSpec>,
    drive: Mutex<Weak<SharedDrive>>,
}

impl Divided {
    /// The portion of one slice, anew; of a drive that is opened anew if the former one is gone.
    fn portion(&self, index: usize) -> Result<Arc<dyn Function>, SourceError> {
        let mut current = self.drive.lock().unwrap_or_else(PoisonError::into_inner);
        let drive = match current.upgrade().filter(|drive| !drive.is_gone()) {
            Some(drive) => drive,
            None => {
                let function = (self.open)()?;
                refuse_without_reset(function.as_ref())?;
                let drive = SharedDrive::open(function, &self.specs)?;
                *current = Arc::downgrade(&drive);
                drive
            }
        };
        Ok(Arc::new(drive.portion(index)?))
    }
}

/// The exports that a function is divided into; `open` opens it again after it was gone.
pub(super) fn divide(
    name: &ExportName,
    slices: &[SliceConfig],
    limits: LimitSpec,
    function: Arc<dyn Function>,
    open: Open,
) -> Result<Vec<Export>, SourceError> {
    refuse_without_reset(function.as_ref())?;
    let specs: Vec<SliceSpec> = slices.iter().map(SliceConfig::spec).collect();
    let drive = SharedDrive::open(function, &specs)?;
    let divided = Arc::new(Divided {
        open,
        specs,
        drive: Mutex::new(Arc::downgrade(&drive)),
    });
    let mut exports = Vec::with_capacity(slices.len());
    for (index, slice) in slices.iter().enumerate() {
        let portion = drive.portion(index)?;
        let name = slice_name(name, slice)?;
        info!("exports {} as {name}", portion.info().label);
        let again = divided.clone();
        let reopen: Reopen = Box::new(move || Ok(again.portion(index)?));
        let limits = slice.limits.unwrap_or(limits).rates();
        let export = Export::reopening(name, Arc::new(portion), reopen);
        exports.push(export.limited_to(limits));
    }
    Ok(exports)
}

/// What a slice is claimed as.
fn slice_name(export: &ExportName, slice: &SliceConfig) -> Result<ExportName, OrderError> {
    export
        .slice(&slice.name)
        .map_err(|_| OrderError::LongSliceName {
            export: export.as_str().into(),
            slice: slice.name.clone(),
        })
}

/// Whether slices have names that can be told apart.
pub(super) fn check(name: Option<&ExportName>, slices: &[SliceConfig]) -> Result<(), OrderError> {
    for (n, slice) in slices.iter().enumerate() {
        if slices.iter().take(n).any(|other| other.name == slice.name) {
            return Err(OrderError::SameName {
                name: slice.name.clone(),
            });
        }
        if let Some(name) = name {
            slice_name(name, slice)?;
        }
    }
    Ok(())
}
