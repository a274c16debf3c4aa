//! The whole path without a VM: a software drive, the connection manager, TCP, the remote
//! function and a small NVMe driver in the guest's place, all in this process.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod bed;
mod claims;
mod data;
mod guest;
mod joining;
mod lanes;
mod notices;
mod proxy;
mod resume;
