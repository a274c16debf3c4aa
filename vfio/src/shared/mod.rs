//! One NVMe controller for many: each gets a *portion* of it, a function of its own.
//!
//! A [`SharedDrive`] owns the physical function and its admin queue. What it gives out, a
//! [`Portion`], is a [`Function`](crate::Function) like any other: a small virtual controller with
//! one namespace, which is a slice of one of the drive's. So whatever drives a whole controller
//! drives a portion, and knows nothing of the others.
//!
//! - `slices` says which blocks a portion has; `drive` is what portions share, `share` how they
//!   share it when all of them want it, `notices` what the host says to all.
//! - `portion` is the function; `controller` has the virtual controller's registers; `admin` answers its admin commands, `identify`
//!   has the pages for that. None of them reaches the drive, but for the creation of queues.
//! - `io` is the way of an I/O command: copied once out of the virtual queue, checked and
//!   rewritten by `check`, and put into a queue of the drive that is this portion's alone. `queues`
//!   are both kinds of queues, `windows` the memory that a portion's commands may name.
//!
//! What holds a portion within its slice is `check` (blocks), `windows` (memory; the address
//! spaces of portions are disjoint) and that nothing else of the drive's is ever passed on.
//!
//! There is no thread for any of this: a doorbell write submits, and
//! [`Function::service`](crate::Function::service) completes, both on the thread of the portion's driver.
//! Between portions there are no locks but that of the admin queue.

#![forbid(unsafe_code)]

mod admin;
mod check;
mod controller;
mod drive;
mod identify;
mod io;
mod notices;
mod portion;
mod queues;
mod share;
mod slices;
mod windows;

pub use check::{Bounds, Checked, Data, check, check_range};
pub use drive::SharedDrive;
pub use portion::Portion;
pub use slices::{SharedError, SliceSpec};
