//! Clients of vhost-user-blk that need no virtual machine: QEMU's disk tools with libblkio.

use std::path::PathBuf;
use std::process::Command;

use super::packages::{TRIXIE_BACKPORTS, with_apt};
use super::tree::Tree;
use crate::cache::Cache;
use crate::error::{IoContext, Result};
use crate::process::mortal_command;

/// `qemu-block-extra` has the module that loads libblkio, and depends on that.
const PACKAGES: [&str; 2] = ["qemu-utils", "qemu-block-extra"];

/// `qemu-io`, `qemu-img` and what they need.
#[derive(Debug, Clone)]
pub struct BlockClients {
    tree: Tree,
    modules: PathBuf,
}

impl BlockClients {
    /// Finds or fetches them.
    ///
    /// # Errors
    /// When they are neither cached nor reachable.
    pub fn obtain() -> Result<Self> {
        let cache = Cache::open()?;
        let recipe = format!("{TRIXIE_BACKPORTS:?} {PACKAGES:?} v1");
        let entry = cache.entry("qemu-clients", &recipe, |dir| {
            with_apt(&cache, &TRIXIE_BACKPORTS, |apt| {
                apt.unpack_with_dependencies(&PACKAGES, dir)
            })
        })?;
        let tree = Tree::at(entry);
        let modules = tree.file("usr/lib/x86_64-linux-gnu/qemu")?;
        let modules = modules
            .canonicalize()
            .context(|| format!("looking for {}", modules.display()))?;
        Ok(Self { tree, modules })
    }

    /// A command that runs one of them, and dies with this process.
    ///
    /// # Errors
    /// When it is not there.
    pub fn command(&self, program: &str) -> Result<Command> {
        let (loader, prefix) = self.tree.launch(&format!("usr/bin/{program}"))?;
        let mut command = mortal_command(&loader);
        command.args(prefix).env("QEMU_MODULE_DIR", &self.modules);
        Ok(command)
    }
}
