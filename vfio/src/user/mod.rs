//! vfio-user: PCIe functions behind a UNIX socket.
//!
//! The protocol (version 0.1, QEMU's `docs/interop/vfio-user.rst`, called "the
//! specification" here) carries the calls of kernel VFIO as messages. [`wire`] and [`body`]
//! are its format, shared by both ends; [`caps`] is the JSON of its handshake; [`Client`] is
//! the VMM's end of the socket; [`UserFunction`] makes a [`Function`](crate::Function) of
//! what a client reaches. The server's end lives in the compute agent.
//!
//! Decoding never panics, never reads beyond the message, and never allocates by a size
//! that the peer names.
#![deny(unsafe_code)]

pub mod body;
pub mod caps;
mod client;
mod describe;
mod error;
pub mod event;
mod function;
mod memory;
mod socket;
pub mod wire;

pub use client::{Client, Reply};
pub use error::ClientError;
pub use function::UserFunction;
pub use memory::DmaMemory;
pub use wire::{Command, Header, WireError};

#[cfg(test)]
mod client_tests;
#[cfg(test)]
mod function_tests;
#[cfg(test)]
mod tests;
