//! BAR mirrors, buffer shadows, and the engines that keep them in step.
//!
//! An engine knows, for one device class, which bytes must be the same on both sides at which
//! moment. It has two halves: the *compute half* is the function that a VMM sees, the *device
//! half* drives the real one. Between them is a [`session::Session`] over the fabric.
//!
//! * [`guest`]: guest memory as the VMM maps it.
//! * [`shadow`]: the buffer shadow and who gets which of its pages.
//! * [`nvme`]: the NVMe engine.
//! * [`polling`]: how a data thread waits for work.
//! * [`remote`]: a function that sits in another server, as a [`farbus_vfio::Function`].

#![forbid(unsafe_code)]

// What unit tests share with the tests of the crate as a whole names it.
#[cfg(test)]
extern crate self as farbus_shadow_mem;

pub mod guest;
pub mod nvme;
pub mod polling;
pub mod remote;
pub mod session;
pub mod shadow;
