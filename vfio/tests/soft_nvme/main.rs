//! The software NVMe controller, driven through the `Function` seam and nothing else, the way
//! a host would drive a real one.

#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it cannot go on"
)]

mod admin;
mod backing;
mod bench;
mod events;
mod features;
mod function;
mod hostile;
mod io;
mod queues;
mod registers;
mod resize;

/// What a controller of these tests keeps its data in.
fn backing_of(path: std::path::PathBuf) -> farbus_vfio::soft_nvme::SoftNvmeConfig {
    farbus_vfio::soft_nvme::SoftNvmeConfig::new(path)
}
