//! A short-lived directory of one test: sockets, disk images, logs.
//!
//! It lies in the system's temporary directory under a short name, because the path of a UNIX
//! socket has at most 107 bytes. It is removed when dropped, but kept, and named on stderr, when the
//! test fails.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::error::{IoContext, Result};
use crate::report;

/// Environment variable: a directory that receives the scratch directories of failed tests.
pub const LOG_ENV: &str = "FARBUS_LOG_DIR";

/// A temporary directory.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    keep: AtomicBool,
}

impl Scratch {
    /// Makes a directory, readable by the owner only.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(name: &str) -> Result<Self> {
        Self::within(&std::env::temp_dir(), name)
    }

    /// As [`Scratch::new`], in a directory of the caller's choice.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn within(dir: &Path, name: &str) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let unique = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("fb{}-{unique}-{name}", std::process::id()));
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .context(|| format!("making {}", path.display()))?;
        Ok(Self {
            path,
            keep: AtomicBool::new(false),
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path inside it.
    #[must_use]
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Makes an empty (sparse) file of `size` bytes in it.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn disk(&self, name: &str, size: u64) -> Result<PathBuf> {
        let path = self.join(name);
        let file = fs::File::create(&path).context(|| format!("creating {}", path.display()))?;
        file.set_len(size)
            .context(|| format!("sizing {}", path.display()))?;
        Ok(path)
    }

    /// Keeps the directory for a person to look at.
    pub fn keep(&self) {
        self.keep.store(true, Ordering::Relaxed);
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let failed = self.keep.load(Ordering::Relaxed) || report::has_failed();
        if !failed {
            // Nothing is lost but disk space when this fails.
            let _ = fs::remove_dir_all(&self.path);
            return;
        }
        let kept = std::env::var_os(LOG_ENV)
            .and_then(|dir| move_logs(&self.path, Path::new(&dir)).ok())
            .unwrap_or_else(|| self.path.clone());
        eprintln!("kept for inspection: {}", kept.display());
    }
}

/// Copies the plain files below 64 MiB (logs, not disks) and drops the rest.
fn move_logs(from: &Path, to: &Path) -> std::io::Result<PathBuf> {
    const DISK: u64 = 64 << 20;
    let to = to.join(from.file_name().unwrap_or_default());
    fs::create_dir_all(&to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        if meta.is_file() && meta.len() < DISK {
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        } else if meta.is_dir() {
            move_logs(&entry.path(), &to)?;
        }
    }
    fs::remove_dir_all(from)?;
    Ok(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_disappears_unless_kept() {
        let gone = Scratch::new("t").unwrap();
        let kept = Scratch::new("t").unwrap();
        kept.keep();
        let paths = [gone.path().to_owned(), kept.path().to_owned()];
        drop(gone);
        drop(kept);
        assert!(!paths[0].exists());
        assert!(paths[1].exists() || std::env::var_os(LOG_ENV).is_some());
        let _ = fs::remove_dir_all(&paths[1]);
    }
}
