//! What people use instead of Farbus, from Debian's packages: to be measured in the same run.
//!
//! The programs come from the suite that QEMU comes from and run in a tree of their own, so they
//! are the same versions on every host, and nothing depends on what is installed there.

use std::path::PathBuf;
use std::process::Command;

use super::packages::{TRIXIE_BACKPORTS, with_apt};
use super::tree::Tree;
use crate::cache::Cache;
use crate::error::Result;
use crate::process::{mortal_command, run_tool};

const PACKAGES: [&str; 4] = ["qemu-utils", "qemu-block-extra", "nbdkit", "tgt"];

const MODULES: &str = "usr/lib/x86_64-linux-gnu/qemu";

/// The peers' programs.
#[derive(Debug, Clone)]
pub struct Peers {
    tree: Tree,
}

impl Peers {
    /// Finds them in the cache, or fetches them.
    ///
    /// # Errors
    /// When the packages are neither cached nor reachable.
    pub fn obtain(cache: &Cache) -> Result<Self> {
        let recipe = format!("{TRIXIE_BACKPORTS:?} {PACKAGES:?} v1");
        let entry = cache.entry("peers", &recipe, |dir| {
            with_apt(cache, &TRIXIE_BACKPORTS, |apt| {
                apt.unpack_with_dependencies(&PACKAGES, dir)
            })
        })?;
        Ok(Self {
            tree: Tree::at(entry),
        })
    }

    /// QEMU's block layer without a machine.
    ///
    /// # Errors
    /// When the tree lacks it.
    pub fn qemu_storage_daemon(&self) -> Result<Command> {
        self.command("usr/bin/qemu-storage-daemon")
    }

    /// The server of iSCSI targets. It ignores SIGTERM.
    ///
    /// # Errors
    /// When the tree lacks it.
    pub fn tgtd(&self) -> Result<Command> {
        self.command("usr/sbin/tgtd")
    }

    /// The program that tells a `tgtd` what to offer.
    ///
    /// # Errors
    /// When the tree lacks it.
    pub fn tgtadm(&self) -> Result<Command> {
        self.command("usr/sbin/tgtadm")
    }

    /// An NBD server.
    ///
    /// # Errors
    /// When the tree lacks it.
    pub fn nbdkit(&self) -> Result<Command> {
        self.command("usr/bin/nbdkit")
    }

    /// A plugin of nbdkit, which looks for them under its own prefix unless it is given a path.
    ///
    /// # Errors
    /// When the tree lacks it.
    pub fn nbdkit_plugin(&self, name: &str) -> Result<PathBuf> {
        self.tree.file(&format!(
            "usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-{name}-plugin.so"
        ))
    }

    /// Which versions these are, for a report.
    ///
    /// # Errors
    /// When a program does not run.
    pub fn versions(&self) -> Result<Vec<String>> {
        let mut versions = Vec::new();
        for mut command in [self.qemu_storage_daemon()?, self.nbdkit()?, self.tgtd()?] {
            let said = run_tool(command.arg("--version"))?;
            let said = String::from_utf8_lossy(&said);
            versions.push(said.lines().next().unwrap_or_default().to_owned());
        }
        Ok(versions)
    }

    /// A command that dies with this process.
    fn command(&self, program: &str) -> Result<Command> {
        let (loader, arguments) = self.tree.launch(program)?;
        let mut command = mortal_command(&loader);
        command
            .args(arguments)
            .env("QEMU_MODULE_DIR", self.tree.file(MODULES)?);
        Ok(command)
    }
}
