//! The DMA windows of a function: what is mapped in its address space.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Resource, getrlimit};
use vm_memory::{MmapRegion, VolatileMemory};

use super::device::IommuInfo;
use super::space::Space;
use crate::function::{DmaWindow, FunctionError, Iova};

/// Where x86 processors take interrupts: a write of a device there is no DMA (Intel SDM
/// volume 3, §11.11.1).
const INTERRUPTS: RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;
/// What every IOMMU can do, for kernels that do not tell (before 5.4): 39 bits.
const ASSUMED: RangeInclusive<u64> = 0..=0x7f_ffff_ffff;

struct Window {
    /// Its last byte.
    last: u64,
    /// Keeps the addresses from being used for something else, which would confuse people;
    /// the pages are the kernel's to keep.
    _memory: Arc<MmapRegion>,
}

/// An address space and what is mapped in it.
pub(super) struct Dma {
    // Closed before the memory goes.
    space: Space,
    windows: Mutex<BTreeMap<u64, Window>>,
    ranges: Vec<RangeInclusive<u64>>,
    /// Windows begin and end at multiples of this.
    page: u64,
}

impl Dma {
    pub(super) fn new(space: Space) -> io::Result<Self> {
        let IommuInfo { page_sizes, ranges } = space.iommu_info()?;
        Ok(Self {
            space,
            windows: Mutex::new(BTreeMap::new()),
            ranges: usable(&ranges.unwrap_or_else(|| vec![ASSUMED])),
            page: smallest_page(page_sizes),
        })
    }

    /// The IOVAs that can be mapped, ascending and disjoint.
    pub(super) fn ranges(&self) -> &[RangeInclusive<u64>] {
        &self.ranges
    }

    pub(super) fn map(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        let DmaWindow { iova, len, .. } = *window;
        let bad = |why| FunctionError::BadWindow {
            iova,
            len: len as u64,
            why,
        };
        let last = check(&self.ranges, self.page, iova, len as u64).map_err(bad)?;
        let memory = window
            .memory
            .get_slice(window.offset, len)
            .map_err(|_| bad("it is not within its memory"))?;
        if (memory.ptr_guard().as_ptr() as u64) % self.page != 0 {
            return Err(bad("its memory does not begin at a page"));
        }
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        if overlaps(&windows, iova.0, last) {
            return Err(bad("it overlaps another one"));
        }
        self.space
            .map_dma(iova, &memory, window.access)
            .map_err(|source| refused(window, source))?;
        let window = Window {
            last,
            _memory: window.memory.clone(),
        };
        windows.insert(iova.0, window);
        Ok(())
    }

    pub(super) fn unmap(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        let bad = |why| FunctionError::BadWindow { iova, len, why };
        let Some(distance) = len.checked_sub(1) else {
            return Ok(());
        };
        let last = iova
            .0
            .checked_add(distance)
            .ok_or_else(|| bad("it runs past the top of the address space"))?;
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        if cuts(&windows, iova.0, last) {
            return Err(bad("it holds a window only in part"));
        }
        // One by one: the kernel's own unmapping of ranges stops at the first difficulty.
        while let Some((&start, window)) = windows.range(iova.0..=last).next() {
            let len = window.last - start + 1;
            let unmapped = self.space.unmap_dma(Iova(start), len);
            let unmapped = unmapped.map_err(|source| FunctionError::Io {
                what: format!("unmapping {len:#x} bytes at {start:#x} for DMA"),
                source,
            })?;
            if unmapped != len {
                log::error!(
                    "of the {len:#x} bytes at {start:#x}, {unmapped:#x} were mapped for DMA"
                );
            }
            windows.remove(&start);
        }
        Ok(())
    }
}

/// Checks where a window is to be; returns its last byte.
fn check(
    ranges: &[RangeInclusive<u64>],
    page: u64,
    iova: Iova,
    len: u64,
) -> Result<u64, &'static str> {
    let distance = len.checked_sub(1).ok_or("it is empty")?;
    let last = iova
        .0
        .checked_add(distance)
        .ok_or("it runs past the top of the address space")?;
    if iova.0 % page != 0 || len % page != 0 {
        return Err("it does not begin and end at pages of the IOMMU");
    }
    if !ranges
        .iter()
        .any(|range| range.contains(&iova.0) && range.contains(&last))
    {
        return Err("the IOMMU cannot map these addresses");
    }
    Ok(last)
}

/// Whether something is mapped in a range.
fn overlaps(windows: &BTreeMap<u64, Window>, first: u64, last: u64) -> bool {
    let below = windows.range(..=last).next_back();
    below.is_some_and(|(_, window)| window.last >= first)
}

/// Whether a range holds a window in part. Windows do not overlap, so that only the last one
/// that begins before an end of the range can reach across that end.
fn cuts(windows: &BTreeMap<u64, Window>, first: u64, last: u64) -> bool {
    let across_first = windows.range(..first).next_back();
    let across_last = windows.range(..=last).next_back();
    across_first.is_some_and(|(_, window)| window.last >= first)
        || across_last.is_some_and(|(_, window)| window.last > last)
}

fn smallest_page(sizes: u64) -> u64 {
    let smallest = 1 << sizes.trailing_zeros().min(62);
    // A kernel that does not tell means pages of its own size.
    if sizes == 0 { 4096 } else { smallest }
}

/// The ranges without the addresses of interrupts, whatever the kernel says of those.
fn usable(ranges: &[RangeInclusive<u64>]) -> Vec<RangeInclusive<u64>> {
    let mut parts: Vec<RangeInclusive<u64>> = ranges
        .iter()
        .flat_map(|range| {
            let (start, end) = (*range.start(), *range.end());
            [
                start..=end.min(INTERRUPTS.start() - 1),
                start.max(INTERRUPTS.end() + 1)..=end,
            ]
        })
        .filter(|range| !range.is_empty())
        .collect();
    parts.sort_by_key(|range| *range.start());
    parts
}

/// The error for a window that the kernel refused, with the remedy where one is known.
fn refused(window: &DmaWindow, source: io::Error) -> FunctionError {
    let what = format!("mapping {:#x} bytes at {} for DMA", window.len, window.iova);
    let remedy = match source.raw_os_error() {
        Some(libc::ENOMEM) => memory_remedy(window.len as u64),
        Some(libc::ENOSPC) => Some(
            "the function has as many DMA windows as the kernel allows (parameter \
             dma_entry_limit of the module vfio_iommu_type1)"
                .to_owned(),
        ),
        _ => None,
    };
    let source = match remedy {
        Some(remedy) => io::Error::new(source.kind(), format!("{remedy} ({source})")),
        None => source,
    };
    FunctionError::Io { what, source }
}

/// What to say when memory could not be locked; `None` when the limit is not the reason.
fn memory_remedy(len: u64) -> Option<String> {
    let limit = getrlimit(Resource::Memlock).current?;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let locked = locked_in(&status).unwrap_or(0);
    (locked.saturating_add(len) > limit).then(|| {
        format!(
            "memory for DMA is locked, and this process may lock {} KiB, of which {} are in use; \
             raise the limit: LimitMEMLOCK=infinity for a service of systemd, 'ulimit -l \
             unlimited' in a shell",
            limit >> 10,
            locked >> 10
        )
    })
}

/// `VmLck` of `/proc/PID/status`, in bytes.
fn locked_in(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmLck:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupt_addresses_are_never_usable() {
        assert_eq!(
            usable(&[ASSUMED]),
            [0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff]
        );
        // What x86 kernels say already.
        let told = [0..=0xfedf_ffff, 0xfef0_0000..=u64::MAX];
        assert_eq!(usable(&told), told);
        assert_eq!(usable(&[0xfee0_0000..=0xfeef_ffff]), []);
    }

    #[test]
    fn windows_must_be_pages_within_one_range() {
        let ranges = [0..=0xffff, 0x2_0000..=0x2_ffff];
        let checked = |iova, len| check(&ranges, 0x1000, Iova(iova), len);
        assert_eq!(checked(0x1000, 0x2000), Ok(0x2fff));
        assert_eq!(checked(0x2_f000, 0x1000), Ok(0x2_ffff));
        for (iova, len) in [
            (0, 0),
            (0x800, 0x1000),
            (0x1000, 0x800),
            (0xf000, 0x2000),
            (0xf000, 0x1_2000),
            (0x3_0000, 0x1000),
            (u64::MAX - 0xfff, 0x2000),
        ] {
            assert!(checked(iova, len).is_err(), "{iova:#x}+{len:#x}");
        }
    }

    #[test]
    fn overlaps_and_cuts_are_noticed_at_every_edge() {
        let memory = Arc::new(MmapRegion::new(4096).unwrap());
        let window = |last| Window {
            last,
            _memory: memory.clone(),
        };
        let windows = BTreeMap::from([(0x2000, window(0x3fff)), (0x4000, window(0x4fff))]);
        assert!(!overlaps(&windows, 0, 0x1fff));
        assert!(overlaps(&windows, 0, 0x2000));
        assert!(overlaps(&windows, 0x3fff, 0x3fff));
        assert!(overlaps(&windows, 0x4fff, u64::MAX));
        assert!(!overlaps(&windows, 0x5000, u64::MAX));
        assert!(!cuts(&windows, 0x2000, 0x3fff));
        assert!(!cuts(&windows, 0, u64::MAX));
        assert!(cuts(&windows, 0x3000, 0x4fff));
        assert!(cuts(&windows, 0x2000, 0x4ffe));
        assert!(cuts(&windows, 0x2800, 0x2fff));
    }

    #[test]
    fn locked_memory_is_read_from_the_status() {
        let status = "Name:\tx\nVmPeak:\t  1 kB\nVmLck:\t    16 kB\n";
        assert_eq!(locked_in(status), Some(16 << 10));
        assert_eq!(locked_in("VmLck:\tmuch\n"), None);
    }

    #[test]
    fn pages_are_the_smallest_that_the_iommu_has() {
        assert_eq!(smallest_page(0x4020_1000), 4096);
        assert_eq!(smallest_page(0), 4096);
        assert_eq!(smallest_page(1 << 63), 1 << 62);
    }
}
