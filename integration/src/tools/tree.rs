//! A directory of unpacked packages whose programs run in place.
//!
//! The tree's own dynamic loader starts its programs with the tree's own libraries, so they work
//! on a host of another release, see the host's files, and need neither chroot nor root rights.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, Result};
use crate::process::run_tool;

const LOADER: &str = "usr/lib64/ld-linux-x86-64.so.2";
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
/// Where Debian 12's packages have some libraries, and the loader.
const OLD_LIBRARIES: &str = "lib/x86_64-linux-gnu";
const OLD_LOADER: &str = "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";
/// Subdirectories of [`LIBRARIES`] that programs reach by an absolute RUNPATH, which would lead
/// into the host's directory of that name.
const PRIVATE_LIBRARIES: [&str; 1] = ["ceph"];

/// A tree of unpacked packages.
#[derive(Debug, Clone)]
pub struct Tree {
    root: PathBuf,
}

impl Tree {
    /// A tree that has been unpacked at `root`.
    #[must_use]
    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// Where it is.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A file of the tree.
    ///
    /// # Errors
    /// [`Error::Missing`] when it is not there.
    pub fn file(&self, path: &str) -> Result<PathBuf> {
        let full = self.root.join(path);
        if full.exists() {
            Ok(full)
        } else {
            Err(Error::Missing {
                what: path.to_owned(),
                place: self.root.clone(),
            })
        }
    }

    /// The loader, and the arguments that make it run the program at `path` of the tree.
    ///
    /// # Errors
    /// [`Error::Missing`] when the tree lacks the program or the loader.
    pub fn launch(&self, path: &str) -> Result<(PathBuf, Vec<String>)> {
        let program = self.file(path)?;
        let args = vec![
            "--inhibit-cache".to_owned(),
            "--library-path".to_owned(),
            self.library_path(),
            program.display().to_string(),
        ];
        Ok((self.loader()?, args))
    }

    fn loader(&self) -> Result<PathBuf> {
        self.file(OLD_LOADER).or_else(|_| self.file(LOADER))
    }

    /// A command that runs the program at `path` of the tree.
    ///
    /// # Errors
    /// [`Error::Missing`] when the tree lacks the program or the loader.
    pub fn command(&self, path: &str) -> Result<Command> {
        let (loader, args) = self.launch(path)?;
        let mut command = Command::new(loader);
        command.args(args);
        Ok(command)
    }

    /// The files, relative to the tree, that the dynamic program at `path` needs, loader included.
    ///
    /// # Errors
    /// [`Error::Missing`] when a library is not in the tree.
    pub fn libraries_of(&self, path: &str) -> Result<Vec<String>> {
        let program = self.file(path)?;
        let listed = run_tool(
            Command::new(self.file(LOADER)?)
                .args([
                    "--inhibit-cache",
                    "--library-path",
                    &self.library_path(),
                    "--list",
                ])
                .arg(program),
        )?;
        let mut needed = vec![LOADER.to_owned()];
        for line in String::from_utf8_lossy(&listed).lines() {
            // "libfoo.so.1 => /path/libfoo.so.1 (0x…)"; the loader and the vDSO have no such arrow.
            let Some((name, target)) = line.trim().split_once(" => ") else {
                continue;
            };
            let target = target.split(" (").next().unwrap_or_default();
            let inside = Path::new(target).strip_prefix(&self.root);
            match inside {
                Ok(relative) => needed.push(relative.display().to_string()),
                // The loader itself is listed under the path that it was started by.
                Err(_) if name.contains("ld-linux") => {}
                Err(_) => {
                    return Err(Error::Missing {
                        what: format!("{name} (needed by {path})"),
                        place: self.root.clone(),
                    });
                }
            }
        }
        Ok(needed)
    }

    fn library_path(&self) -> String {
        let libraries = self.root.join(LIBRARIES);
        let mut path = libraries.display().to_string();
        let private = PRIVATE_LIBRARIES.map(|name| libraries.join(name));
        for more in private.into_iter().chain([self.root.join(OLD_LIBRARIES)]) {
            if more.is_dir() {
                path.push(':');
                path.push_str(&more.display().to_string());
            }
        }
        path
    }
}
