//! The software NVMe controller on memory and on nothing: what is true with a file is true with
//! memory, although commands are carried out by whoever rings a doorbell, and what is peculiar
//! to that way.

#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it cannot go on"
)]

#[path = "soft_nvme/bench.rs"]
#[allow(dead_code, reason = "tests of files need more of it")]
mod bench;
#[path = "soft_nvme/hostile.rs"]
mod hostile;
#[path = "soft_nvme/inline.rs"]
mod inline;
#[path = "soft_nvme/io.rs"]
mod io;
#[path = "soft_nvme/queues.rs"]
mod queues;

/// What a controller of these tests keeps its data in.
fn backing_of(_: std::path::PathBuf) -> farbus_vfio::soft_nvme::SoftNvmeConfig {
    farbus_vfio::soft_nvme::SoftNvmeConfig::memory(bench::SIZE)
}
