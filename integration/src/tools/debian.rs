//! A fresh tree of the Debian that this machine runs, to install packages in.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::sources::Archive;
use crate::cache::Cache;
use crate::error::{Error, IoContext, Result};
use crate::process::run_tool;
use crate::scratch::Scratch;

/// What every host has beyond a minimal tree.
const PACKAGES: [&str; 1] = ["systemd"];

/// Lists every file and directory of a Debian but those that change whenever packages are installed: dpkg's own,
/// the backups of the lists of accounts, logs, and what systemd leaves.
pub const FILES: &str = "find / /run -xdev ! -path '/proc/*' ! -path '/tmp/*' ! -path '/root/*' \
    ! -path '/var/tmp/*' ! -path '/var/lib/dpkg/*' ! -path '/var/lib/systemd/*' ! -path '/var/log/*' \
    ! -path '/etc/*-' ! -path /etc/.pwd.lock ! -path '/run/systemd*' ! -path '/run/job*' | sort -u";

/// A copy of a fresh tree, gone with the test. To be changed as root, in a chroot.
#[derive(Debug)]
pub struct DebianTree {
    root: PathBuf,
    _scratch: Scratch,
}

impl DebianTree {
    /// Makes one in which the dependencies of `packages` (`.deb` files) are installed, and the packages
    /// are not. Needs root; the network, the first time.
    ///
    /// # Errors
    /// When it is neither cached nor can be made.
    pub fn make_for(packages: &[PathBuf]) -> Result<Self> {
        let mut installed: Vec<String> = PACKAGES.map(Into::into).to_vec();
        for package in packages {
            installed.extend(dependencies(package)?);
        }
        installed.sort();
        installed.dedup();
        let archive = Archive::of_system()?;
        let suite = suite_of_system()?;
        let include = installed.join(",");
        let recipe = format!("{suite} {include} v1");
        let fresh = Cache::open()?.entry("debian", &recipe, |dir| {
            run_tool(
                Command::new("mmdebstrap")
                    .args(["--quiet", "--variant=minbase"])
                    .arg(format!("--include={include}"))
                    .arg(&suite)
                    .arg(dir.join("root"))
                    .arg(archive.source_line(&suite)),
            )
            .map(drop)
        })?;
        let scratch = Scratch::new("debian")?;
        let root = scratch.join("root");
        run_tool(
            Command::new("cp")
                .args(["-a", "--reflink=auto"])
                .arg(fresh.join("root"))
                .arg(&root),
        )?;
        for package in packages {
            let name = package.file_name().unwrap_or_default();
            fs::copy(package, root.join("tmp").join(name))
                .context(|| format!("copying {}", package.display()))?;
        }
        Ok(Self {
            root,
            _scratch: scratch,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Runs a shell command in it as its root, without a system manager; it must succeed. Returns what it
    /// wrote to stdout.
    ///
    /// # Errors
    /// When it fails.
    pub fn run(&self, script: &str) -> Result<String> {
        let inside = "mount -t proc proc \"$0/proc\" && exec chroot \"$0\" /bin/sh -ec \"$1\"";
        let output = run_tool(
            Command::new("unshare")
                .args(["--mount", "--pid", "--fork", "sh", "-c", inside])
                .arg(&self.root)
                .arg(script)
                .env_clear()
                .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
                .env("LC_ALL", "C.UTF-8")
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )?;
        Ok(String::from_utf8_lossy(&output).into_owned())
    }

    /// Every file and directory in it, as [`FILES`] lists them.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn files(&self) -> Result<Vec<String>> {
        let found = self.run(FILES)?;
        Ok(found.lines().map(Into::into).collect())
    }
}

/// Names of the packages that a `.deb` depends on; of alternatives, the first.
fn dependencies(package: &Path) -> Result<Vec<String>> {
    let field = run_tool(
        Command::new("dpkg-deb")
            .arg("--field")
            .arg(package)
            .arg("Depends"),
    )?;
    let names = String::from_utf8_lossy(&field)
        .split(',')
        .filter_map(|one| one.split_whitespace().next().map(str::to_owned))
        .collect();
    Ok(names)
}

fn suite_of_system() -> Result<String> {
    let release =
        fs::read_to_string("/etc/os-release").context(|| "reading /etc/os-release".into())?;
    release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(str::to_owned)
        .ok_or_else(|| Error::NoPackageSource {
            reason: "/etc/os-release names no release of Debian".into(),
        })
}
