//! How the backing is found: memory is made; a file is opened or created, checked, and locked
//! against a second controller.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::backing::{Backing, FileBacking, MemoryBacking};
use super::options::{Medium, SoftNvmeConfig};

/// Why the backing file cannot be used. None is cured by trying again, except
/// [`BackingError::InUse`].
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// There is no such file, and no size to create it with.
    #[error("{} does not exist; add size= to create it, such as size=1GiB", .0.display())]
    Missing(PathBuf),
    /// The file has another size than the one asked for.
    #[error(
        "{} has {actual} bytes, but size= says {wanted}; leave size= out to use it as it is",
        path.display()
    )]
    SizeDiffers {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        actual: u64,
        /// The size asked for in bytes.
        wanted: u64,
    },
    /// No whole number of blocks.
    #[error(
        "{medium} would have {size} bytes, which is not a multiple (of at least one) of the block \
         size {block_size}; choose another size= or block-size="
    )]
    NotWholeBlocks {
        /// What was to hold the data.
        medium: Medium,
        /// Its size in bytes.
        size: u64,
        /// The block size in bytes.
        block_size: u32,
    },
    /// Something else than a file or a block device.
    #[error("{} is neither a regular file nor a block device", .0.display())]
    Kind(PathBuf),
    /// Another controller has it.
    #[error("{} is in use by another controller (it is locked)", .0.display())]
    InUse(PathBuf),
    /// There is no memory for the data, or no address space.
    #[error("cannot reserve {size} bytes of memory")]
    Memory {
        /// Size of the drive in bytes.
        size: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The operating system refused.
    #[error("cannot {verb} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Opens, or makes, what the configuration names.
pub(super) fn open(config: &SoftNvmeConfig) -> Result<Backing, BackingError> {
    // A drive that is no file has a size, or its description was refused.
    let size = config.size.unwrap_or(0);
    match &config.medium {
        Medium::File(path) => Ok(Backing::File(open_file(config, path)?)),
        Medium::Memory => {
            check_blocks(config, size)?;
            let memory =
                MemoryBacking::new(size).map_err(|source| BackingError::Memory { size, source })?;
            Ok(Backing::Memory(memory))
        }
        Medium::Null => {
            check_blocks(config, size)?;
            Ok(Backing::Null { len: size })
        }
    }
}

fn open_file(config: &SoftNvmeConfig, path: &Path) -> Result<FileBacking, BackingError> {
    let fail = |verb| {
        move |source: io::Error| BackingError::Io {
            verb,
            path: path.to_owned(),
            source,
        }
    };
    if let Some(size) = config.size {
        check_blocks(config, size)?;
    }
    let file = match open_existing(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let size = config
                .size
                .ok_or_else(|| BackingError::Missing(path.to_owned()))?;
            create(path, size).map_err(fail("create"))?
        }
        Err(error) => return Err(fail("open")(error)),
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Err(BackingError::InUse(path.to_owned())),
        Err(error) => return Err(fail("lock")(error.into())),
    }
    let kind = file.metadata().map_err(fail("examine"))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(BackingError::Kind(path.to_owned()));
    }
    // The end of a block device is its size too; its metadata says 0.
    let len = (&file)
        .seek(SeekFrom::End(0))
        .map_err(fail("find the size of"))?;
    match config.size {
        Some(wanted) if wanted != len => {
            let path = path.to_owned();
            return Err(BackingError::SizeDiffers {
                path,
                actual: len,
                wanted,
            });
        }
        _ => check_blocks(config, len)?,
    }
    Ok(FileBacking::new(file, len, kind.is_block_device()))
}

/// Makes a drive's file as long as its description says, if it is shorter: the drive, which may be
/// running, follows within a second or two. Whether it was shorter.
///
/// # Errors
/// When the file is longer, since nothing is ever cut off; when there is no such file; or when
/// the operating system refuses.
pub fn grow_file(config: &SoftNvmeConfig) -> Result<bool, BackingError> {
    let (Medium::File(path), Some(wanted)) = (&config.medium, config.size) else {
        return Ok(false);
    };
    let fail = |verb| {
        move |source: io::Error| BackingError::Io {
            verb,
            path: path.to_owned(),
            source,
        }
    };
    check_blocks(config, wanted)?;
    // Not exclusively: a running drive has the file open.
    let file = OpenOptions::new().write(true).open(path);
    let mut file = file.map_err(fail("open"))?;
    let actual = file
        .seek(SeekFrom::End(0))
        .map_err(fail("find the size of"))?;
    if actual > wanted {
        return Err(BackingError::SizeDiffers {
            path: path.to_owned(),
            actual,
            wanted,
        });
    }
    if actual < wanted {
        file.set_len(wanted).map_err(fail("lengthen"))?;
    }
    Ok(actual < wanted)
}

fn check_blocks(config: &SoftNvmeConfig, size: u64) -> Result<(), BackingError> {
    let block_size = config.block_size;
    if size == 0 || size % u64::from(block_size) != 0 {
        return Err(BackingError::NotWholeBlocks {
            medium: config.medium.clone(),
            size,
            block_size,
        });
    }
    Ok(())
}

fn open_existing(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let kind = std::fs::metadata(path)?.file_type();
    // On a block device `O_EXCL` means that no file system has it mounted. `O_NONBLOCK` keeps
    // the opening of a FIFO from waiting for a writer; it means nothing to the others.
    let exclusive = if kind.is_block_device() {
        libc::O_EXCL
    } else {
        0
    };
    options
        .custom_flags(exclusive | libc::O_NONBLOCK)
        .open(path)
}

/// Creates a sparse file. Never touches one that has appeared in the meantime.
fn create(path: &Path, size: u64) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    if let Err(error) = file.set_len(size) {
        // An empty file would only be in the way of the next attempt.
        if let Err(error) = std::fs::remove_file(path) {
            log::warn!("{} is left behind empty: {error}", path.display());
        }
        return Err(error);
    }
    Ok(file)
}
