//! Our vfio-user server: offers any [`Function`](farbus_vfio::Function) to a VMM.
//!
//! An [`Endpoint`] is a UNIX socket and a subscriber of an event loop. It has no thread of
//! its own and never waits: sockets are non-blocking, a request is answered by calls of the
//! function before the next one is looked at, and one wake-up does a bounded amount of work,
//! so that other subscribers get their turn.
//!
//! The layers, from the socket inwards, so that everything above the first can be fed
//! bytes without one:
//!
//! | module | knows |
//! |---|---|
//! | `endpoint` | the event loop; which client is served and which is turned away |
//! | `connection` | one client's socket: receive, send, budget |
//! | `inbox`, `outbox` | where messages begin and end; which descriptors belong to which |
//! | `session` | one client's conversation: what each command does, what refuses it |
//! | `irqs`, `dma`, `regions` | the commands, by what they are about |
//! | `msix` | the MSI-X table, where the client is not to have it |
//!
//! The client is not trusted. What it gets wrong within a message is refused with an error
//! reply; what leaves the stream unreadable, or shows that it will not behave, ends the
//! connection. Either way the function is put back into its initial state when a client has
//! gone, and the next one may connect.

mod connection;
mod dma;
mod endpoint;
mod fuzz;
mod inbox;
mod irqs;
mod kept;
pub(crate) mod listener;
mod memory;
mod msix;
mod outbox;
mod peek;
pub(crate) mod record;
mod refusal;
mod regions;
mod session;

pub use endpoint::Endpoint;
pub use fuzz::fuzz_session;
pub use listener::EndpointError;
