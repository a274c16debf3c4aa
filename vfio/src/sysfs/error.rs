//! Why a function could not be lent, or given back.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::Obstacle;
use crate::PciAddress;

/// Why a function could not be lent, or given back. The sentences hold the remedy.
#[derive(Debug, thiserror::Error)]
pub enum SysfsError {
    /// There is no such function.
    #[error(
        "there is no PCI function {address}; `farbus-device-server list` shows those there are"
    )]
    NoFunction {
        /// What was asked for.
        address: PciAddress,
    },
    /// Something stands against lending it.
    #[error("{address} cannot be lent: {obstacle}; {}", .obstacle.remedy())]
    Obstacle {
        /// What was asked for.
        address: PciAddress,
        /// What stands against it.
        obstacle: Obstacle,
    },
    /// It is not bound to VFIO, and nobody asked for that.
    #[error(
        "{address} is bound to {driver} and not to vfio-pci; add --bind to have it bound while it is exported"
    )]
    NotBound {
        /// What was asked for.
        address: PciAddress,
        /// The driver that has it, or `no driver`.
        driver: String,
    },
    /// This process has let go of it, and the kernel has not.
    #[error("the kernel is still closing {address}")]
    Closing {
        /// The function.
        address: PciAddress,
    },
    /// Another process has lent it.
    #[error("{address} is lent by process {pid} already; end that one first")]
    Lent {
        /// What was asked for.
        address: PciAddress,
        /// Who has it.
        pid: u32,
    },
    /// The kernel did not bind it.
    #[error(
        "{address} was given to {wanted}, and {found} has it now; the kernel's log (dmesg) may say why"
    )]
    Probe {
        /// Which function.
        address: PciAddress,
        /// The driver that should have it.
        wanted: String,
        /// The driver that has it, or `no driver`.
        found: String,
    },
    /// The kernel refused a write.
    #[error("{} did not take {value:?}{}", .path.display(), remedy_for(.source))]
    Write {
        /// The attribute.
        path: PathBuf,
        /// What was to be written.
        value: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The number of virtual functions cannot be had.
    #[error("{address} cannot have {wanted} virtual functions: {why}")]
    Sriov {
        /// The physical function.
        address: PciAddress,
        /// How many were asked for.
        wanted: u16,
        /// What is against it, and what helps.
        why: String,
    },
    /// The record of lent functions cannot be used.
    #[error("the record of lent functions {} {what}", .path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what helps.
        what: String,
        /// The cause, if there is a deeper one.
        #[source]
        source: Option<io::Error>,
    },
    /// Another process is changing the record, and does not end.
    #[error(
        "the record of lent functions {} has been locked by another process for {waited:?}; is a farbus-device-server hanging?",
        .path.display()
    )]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
}

fn remedy_for(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => "; only root may write there",
        io::ErrorKind::NotFound => "; is the device still there?",
        _ => "",
    }
}
