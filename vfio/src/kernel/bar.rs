//! A BAR, mapped into this process.
//!
//! Rules of this module:
//!
//! 1. The mapping is made here, of a device's own descriptor, and lives as long as the
//!    [`Mapping`]. Nothing but this module has its address.
//! 2. It is touched only by naturally aligned volatile accesses within its bounds: each is
//!    one access on the bus, neither torn nor merged nor left out.
//! 3. Its pages vanish when the device does, or when memory decoding is turned off. Every
//!    access runs under a [`Guard`], so that this is an answer and not a signal.
//! 4. Memory that a device is to find must be written before the register that tells of it:
//!    there is a fence before every store and after every load. On x86 that orders what the
//!    device sees; other architectures need barriers that Rust does not have, so there is
//!    no mapping, and the kernel does the access.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, compiler_fence, fence};

use crate::sigbus::{Guard, Pages};

/// Whether rule 4 can be kept here.
pub(super) const POSSIBLE: bool = cfg!(target_arch = "x86_64");

struct Mapping {
    start: NonNull<u8>,
    len: usize,
    /// A renewal has failed half-way: the addresses may have become somebody else's.
    abandoned: AtomicBool,
}

// SAFETY: the pointer stands for a mapping that belongs to nobody's thread, and rule 2 lets
// any number of threads access it at once.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

// SAFETY: rules 1 and 2; `renew` fails only within a repair.
unsafe impl Pages for Mapping {
    fn range(&self) -> Range<usize> {
        let start = self.start.as_ptr() as usize;
        start..start.saturating_add(self.len)
    }
}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset` on.
    fn new(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        // SAFETY: without MAP_FIXED the kernel takes addresses that are free.
        let start = unsafe { mmap(null_mut(), len, 0, file, offset) }?;
        let start =
            NonNull::new(start).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self {
            start,
            len,
            abandoned: AtomicBool::new(false),
        })
    }

    /// Maps the same anew, at the same addresses. An error is the end of the mapping.
    fn renew(&self, file: &File, offset: u64) -> io::Result<()> {
        // SAFETY: the range is the whole of this live mapping, which nobody accesses now:
        // only a guard calls this, while it says that the pages are lost.
        let renewed = unsafe { mmap(self.start.as_ptr(), self.len, libc::MAP_FIXED, file, offset) };
        if renewed.is_err() {
            self.abandoned.store(true, Ordering::SeqCst);
        }
        renewed.map(drop)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if !self.abandoned.load(Ordering::SeqCst) {
            // SAFETY: rule 1: the range is this mapping's, and nobody accesses it any more.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
        }
    }
}

/// # Safety
///
/// As for mmap(2): with `MAP_FIXED` in `flags`, whatever is mapped there must be the caller's to
/// replace.
unsafe fn mmap(
    address: *mut u8,
    len: usize,
    flags: libc::c_int,
    file: &File,
    offset: u64,
) -> io::Result<*mut u8> {
    let offset =
        libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    // SAFETY: the caller's; the descriptor is borrowed for the call.
    let start = unsafe {
        libc::mmap(
            address.cast(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | flags,
            file.as_raw_fd(),
            offset,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(start.cast())
}

/// Why the mapping did not do an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missed {
    /// It was not tried: the pages are lost, or the access is not one that it can do.
    NotTried,
    /// The pages were lost meanwhile. A load has no value, and a store may or may not have
    /// reached the device.
    Lost,
}

/// A BAR that is mapped, except for a part that is not to be touched.
pub(super) struct MappedBar {
    // The guard holds the mapping too; it goes first.
    guard: Guard,
    mapping: Arc<Mapping>,
    except: Range<u64>,
}

impl MappedBar {
    /// Maps `len` bytes of a device's descriptor from `offset` on; accesses that touch
    /// `except` (bytes of the BAR) are not done.
    pub(super) fn new(file: &File, offset: u64, len: u64, except: Range<u64>) -> io::Result<Self> {
        let too_large = |_| io::Error::from_raw_os_error(libc::EFBIG);
        let len = usize::try_from(len).map_err(too_large)?;
        let mapping = Arc::new(Mapping::new(file, offset, len)?);
        let guard = Guard::of(mapping.clone(), rustix::param::page_size(), None)?;
        Ok(Self {
            guard,
            mapping,
            except,
        })
    }

    /// Maps the BAR anew if its pages were lost; `file` and `offset` as for [`Self::new`].
    pub(super) fn repair(&self, file: &File, offset: u64) -> io::Result<()> {
        if self.is_whole() {
            return Ok(());
        }
        // A renewal that fails costs the mapping, so try first whether there is one to be had.
        drop(Mapping::new(file, offset, self.mapping.len)?);
        self.guard.repair(|| self.mapping.renew(file, offset))
    }

    /// Whether the next access will be tried.
    pub(super) fn is_whole(&self) -> bool {
        self.guard.whole().is_some()
    }

    /// Loads 1, 2, 4 or 8 bytes at a multiple of their number.
    pub(super) fn load(&self, offset: u64, data: &mut [u8]) -> Result<(), Missed> {
        let place = self.place(offset, data.len())?;
        self.guarded(|| {
            // SAFETY: rules 1 to 3: `place` has checked bounds and alignment, the mapping
            // lives as long as `self`, and the guard survives the loss of its pages. Plain
            // loads could be torn or merged.
            let value = unsafe {
                match data.len() {
                    1 => u64::from(place.as_ptr().read_volatile()),
                    2 => place.cast::<u16>().as_ptr().read_volatile().into(),
                    4 => place.cast::<u32>().as_ptr().read_volatile().into(),
                    _ => place.cast::<u64>().as_ptr().read_volatile(),
                }
            };
            fence(Ordering::Acquire);
            for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
                *byte = value;
            }
        })
    }

    /// Stores 1, 2, 4 or 8 bytes at a multiple of their number.
    pub(super) fn store(&self, offset: u64, data: &[u8]) -> Result<(), Missed> {
        let place = self.place(offset, data.len())?;
        let bytes = data.iter().rev();
        let value = bytes.fold(0u64, |value, &byte| value << 8 | u64::from(byte));
        self.guarded(|| {
            fence(Ordering::Release);
            // SAFETY: as in `load`.
            unsafe {
                match data.len() {
                    1 => place.as_ptr().write_volatile(value as u8),
                    2 => place.cast::<u16>().as_ptr().write_volatile(value as u16),
                    4 => place.cast::<u32>().as_ptr().write_volatile(value as u32),
                    _ => place.cast::<u64>().as_ptr().write_volatile(value),
                }
            }
        })
    }

    /// Where an access goes, if it is one for the mapping.
    fn place(&self, offset: u64, len: usize) -> Result<NonNull<u8>, Missed> {
        let end = offset.checked_add(len as u64).ok_or(Missed::NotTried)?;
        let aligned = matches!(len, 1 | 2 | 4 | 8) && offset % len as u64 == 0;
        let kept_off = offset < self.except.end && self.except.start < end;
        if !aligned || kept_off || end > self.mapping.len as u64 {
            return Err(Missed::NotTried);
        }
        // SAFETY: the offset lies within the mapping, so the sum does.
        Ok(unsafe { self.mapping.start.add(offset as usize) })
    }

    fn guarded(&self, access: impl FnOnce()) -> Result<(), Missed> {
        let before = self.guard.whole().ok_or(Missed::NotTried)?;
        access();
        // The access comes before the second look; in the processor a fault sees to that.
        compiler_fence(Ordering::SeqCst);
        if self.guard.whole() == Some(before) {
            Ok(())
        } else {
            Err(Missed::Lost)
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    const LEN: u64 = 0x4000;

    /// A file takes the part of a device: a hole behind its end faults as a device does that
    /// is gone.
    fn bar() -> (File, MappedBar) {
        let file = File::from(memfd_create("bar", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(LEN).unwrap();
        let bar = MappedBar::new(&file, 0, LEN, 0x2000..0x2010).unwrap();
        (file, bar)
    }

    #[test]
    fn accesses_of_every_width_arrive_in_little_endian() {
        let (_file, bar) = bar();
        bar.store(0x10, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        bar.store(0x14, &[0xa5; 4]).unwrap();
        bar.store(0x12, &[0xb6; 2]).unwrap();
        bar.store(0x11, &[0xc7]).unwrap();
        let mut bytes = [0; 8];
        bar.load(0x10, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 0xc7, 0xb6, 0xb6, 0xa5, 0xa5, 0xa5, 0xa5]);
        bar.load(0x12, &mut bytes[..2]).unwrap();
        assert_eq!(bytes[..2], [0xb6, 0xb6]);
    }

    #[test]
    fn misaligned_odd_foreign_and_outside_accesses_are_not_tried() {
        let (_file, bar) = bar();
        let cases = [
            (1, 2),
            (4, 8),
            (0, 3),
            (0, 16),
            (0, 0),
            (LEN, 4),
            (u64::MAX, 4),
            (0x2000, 4),
            (0x200f, 1),
            (0x2008, 8),
        ];
        for (offset, len) in cases {
            let mut data = vec![0; len];
            assert_eq!(bar.load(offset, &mut data), Err(Missed::NotTried));
            assert_eq!(bar.store(offset, &data), Err(Missed::NotTried), "{offset}");
        }
        assert_eq!(bar.store(0x2010, &[0; 4]), Ok(()));
        assert_eq!(bar.store(0x1ff8, &[0; 8]), Ok(()));
    }

    #[test]
    fn lost_pages_are_told_and_come_back_by_repair() {
        let (file, bar) = bar();
        bar.store(0, &[7; 4]).unwrap();
        file.set_len(0).unwrap();
        assert_eq!(bar.store(0x3000, &[1; 4]), Err(Missed::Lost));
        assert!(!bar.is_whole());
        let mut data = [0; 4];
        assert_eq!(bar.load(0, &mut data), Err(Missed::NotTried));

        file.set_len(LEN).unwrap();
        bar.repair(&file, 0).unwrap();
        assert!(bar.is_whole());
        bar.store(0x3000, &[9; 4]).unwrap();
        bar.load(0x3000, &mut data).unwrap();
        assert_eq!(data, [9; 4]);

        // Again, since a repair must not use up the guard.
        file.set_len(0).unwrap();
        assert_eq!(bar.load(0, &mut data), Err(Missed::Lost));
    }

    #[test]
    fn repair_that_fails_leaves_the_pages_lost() {
        let (file, bar) = bar();
        file.set_len(0).unwrap();
        assert_eq!(bar.store(0, &[1]), Err(Missed::Lost));
        let read_only = File::open("/proc/self/exe").unwrap();
        assert!(bar.repair(&read_only, 0).is_err());
        assert!(!bar.is_whole());
        file.set_len(LEN).unwrap();
        bar.repair(&file, 0).unwrap();
        assert_eq!(bar.store(0, &[1]), Ok(()));
    }
}
