//! The file or block device that holds the namespace's data.
//!
//! It is opened once, locked against a second controller, and never resized. Errors of the
//! operating system become what a drive would answer (NVMe 1.4 §4.6.1.2).

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};

use super::dma::Scatter;
use super::options::SoftNvmeConfig;
use super::sys::{Direction, TransferError, Vectors};
use crate::nvme::Status;

/// Zeroes are written in pieces of this many bytes where the file system knows no better way.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

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
        "{} would have {size} bytes, which is not a multiple (of at least one) of the block \
         size {block_size}; choose another size= or block-size=",
        path.display()
    )]
    NotWholeBlocks {
        /// The file.
        path: PathBuf,
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

/// An open backing file.
#[derive(Debug)]
pub(super) struct Backing {
    file: File,
    len: u64,
    block_device: bool,
    /// Cleared when the file system turns out not to know `FALLOC_FL_ZERO_RANGE`.
    can_zero_range: AtomicBool,
    /// Cleared when the file system turns out not to know `FALLOC_FL_PUNCH_HOLE`.
    can_punch_hole: AtomicBool,
    /// A flush failed. The kernel reports a lost write once and then takes the page for clean,
    /// so a later flush would claim what is not true.
    lost_writes: AtomicBool,
}

impl Backing {
    /// Opens, or creates, what the configuration names.
    pub(super) fn open(config: &SoftNvmeConfig) -> Result<Self, BackingError> {
        let path = &config.path;
        let fail = |verb| {
            move |source: io::Error| BackingError::Io {
                verb,
                path: path.clone(),
                source,
            }
        };
        if let Some(size) = config.size {
            check_blocks(config, size)?;
        }
        let file = match open_existing(config) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let size = config
                    .size
                    .ok_or_else(|| BackingError::Missing(path.clone()))?;
                create(config, size).map_err(fail("create"))?
            }
            Err(error) => return Err(fail("open")(error)),
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(BackingError::InUse(path.clone())),
            Err(error) => return Err(fail("lock")(error.into())),
        }
        let kind = file.metadata().map_err(fail("examine"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(BackingError::Kind(path.clone()));
        }
        // The end of a block device is its size too; its metadata says 0.
        let len = (&file)
            .seek(SeekFrom::End(0))
            .map_err(fail("find the size of"))?;
        match config.size {
            Some(wanted) if wanted != len => {
                let path = path.clone();
                return Err(BackingError::SizeDiffers {
                    path,
                    actual: len,
                    wanted,
                });
            }
            _ => check_blocks(config, len)?,
        }
        Ok(Self::new(file, len, kind.is_block_device()))
    }

    fn new(file: File, len: u64, block_device: bool) -> Self {
        Self {
            file,
            len,
            block_device,
            can_zero_range: AtomicBool::new(true),
            can_punch_hole: AtomicBool::new(true),
            lost_writes: AtomicBool::new(false),
        }
    }

    /// Size in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// Whether acknowledged writes may have been lost, so that no more are taken.
    pub(super) fn has_lost_writes(&self) -> bool {
        self.lost_writes.load(Ordering::SeqCst)
    }

    /// Reads at `offset` (bytes) straight into a command's memory.
    pub(super) fn read(
        &self,
        offset: u64,
        to: &Scatter,
        vectors: &mut Vectors,
    ) -> Result<(), Status> {
        vectors
            .transfer(&self.file, offset, Direction::Read, to.slices())
            .map_err(|error| read_status(&error))
    }

    /// Reads at `offset` (bytes) into the controller's own memory.
    pub(super) fn read_into(&self, offset: u64, data: &mut [u8]) -> Result<(), Status> {
        self.file
            .read_exact_at(data, offset)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => read_status(&TransferError::EndOfFile),
                _ => read_status(&TransferError::Os(error)),
            })
    }

    /// Writes at `offset` (bytes) straight out of a command's memory.
    pub(super) fn write(
        &self,
        offset: u64,
        from: &Scatter,
        durable: bool,
        vectors: &mut Vectors,
    ) -> Result<(), Status> {
        self.check_writable(offset, from.len() as u64)?;
        let direction = if durable {
            Direction::WriteDurable
        } else {
            Direction::Write
        };
        match vectors.transfer(&self.file, offset, direction, from.slices()) {
            Ok(()) => Ok(()),
            Err(TransferError::Os(error)) if error.raw_os_error() == Some(libc::EFAULT) => {
                Err(Status::DATA_TRANSFER_ERROR)
            }
            Err(TransferError::Os(error)) => {
                // A durable write reports what earlier writes lost, too.
                if durable && !is_full(&error) {
                    self.lost_writes.store(true, Ordering::SeqCst);
                }
                Err(write_status(&error))
            }
            Err(TransferError::EndOfFile) => Err(Status::WRITE_FAULT.with_dnr()),
        }
    }

    /// Puts all writes that have completed on stable storage.
    pub(super) fn flush(&self) -> Result<(), Status> {
        if self.has_lost_writes() {
            return Err(Status::WRITE_FAULT.with_dnr());
        }
        self.file.sync_data().map_err(|error| {
            log::error!("flushing the backing file failed, no more writes are taken: {error}");
            self.lost_writes.store(true, Ordering::SeqCst);
            Status::WRITE_FAULT.with_dnr()
        })
    }

    /// Makes a range (bytes) read as zero. `deallocate` gives its space back, where that is
    /// possible.
    pub(super) fn zero(&self, offset: u64, len: u64, deallocate: bool) -> Result<(), Status> {
        self.check_writable(offset, len)?;
        let done = (deallocate && self.punch_hole(offset, len)?)
            || self.zero_range(offset, len)?
            || self.punch_hole(offset, len)?;
        if done {
            Ok(())
        } else {
            self.write_zeroes(offset, len)
        }
    }

    /// Gives the space of a range (bytes) back; where that is not possible nothing happens,
    /// which the specification allows (NVMe 1.4 §6.7).
    pub(super) fn deallocate(&self, offset: u64, len: u64) -> Result<(), Status> {
        self.check_writable(offset, len)?;
        self.punch_hole(offset, len).map(|_| ())
    }

    /// A file that somebody cut short must not grow back with zeroes for what was lost, so
    /// blocks behind its end are bad ones.
    fn check_writable(&self, offset: u64, len: u64) -> Result<(), Status> {
        if self.has_lost_writes() {
            return Err(Status::WRITE_FAULT.with_dnr());
        }
        if self.block_device {
            return Ok(());
        }
        let actual = self
            .file
            .metadata()
            .map_err(|error| write_status(&error))?
            .len();
        if offset.saturating_add(len) > actual {
            return Err(Status::WRITE_FAULT.with_dnr());
        }
        Ok(())
    }

    /// Returns whether the file system knows how to.
    fn punch_hole(&self, offset: u64, len: u64) -> Result<bool, Status> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.allocate(&self.can_punch_hole, flags, offset, len)
    }

    /// Returns whether the file system knows how to.
    fn zero_range(&self, offset: u64, len: u64) -> Result<bool, Status> {
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        self.allocate(&self.can_zero_range, flags, offset, len)
    }

    fn allocate(
        &self,
        able: &AtomicBool,
        flags: FallocateFlags,
        offset: u64,
        len: u64,
    ) -> Result<bool, Status> {
        use rustix::io::Errno;
        while able.load(Ordering::Relaxed) {
            match fallocate(&self.file, flags, offset, len) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                // `EINVAL` comes from block devices for ranges that are not whole sectors of
                // theirs; writing zeroes works there.
                Err(Errno::INVAL) => return Ok(false),
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => able.store(false, Ordering::Relaxed),
                Err(error) => return Err(write_status(&error.into())),
            }
        }
        Ok(false)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Status> {
        let mut at = offset;
        let end = offset.saturating_add(len);
        while at < end {
            let now = (end - at).min(ZEROES.len() as u64);
            let zeroes = ZEROES.get(..now as usize).unwrap_or(&ZEROES);
            self.file
                .write_all_at(zeroes, at)
                .map_err(|error| write_status(&error))?;
            at += now;
        }
        Ok(())
    }
}

fn check_blocks(config: &SoftNvmeConfig, size: u64) -> Result<(), BackingError> {
    let block_size = config.block_size;
    if size == 0 || size % u64::from(block_size) != 0 {
        let path = config.path.clone();
        return Err(BackingError::NotWholeBlocks {
            path,
            size,
            block_size,
        });
    }
    Ok(())
}

fn open_existing(config: &SoftNvmeConfig) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let kind = std::fs::metadata(&config.path)?.file_type();
    // On a block device `O_EXCL` means that no file system has it mounted. `O_NONBLOCK` keeps
    // the opening of a FIFO from waiting for a writer; it means nothing to the others.
    let exclusive = if kind.is_block_device() {
        libc::O_EXCL
    } else {
        0
    };
    options
        .custom_flags(exclusive | libc::O_NONBLOCK)
        .open(&config.path)
}

/// Creates a sparse file. Never touches one that has appeared in the meantime.
fn create(config: &SoftNvmeConfig, size: u64) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&config.path)?;
    if let Err(error) = file.set_len(size) {
        // An empty file would only be in the way of the next attempt.
        if let Err(error) = std::fs::remove_file(&config.path) {
            log::warn!("{} is left behind empty: {error}", config.path.display());
        }
        return Err(error);
    }
    Ok(file)
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG)
    )
}

/// What a drive says when it cannot read.
fn read_status(error: &TransferError) -> Status {
    match error {
        TransferError::Os(error) if error.raw_os_error() == Some(libc::EFAULT) => {
            Status::DATA_TRANSFER_ERROR
        }
        _ => Status::UNRECOVERED_READ.with_dnr(),
    }
}

/// What a drive says when it cannot write.
fn write_status(error: &io::Error) -> Status {
    if is_full(error) {
        Status::CAPACITY_EXCEEDED
    } else {
        Status::WRITE_FAULT.with_dnr()
    }
}
