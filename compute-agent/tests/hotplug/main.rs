//! Plugging and unplugging against VMMs that are played by a script: refusals, guests that say no,
//! and peers that are no VMM at all.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod hostile;
mod peer;
mod qemu;
