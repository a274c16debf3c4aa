//! The device server: exports PCIe functions to compute servers.
//!
//! [`exports`] knows what is exported and who has claimed it; [`manager`] is the connection
//! manager, which takes a connection from its first byte to a claim and joins it to the
//! function; [`attachment`] is the event loop of one claim, `lane` that of each further connection
//! that the claim has. [`service`] keeps all that in line with a configuration file ([`config`]) and
//! offers an admin interface. [`sources`] opens what is exported
//! and gives it back to the host at the end; [`doctor`] says whether a host is ready for that.

#![forbid(unsafe_code)]

pub mod attachment;
pub mod cli;
pub mod config;
pub mod doctor;
pub mod exports;
mod join;
mod lane;
mod lanes;
mod liveness;
pub mod manager;
mod refusals;
pub mod service;
pub mod slices;
pub mod sources;
