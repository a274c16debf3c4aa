//! A QEMU that has `vfio-user-pci` (10.1 or newer), or Debian 12's.
//!
//! `$FARBUS_QEMU` if set, the system's if it is new enough, else Debian's newest, unpacked into a
//! tree and run there by the tree's own loader. Debian 12's is always one from a tree.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::packages::{BOOKWORM, Suite, TRIXIE_BACKPORTS, with_apt};
use super::tree::Tree;
use crate::cache::Cache;
use crate::error::Result;
use crate::process::{mortal_command, run_tool};

/// Environment variable that names a QEMU to use.
pub const QEMU_ENV: &str = "FARBUS_QEMU";

const PACKAGES: [&str; 1] = ["qemu-system-x86"];

/// What the machines of the test bed are for.
const NEW_DEVICE: &str = "vfio-user-pci";
/// What Debian 12's is there for.
const OLD_DEVICE: &str = "vhost-user-blk-pci";

/// A usable QEMU.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: PathBuf,
    /// Arguments before QEMU's own.
    prefix: Vec<String>,
    modules: Option<PathBuf>,
    version: String,
}

impl Qemu {
    /// Finds or fetches one.
    ///
    /// # Errors
    /// When none is usable and none can be fetched.
    pub fn obtain(cache: &Cache) -> Result<Self> {
        let named = std::env::var_os(QEMU_ENV).map(PathBuf::from);
        let candidate = named.clone().unwrap_or_else(|| "qemu-system-x86_64".into());
        match Self::probe(&candidate, Vec::new(), None, NEW_DEVICE) {
            Ok(Some(usable)) => return Ok(usable),
            Err(e) if named.is_some() => return Err(e),
            _ => {}
        }
        Self::unpack(cache, "qemu", &TRIXIE_BACKPORTS, NEW_DEVICE)
    }

    /// Finds or fetches Debian 12's, 7.2.
    ///
    /// # Errors
    /// When it cannot be fetched.
    pub fn of_debian_12(cache: &Cache) -> Result<Self> {
        Self::unpack(cache, "qemu-debian-12", &BOOKWORM, OLD_DEVICE)
    }

    fn unpack(cache: &Cache, name: &str, suite: &'static Suite, device: &str) -> Result<Self> {
        let recipe = format!("{suite:?} {PACKAGES:?} v1");
        let entry = cache.entry(name, &recipe, |dir| {
            with_apt(cache, suite, |apt| {
                apt.unpack_with_dependencies(&PACKAGES, dir)
            })
        })?;
        let tree = Tree::at(entry);
        let (loader, mut prefix) = tree.launch("usr/bin/qemu-system-x86_64")?;
        for data in ["usr/share/qemu", "usr/share/seabios"] {
            prefix.extend(["-L".to_owned(), tree.file(data)?.display().to_string()]);
        }
        // Where nothing is a module there is no directory of them.
        let modules = tree.file("usr/lib/x86_64-linux-gnu/qemu").ok();
        Self::probe(&loader, prefix, modules, device)?.ok_or_else(|| crate::error::Error::Missing {
            what: format!("{device} in QEMU's list of devices"),
            place: tree.root().to_owned(),
        })
    }

    /// QEMU's version line.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// A command that runs QEMU and dies with this process.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = mortal_command(&self.program);
        self.dress(&mut command);
        command
    }

    fn dress(&self, command: &mut Command) {
        command.args(&self.prefix);
        if let Some(modules) = &self.modules {
            command.env("QEMU_MODULE_DIR", modules);
        }
    }

    /// `Some` when it runs and has the device, `None` when it runs and has not.
    fn probe(
        program: &Path,
        prefix: Vec<String>,
        modules: Option<PathBuf>,
        device: &str,
    ) -> Result<Option<Self>> {
        let mut qemu = Self {
            program: program.to_owned(),
            prefix,
            modules,
            version: String::new(),
        };
        let run = |argument: &[&str]| {
            let mut command = Command::new(&qemu.program);
            qemu.dress(&mut command);
            let said = run_tool(command.args(argument))?;
            Ok(String::from_utf8_lossy(&said).into_owned())
        };
        let devices = run(&["-device", "help"])?;
        let version = run(&["--version"])?;
        if !devices.contains(&format!("\"{device}\"")) {
            return Ok(None);
        }
        qemu.version = version.lines().next().unwrap_or_default().to_owned();
        Ok(Some(qemu))
    }
}
