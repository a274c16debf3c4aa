//! The bodies that follow the header, one type per message of the specification.
//!
//! A body is decoded from the bytes after the header. Those with a fixed layout tolerate
//! trailing bytes, as the specification lets a request be longer than its fixed part; those
//! with data check that the data has exactly the length that the body says.

mod irqs;
mod multi;

pub use irqs::{IrqAction, IrqData, SetIrqs};
pub use multi::{MultiWrite, WriteMulti};

use super::wire::{FLAG_NO_REPLY, WireError};

/// Defines a body with a fixed layout: its fields in wire order, without padding.
macro_rules! fixed_body {
    (
        $(#[$doc:meta])*
        $name:ident, $len:literal, $what:literal {
            $( $(#[$field_doc:meta])* $field:ident: $type:ty, )*
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name {
            $( $(#[$field_doc])* pub $field: $type, )*
        }

        impl $name {
            /// Length in bytes.
            pub const LEN: usize = $len;
            /// The name in the specification.
            pub const NAME: &'static str = $what;

            /// Reads the body from the beginning of `bytes`.
            pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
                let mut fields = Fields { rest: bytes, what: $what, len: bytes.len(), need: $len };
                Ok(Self { $( $field: <$type>::from_ne_bytes(fields.take()?), )* })
            }

            /// Writes the body.
            pub fn encode(&self) -> [u8; $len] {
                let mut bytes = [0; $len];
                let mut rest: &mut [u8] = &mut bytes;
                $( put(&mut rest, &self.$field.to_ne_bytes()); )*
                debug_assert!(rest.is_empty());
                bytes
            }
        }
    };
}

/// What is left of a body while its fields are read.
struct Fields<'a> {
    rest: &'a [u8],
    what: &'static str,
    len: usize,
    need: usize,
}

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (field, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(WireError::BodyTooShort {
                what: self.what,
                len: self.len,
                need: self.need,
            })?;
        self.rest = rest;
        Ok(*field)
    }
}

fn put(rest: &mut &mut [u8], field: &[u8]) {
    if let Some((head, tail)) = std::mem::take(rest).split_at_mut_checked(field.len()) {
        head.copy_from_slice(field);
        *rest = tail;
    }
}

fixed_body! {
    /// The fixed part of `VFIO_USER_VERSION`; version data may follow.
    Version, 4, "VERSION" {
        /// Major version.
        major: u16,
        /// Minor version.
        minor: u16,
    }
}

fixed_body! {
    /// `VFIO_USER_DMA_MAP`.
    DmaMap, 32, "DMA_MAP" {
        /// Size of this structure.
        argsz: u32,
        /// [`DMA_READ`] and [`DMA_WRITE`].
        flags: u32,
        /// Where in the file the window begins, in bytes.
        offset: u64,
        /// The IOVA of the window.
        address: u64,
        /// Its length in bytes.
        size: u64,
    }
}

/// [`DmaMap`] flag: the device may read.
pub const DMA_READ: u32 = 1 << 0;
/// [`DmaMap`] flag: the device may write.
pub const DMA_WRITE: u32 = 1 << 1;

fixed_body! {
    /// `VFIO_USER_DMA_UNMAP`.
    DmaUnmap, 24, "DMA_UNMAP" {
        /// Room for the reply.
        argsz: u32,
        /// [`UNMAP_GET_DIRTY_BITMAP`] and [`UNMAP_ALL`].
        flags: u32,
        /// The IOVA where the range begins.
        address: u64,
        /// Its length in bytes.
        size: u64,
    }
}

/// [`DmaUnmap`] flag, `VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP` of `linux/vfio.h`.
pub const UNMAP_GET_DIRTY_BITMAP: u32 = 1 << 0;
/// [`DmaUnmap`] flag, `VFIO_DMA_UNMAP_FLAG_ALL` of `linux/vfio.h`: every window goes, and
/// address and size are 0.
pub const UNMAP_ALL: u32 = 1 << 1;

fixed_body! {
    /// `VFIO_USER_DEVICE_GET_INFO`.
    DeviceInfo, 16, "DEVICE_GET_INFO" {
        /// Room for the reply; in a reply, the room that is needed.
        argsz: u32,
        /// [`DEVICE_RESET`] and [`DEVICE_PCI`].
        flags: u32,
        /// How many regions there are.
        num_regions: u32,
        /// How many kinds of interrupts there are.
        num_irqs: u32,
    }
}

/// [`DeviceInfo`] flag: the device can be reset.
pub const DEVICE_RESET: u32 = 1 << 0;
/// [`DeviceInfo`] flag: it is a PCI device.
pub const DEVICE_PCI: u32 = 1 << 1;

fixed_body! {
    /// `VFIO_USER_DEVICE_GET_REGION_INFO`.
    RegionInfo, 32, "DEVICE_GET_REGION_INFO" {
        /// Room for the reply; in a reply, the room that is needed.
        argsz: u32,
        /// [`REGION_READ`] and its like.
        flags: u32,
        /// Which region.
        index: u32,
        /// Where capabilities follow, from the beginning of this structure; 0 for none.
        cap_offset: u32,
        /// The region's size in bytes; 0 when it does not exist.
        size: u64,
        /// What to add when mapping the region.
        offset: u64,
    }
}

/// [`RegionInfo`] flag: the region can be read.
pub const REGION_READ: u32 = 1 << 0;
/// [`RegionInfo`] flag: the region can be written.
pub const REGION_WRITE: u32 = 1 << 1;
/// [`RegionInfo`] flag: the region can be mapped, through the descriptor in the reply.
pub const REGION_MMAP: u32 = 1 << 2;
/// [`RegionInfo`] flag: capabilities follow.
pub const REGION_CAPS: u32 = 1 << 3;

/// Index of configuration space among the regions (`VFIO_PCI_CONFIG_REGION_INDEX`).
pub const REGION_INDEX_CONFIG: u32 = 7;
/// How many regions a PCI device has: six BARs, ROM, configuration space and VGA.
pub const NUM_REGIONS: u32 = 9;

fixed_body! {
    /// `VFIO_USER_DEVICE_GET_REGION_IO_FDS`.
    RegionIoFds, 16, "DEVICE_GET_REGION_IO_FDS" {
        /// Room for the reply.
        argsz: u32,
        /// Zero.
        flags: u32,
        /// Which region.
        index: u32,
        /// Zero in a request.
        count: u32,
    }
}

fixed_body! {
    /// `VFIO_USER_DEVICE_GET_IRQ_INFO`.
    IrqInfo, 16, "DEVICE_GET_IRQ_INFO" {
        /// Room for the reply; in a reply, the room that is needed.
        argsz: u32,
        /// [`IRQ_EVENTFD`] and its like.
        flags: u32,
        /// Which kind of interrupts.
        index: u32,
        /// How many there are.
        count: u32,
    }
}

/// [`IrqInfo`] flag: can be signalled through eventfds.
pub const IRQ_EVENTFD: u32 = 1 << 0;
/// [`IrqInfo`] flag: can be masked.
pub const IRQ_MASKABLE: u32 = 1 << 1;
/// [`IrqInfo`] flag: masks itself when it fires.
pub const IRQ_AUTOMASKED: u32 = 1 << 2;

/// Index of the legacy pin among the kinds of interrupts (`VFIO_PCI_INTX_IRQ_INDEX`).
pub const IRQ_INDEX_INTX: u32 = 0;
/// Index of MSI.
pub const IRQ_INDEX_MSI: u32 = 1;
/// Index of MSI-X.
pub const IRQ_INDEX_MSIX: u32 = 2;
/// How many kinds there are: pin, MSI, MSI-X, error and request.
pub const NUM_IRQS: u32 = 5;

fixed_body! {
    /// The fixed part of `VFIO_USER_REGION_READ` and `VFIO_USER_REGION_WRITE`; in a write's
    /// request and a read's reply the data follow.
    RegionAccess, 16, "REGION_READ or REGION_WRITE" {
        /// Where in the region, in bytes.
        offset: u64,
        /// Which region.
        region: u32,
        /// How many bytes.
        count: u32,
    }
}

fixed_body! {
    /// The fixed part of `VFIO_USER_DMA_READ` and `VFIO_USER_DMA_WRITE`.
    DmaTransfer, 16, "DMA_READ or DMA_WRITE" {
        /// The IOVA.
        address: u64,
        /// How many bytes.
        count: u64,
    }
}

fixed_body! {
    /// The fixed part of `VFIO_USER_DEVICE_SET_IRQS`; one byte per interrupt may follow.
    SetIrqsHead, 20, "DEVICE_SET_IRQS" {
        /// Size of the request, its data included.
        argsz: u32,
        /// One `DATA` and one `ACTION` bit.
        flags: u32,
        /// Which kind of interrupts.
        index: u32,
        /// The first interrupt.
        start: u32,
        /// How many interrupts.
        count: u32,
    }
}

/// A region write's request: the fixed part, and exactly the data it says.
pub fn decode_region_write(bytes: &[u8]) -> Result<(RegionAccess, &[u8]), WireError> {
    let access = RegionAccess::decode(bytes)?;
    let data = bytes.get(RegionAccess::LEN..).unwrap_or_default();
    if data.len() as u64 != u64::from(access.count) {
        return Err(WireError::DataLength {
            what: "REGION_WRITE",
            said: u64::from(access.count),
            carried: data.len(),
        });
    }
    Ok((access, data))
}

/// Checks an `argsz` field against what it has to cover.
pub fn at_least(what: &'static str, argsz: u32, need: usize) -> Result<(), WireError> {
    if (argsz as usize) < need {
        return Err(WireError::ArgszTooSmall {
            what,
            argsz,
            need: need as u32,
        });
    }
    Ok(())
}

/// The header flags of a command that wants a reply, or does not.
pub fn reply_flag(wanted: bool) -> u32 {
    if wanted { 0 } else { FLAG_NO_REPLY }
}
