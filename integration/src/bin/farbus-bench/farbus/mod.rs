//! Farbus itself: a software NVMe drive, lent over TCP.
//!
//! It is measured at four places: at the vfio-user endpoint of a compute agent and at its vhost-user-blk endpoint, as
//! a VMM sees them; with the compute half in the process of the load, as SPDK's perf tool has it; and from within a
//! guest.

mod endpoint;
mod guest;
mod in_process;
pub(crate) mod load;
mod path;
mod vhost_user;

use anyhow::Result;
use farbus_integration::tools::Tools;

use crate::session::Subject;

/// Nobody polls.
pub(crate) const ENDPOINT: &str = "Farbus endpoint";
/// Both daemons poll while it pays: what an operator gets.
pub(crate) const ENDPOINT_ADAPTIVE: &str = "Farbus endpoint, adaptive";
/// The same, and each side has two data threads with a connection each.
pub(crate) const ENDPOINT_THREADS: &str = "Farbus endpoint, 2 data threads";
/// The same with a drive that moves no data, to be seen beside [`NBD_NULL`](crate::peers::NBD_NULL); its
/// memory is the daemons' own.
pub(crate) const ENDPOINT_NULL: &str = "Farbus endpoint, null drive";
/// The other endpoint, with the peers' client; both daemons poll while it pays.
pub(crate) const VHOST_USER: &str = "Farbus vhost-user-blk";
/// The compute half in the load's process; nobody polls.
pub(crate) const IN_PROCESS: &str = "Farbus in process";
/// Both sides poll.
pub(crate) const IN_PROCESS_POLLED: &str = "Farbus in process, polled";
/// fio in a guest, its drive lent over TCP.
pub(crate) const GUEST: &str = "guest's fio";
/// The same software drive behind the same kind of socket, without a fabric.
pub(crate) const GUEST_LOCAL: &str = "guest's fio, no fabric";

/// Size of the drives of a subject, all together.
const SIZE: u64 = 256 << 20;

pub(crate) fn subjects() -> Result<Vec<Box<dyn Subject>>> {
    let mut subjects: Vec<Box<dyn Subject>> = Vec::new();
    subjects.extend(endpoint::subjects());
    subjects.push(Box::new(vhost_user::VhostUser));
    subjects.extend(in_process::subjects());
    subjects.push(Box::new(guest::Guests::new(Tools::open()?)));
    Ok(subjects)
}
