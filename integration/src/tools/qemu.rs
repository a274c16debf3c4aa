//! A QEMU that has `vfio-user-pci` (10.1 or newer).
//!
//! `$FARBUS_QEMU` if set, the system's if it is new enough, else Debian's newest, unpacked into a
//! tree and run there by the tree's own loader.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::packages::{TRIXIE_BACKPORTS, with_apt};
use super::tree::Tree;
use crate::cache::Cache;
use crate::error::Result;
use crate::process::{mortal_command, run_tool};

/// Environment variable that names a QEMU to use.
pub const QEMU_ENV: &str = "FARBUS_QEMU";

const PACKAGES: [&str; 1] = ["qemu-system-x86"];

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
        match Self::probe(&candidate, Vec::new(), None) {
            Ok(Some(usable)) => return Ok(usable),
            Err(e) if named.is_some() => return Err(e),
            _ => {}
        }
        let recipe = format!("{TRIXIE_BACKPORTS:?} {PACKAGES:?} v1");
        let entry = cache.entry("qemu", &recipe, |dir| {
            with_apt(cache, &TRIXIE_BACKPORTS, |apt| {
                apt.unpack_with_dependencies(&PACKAGES, dir)
            })
        })?;
        let tree = Tree::at(entry);
        let (loader, mut prefix) = tree.launch("usr/bin/qemu-system-x86_64")?;
        for data in ["usr/share/qemu", "usr/share/seabios"] {
            prefix.extend(["-L".to_owned(), tree.file(data)?.display().to_string()]);
        }
        let modules = tree.file("usr/lib/x86_64-linux-gnu/qemu")?;
        Self::probe(&loader, prefix, Some(modules))?.ok_or_else(|| crate::error::Error::Missing {
            what: "vfio-user-pci in QEMU's list of devices".into(),
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
        if !devices.contains("\"vfio-user-pci\"") {
            return Ok(None);
        }
        qemu.version = version.lines().next().unwrap_or_default().to_owned();
        Ok(Some(qemu))
    }
}
