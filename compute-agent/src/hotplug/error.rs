//! Why a device is not where it should be, and what helps.

use std::io;
use std::time::Duration;

/// A failure of plugging or unplugging.
#[derive(Debug, thiserror::Error)]
pub enum HotplugError {
    /// No VM was named.
    #[error("no VM was named to plug the device into")]
    NoVm,
    /// Nobody listens at the VMM's socket.
    #[error(
        "cannot connect to the {what} socket {socket}: {source}; the VM must run, and this process must \
         be allowed to write to the socket"
    )]
    Connect {
        /// Which interface, such as `QMP`.
        what: &'static str,
        /// The path.
        socket: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The socket was lost in the middle.
    #[error("the {what} socket {socket} failed while {doing}: {source}")]
    Socket {
        /// Which interface.
        what: &'static str,
        /// The path.
        socket: String,
        /// What was being done.
        doing: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The VMM closed the connection, most likely since it ended.
    #[error("the VMM at {socket} closed the connection while {doing}; it may have ended")]
    Closed {
        /// The path.
        socket: String,
        /// What was being done.
        doing: String,
    },
    /// QEMU has accepted nobody.
    #[error(
        "nobody speaks at the QMP socket {socket} after {after:?}: most likely another program is connected, \
         since QEMU serves one at a time; give the agent one of its own \
         (-qmp unix:PATH,server=on,wait=off)"
    )]
    Busy {
        /// The path.
        socket: String,
        /// How long was waited.
        after: Duration,
    },
    /// The socket is another program's.
    #[error("what listens at {socket} does not speak {protocol}; it said: {said}")]
    WrongProtocol {
        /// The path.
        socket: String,
        /// What it should speak.
        protocol: &'static str,
        /// The beginning of what it said instead.
        said: String,
    },
    /// The VMM does not answer.
    #[error("the VMM at {socket} did not answer within {after:?} while {doing}")]
    Timeout {
        /// The path.
        socket: String,
        /// How long was waited, in all.
        after: Duration,
        /// What was being done.
        doing: String,
    },
    /// The VMM refused.
    #[error("the VMM refuses {request}: {reason}{remedy}")]
    Refused {
        /// What it was asked.
        request: String,
        /// What it said.
        reason: String,
        /// What helps, if that is known; begins with a semicolon.
        remedy: &'static str,
    },
    /// The guest's memory cannot be shared.
    #[error(
        "the memory '{backend}' of the VM is not shared, so that no other process can reach what the guest \
         puts there; {remedy}"
    )]
    MemoryNotShared {
        /// Its name at the VMM.
        backend: String,
        /// How to start the VM instead.
        remedy: &'static str,
    },
    /// There is nowhere to plug into.
    #[error(
        "QEMU has no free root port that takes hot-plug ({ports} ports looked at); start it with more \
         (-device pcie-root-port,id=rpN,chassis=N,slot=N), or name a bus"
    )]
    NoFreePort {
        /// How many ports there are.
        ports: usize,
    },
    /// The name is taken by something else.
    #[error("the VM has a {found} named {name} already; remove it, or use another id")]
    NameTaken {
        /// The name.
        name: String,
        /// What it is.
        found: String,
    },
    /// The guest did not let go in time.
    #[error(
        "the guest has not let go of {name} within {after:?}; it has been asked, and may still do so: \
         unplug again, or by force"
    )]
    GuestKeeps {
        /// The device's name at the VMM.
        name: String,
        /// How long was waited, in all.
        after: Duration,
    },
    /// The guest said no.
    #[error("the guest refuses to let go of {name}; stop what uses it there, and unplug again")]
    GuestRefused {
        /// The device's name at the VMM.
        name: String,
    },
}

impl HotplugError {
    /// Whether it is the guest that keeps the device, so that asking again later may do.
    pub fn is_the_guests_will(&self) -> bool {
        matches!(self, Self::GuestKeeps { .. } | Self::GuestRefused { .. })
    }

    /// Whether the VMM has ended: nobody listens at its socket, or it has hung up. That it cannot be
    /// asked for another reason, such as a lack of descriptors, says nothing about it.
    pub fn is_vmm_gone(&self) -> bool {
        match self {
            Self::Closed { .. } => true,
            Self::Connect { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ),
            _ => false,
        }
    }
}
