//! User-mode Linux: a kernel that is a process, and a vhost-user client of its own, without
//! emulation. Its root is this host's file system, so it runs this host's programs.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::packages::{Suite, with_apt};
use super::tree::Tree;
use crate::cache::Cache;
use crate::error::{Error, IoContext, Result};
use crate::process::mortal_command;

/// Older ones send memory tables whose size does not fit their count.
const FORKY: Suite = Suite {
    name: "forky",
    suites: &["forky"],
    target: "forky",
};
const PACKAGES: [&str; 1] = ["user-mode-linux"];

const KERNEL: &str = "usr/bin/linux.uml";

/// A user-mode kernel and its modules.
#[derive(Debug, Clone)]
pub struct UserModeLinux {
    tree: Tree,
    modules: PathBuf,
}

impl UserModeLinux {
    /// Finds or fetches it.
    ///
    /// # Errors
    /// When it is neither cached nor reachable.
    pub fn obtain() -> Result<Self> {
        let cache = Cache::open()?;
        let recipe = format!("{FORKY:?} {PACKAGES:?} v1");
        let entry = cache.entry("user-mode-linux", &recipe, |dir| {
            with_apt(&cache, &FORKY, |apt| {
                apt.unpack_with_dependencies(&PACKAGES, dir)
            })
        })?;
        let tree = Tree::at(entry);
        let modules = tree.file("usr/lib/uml/modules")?;
        Ok(Self { tree, modules })
    }

    /// A loadable module.
    ///
    /// # Errors
    /// [`Error::Missing`] when there is none of that name.
    pub fn module(&self, name: &str) -> Result<PathBuf> {
        find(&self.modules, name).ok_or_else(|| Error::Missing {
            what: format!("module {name}"),
            place: self.modules.clone(),
        })
    }

    /// A command that boots it; `init` is a program of this host, and `device` the socket of a
    /// vhost-user block device. It ends with this process.
    ///
    /// The kernel executes its own file again, which must then be a program that runs by itself: a
    /// copy in `dir` that names the tree's loader.
    ///
    /// # Errors
    /// When it is not there, or `dir` has too long a path.
    pub fn boot(&self, dir: &Path, init: &Path, device: &Path) -> Result<Command> {
        let (loader, _) = self.tree.launch(KERNEL)?;
        let (program, own) = (dir.join("linux"), dir.join("ld"));
        symlink(loader, &own).context(|| format!("linking {}", own.display()))?;
        let kernel = self.tree.file(KERNEL)?;
        let mut bytes = fs::read(&kernel).context(|| format!("reading {}", kernel.display()))?;
        name_loader(&mut bytes, &own).ok_or_else(|| Error::Missing {
            what: format!("room for the path {}", own.display()),
            place: kernel,
        })?;
        fs::write(&program, bytes)
            .and_then(|()| fs::set_permissions(&program, PermissionsExt::from_mode(0o755)))
            .context(|| format!("writing {}", program.display()))?;
        let libraries = self.tree.file("usr/lib/x86_64-linux-gnu")?;
        // Not for what `mortal_command` runs before.
        let mut command = mortal_command(Path::new("/usr/bin/env"));
        command
            .arg(format!("LD_LIBRARY_PATH={}", libraries.display()))
            .arg(format!("TMPDIR={}", dir.display()))
            .arg(program)
            .args([
                "mem=256M",
                "root=/dev/root",
                "rootfstype=hostfs",
                "rootflags=/",
                "rw",
                "con=null",
                "con0=null,fd:1",
                "panic=-1",
            ])
            .arg(format!("init={}", init.display()))
            // 2 is the virtio id of a block device.
            .arg(format!("virtio_uml.device={}:2", device.display()));
        Ok(command)
    }
}

/// Replaces the loader that a program names.
fn name_loader(program: &mut [u8], loader: &Path) -> Option<()> {
    const USUAL: &[u8] = b"/lib64/ld-linux-x86-64.so.2\0";
    let at = program.windows(USUAL.len()).position(|w| w == USUAL)?;
    let mut name = loader.as_os_str().as_bytes().to_vec();
    name.push(0);
    let place = program.get_mut(at..at + name.len().max(USUAL.len()))?;
    if name.len() > USUAL.len() {
        return None;
    }
    place.fill(0);
    place.get_mut(..name.len())?.copy_from_slice(&name);
    Some(())
}

fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    for entry in fs::read_dir(dir).ok()?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if let Some(found) = find(&path, name) {
                return Some(found);
            }
        } else if path.file_name().is_some_and(|file| file == name) {
            return Some(path);
        }
    }
    None
}
