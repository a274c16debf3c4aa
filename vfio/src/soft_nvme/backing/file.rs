//! A namespace on a file or a block device.
//!
//! Nothing here resizes it; others may. Errors of the operating system become what a drive would answer
//! (NVMe 1.4 §4.6.1.2).

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};

use super::super::dma::Scatter;
use super::super::sys::{Direction, TransferError, Vectors};
use crate::nvme::Status;

/// Zeroes are written in pieces of this many bytes where the file system knows no better way.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// An open backing file.
#[derive(Debug)]
pub(in super::super) struct FileBacking {
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

impl FileBacking {
    pub(in super::super) fn new(file: File, len: u64, block_device: bool) -> Self {
        Self {
            file,
            len,
            block_device,
            can_zero_range: AtomicBool::new(true),
            can_punch_hole: AtomicBool::new(true),
            lost_writes: AtomicBool::new(false),
        }
    }

    /// Size in bytes when it was opened.
    pub(in super::super) fn len(&self) -> u64 {
        self.len
    }

    /// Size in bytes as it is now, if that can be found out.
    pub(in super::super) fn len_by_now(&self) -> Option<u64> {
        // Transfers name their offsets, so it does not matter where the file's own is.
        (&self.file).seek(SeekFrom::End(0)).ok()
    }

    pub(in super::super) fn file(&self) -> &File {
        &self.file
    }

    pub(in super::super) fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// Whether acknowledged writes may have been lost, so that no more are taken.
    pub(in super::super) fn has_lost_writes(&self) -> bool {
        self.lost_writes.load(Ordering::SeqCst)
    }

    /// Reads at `offset` (bytes) straight into a command's memory.
    pub(in super::super) fn read(
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
    pub(in super::super) fn read_into(&self, offset: u64, data: &mut [u8]) -> Result<(), Status> {
        self.file
            .read_exact_at(data, offset)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => read_status(&TransferError::EndOfFile),
                _ => read_status(&TransferError::Os(error)),
            })
    }

    /// Writes at `offset` (bytes) straight out of a command's memory.
    pub(in super::super) fn write(
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
    pub(in super::super) fn flush(&self) -> Result<(), Status> {
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
    pub(in super::super) fn zero(
        &self,
        offset: u64,
        len: u64,
        deallocate: bool,
    ) -> Result<(), Status> {
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
    pub(in super::super) fn deallocate(&self, offset: u64, len: u64) -> Result<(), Status> {
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

impl Drop for FileBacking {
    fn drop(&mut self) {
        // Closing alone leaves the lock to a child process that another thread is about to
        // start, for as long as that child has not come to its `exec`.
        if let Err(error) = flock(&self.file, FlockOperation::Unlock) {
            log::debug!("the backing file was not unlocked: {error}");
        }
    }
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

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    /// A file whose first page can neither be read nor written (nobody maps address 0) and
    /// that cannot be flushed: a stand-in for a dying disk.
    fn dying() -> FileBacking {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/proc/self/mem")
            .unwrap();
        FileBacking::new(file, 1 << 20, true)
    }

    #[test]
    fn a_disk_that_cannot_be_read_gives_media_errors() {
        let outcome = dying().read_into(0, &mut [0; 512]);
        assert_eq!(outcome, Err(Status::UNRECOVERED_READ.with_dnr()));
    }

    #[test]
    fn a_disk_that_cannot_be_written_gives_write_faults() {
        let backing = dying();
        assert_eq!(
            backing.write_zeroes(0, 4096),
            Err(Status::WRITE_FAULT.with_dnr())
        );
        assert_eq!(
            backing.zero(0, 4096, true),
            Err(Status::WRITE_FAULT.with_dnr())
        );
        assert!(
            !backing.has_lost_writes(),
            "each of these was reported to its command"
        );
    }

    #[test]
    fn after_a_failed_flush_no_write_and_no_flush_is_believed_any_more() {
        let backing = dying();
        let fault = Err(Status::WRITE_FAULT.with_dnr());
        assert_eq!(backing.flush(), fault);
        assert!(backing.has_lost_writes());
        assert_eq!(backing.flush(), fault);
        assert_eq!(backing.zero(0, 4096, false), fault);
        assert_eq!(backing.deallocate(0, 4096), fault);
        let nothing = Scatter::with_capacity(0);
        assert_eq!(
            backing.write(0, &nothing, false, &mut Vectors::with_capacity(0)),
            fault
        );
    }

    #[test]
    fn errors_become_what_a_drive_would_say() {
        let full = Status::CAPACITY_EXCEEDED;
        let fault = Status::WRITE_FAULT.with_dnr();
        for (errno, expected) in [
            (libc::ENOSPC, full),
            (libc::EDQUOT, full),
            (libc::EFBIG, full),
            (libc::EIO, fault),
            (libc::EROFS, fault),
            (libc::EPERM, fault),
        ] {
            assert_eq!(write_status(&io::Error::from_raw_os_error(errno)), expected);
        }
        let read = |errno| read_status(&TransferError::Os(io::Error::from_raw_os_error(errno)));
        assert_eq!(read(libc::EIO), Status::UNRECOVERED_READ.with_dnr());
        assert_eq!(read(libc::EFAULT), Status::DATA_TRANSFER_ERROR);
    }

    #[test]
    fn zeroes_are_written_where_the_file_system_knows_no_better_way() {
        let directory = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = directory.as_path().join("disk.img");
        std::fs::write(&path, vec![7; 300 << 10]).unwrap();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let backing = FileBacking::new(file, 300 << 10, false);
        backing.can_zero_range.store(false, Ordering::Relaxed);
        backing.can_punch_hole.store(false, Ordering::Relaxed);
        backing.zero(512, 200 << 10, true).unwrap();
        backing.deallocate(0, 512).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let end = 512 + (200 << 10);
        assert!(bytes[512..end].iter().all(|byte| *byte == 0));
        assert!(
            bytes[..512]
                .iter()
                .chain(&bytes[end..])
                .all(|byte| *byte == 7)
        );
    }
}
