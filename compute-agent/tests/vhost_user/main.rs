//! The vhost-user endpoint without a VMM and without a network: a driver that puts what it likes
//! into the rings of a device on a software drive.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it cannot go on"
)]
#![allow(
    clippy::duplicate_mod,
    reason = "the same tests are run of a guest behind an IOMMU"
)]

mod behind;
mod harness;
mod hostile;
mod iommu;
mod memory;
mod messages;
mod recovery;
mod requests;
