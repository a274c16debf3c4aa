//! The endpoint for VMMs that speak vhost-user: a remote drive as a virtio block device.
//!
//! Here the agent is the drive's driver. The guest's memory is mapped for the function at guest
//! addresses, a request's buffers become PRP entries as they are, and engine, buffer shadow and
//! link are the same as for vfio-user: no data is copied on this side but what PRPs cannot name
//! ([`pieces`]).
//!
//! - [`worker`]: the event loop; [`socket`]: where VMMs come from.
//! - [`channel`], [`device`]: the VMM's messages, and what they do; [`config`], [`memory`],
//!   [`notifier`], [`vring`]: what they set up.
//! - [`ring`], [`chain`], [`request`], [`work`], [`pieces`]: from the available ring to commands of
//!   the drive and back; [`inflight`]: what survives this process.
//! - [`iommu`], [`space`]: guests whose driver is behind an IOMMU.
//! - [`drive`]: the drive's driver.

pub mod back;
mod bounce;
pub mod chain;
pub mod channel;
pub mod cli;
pub mod config;
pub mod device;
pub mod drive;
mod fuzz;
mod handler;
pub mod inflight;
pub mod iommu;
pub mod memory;
pub mod notifier;
pub mod pieces;
mod reactor;
pub mod request;
pub mod ring;
pub mod socket;
pub mod space;
pub mod vring;
pub mod work;
pub mod worker;

pub use fuzz::fuzz_request;
pub use iommu::fuzz_iotlb;
