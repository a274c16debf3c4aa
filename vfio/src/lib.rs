//! Where PCIe functions come from.
//!
//! A [`Function`] is one PCIe function: configuration space, BARs, interrupts, DMA and
//! reset. This crate defines that seam ([`function`]), the terms of the NVMe specification
//! that several crates share ([`nvme`]), the sources of functions, and what is common to those that
//! stand [`around`] another one. It is the *local*
//! transport and knows nothing of networks.

pub mod around;
pub mod config;
pub mod driver;
pub mod function;
pub mod kernel;
pub mod nvme;
pub mod nvme_port;
pub mod pci;
pub mod shared;
pub mod sigbus;
pub mod soft_nvme;
pub mod sysfs;
pub mod user;

pub use around::Around;
pub use function::{
    DmaAccess, DmaWindow, Function, FunctionError, FunctionInfo, InterruptCounts, InterruptKind,
    Iova, Notice, RegionIndex, RegionInfo,
};
pub use pci::PciAddress;
