//! What the fuzz targets do with their input. Each target has a module here, and is one call
//! of it in `fuzz_targets/`.
//!
//! | module | whose bytes | what must hold |
//! |---|---|---|
//! | [`fabric`] | a peer's stream | what decodes encodes to the same bytes; TCP delivers just that |
//! | [`ring`] | a peer over RDMA | its messages lie within the ring and not over each other |
//! | [`config`] | a peer's configuration space, a VMM's accesses | it keeps its promises to the guest |
//! | [`guest`] | a guest, with a real device half behind it | the halves agree, nothing is lost |
//! | [`shared`] | the driver of a portion of a shared drive | the other portions' blocks and memory stay |
//! | [`device`] | a peer and a device, around the device half | no DMA leaves the claim's memory |
//!
//! The vfio-user target needs no module: the compute agent has the conversation itself.
//!
//! Around the engine are fakes that watch it: [`link`] carries frames in memory and checks
//! each of them, [`nvme`] is a controller that checks each command it gets and otherwise
//! does what the input says.

#![forbid(unsafe_code)]

pub mod config;
pub mod device;
pub mod fabric;
pub mod guest;
pub mod input;
pub mod link;
pub mod nvme;
pub mod ring;
pub mod shared;
