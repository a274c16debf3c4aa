//! The agent as a service: one daemon that gives devices to the VMs of this host, by REST.
//!
//! | module | knows |
//! |---|---|
//! | [`serve`] | the daemon's life |
//! | [`config`] | what the daemon is to do |
//! | [`rest`] | the interface: paths and answers |
//! | [`registry`] | which attachments there are |
//! | [`attachment`] | one of them, from the request to its end |
//! | [`choose`], [`pool`] | which devices there are, and which one is taken |
//! | [`process`], [`identity`] | worker processes |
//! | [`custody`] | what outlives a worker |
//! | [`hot_plug`] | the seam to the VMMs |
//! | [`store`] | what survives the daemon |
//! | [`events`], [`metrics`] | what is told of it |
//!
//! The daemon carries no data: that is what a worker does, one process for each attachment. A worker
//! outlives the daemon, and the next daemon takes it over.
#![forbid(unsafe_code)]

pub mod attachment;
pub mod choose;
pub mod cli;
pub mod config;
pub mod custody;
pub mod events;
pub mod hot_plug;
pub mod id;
pub mod identity;
pub mod metrics;
pub mod pool;
pub mod process;
pub mod registry;
pub mod rest;
pub mod serve;
pub mod store;
mod validate;
