//! Who uses a function: file systems, swap, md and device mapper, network interfaces, and
//! programs that have its nodes open.
//!
//! What is seen is what sysfs and procfs show of this process's mount and PID namespaces. A
//! claim on a disk that they do not show (another namespace's mount, ZFS, a device of a
//! larger btrfs) is found when a function is lent, by asking the kernel for the disk exclusively.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::host::{attribute, names, number, read};
use super::process::program;
use super::{Host, PciFunction};

/// Someone who uses a function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum User {
    /// A mounted file system.
    Mount {
        /// The node of the disk or partition.
        device: String,
        /// Where it is mounted.
        at: String,
    },
    /// Swap space.
    Swap {
        /// The node of the disk or partition.
        device: String,
    },
    /// A device made of it by md or device mapper.
    Holder {
        /// The node of the disk or partition.
        device: String,
        /// The node of what is made of it, and its name where it has one.
        holder: String,
    },
    /// A network interface that is up.
    Network {
        /// Its name.
        interface: String,
    },
    /// Virtual functions, which go when the driver of the physical one does.
    VirtualFunctions {
        /// How many.
        count: usize,
    },
    /// A program that has a node open.
    Open {
        /// The node.
        node: String,
        /// The process.
        pid: String,
        /// Its program's name.
        program: String,
    },
    /// Something in the kernel, which says no more.
    Claimed {
        /// The node.
        device: String,
    },
}

impl User {
    /// What ends the use, as a clause in the imperative.
    pub fn remedy(&self) -> String {
        match self {
            Self::Mount { at, .. } => format!("unmount it (umount {at})"),
            Self::Swap { device } => format!("take it out of use (swapoff {device})"),
            Self::Holder { holder, .. } => format!("stop {holder}"),
            Self::Network { interface } => format!("take it down (ip link set {interface} down)"),
            Self::VirtualFunctions { .. } => {
                "remove them (echo 0 to its sriov_numvfs), or lend those instead".into()
            }
            Self::Open { program, pid, .. } => format!("end {program} (process {pid})"),
            Self::Claimed { device } => format!(
                "find its user (another mount namespace, ZFS, btrfs?) with lsblk -f {device}"
            ),
        }
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount { device, at } => write!(f, "{device} is mounted on {at}"),
            Self::Swap { device } => write!(f, "{device} is swap space"),
            Self::Holder { device, holder } => write!(f, "{device} is part of {holder}"),
            Self::Network { interface } => write!(f, "network interface {interface} is up"),
            Self::VirtualFunctions { count } => write!(f, "it has {count} virtual functions"),
            Self::Open { node, pid, program } => {
                write!(f, "{program} (process {pid}) has {node} open")
            }
            Self::Claimed { device } => write!(f, "something in the kernel has claimed {device}"),
        }
    }
}

/// A device that has a node or an interface, and where sysfs keeps it.
#[derive(Debug)]
struct Entry {
    name: String,
    path: PathBuf,
}

struct Mount {
    number: String,
    source: String,
    at: String,
}

/// All use of a host's devices, from which that of one function is picked.
pub(super) struct Usage {
    mounts: Vec<Mount>,
    swaps: Vec<String>,
    blocks: Vec<Entry>,
    interfaces: Vec<Entry>,
    /// Nodes below `/dev`, without the `/dev/`.
    nodes: Vec<Entry>,
    /// Who has which file below `/dev` open.
    open: BTreeMap<String, Vec<String>>,
    subsystems: Vec<PathBuf>,
    host: Host,
}

impl Usage {
    pub(super) fn read(host: &Host) -> Self {
        let subsystems = host.path("sys/class/nvme-subsystem");
        Self {
            mounts: mounts(host),
            swaps: swaps(host),
            blocks: entries(&host.path("sys/class/block")),
            interfaces: entries(&host.path("sys/class/net")),
            nodes: ["sys/dev/block", "sys/dev/char"]
                .iter()
                .flat_map(|kind| nodes(&host.path(kind)))
                .collect(),
            open: open_nodes(host),
            subsystems: entries(&subsystems).into_iter().map(|e| e.path).collect(),
            host: host.clone(),
        }
    }

    /// The users of the function in `directory`.
    pub(super) fn of(&self, directory: &Path, function: &PciFunction) -> Vec<User> {
        let territory = self.territory(directory);
        let ours = |entry: &&Entry| territory.iter().any(|root| entry.path.starts_with(root));
        let mut users = Vec::new();
        let mut seen = Vec::new();
        for block in self.blocks.iter().filter(ours) {
            self.users_of_block(block, &mut seen, &mut users);
        }
        for interface in self.interfaces.iter().filter(ours) {
            // IFF_UP, netdevice(7).
            if number(&interface.path.join("flags")).is_some_and(|flags| flags & 1 != 0) {
                users.push(User::Network {
                    interface: interface.name.clone(),
                });
            }
        }
        let virtual_functions = function.sriov.as_ref().map_or(0, |s| s.functions.len());
        if virtual_functions > 0 {
            users.push(User::VirtualFunctions {
                count: virtual_functions,
            });
        }
        for node in self.nodes.iter().filter(ours) {
            self.openers(&format!("/dev/{}", node.name), &mut users);
        }
        if let Some(group) = function.iommu_group {
            self.openers(&format!("/dev/vfio/{group}"), &mut users);
        }
        if let Some(node) = &function.device_node {
            self.openers(&format!("/{node}"), &mut users);
        }
        users
    }

    /// The nodes of a function's disks, without partitions.
    fn disks(&self, directory: &Path) -> Vec<String> {
        let territory = self.territory(directory);
        let ours = |entry: &&Entry| territory.iter().any(|root| entry.path.starts_with(root));
        let is_whole = |entry: &&Entry| !entry.path.join("partition").exists();
        let disks = self.blocks.iter().filter(ours).filter(is_whole);
        disks.map(|block| block.name.clone()).collect()
    }

    /// Where sysfs keeps what belongs to a function: its own directory, and with NVMe
    /// multipath that of the subsystem which has its controller's disks.
    fn territory(&self, directory: &Path) -> Vec<PathBuf> {
        let Ok(own) = fs::canonicalize(directory) else {
            return Vec::new();
        };
        let controllers = names(&own.join("nvme"));
        let has_one = |subsystem: &&PathBuf| {
            controllers
                .iter()
                .any(|controller| subsystem.join(controller).exists())
        };
        let subsystems: Vec<PathBuf> = self.subsystems.iter().filter(has_one).cloned().collect();
        [vec![own], subsystems].concat()
    }

    /// A disk's or partition's users, and those of what is made of it.
    fn users_of_block(&self, block: &Entry, seen: &mut Vec<String>, users: &mut Vec<User>) {
        if seen.contains(&block.name) {
            return;
        }
        seen.push(block.name.clone());
        let device = format!("/dev/{}", block.name);
        let number = attribute(&block.path.join("dev"));
        for mount in &self.mounts {
            if Some(&mount.number) == number.as_ref() || mount.source == device {
                users.push(User::Mount {
                    device: device.clone(),
                    at: mount.at.clone(),
                });
            }
        }
        if self.swaps.contains(&device) {
            users.push(User::Swap {
                device: device.clone(),
            });
        }
        for name in names(&block.path.join("holders")) {
            let holder = self.blocks.iter().find(|block| block.name == name);
            let mapped = holder.and_then(|holder| attribute(&holder.path.join("dm/name")));
            users.push(User::Holder {
                device: device.clone(),
                holder: match mapped {
                    Some(mapped) => format!("/dev/{name} ({mapped})"),
                    None => format!("/dev/{name}"),
                },
            });
            if let Some(holder) = holder {
                self.users_of_block(holder, seen, users);
            }
        }
    }

    fn openers(&self, node: &str, users: &mut Vec<User>) {
        for pid in self.open.get(node).into_iter().flatten() {
            users.push(User::Open {
                node: node.to_owned(),
                pid: pid.clone(),
                program: program(&self.host, pid),
            });
        }
    }
}

/// Claims the disks of the function in `directory`, so that nobody mounts one of them as long
/// as the files are there; or says which of them something in the kernel has claimed, in whole
/// or in part.
pub(super) fn claim_disks(host: &Host, directory: &Path) -> Result<Vec<File>, User> {
    let mut claims = Vec::new();
    for disk in Usage::read(host).disks(directory) {
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_EXCL | libc::O_NONBLOCK)
            .open(host.path("dev").join(&disk));
        match opened {
            Ok(file) => claims.push(file),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                return Err(User::Claimed {
                    device: format!("/dev/{disk}"),
                });
            }
            // Without a node nobody can mount it either.
            Err(error) => log::debug!("/dev/{disk} cannot be claimed: {error}"),
        }
    }
    Ok(claims)
}

/// Who has this node open, this process included.
pub(super) fn holders_of_node(host: &Host, node: &str) -> Vec<String> {
    let own = std::process::id().to_string();
    let mut pids = open_nodes(host).remove(node).unwrap_or_default();
    if open_files(host, &own).iter().any(|open| open == node) {
        pids.push(own);
    }
    pids
}

/// The symbolic links in a directory of a class, and where they lead.
fn entries(directory: &Path) -> Vec<Entry> {
    let names = names(directory).into_iter();
    names
        .filter_map(|name| {
            let path = fs::canonicalize(directory.join(&name)).ok()?;
            Some(Entry { name, path })
        })
        .collect()
}

/// The same for directories whose links are named by device number.
fn nodes(directory: &Path) -> Vec<Entry> {
    let mut found = entries(directory);
    found.retain_mut(|entry| {
        let uevent = read(&entry.path.join("uevent")).unwrap_or_default();
        let name = uevent.lines().find_map(|l| l.strip_prefix("DEVNAME="));
        entry.name = name.unwrap_or_default().to_owned();
        !entry.name.is_empty()
    });
    found
}

/// The mounts of the first process's namespace and of this one's (proc(5), `mountinfo`).
fn mounts(host: &Host) -> Vec<Mount> {
    let mut lines: Vec<String> = ["proc/1/mountinfo", "proc/self/mountinfo"]
        .iter()
        .filter_map(|file| read(&host.path(file)))
        .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
        .collect();
    lines.sort();
    lines.dedup();
    let mut mounts: Vec<Mount> = lines.iter().filter_map(|line| mount(line)).collect();
    mounts.sort_by(|a, b| (&a.number, &a.at).cmp(&(&b.number, &b.at)));
    mounts.dedup_by(|a, b| (&a.number, &a.source, &a.at) == (&b.number, &b.source, &b.at));
    mounts
}

fn mount(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ');
    Some(Mount {
        number: left.nth(2)?.to_owned(),
        at: unescape(left.nth(1)?),
        source: unescape(right.split(' ').nth(1)?),
    })
}

fn swaps(host: &Host) -> Vec<String> {
    let text = read(&host.path("proc/swaps")).unwrap_or_default();
    let lines = text.lines().skip(1);
    let paths = lines.filter_map(|line| line.split_ascii_whitespace().next());
    paths.map(unescape).collect()
}

/// White space and backslashes are written as `\` and three octal digits.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let code = part.get(..3).and_then(|c| u8::from_str_radix(c, 8).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                bytes.extend_from_slice(&part.as_bytes()[3..]);
            }
            None => {
                bytes.push(b'\\');
                bytes.extend_from_slice(part.as_bytes());
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Which files below `/dev` other processes have open.
fn open_nodes(host: &Host) -> BTreeMap<String, Vec<String>> {
    let own = std::process::id().to_string();
    let mut open: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let is_pid = |name: &String| name.bytes().all(|byte| byte.is_ascii_digit());
    for pid in names(&host.path("proc")).into_iter().filter(is_pid) {
        if pid == own {
            continue;
        }
        for node in open_files(host, &pid) {
            let pids = open.entry(node).or_default();
            if !pids.contains(&pid) {
                pids.push(pid.clone());
            }
        }
    }
    open
}

/// The files below `/dev` that a process has open.
fn open_files(host: &Host, pid: &str) -> Vec<String> {
    let directory = host.path(format!("proc/{pid}/fd"));
    let files = names(&directory).into_iter().filter_map(|fd| {
        let target = fs::read_link(directory.join(fd)).ok()?;
        let target = target.to_str()?;
        target.starts_with("/dev/").then(|| target.to_owned())
    });
    files.collect()
}
