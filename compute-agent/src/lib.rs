//! The compute server's side of Farbus: it offers functions that sit elsewhere to the VMMs
//! of this host.
//!
//! - [`api`]: the JSON of the REST interface.
//! - [`cli`]: the command line.
//! - [`daemon`]: the agent as a service.
//! - [`worker`]: one attachment's event loop, which joins the endpoint and the link.
//! - [`lanes`]: its further data threads, if it has several.
//! - [`reconnect`]: how a lost link is replaced.
//! - [`upkeep`]: what an event loop does to keep its link.
//! - [`vfio_user`], [`vhost_user`]: the endpoints that a VMM connects to.
//! - [`custody`]: how an attachment outlives the process that carries it.
//! - [`hotplug`]: what plugs an endpoint into a running VM.
//! - [`peer`]: who is at the other end of a socket.
//! - [`sandbox`]: what a worker gives up once it is set up.
//! - [`guest_memory`]: the memory of the guest, as the VMM hands it over.
#![deny(unsafe_code)]

pub mod api;
pub mod cli;
pub mod custody;
pub mod daemon;
pub mod guest_memory;
pub mod hotplug;
pub mod lanes;
pub mod peer;
pub mod reconnect;
pub mod sandbox;
mod timer;
pub mod upkeep;
pub mod vfio_user;
pub mod vhost_user;
pub mod worker;
