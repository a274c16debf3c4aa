//! The PCI functions of this host, as sysfs and procfs show them, and which driver has them.
//!
//! [`Host`] is the door: it reads below a root that the caller gives, and writes through a
//! [`Kernel`], so that tests run on a made-up tree. [`Inventory`] is one look at all
//! functions; [`users`] finds who uses one; [`Bindings`] lends functions to the VFIO driver and
//! gives them back, also those that a process which died had lent.
//!
//! What is read here is text from the kernel, about devices that may lie: every file is read up
//! to a bound, and what cannot be understood counts as absent.
#![forbid(unsafe_code)]

pub mod acs;
pub mod bindings;
mod class;
mod error;
#[cfg(any(test, feature = "fake-host"))]
pub mod fake;
mod host;
mod inventory;
mod obstacles;
mod process;
mod record;
pub mod sriov;
pub mod users;
mod virtualization;

pub use bindings::Bindings;
pub use class::ClassCode;
pub use error::SysfsError;
pub use host::{Host, Kernel};
pub use inventory::{Inventory, Member, PciFunction, Sriov};
pub use obstacles::Obstacle;
pub use users::User;

/// Where iommufd is, below the root.
pub const IOMMUFD: &str = "dev/iommu";

/// The kernel's generic VFIO driver for PCI functions.
pub const VFIO_DRIVER: &str = "vfio-pci";

#[cfg(test)]
mod tests;
