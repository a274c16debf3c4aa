//! The provider for RDMA: a reliable connection whose both sides write into each other's memory.
//!
//! A frame's payload is written where it belongs, straight out of the memory that it is in; the
//! control part follows with the last write, into a ring of messages at the peer ([`crate::ring`]), with
//! immediate data that tells it so. A frame is one chain of work requests, posted with one
//! doorbell. What goes from one queue pair to the other is placed in order, so a payload is there
//! before its message is seen.
//!
//! * [`raw`] is libibverbs, and all that is unsafe.
//! * `route` and `prepare` set a connection up, over the TCP connection that the claim was made
//!   on. That stays as the *control connection*: its end is the peer's.
//! * `windows` registers this side's memory, `keys` knows the peer's.
//! * `sends` and `link` carry frames.
//!
//! Every connection has a protection domain, queues and keys of its own. They end with it, and
//! with them every right that the peer had: what it still sends, the device refuses.

mod keys;
mod link;
mod prepare;
pub mod raw;
mod route;
mod sends;
mod survey;
mod windows;

pub use link::VerbsLink;
pub(crate) use prepare::{Prepared, locked_memory};
pub use survey::{PortReport, survey};
