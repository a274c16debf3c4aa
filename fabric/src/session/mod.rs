//! From a new connection to a claimed one.
//!
//! Set-up is a short exchange in which each side knows what the other says next, so it blocks;
//! each side bounds the time that it spends waiting for the other, over the whole exchange.
//! A peer that is silent, or sends a byte now and then, is dropped when that time is used up.
//!
//! The claim itself is made over TCP. Between it and the description both sides may agree to go on
//! over RDMA ([`crate::provider`]); the TCP connection then only tells of each other's end.
//!
//! What comes out is a [`Link`](crate::Link) with its epoch set. Before that there is no link to
//! be had: a connection that is not claimed has no method that touches the device.

mod budget;
mod channel;
pub mod client;
mod dial;
mod list;
mod rdma;
pub mod server;

pub use client::ClaimedLink;
