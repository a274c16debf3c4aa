//! The ioctls of `linux/vfio.h` and `linux/iommufd.h`.
//!
//! Rules of this module:
//!
//! 1. Descriptors are borrowed from owners that outlive the call.
//! 2. A structure is a byte buffer whose first word, `argsz` (`size` with iommufd), is its length.
//!    The kernel reads and writes no byte behind that, so that no request can touch memory that is
//!    not the buffer's. Requests of that form are the [`Structured`] ones, and only this module
//!    can name them.
//! 3. Other requests take nothing, a number, or a pointer that lives for the call.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use iommufd_bindings::iommufd::{
    IOMMUFD_CMD_IOAS_ALLOC, IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_CMD_IOAS_MAP,
    IOMMUFD_CMD_IOAS_UNMAP, IOMMUFD_TYPE, iommu_ioas_iova_ranges,
};
use vfio_bindings::bindings::vfio::{VFIO_BASE, VFIO_TYPE};
use vmm_sys_util::ioctl::{_IOC_NONE, ioctl_expr};

/// More ranges than this an IOMMU does not have.
const MAX_RANGES: u32 = 4096;

/// A request's number. VFIO's say nothing of direction and size.
const fn request(number: u32) -> libc::c_ulong {
    ioctl_expr(_IOC_NONE, VFIO_TYPE as u32, VFIO_BASE + number, 0)
}

/// The same for iommufd's.
const fn iommufd_request(number: u32) -> libc::c_ulong {
    ioctl_expr(_IOC_NONE, IOMMUFD_TYPE as u32, number, 0)
}

/// Requests that take nothing or a number.
#[derive(Clone, Copy)]
pub(super) enum Plain {
    GetApiVersion,
    CheckExtension,
    SetIommu,
    DeviceReset,
}

/// Requests whose structure begins with `argsz`.
#[derive(Clone, Copy)]
pub(super) enum Structured {
    GroupGetStatus,
    DeviceGetInfo,
    DeviceGetRegionInfo,
    DeviceGetIrqInfo,
    DeviceSetIrqs,
    DeviceGetHotResetInfo,
    DeviceHotReset,
    IommuGetInfo,
    IommuMapDma,
    IommuUnmapDma,
    DeviceBindIommufd,
    DeviceAttachIoas,
    IoasAllocate,
    IoasMap,
    IoasUnmap,
}

impl Plain {
    fn number(self) -> libc::c_ulong {
        request(match self {
            Self::GetApiVersion => 0,
            Self::CheckExtension => 1,
            Self::SetIommu => 2,
            Self::DeviceReset => 11,
        })
    }
}

impl Structured {
    fn number(self) -> libc::c_ulong {
        request(match self {
            Self::GroupGetStatus => 3,
            Self::DeviceGetInfo => 7,
            Self::DeviceGetRegionInfo => 8,
            Self::DeviceGetIrqInfo => 9,
            Self::DeviceSetIrqs => 10,
            // The numbers 12 and 13 mean one thing at a device and another at a container.
            Self::DeviceGetHotResetInfo | Self::IommuGetInfo => 12,
            Self::DeviceHotReset | Self::IommuMapDma => 13,
            Self::IommuUnmapDma => 14,
            Self::DeviceBindIommufd => 18,
            Self::DeviceAttachIoas => 19,
            Self::IoasAllocate => return iommufd_request(IOMMUFD_CMD_IOAS_ALLOC),
            Self::IoasMap => return iommufd_request(IOMMUFD_CMD_IOAS_MAP),
            Self::IoasUnmap => return iommufd_request(IOMMUFD_CMD_IOAS_UNMAP),
        })
    }
}

/// A structure for the kernel; fields are named by their offset in bytes.
pub(super) struct Args(Vec<u8>);

impl Args {
    /// All zero but for `argsz`; `len` is at least 4.
    pub(super) fn new(len: usize) -> Self {
        let mut args = Self(vec![0; len]);
        args.set_u32(0, len as u32);
        args
    }

    /// The length that the kernel would have liked.
    pub(super) fn wanted(&self) -> usize {
        self.u32(0) as usize
    }

    /// What is at `at`, or 0 behind the end.
    pub(super) fn u16(&self, at: usize) -> u16 {
        self.bytes(at).map_or(0, u16::from_ne_bytes)
    }

    /// What is at `at`, or 0 behind the end.
    pub(super) fn u32(&self, at: usize) -> u32 {
        self.bytes(at).map_or(0, u32::from_ne_bytes)
    }

    /// What is at `at`, or 0 behind the end.
    pub(super) fn u64(&self, at: usize) -> u64 {
        self.bytes(at).map_or(0, u64::from_ne_bytes)
    }

    fn bytes<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..)?.get(..N)?.try_into().ok()
    }

    /// Sets what is at `at`; nothing behind the end.
    pub(super) fn set_u32(&mut self, at: usize, value: u32) {
        self.set(at, &value.to_ne_bytes());
    }

    /// Sets what is at `at`; nothing behind the end.
    pub(super) fn set_u64(&mut self, at: usize, value: u64) {
        self.set(at, &value.to_ne_bytes());
    }

    fn set(&mut self, at: usize, value: &[u8]) {
        let place = self.0.get_mut(at..).and_then(|b| b.get_mut(..value.len()));
        if let Some(place) = place {
            place.copy_from_slice(value);
        }
    }
}

fn checked(outcome: libc::c_int) -> io::Result<u32> {
    u32::try_from(outcome).map_err(|_| io::Error::last_os_error())
}

/// A request that takes a number.
pub(super) fn plain(fd: BorrowedFd<'_>, request: Plain, argument: u32) -> io::Result<u32> {
    let argument = libc::c_ulong::from(argument);
    // SAFETY: rules 1 and 3: these requests take numbers, so the kernel touches no memory of
    // ours. There is no safe interface to VFIO.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), request.number() as _, argument) })
}

/// A request with a structure.
pub(super) fn structured(
    fd: BorrowedFd<'_>,
    request: Structured,
    args: &mut Args,
) -> io::Result<u32> {
    // A refused call may have left the length there that the kernel would have liked.
    let len = args.0.len() as u32;
    args.set_u32(0, len);
    // SAFETY: rules 1 and 2: `argsz` is the length of the buffer, which is borrowed for the
    // call and is at least as long as `argsz` itself. Addresses within a DMA_MAP are not
    // dereferenced; see `map_dma` for those.
    checked(unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            request.number() as _,
            args.0.as_mut_ptr().cast::<libc::c_void>(),
        )
    })
}

/// `IOMMU_IOAS_IOVA_RANGES`: an address space's page size, and its first `room` ranges, first and
/// last address; or an error that says how many there are (EMSGSIZE).
pub(super) fn iova_ranges(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
    room: &mut Vec<[u64; 2]>,
) -> io::Result<u64> {
    type Ranges = iommu_ioas_iova_ranges;
    let mut args = Args::new(size_of::<Ranges>());
    args.set_u32(offset_of!(Ranges, ioas_id), ioas);
    args.set_u32(offset_of!(Ranges, num_iovas), room.len() as u32);
    args.set_u64(offset_of!(Ranges, allowed_iovas), room.as_mut_ptr() as u64);
    // SAFETY: rules 1 and 2, but for one pointer in the structure: the kernel writes at most
    // `num_iovas` ranges there, each of two u64, and that is what there is room for.
    let outcome = checked(unsafe {
        libc::ioctl(
            iommufd.as_raw_fd(),
            iommufd_request(IOMMUFD_CMD_IOAS_IOVA_RANGES) as _,
            args.0.as_mut_ptr().cast::<libc::c_void>(),
        )
    });
    room.resize(
        args.u32(offset_of!(Ranges, num_iovas)).min(MAX_RANGES) as usize,
        [0; 2],
    );
    outcome?;
    Ok(args.u64(offset_of!(Ranges, out_iova_alignment)))
}

/// `VFIO_GROUP_SET_CONTAINER`.
pub(super) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> io::Result<()> {
    let container: RawFd = container.as_raw_fd();
    // SAFETY: rules 1 and 3: the kernel reads one int, which lives until the call returns.
    checked(unsafe {
        libc::ioctl(
            group.as_raw_fd(),
            request(4) as _,
            std::ptr::from_ref(&container),
        )
    })
    .map(drop)
}

/// `VFIO_GROUP_GET_DEVICE_FD`: the descriptor of the device of that name.
pub(super) fn device_of(group: BorrowedFd<'_>, name: &CStr) -> io::Result<File> {
    // SAFETY: rules 1 and 3: the kernel reads a text that ends with a zero and lives until the
    // call returns.
    let fd = checked(unsafe { libc::ioctl(group.as_raw_fd(), request(6) as _, name.as_ptr()) })?;
    // SAFETY: the kernel has just made this descriptor for us, so nobody else owns it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_linux_vfio_h() {
        // `_IO(';', 100 + n)`.
        assert_eq!(Plain::GetApiVersion.number(), 0x3b64);
        assert_eq!(Plain::DeviceReset.number(), 0x3b6f);
        assert_eq!(Structured::IommuMapDma.number(), 0x3b71);
        assert_eq!(Structured::DeviceBindIommufd.number(), 0x3b76);
        // `_IO(';', 0x80 + n)` of linux/iommufd.h.
        assert_eq!(Structured::IoasAllocate.number(), 0x3b81);
        assert_eq!(Structured::IoasUnmap.number(), 0x3b86);
    }

    #[test]
    fn fields_behind_the_end_read_as_zero_and_take_nothing() {
        let mut args = Args::new(8);
        args.set_u32(4, 7);
        args.set_u64(4, u64::MAX);
        args.set_u32(usize::MAX, 1);
        assert_eq!((args.u32(0), args.u32(4), args.u64(4)), (8, 7, 0));
        assert_eq!((args.u16(7), args.u64(usize::MAX)), (0, 0));
    }
}
