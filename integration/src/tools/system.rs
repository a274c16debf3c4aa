//! A disk with a Debian whose first process is systemd, for what is to be seen on real units.
//!
//! It is made of a [`DebianTree`], without mounting anything. The guest takes commands as others do: the init of
//! the small guests is a service here.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use super::Tools;
use super::debian::DebianTree;
use crate::daemon::program;
use crate::error::{IoContext, Result};
use crate::process::run_tool;

const PORT: &str = include_str!("../../guest/init");

const UNIT: &str = "\
[Unit]
Description=Commands of the test bed
# After what is started at boot, and before it may end.
After=multi-user.target

[Service]
ExecStart=/usr/local/sbin/farbus-port
KillMode=process
SendSIGKILL=no
";

/// What would wait for devices that nobody announces (there is no udev), for a bus that is not there, or for a network.
const MASKED: [&str; 7] = [
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "getty.target",
    "serial-getty@ttyS0.service",
    "systemd-logind.service",
    "systemd-networkd-wait-online.service",
];

/// Room for the packages, and for what tests write.
const SIZE: u64 = 1 << 30;

/// Where the disk has the packages that the tree was made for.
pub const PACKAGES: &str = "/opt/packages";

/// Makes the disk at `image`, with these programs of the workspace in it.
///
/// # Errors
/// When a program is not built, or a file cannot be read or written.
pub fn disk(tools: &Tools, tree: &DebianTree, programs: &[&str], image: &Path) -> Result<()> {
    let root = tree.path();
    let at = |path: &str| root.join(path.trim_start_matches('/'));
    tree.run(&format!("mkdir -p {PACKAGES} && mv /tmp/*.deb {PACKAGES}"))?;
    for name in programs {
        executable(
            &at("/usr/bin").join(name),
            &fs::read(program(name)?).context(|| format!("reading {name}"))?,
        )?;
    }
    executable(&at("/usr/local/sbin/farbus-port"), PORT.as_bytes())?;
    let units = at("/etc/systemd/system");
    write(&units.join("farbus-port.service"), UNIT.as_bytes())?;
    let wanted = units.join("default.target.wants");
    fs::create_dir_all(&wanted).context(|| format!("making {}", wanted.display()))?;
    link(
        &wanted.join("farbus-port.service"),
        "../farbus-port.service",
    )?;
    link(
        &units.join("default.target"),
        "/lib/systemd/system/multi-user.target",
    )?;
    for unit in MASKED {
        link(&units.join(unit), "/dev/null")?;
    }
    // Nothing here is generated, and each of them is a process at every reload of the manager.
    let generators = at("/etc/systemd/system-generators");
    fs::create_dir_all(&generators).context(|| format!("making {}", generators.display()))?;
    let found = fs::read_dir(at("/lib/systemd/system-generators"));
    for generator in found.into_iter().flatten().flatten() {
        link(&generators.join(generator.file_name()), "/dev/null")?;
    }
    // Without an identity, a first boot asks questions.
    write(
        &at("/etc/machine-id"),
        b"0123456789abcdef0123456789abcdef\n",
    )?;
    let writing = || format!("writing {}", image.display());
    File::create(image)
        .and_then(|file| file.set_len(SIZE))
        .context(writing)?;
    run_tool(
        tools
            .tree()
            .command("usr/sbin/mke2fs")?
            .env("MKE2FS_CONFIG", tools.tree().file("etc/mke2fs.conf")?)
            .args(["-q", "-t", "ext4", "-O", "^has_journal", "-d"])
            .arg(root)
            .arg(image),
    )
    .map(drop)
}

fn write(path: &PathBuf, content: &[u8]) -> Result<()> {
    fs::write(path, content).context(|| format!("writing {}", path.display()))
}

fn executable(path: &PathBuf, content: &[u8]) -> Result<()> {
    write(path, content)?;
    fs::set_permissions(path, Permissions::from_mode(0o755))
        .context(|| format!("setting the mode of {}", path.display()))
}

/// Makes a link, in place of whatever is there.
fn link(path: &Path, target: &str) -> Result<()> {
    let _ = fs::remove_file(path);
    symlink(target, path).context(|| format!("linking {}", path.display()))
}
