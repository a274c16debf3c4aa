//! A software NVMe 1.4 controller on a file, a block device, memory, or nothing.
//!
//! It behaves as a function behind VFIO does: registers, DMA to the windows that were mapped
//! for it, and eventfds; it answers to nothing else. So whatever drives it can drive a real
//! controller. As with a real one, software has to set Memory Space Enable and Bus Master
//! Enable in the Command register before registers answer and DMA works, and again after
//! [`Function::reset`].
//!
//! - [`SoftNvmeConfig`] (`options`) says what it is made of; `open` finds the file, `backing`
//!   is what holds the data, and `identity` has the names that follow from it.
//! - `front` has the registers, `queues` the rings, `irq` the vectors, `dma` the windows, `prp`
//!   the way from a command to its data, `sys` the system calls that move it.
//! - `controller` is what the threads share and how a command lives; `threads` are those that
//!   do the work, `inline` what is done without them; `admin` (with `identify`, `features`,
//!   `health` and `events`) and `io` have the commands; `size` follows a file that grows; `shape` is
//!   how it looks to PCI.
//!
//! A write to a doorbell stores the tail. With a file, which may keep a command waiting, it
//! then wakes a thread; with memory or nothing, the commands are carried out there and then.
//! Reads and writes go straight between the backing and the windows. Nothing is allocated for
//! an I/O command.

#![deny(unsafe_code)]

mod admin;
mod backing;
mod controller;
mod dma;
mod events;
mod features;
mod front;
mod health;
mod identify;
mod identity;
mod inline;
mod io;
mod irq;
mod open;
mod options;
mod prp;
mod queues;
pub(crate) mod shape;
mod size;
#[allow(unsafe_code, reason = "vectored I/O on memory that is not ours alone")]
mod sys;
mod threads;
mod work;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use vmm_sys_util::eventfd::EventFd;

// What a portion of a shared drive has in common with this controller.
pub(crate) use dma::Unreachable;
pub(crate) use features::Features;
pub(crate) use health::firmware_log;
pub(crate) use identify::{descriptors, namespace_list};
pub(crate) use identity::Identity;
pub use identity::{DEVICE, VENDOR};
pub use open::{BackingError, grow_file};
pub use options::{
    DEFAULT_QUEUE_PAIRS, MAX_QUEUE_PAIRS, Medium, OptionError, SoftNvmeConfig, parse_size,
};
pub(crate) use prp::{LIST_ENTRIES, walk};

use self::shape::{MSIX_PBA, MSIX_TABLE};
use crate::config::{ConfigEffect, ConfigSpace, PowerState};
use crate::function::{
    DmaWindow, Function, FunctionError, FunctionInfo, InterruptCounts, InterruptKind, Iova,
    RegionIndex, RegionInfo,
};
use crate::nvme::DOORBELL_BASE;

/// Locks a mutex. A thread that panicked while it held the lock has left state that is still
/// sound, if perhaps not what was wanted; a second panic would help nobody.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a software controller could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SoftNvmeError {
    /// What was to hold the data.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// The description contradicts itself.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// The configuration space.
    #[error("the controller's configuration space is not sound")]
    Config(#[from] crate::config::ConfigError),
    /// The threads.
    #[error("cannot start the controller's threads")]
    Threads(#[source] std::io::Error),
}

/// A software NVMe controller.
pub struct SoftNvme {
    info: FunctionInfo,
    config: Mutex<ConfigSpace>,
    /// Registers answer: Memory Space Enable is set, and the power state is D0.
    decoding: AtomicBool,
    controller: Arc<controller::Controller>,
    _threads: threads::Threads,
}

impl SoftNvme {
    /// Opens what holds the data and starts the controller's threads. Without a path, or with
    /// values out of range, this fails; text is better parsed than built by hand.
    pub fn open(config: &SoftNvmeConfig) -> Result<Self, SoftNvmeError> {
        config.check()?;
        let backing = open::open(config)?;
        let vectors = config.queues + 1;
        let (bar0, space) = shape::configuration(DEVICE, vectors)?;
        let info = FunctionInfo {
            label: format!("soft-nvme {}", config.medium),
            config_size: space.size(),
            regions: vec![bar0],
            interrupts: InterruptCounts {
                msix: u32::from(vectors),
                ..Default::default()
            },
            resettable: true,
            iova_ranges: vec![0..=dma::IOVA_MAX],
        };
        let block_shift = config.block_size.trailing_zeros() as u8;
        let controller = Arc::new(controller::Controller {
            identity: identity::Identity::of(config, &backing),
            block_shift,
            size: size::Size::new(backing.len() >> block_shift),
            backing,
            queue_pairs: config.queues,
            dma: dma::Dma::new(),
            interrupts: irq::Interrupts::new(vectors),
            front: front::Front::default(),
            queues: RwLock::new(queues::Queues::new(config.queues)),
            work: work::WorkQueue::default(),
            events: events::Events::default(),
            features: Mutex::new(features::Features::new(config.queues)),
            write_cache: AtomicBool::new(true),
            health: health::Health::new(),
            halted: AtomicBool::new(false),
            reported_fatal: AtomicBool::new(false),
        });
        let threads = threads::Threads::start(&controller).map_err(SoftNvmeError::Threads)?;
        Ok(Self {
            info,
            config: Mutex::new(space),
            decoding: AtomicBool::new(false),
            controller,
            _threads: threads,
        })
    }

    /// Lets the rest of the function know what configuration space says.
    fn apply(&self, space: &ConfigSpace) {
        let state = space.state();
        let awake = state.power == PowerState::D0;
        self.decoding
            .store(state.memory_enabled && awake, Ordering::SeqCst);
        self.controller
            .dma
            .set_bus_master(state.bus_master && awake);
    }

    /// Checks an access to a region; returns its offset.
    fn check_access(
        &self,
        region: RegionIndex,
        offset: u64,
        len: usize,
    ) -> Result<u64, FunctionError> {
        let Some(RegionInfo { size, .. }) = self.info.region(region) else {
            return Err(FunctionError::Unsupported(format!(
                "the function has no {region}"
            )));
        };
        if offset.checked_add(len as u64).is_none_or(|end| end > size) {
            return Err(FunctionError::OutOfBounds {
                what: region.to_string(),
                offset,
                len,
            });
        }
        if !self.decoding.load(Ordering::SeqCst) {
            return Err(FunctionError::Unsupported(format!(
                "{region} does not answer: Memory Space Enable is off, or the function sleeps"
            )));
        }
        Ok(offset)
    }

    /// Writes the aligned dword at `offset` of BAR 0.
    fn write_dword(&self, offset: u64, value: u32) {
        match offset {
            0..DOORBELL_BASE => self.controller.front.write_dword(offset, value),
            DOORBELL_BASE..MSIX_TABLE => {
                self.controller.ring((offset - DOORBELL_BASE) / 4, value);
            }
            MSIX_TABLE..MSIX_PBA => {
                let at = (offset - MSIX_TABLE) as usize;
                self.controller
                    .interrupts
                    .write_table(at, &value.to_le_bytes());
            }
            // The pending bits are read only.
            _ => {}
        }
    }
}

impl Function for SoftNvme {
    fn info(&self) -> &FunctionInfo {
        &self.info
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        Ok(lock(&self.config).read(offset, data)?)
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), FunctionError> {
        let mut space = lock(&self.config);
        let ConfigEffect { flr, .. } = space.write(offset, data)?;
        self.apply(&space);
        drop(space);
        if flr { self.reset() } else { Ok(()) }
    }

    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        let offset = self.check_access(region, offset, data.len())?;
        let page = offset & !0xfff;
        let at = (offset - page) as usize;
        // An access that crosses pages is none that a bus would do; it sees only the first.
        match page {
            0 => self.controller.front.read(at, data),
            MSIX_TABLE => self.controller.interrupts.read_table(at, data),
            MSIX_PBA => self.controller.interrupts.read_pending(at, data),
            // What a doorbell reads as is up to the vendor (§3.1.24).
            _ => data.fill(0),
        }
        Ok(())
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        let offset = self.check_access(region, offset, data.len())?;
        for (at, value) in shape::dwords(offset, data) {
            self.write_dword(at, value);
        }
        Ok(())
    }

    fn map_dma(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        self.controller.dma.map(window)
    }

    fn unmap_dma(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        self.controller.dma.unmap(iova, len)
    }

    fn set_interrupts(
        &self,
        kind: InterruptKind,
        first: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        shape::check_vectors(&self.info, kind, first, events.len())?;
        self.controller
            .interrupts
            .set(first, events)
            .map_err(|source| FunctionError::Io {
                what: "making an interrupt eventfd non-blocking".to_owned(),
                source,
            })
    }

    fn mask_interrupt(
        &self,
        kind: InterruptKind,
        vector: u32,
        masked: bool,
    ) -> Result<(), FunctionError> {
        shape::check_vectors(&self.info, kind, vector, 1)?;
        self.controller.interrupts.mask(vector, masked);
        Ok(())
    }

    fn completes_at_once(&self) -> bool {
        self.controller.backing.is_immediate()
    }

    fn reset(&self) -> Result<(), FunctionError> {
        let mut space = lock(&self.config);
        space.reset();
        self.decoding.store(false, Ordering::SeqCst);
        drop(space);
        self.controller.front.reset();
        // Only now: commands that were under way may finish, and their data with them.
        self.apply(&lock(&self.config));
        Ok(())
    }
}
