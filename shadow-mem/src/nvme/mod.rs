//! The NVMe engine: a mediated passthrough.
//!
//! The guest's queues stay on the compute side and the device's on the device side; commands
//! cross by tag, each in one message with its data. [`compute`] fetches them from the guest,
//! [`device`] places them in the real queues with PRPs that point into the buffer shadow.

pub mod compute;
pub mod description;
pub mod device;
pub mod identify;
pub mod prp;
pub mod record;
pub mod ring;
mod slots;
pub mod transfer;
