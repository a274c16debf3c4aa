//! Between a device server and a function: looks at the memory that the device gets, and at
//! what is left in it when it is taken away.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farbus_vfio::nvme::PAGE_SIZE;
use farbus_vfio::{Around, DmaWindow, Function, FunctionError, Iova};
use vm_memory::VolatileMemory;

/// A function whose DMA memory is looked at whenever the device gets it, and when it is taken
/// away.
pub(crate) struct Watched {
    function: Arc<dyn Function>,
    windows: Mutex<BTreeMap<u64, DmaWindow>>,
    seen: Mutex<Seen>,
}

/// What was seen so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// How often the device got memory.
    pub(crate) windows: u64,
    /// Bytes that were not zero in memory that the device got, before it had it.
    pub(crate) used_when_given: u64,
    /// Bytes that were not zero in memory that was taken away.
    pub(crate) used_when_taken: u64,
}

impl Watched {
    pub(crate) fn new(function: Arc<dyn Function>) -> Self {
        Self {
            function,
            windows: Mutex::default(),
            seen: Mutex::default(),
        }
    }

    pub(crate) fn seen(&self) -> Seen {
        *lock(&self.seen)
    }
}

/// What is behind these locks is whole whenever they are free.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many bytes of a window are not zero.
fn non_zero(window: &DmaWindow) -> u64 {
    let mut page = [0_u8; PAGE_SIZE];
    let pages = (0..window.len).step_by(PAGE_SIZE);
    let counts = pages.map(|at| {
        let len = PAGE_SIZE.min(window.len - at);
        let part = window.memory.get_slice(window.offset + at, len);
        // Memory that cannot be looked at counts as used.
        let copied = part.map_or(usize::MAX, |part| part.copy_to(&mut page[..]));
        match copied == len {
            true => page[..len].iter().filter(|byte| **byte != 0).count() as u64,
            false => len as u64,
        }
    });
    counts.sum()
}

impl Around for Watched {
    fn inner(&self) -> &dyn Function {
        &*self.function
    }

    fn map_dma(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        let used = non_zero(window);
        let mut seen = lock(&self.seen);
        seen.windows += 1;
        seen.used_when_given += used;
        drop(seen);
        lock(&self.windows).insert(window.iova.0, window.clone());
        self.function.map_dma(window)
    }

    fn unmap_dma(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        self.function.unmap_dma(iova, len)?;
        let window = lock(&self.windows).remove(&iova.0);
        lock(&self.seen).used_when_taken += window.as_ref().map_or(0, non_zero);
        Ok(())
    }
}
