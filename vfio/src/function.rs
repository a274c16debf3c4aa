//! The `Function` seam: everything a PCIe function offers to whoever drives it.
//!
//! The shape is that of kernel VFIO (configuration space, numbered regions, interrupts as
//! eventfds, DMA windows at IOVAs that the driver of the function chooses, reset), because
//! that is what both ends need: a device server drives a physical function through it, and a
//! compute agent offers a remote function to a VMM through it. Nothing here knows a device
//! class.

use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

use crate::PciAddress;

/// An address as the function's DMA engine issues it, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iova(pub u64);

impl fmt::Display for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A memory region of a function, numbered as in VFIO (`linux/vfio.h`,
/// `VFIO_PCI_BAR0_REGION_INDEX` and on): 0 to 5 are the BARs, 6 is the expansion ROM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionIndex(pub u8);

impl RegionIndex {
    /// BAR 0, where NVMe has its registers.
    pub const BAR0: Self = Self(0);
    /// The expansion ROM.
    pub const ROM: Self = Self(6);
    /// How many regions of this kind a function can have.
    pub const COUNT: u8 = 7;
}

impl fmt::Display for RegionIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bar @ 0..=5 => write!(f, "BAR{bar}"),
            6 => f.write_str("ROM"),
            other => write!(f, "region {other}"),
        }
    }
}

/// One region that a function has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Which one.
    pub index: RegionIndex,
    /// Its size in bytes: a power of two, at least 16 for memory and 4 for I/O ports.
    pub size: u64,
}

/// How many interrupts of each kind a function has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterruptCounts {
    /// Legacy pin interrupts: 0 or 1.
    pub intx: u32,
    /// MSI messages: 0 to 32.
    pub msi: u32,
    /// MSI-X table entries: 0 to 2048.
    pub msix: u32,
}

impl InterruptCounts {
    /// The count of one kind.
    pub fn of(&self, kind: InterruptKind) -> u32 {
        match kind {
            InterruptKind::Intx => self.intx,
            InterruptKind::Msi => self.msi,
            InterruptKind::Msix => self.msix,
        }
    }
}

/// The kinds of interrupts of a PCI function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum InterruptKind {
    /// The level-triggered pin.
    Intx,
    /// Message-signalled, PCI Local Bus 3.0 section 6.8.1.
    Msi,
    /// Message-signalled with a table, section 6.8.2.
    Msix,
}

/// What a function is, as far as it does not change while it is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionInfo {
    /// For people: where the function comes from, such as `soft-nvme disk.img`.
    pub label: String,
    /// Size of configuration space in bytes: 256 or 4096.
    pub config_size: u16,
    /// The regions that exist, ascending by index.
    pub regions: Vec<RegionInfo>,
    /// The interrupts that exist.
    pub interrupts: InterruptCounts,
    /// Whether [`Function::reset`] can work.
    pub resettable: bool,
    /// The IOVAs that [`Function::map_dma`] accepts, ascending and disjoint.
    pub iova_ranges: Vec<RangeInclusive<u64>>,
}

impl FunctionInfo {
    /// The region with this index, if the function has it.
    pub fn region(&self, index: RegionIndex) -> Option<RegionInfo> {
        self.regions.iter().copied().find(|r| r.index == index)
    }
}

/// What a function may do with memory that was mapped for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaAccess {
    /// The function may only read.
    Read,
    /// The function may read and write.
    ReadWrite,
}

/// A range of this process's shared memory, given to a function at an IOVA.
///
/// The memory is a mapping that others (a device, another process, a guest) change at any
/// time; it is only ever touched through `vm-memory`'s volatile slices or by the kernel.
#[derive(Clone)]
pub struct DmaWindow {
    /// Where the function sees the range.
    pub iova: Iova,
    /// The mapping that holds it.
    pub memory: Arc<MmapRegion>,
    /// Where in `memory` the range begins, in bytes.
    pub offset: usize,
    /// Its length in bytes; `offset + len` lies within `memory`.
    pub len: usize,
    /// What the function may do with it.
    pub access: DmaAccess,
}

impl fmt::Debug for DmaWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "DmaWindow({}+{:#x}, {:?})",
            self.iova, self.len, self.access
        )
    }
}

/// Why a function did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    /// An access outside of what exists.
    #[error("access of {len} bytes at {offset:#x} lies outside of {what}")]
    OutOfBounds {
        /// The space that was accessed, such as `BAR0`.
        what: String,
        /// First byte of the access.
        offset: u64,
        /// Length of the access in bytes.
        len: usize,
    },
    /// The caller asked for something that the function does not have or cannot do.
    #[error("{0}")]
    Unsupported(String),
    /// A DMA window that overlaps another, is misaligned, or does not exist.
    #[error("DMA window at {iova} of {len:#x} bytes: {why}")]
    BadWindow {
        /// Start of the window.
        iova: Iova,
        /// Its length in bytes.
        len: u64,
        /// What is wrong with it, as a clause.
        why: &'static str,
    },
    /// The function is no longer there (unplugged, or its process has ended).
    #[error("the function is gone: {0}")]
    Gone(String),
    /// The operating system refused.
    #[error("{what} failed")]
    Io {
        /// What was tried, as a noun phrase.
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What a function, or its host, says unasked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The host wants the function back, because it is to be unplugged or to change its
    /// driver. It waits until the function is dropped.
    UnplugRequested,
    /// The function has reported an uncorrectable error (PCIe 6.2). Only a reset helps.
    ErrorReported,
}

/// One PCIe function.
///
/// Calls take `&self` and may come from several threads; an implementation orders accesses
/// of one thread as PCIe does (a read returns after the writes before it took effect). None
/// blocks on anything but the function itself.
pub trait Function: Send + Sync {
    /// What the function is.
    fn info(&self) -> &FunctionInfo;

    /// Where in this host it sits, if it is a PCI function of this host.
    fn pci_address(&self) -> Option<PciAddress> {
        None
    }

    /// Reads configuration space from `offset` on (bytes) into all of `data`.
    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), FunctionError>;

    /// Writes all of `data` to configuration space from `offset` on (bytes).
    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), FunctionError>;

    /// Reads a region from `offset` on (bytes) into all of `data`. Accesses of 1, 2, 4 and 8
    /// naturally aligned bytes are single accesses on the bus.
    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError>;

    /// Writes all of `data` to a region from `offset` on (bytes); widths as in
    /// [`Self::region_read`]. The write is posted: what it sets off may still be under way
    /// when this returns.
    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError>;

    /// Lets the function reach memory. The window must not overlap another one.
    fn map_dma(&self, window: &DmaWindow) -> Result<(), FunctionError>;

    /// Takes back every window that lies within `iova .. iova + len` (bytes); a window that
    /// lies there only in part is an error. When this returns, the function no longer
    /// accesses the memory.
    fn unmap_dma(&self, iova: Iova, len: u64) -> Result<(), FunctionError>;

    /// Sets which eventfds are signalled for the interrupts `first ..` of one kind; `None`
    /// silences one. Other vectors of that kind keep what they have.
    fn set_interrupts(
        &self,
        kind: InterruptKind,
        first: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError>;

    /// Masks or unmasks one interrupt. What becomes pending while masked is signalled once
    /// at the unmask.
    fn mask_interrupt(
        &self,
        kind: InterruptKind,
        vector: u32,
        masked: bool,
    ) -> Result<(), FunctionError>;

    /// Brings the function to its state after power-on (PCIe 6.6.2, function level reset).
    /// DMA windows and interrupt eventfds stay set; no DMA of before the reset follows it.
    fn reset(&self) -> Result<(), FunctionError>;

    /// Does what a function leaves to the thread of whoever drives it, such as passing on
    /// completions: called before each look at memory that the function writes. Most functions
    /// leave nothing.
    fn service(&self) {}

    /// Whether only one thread may drive it, since more would only wait for each other.
    fn wants_one_thread(&self) -> bool {
        false
    }

    /// Whether a command of an I/O queue has completed when the write of the doorbell returns that announces it, or
    /// that makes room for its completion. Whoever drives it from one thread looks there, and wants no interrupts.
    fn completes_at_once(&self) -> bool {
        false
    }

    /// The notices that can come, each with the eventfd that is signalled for it. They do not
    /// change while the function is open.
    fn notices(&self) -> Vec<(Notice, &EventFd)> {
        Vec::new()
    }
}
