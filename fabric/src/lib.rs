//! The remote transport: what the two sides say to each other, and what carries it.
//!
//! * [`wire`] is the protocol: frames, messages, versions. Pure functions over bytes.
//! * [`link`] is the seam between the protocol and a provider: ordered messages, each with a
//!   small control part and a payload that lands directly in registered memory.
//! * [`tcp`] is the provider for an ordinary network; `verbs` (a feature) is the one for RDMA.
//! * [`ring`] is how much one side may put into the memory in which the other gets its messages over RDMA.
//! * [`provider`] is the choice between them.
//! * [`session`] takes a new connection to the point where it is claimed.
//!
//! The crate knows nothing of PCIe functions or device classes: commands, completions and
//! engine descriptions are opaque bytes to it. `docs/protocol.md` is the specification.

#![deny(unsafe_code)]

pub mod error;
pub mod link;
pub mod provider;
pub mod ring;
pub mod session;
pub mod tcp;
#[cfg(feature = "verbs")]
pub mod verbs;
pub mod wire;

pub use error::FabricError;
pub use link::{Counters, Frame, Link, Received, RemoteSpan, Sink, Span};
pub use tcp::TcpLink;
