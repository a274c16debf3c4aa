//! The guests' userland: a busybox, Debian's storage tools, and an init that obeys the test bed.
//!
//! It comes in sizes, because the guest's kernel unpacks it at every boot: the small one has
//! what nearly every test needs, the large one adds fio, whose libraries are several times as big, and
//! the one for RDMA the tools that make devices on a network.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cpio::Cpio;
use super::kernel::KernelFiles;
use super::tree::Tree;
use crate::cache::Cache;
use crate::error::{IoContext, Result};
use crate::process::run_tool;

const INIT: &str = include_str!("../../guest/init");

/// Dynamic programs of the small userland; busybox has the rest. The shell is not busybox's, because
/// that one prefers its own tools over these, whatever the path says.
const PROGRAMS: [&str; 15] = [
    "usr/bin/dash",
    "usr/sbin/nvme",
    "usr/sbin/mke2fs",
    "usr/sbin/e2fsck",
    "usr/bin/lspci",
    "usr/bin/setpci",
    "usr/sbin/blkdiscard",
    "usr/sbin/blockdev",
    "usr/sbin/fstrim",
    "usr/bin/lsblk",
    "usr/bin/dd",
    "usr/bin/sha256sum",
    "usr/bin/taskset",
    "usr/bin/setpriv",
    "usr/bin/sync",
];

const LINKS: [(&str, &str); 2] = [("usr/bin/sh", "dash"), ("usr/sbin/mkfs.ext4", "mke2fs")];

const DATA: [&str; 2] = ["etc/mke2fs.conf", "usr/share/misc/pci.ids"];

/// Added by the large userland.
const LARGE_PROGRAMS: [&str; 1] = ["usr/bin/fio"];

/// Added by the userland for RDMA; busybox's `ip` knows too little.
const RDMA_PROGRAMS: [&str; 2] = ["usr/bin/ip", "usr/bin/rdma"];

const BUSYBOX: &str = "usr/bin/busybox";

/// How much userland a guest gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Userland {
    /// busybox, nvme-cli, e2fsprogs, pciutils, util-linux' block tools.
    Small,
    /// The small one, and fio.
    Large,
    /// The small one, and iproute2.
    Rdma,
}

/// Makes (once) the initramfs of `userland` for `kernel`.
///
/// # Errors
/// When a program or a library is missing, or writing fails.
pub fn initramfs(
    cache: &Cache,
    tree: &Tree,
    kernel: &KernelFiles,
    userland: Userland,
) -> Result<PathBuf> {
    let name = match userland {
        Userland::Small => "initramfs-small",
        Userland::Large => "initramfs-large",
        Userland::Rdma => "initramfs-rdma",
    };
    let recipe = format!(
        "v1 {} {} {PROGRAMS:?} {LARGE_PROGRAMS:?} {RDMA_PROGRAMS:?} {LINKS:?} {DATA:?}\n{INIT}",
        tree.root().display(),
        kernel.modules.display(),
    );
    let entry = cache.entry(&format!("{name}-{}", kernel.release), &recipe, |dir| {
        let mut bytes = fs::read(&kernel.modules)
            .context(|| format!("reading {}", kernel.modules.display()))?;
        bytes.extend(pack(tree, userland)?);
        fs::write(dir.join("initramfs.cpio"), bytes).context(|| "writing an initramfs".into())
    })?;
    Ok(entry.join("initramfs.cpio"))
}

/// The static busybox of a tree, which the host can run as well.
///
/// # Errors
/// When the tree has none.
pub fn busybox(tree: &Tree) -> Result<PathBuf> {
    tree.file(BUSYBOX)
}

fn pack(tree: &Tree, userland: Userland) -> Result<Vec<u8>> {
    let mut cpio = Cpio::new();
    for dir in ["proc", "sys", "dev", "run", "tmp", "mnt", "root", "etc"] {
        cpio.dir(dir);
    }
    for (link, target) in [
        ("bin", "usr/bin"),
        ("sbin", "usr/sbin"),
        ("lib", "usr/lib"),
        ("lib64", "usr/lib64"),
    ] {
        cpio.dir(target);
        cpio.link(link, target);
    }
    // The kernel opens init's standard streams before init can mount devtmpfs.
    cpio.char_device("dev/console", 5, 1);
    cpio.char_device("dev/null", 1, 3);
    cpio.file("init", 0o755, INIT.as_bytes());

    let more: &[&str] = match userland {
        Userland::Small => &[],
        Userland::Large => &LARGE_PROGRAMS,
        Userland::Rdma => &RDMA_PROGRAMS,
    };
    let mut files: BTreeSet<String> = BTreeSet::new();
    for program in PROGRAMS.iter().chain(more) {
        files.insert((*program).to_owned());
        files.extend(tree.libraries_of(program)?);
    }
    files.extend(DATA.iter().map(|d| (*d).to_owned()));
    files.insert(BUSYBOX.to_owned());
    for file in &files {
        let content = fs::read(tree.file(file)?).context(|| format!("reading {file}"))?;
        let permissions = if DATA.contains(&file.as_str()) {
            0o644
        } else {
            0o755
        };
        cpio.file(file, permissions, &content);
    }
    for (link, target) in LINKS {
        cpio.link(link, target);
    }
    for applet in applets(&tree.file(BUSYBOX)?)? {
        let paths = [format!("usr/bin/{applet}"), format!("usr/sbin/{applet}")];
        let taken =
            |path: &String| files.contains(path) || LINKS.iter().any(|(link, _)| link == path);
        if !paths.iter().any(taken) {
            cpio.link(&paths[0], "busybox");
        }
    }
    Ok(cpio.finish())
}

fn applets(busybox: &Path) -> Result<Vec<String>> {
    let listed = run_tool(Command::new(busybox).arg("--list"))?;
    Ok(String::from_utf8_lossy(&listed)
        .lines()
        .map(str::to_owned)
        .collect())
}
