//! A guest, a peer and a device that do what they must not, or at the worst moment: each
//! outcome is the one promised, and the engine works afterwards.
//!
//! The halves of the engine are driven by hand here, each over a link that only records what
//! is sent ([`wire`]): [`guest`] is in a guest's place, [`device`] in the peer's with a
//! [`fake_nvme`] behind it. What depends on bytes in flight has real sockets ([`remote`]).

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod coalescing;
mod device;
mod doorbells;
mod fake_nvme;
mod guest;
mod remote;
mod wire;

mod bad_completions;
mod bad_submissions;
mod device_life;
mod guest_life;
mod guest_queues;
mod host_memory;
mod landing;
mod opcodes;
mod rebuild;
