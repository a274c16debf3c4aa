//! BAR mirrors, buffer shadows, and the engines that keep them in step.
//!
//! An engine knows, for one device class, which bytes must be the same on both sides at which
//! moment. It has two halves: the *compute half* is the function that a VMM sees, the *device
//! half* drives the real one. Between them is a [`session::Session`] over the fabric.
//!
//! * [`guest`]: guest memory as the VMM maps it.
//! * [`limits`]: limits of a claim as people write them.
//! * [`shadow`]: the buffer shadow and who gets which of its pages.
//! * [`nvme`]: the NVMe engine.
//! * [`polling`]: how a data thread waits for work.
//! * [`remote`]: a function that sits in another server, as a [`farbus_vfio::Function`].

#![forbid(unsafe_code)]

pub mod guest;
pub mod limits;
pub mod nvme;
pub mod polling;
pub mod remote;
pub mod session;
pub mod shadow;
