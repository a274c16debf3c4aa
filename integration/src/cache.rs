//! What was fetched or built once, kept outside the checkout.
//!
//! An entry is a directory named after its content's recipe: another recipe is another entry, so
//! an entry, once there, never changes. Entries appear by a rename under a file lock; parallel
//! tests and parallel checkouts wait for each other, and a killed build leaves no half entry.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Access, FlockOperation, access, flock};

use crate::error::{IoContext, Result};

/// Environment variable that names another cache directory.
pub const CACHE_ENV: &str = "FARBUS_CACHE";

const DEFAULT: &str = "/var/cache/farbus";

/// The cache directory.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
    built: AtomicBool,
}

impl Cache {
    /// Opens the cache: `$FARBUS_CACHE`, or `/var/cache/farbus`, or `~/.cache/farbus` for a user who
    /// may not write there.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn open() -> Result<Self> {
        if let Some(named) = std::env::var_os(CACHE_ENV) {
            return Self::at(Path::new(&named));
        }
        let everyones = Self::at(Path::new(DEFAULT));
        match (everyones, std::env::var_os("HOME")) {
            (Ok(cache), _) => Ok(cache),
            (Err(_), Some(home)) => Self::at(&Path::new(&home).join(".cache/farbus")),
            (Err(error), None) => Err(error),
        }
    }

    /// Opens a cache in a given directory.
    ///
    /// # Errors
    /// When the directory cannot be made, or not be written to.
    pub fn at(root: &Path) -> Result<Self> {
        fs::create_dir_all(root)
            .context(|| format!("making cache directory {}", root.display()))?;
        access(root, Access::WRITE_OK)
            .context(|| format!("writing to cache directory {}", root.display()))?;
        Ok(Self {
            root: root.to_owned(),
            built: AtomicBool::new(false),
        })
    }

    /// The cache's directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether an entry had to be built since this cache was opened.
    #[must_use]
    pub fn has_built(&self) -> bool {
        self.built.load(Ordering::Relaxed)
    }

    /// Holds the lock called `name` until the guard is dropped.
    ///
    /// # Errors
    /// When the lock file cannot be made or locked.
    pub fn lock(&self, name: &str) -> Result<CacheLock> {
        let path = self.root.join(format!("{name}.lock"));
        let file = fs::File::create(&path).context(|| format!("creating {}", path.display()))?;
        flock(&file, FlockOperation::LockExclusive)
            .context(|| format!("locking {}", path.display()))?;
        Ok(CacheLock { _file: file })
    }

    /// The directory of entry `name` made by `recipe`, built by `build` if it is not there yet.
    ///
    /// `recipe` is any text that changes whenever the content should. `build` fills the directory
    /// that it is given.
    ///
    /// # Errors
    /// Those of `build`, and failures of the file system.
    pub fn entry(
        &self,
        name: &str,
        recipe: &str,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let key = format!("{name}-{:016x}", fnv1a(recipe.as_bytes()));
        let path = self.root.join(&key);
        if path.is_dir() {
            return Ok(path);
        }
        let _lock = self.lock(&key)?;
        if path.is_dir() {
            return Ok(path);
        }
        let unfinished = self.root.join(format!("{key}.tmp"));
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished)
                .context(|| format!("removing {}", unfinished.display()))?;
        }
        fs::create_dir(&unfinished).context(|| format!("making {}", unfinished.display()))?;
        eprintln!(
            "farbus test bed: preparing {name} in {}",
            self.root.display()
        );
        build(&unfinished)?;
        fs::write(unfinished.join("recipe"), recipe)
            .context(|| format!("writing the recipe of {key}"))?;
        fs::rename(&unfinished, &path).context(|| format!("moving {key} into place"))?;
        self.built.store(true, Ordering::Relaxed);
        Ok(path)
    }
}

/// A held lock of the cache.
#[derive(Debug)]
pub struct CacheLock {
    _file: fs::File,
}

/// FNV-1a, 64 bits: a name for a text, the same with every compiler. Not for security.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::scratch::Scratch;

    #[test]
    fn entry_is_built_once_per_recipe() {
        let scratch = Scratch::new("cache").unwrap();
        let cache = Cache::at(scratch.path()).unwrap();
        let build = |dir: &Path| fs::write(dir.join("x"), "1").context(|| "writing".into());
        let first = cache.entry("thing", "a", build).unwrap();
        let again = cache.entry("thing", "a", |_| unreachable!()).unwrap();
        let other = cache.entry("thing", "b", build).unwrap();
        assert_eq!(first, again);
        assert_ne!(first, other);
        assert_eq!(fs::read_to_string(first.join("x")).unwrap(), "1");
    }

    #[test]
    fn failed_build_leaves_no_entry() {
        let scratch = Scratch::new("cache").unwrap();
        let cache = Cache::at(scratch.path()).unwrap();
        let failed = cache.entry("thing", "a", |_| {
            Err(Error::NoPackageSource {
                reason: "test".into(),
            })
        });
        assert!(failed.is_err());
        let built = cache.entry("thing", "a", |_| Ok(())).unwrap();
        assert!(built.is_dir());
    }

    #[test]
    fn fnv_matches_its_published_vectors() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
