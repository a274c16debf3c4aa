//! Custody: how an attachment outlives the process that carries it.
//!
//! The daemon is the *keeper*: it holds duplicates of every descriptor that a worker cannot get again
//! (the VMM's connection, the listener, guest memory, interrupts, and the memory that the worker's
//! state is in). A *worker* says at a SEQPACKET socket who it is, gets what is held in its name,
//! and hands over what is new. When it dies, its successor says the same name and goes on.
//!
//! | module | knows |
//! |---|---|
//! | [`messages`] | the datagrams between the two, and their bounds |
//! | [`keeper`] | the daemon's side |
//! | [`fdstore`] | what systemd holds for it, should daemon and worker die at once |
//! | [`worker`], [`attend`] | the worker's side |
//! | [`statistics`] | what a worker has counted, read by the daemon at any time |
//!
//! Nothing of this is on the way of an I/O: the worker's state changes in memory that the
//! keeper holds anyway, and descriptors are handed over when a VMM sets its device up.

pub mod attend;
pub mod fdstore;
pub mod keeper;
pub mod messages;
pub mod socket;
pub mod statistics;
pub mod worker;

pub use keeper::{Event, Keeper, KeeperError};
pub use statistics::Statistics;
pub use worker::{Client, Custody, CustodyError};
