//! What a worker gives up once it is set up: privileges, files, system calls. It handles what a guest,
//! a VMM and a peer send; should one of them find a fault, little is to be had here.
//!
//! In this order: another user, if one is given; no capabilities and no way to new ones; limits of
//! descriptors, of private memory, and no core files, which would hold the guest's memory; Landlock: no
//! files but those that a new claim needs, and no TCP connection but to the device server;
//! seccomp: the system calls of the event loop, of a new claim, and of guest memory (`syscalls`).
//!
//! It is entered by the calling thread, and inherited by those that it starts: so before others are.
//! Under it, the memory map of a VMM cannot be looked at. A guest whose memory is not shared is then told
//! of when it enables its controller, not when it is attached.

mod syscalls;
pub mod user;

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, LandlockStatus, NetPort, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, Scope,
};
use log::{info, warn};
use rustix::process::{Gid, Resource, Rlimit, Uid, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

pub use user::User;

/// The newest kernel interface that this knows; older ones give less.
const LANDLOCK: ABI = ABI::V6;
/// Descriptors: the vectors of MSI-X and files of guest memory, each with a duplicate for custody, and
/// some of our own.
const MAX_FDS: u64 = 8192;
/// Private memory in bytes, not counting what is shared with the guest.
const MAX_PRIVATE: u64 = 2 << 30;

/// What name resolution reads.
const RESOLVER: [&str; 8] = [
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/run/systemd/resolve",
    "/usr/lib",
    "/lib",
];
/// What the RDMA libraries read, and the devices that they open.
const VERBS: [&str; 5] = [
    "/sys",
    "/etc/libibverbs.d",
    "/usr/lib",
    "/lib",
    "/usr/lib64",
];
const VERBS_DEVICES: &str = "/dev/infiniband";
/// How this host names itself to device servers.
const HOSTNAME: &str = "/proc/sys/kernel/hostname";

/// Why a worker does not go on without.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The operating system refused.
    #[error("the worker cannot {what}; --sandbox=off does without")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Landlock failed otherwise than by not being there.
    #[error("the worker's files cannot be restricted; --sandbox=off does without")]
    Landlock(#[from] RulesetError),
    /// The filter of system calls is wrong or was refused.
    #[error("the worker's system calls cannot be restricted; --sandbox=off does without")]
    Seccomp(#[from] seccompiler::Error),
    /// A filter cannot be made for this machine.
    #[error("the worker's system calls cannot be restricted on this machine")]
    Filter(#[from] seccompiler::BackendError),
}

/// What a worker needs of the world.
#[derive(Clone, Debug)]
pub struct Needs {
    /// The device server, as `HOST:PORT`.
    pub address: String,
    /// Whether a new claim may look for RDMA.
    pub verbs: bool,
    /// Who it is to be.
    pub user: Option<User>,
}

/// Gives up everything else, for good.
pub fn enter(needs: &Needs) -> Result<(), SandboxError> {
    limit(needs.verbs)?;
    if let Some(user) = needs.user {
        become_user(user)?;
    }
    drop_privileges()?;
    restrict_files(needs)?;
    syscalls::restrict()?;
    info!("sandboxed: no privileges, no files, {} only", needs.address);
    Ok(())
}

fn failed(what: &'static str) -> impl Fn(rustix::io::Errno) -> SandboxError {
    move |source| SandboxError::Io {
        what,
        source: source.into(),
    }
}

fn limit(verbs: bool) -> Result<(), SandboxError> {
    let lower = |resource, wanted: u64| {
        let most = getrlimit(resource).maximum;
        let limit = Some(most.map_or(wanted, |most| most.min(wanted)));
        setrlimit(
            resource,
            Rlimit {
                current: limit,
                maximum: limit,
            },
        )
    };
    lower(Resource::Nofile, MAX_FDS).map_err(failed("limit its descriptors"))?;
    lower(Resource::Data, MAX_PRIVATE).map_err(failed("limit its memory"))?;
    lower(Resource::Core, 0).map_err(failed("do without core files"))?;
    if verbs {
        // What is pinned for RDMA is the guest's. Without the privilege, the limit stays as it is.
        let unlimited = Rlimit {
            current: None,
            maximum: None,
        };
        let _ = setrlimit(Resource::Memlock, unlimited);
    }
    Ok(())
}

fn become_user(user: User) -> Result<(), SandboxError> {
    let failed = failed("become the user of --user");
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    set_thread_groups(&[]).map_err(&failed)?;
    set_thread_res_gid(gid, gid, gid).map_err(&failed)?;
    set_thread_res_uid(uid, uid, uid).map_err(&failed)
}

fn drop_privileges() -> Result<(), SandboxError> {
    set_no_new_privs(true).map_err(failed("give up new privileges"))?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).map_err(failed("give up its capabilities"))
}

fn restrict_files(needs: &Needs) -> Result<(), SandboxError> {
    let port = needs.address.rsplit_once(':');
    let port = port.and_then(|(_, port)| port.parse().ok()).unwrap_or(0);
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::AbstractUnixSocket)?
        .scope(Scope::Signal)?
        .create()?
        .add_rule(NetPort::new(port, AccessNet::ConnectTcp))?;
    let (read, write) = (AccessFs::from_read(LANDLOCK), AccessFs::WriteFile);
    let mut readable = vec![HOSTNAME];
    if needs.address.parse::<SocketAddr>().is_err() {
        readable.extend(RESOLVER);
        ruleset = ruleset.add_rule(NetPort::new(53, AccessNet::ConnectTcp))?;
    }
    if needs.verbs {
        readable.extend(VERBS);
        if let Ok(devices) = PathFd::new(VERBS_DEVICES) {
            let access = AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::IoctlDev | write;
            ruleset = ruleset.add_rule(PathBeneath::new(devices, access))?;
        }
    }
    for path in readable {
        // What is not there need not be read.
        if let Ok(fd) = PathFd::new(path) {
            let access = if Path::new(path).is_dir() {
                read
            } else {
                AccessFs::ReadFile.into()
            };
            ruleset = ruleset.add_rule(PathBeneath::new(fd, access))?;
        }
    }
    match ruleset.restrict_self()?.landlock {
        LandlockStatus::NotEnabled => warn!(
            "this kernel has Landlock switched off (add landlock to the parameter lsm=); the worker \
             can open what its user can"
        ),
        LandlockStatus::NotImplemented => {
            warn!("this kernel has no Landlock; the worker can open what its user can");
        }
        LandlockStatus::Available { effective_abi, .. } if effective_abi < ABI::V4 => warn!(
            "this kernel's Landlock (ABI {effective_abi:?}) does not know of networks; the worker can \
             connect to any host"
        ),
        LandlockStatus::Available { .. } => {}
    }
    Ok(())
}
