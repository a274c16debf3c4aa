//! Reading and writing the kernel's files below a root.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::SysfsError;
use crate::PciAddress;

/// The most that is read of one file, in bytes. The longest are tables of interrupts and of
/// mounts; an attribute of sysfs has one page.
const MAX_FILE: u64 = 16 << 20;
/// The most entries of one directory that are looked at.
const MAX_ENTRIES: usize = 1 << 20;

/// Who carries out what is written to an attribute. Tests put a made-up kernel here.
pub trait Kernel: Send + Sync {
    /// Writes `value` to the attribute at `path`, with one system call.
    fn write(&self, path: &Path, value: &str) -> io::Result<()>;
}

struct Linux;

impl Kernel for Linux {
    fn write(&self, path: &Path, value: &str) -> io::Result<()> {
        let mut file = File::options().write(true).open(path)?;
        // An attribute takes the whole value with one call or not at all.
        match file.write(value.as_bytes())? {
            taken if taken == value.len() => Ok(()),
            taken => Err(io::Error::other(format!(
                "the kernel took {taken} of {} bytes",
                value.len()
            ))),
        }
    }
}

/// A host's `/sys`, `/proc` and `/dev`.
#[derive(Clone)]
pub struct Host {
    root: PathBuf,
    kernel: Arc<dyn Kernel>,
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Host {
    /// This host.
    pub fn new() -> Self {
        Self::with_kernel("/", Arc::new(Linux))
    }

    /// A host whose `/sys`, `/proc` and `/dev` lie in the directory `root`, and whose
    /// attributes `kernel` writes.
    pub fn with_kernel(root: impl Into<PathBuf>, kernel: Arc<dyn Kernel>) -> Self {
        Self {
            root: root.into(),
            kernel,
        }
    }

    /// The path of a file of this host, such as `sys/class/net`.
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.root.join(relative)
    }

    /// The beginning of a file of this host, if it can be read.
    pub fn read(&self, relative: impl AsRef<Path>) -> Option<String> {
        read(&self.path(relative))
    }

    /// A file of this host without the white space around its text; `None` when it is empty or
    /// cannot be read.
    pub fn attribute(&self, relative: impl AsRef<Path>) -> Option<String> {
        attribute(&self.path(relative))
    }

    /// The names in a directory of this host, ascending; none when it cannot be read.
    pub fn names(&self, relative: impl AsRef<Path>) -> Vec<String> {
        names(&self.path(relative))
    }

    /// The directory of a function.
    pub fn function(&self, address: PciAddress) -> PathBuf {
        self.path("sys/bus/pci/devices").join(address.to_string())
    }

    /// The directory of a driver for PCI functions, which exists when the kernel has it.
    pub fn driver(&self, name: &str) -> PathBuf {
        self.path("sys/bus/pci/drivers").join(name)
    }

    /// Writes an attribute.
    pub fn write(&self, path: &Path, value: &str) -> Result<(), SysfsError> {
        log::debug!("writes {value:?} to {}", path.display());
        self.kernel
            .write(path, value)
            .map_err(|source| SysfsError::Write {
                path: path.to_owned(),
                value: value.trim_end().to_owned(),
                source,
            })
    }
}

/// The beginning of a file, if it can be read; what is not text in it is replaced.
pub(super) fn read(path: &Path) -> Option<String> {
    Some(String::from_utf8_lossy(&read_bytes(path)?).into_owned())
}

/// The beginning of a file, if it can be read.
pub(super) fn read_bytes(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path).ok()?;
    file.take(MAX_FILE).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// An attribute without the white space around it; `None` when it is empty or absent.
pub(super) fn attribute(path: &Path) -> Option<String> {
    let text = read(path)?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// An attribute that is a number, decimal or with `0x`.
pub(super) fn number(path: &Path) -> Option<i64> {
    let text = attribute(path)?;
    match text.strip_prefix("0x") {
        Some(digits) => i64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// The last component of where a symbolic link leads.
pub(super) fn link_name(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

/// The names in a directory, ascending; none when it cannot be read.
pub(super) fn names(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .take(MAX_ENTRIES)
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    names.sort();
    names
}
