//! Functions of this host, through the kernel's VFIO.
//!
//! [`VfioFunction::open`] takes a function from the kernel by its [`PciAddress`](crate::PciAddress): it must be
//! bound to vfio-pci (or to a variant of that driver), behind an IOMMU, in a group with no function that
//! the host uses. Each function gets a container, that is an address space for DMA, of its own.
//!
//! - `open` finds the descriptors (`device`) and says what is in the way.
//! - `function` is the [`Function`](crate::Function); `bar`, `interrupts` and `dma` are its parts, and
//!   `msix` finds the table that belongs to the kernel.
//! - `space` is what DMA goes through: a container, or an IOAS of iommufd.
//! - `sys` has the ioctls. It and `bar` are the only unsafe code.
//!
//! It stands on the ioctls themselves and not on the crate `vfio-ioctls`, whose device loses the errors
//! of accesses and resets, panics when it is dropped after its function has left sysfs, and has
//! neither mappings of BARs, nor read-only DMA, nor IOVA ranges, nor resets of slots.
//!
//! Where the kernel has them, a function is opened by its own node (`/dev/vfio/devices/vfioN`) and sees
//! an address space of iommufd (`iommufd`); elsewhere by its group's node (`/dev/vfio/N`) and a
//! container, which every kernel with VFIO had before.
#![deny(unsafe_code)]

#[allow(unsafe_code, reason = "volatile access to mapped BARs")]
mod bar;
mod device;
mod dma;
mod error;
mod function;
mod interrupts;
mod iommufd;
mod msix;
mod open;
mod space;
#[allow(unsafe_code, reason = "VFIO is ioctls")]
mod sys;

pub use error::VfioError;
pub use function::VfioFunction;
