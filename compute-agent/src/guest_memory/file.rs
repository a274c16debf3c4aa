//! The files that guest memory is made of, each mapped once.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use farbus_vfio::{Iova, sigbus};
use rustix::fs::{FileType, OFlags, Stat, fcntl_getfl, fstat, fstatfs};
use vm_memory::{FileOffset, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use super::sharing::{Sharing, sharing_of};
use super::{MAX_WINDOWS, PAGE};
use crate::custody::Custody;
use crate::custody::messages::Key;

/// The most files at once; a VMM has one per memory backend.
const MAX_FILES: usize = 256;

/// `HUGETLBFS_MAGIC` of `linux/magic.h`.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// Why a window cannot be mapped or unmapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The range is empty or runs past the top of the address space.
    #[error(
        "a range of {size:#x} bytes at {iova} is empty or runs past the top of the address space"
    )]
    BadRange {
        /// Where it begins.
        iova: Iova,
        /// Its length in bytes.
        size: u64,
    },
    /// Something does not begin or end at a page.
    #[error(
        "the {what} at {at:#x} of {size:#x} bytes does not begin and end at multiples of {PAGE}"
    )]
    Misaligned {
        /// What it is.
        what: &'static str,
        /// Where it begins.
        at: u64,
        /// Its length in bytes.
        size: u64,
    },
    /// Part of the range is mapped already.
    #[error("a window of {size:#x} bytes at {iova} overlaps the one at {other}")]
    Overlap {
        /// Where the new window would begin.
        iova: Iova,
        /// Its length in bytes.
        size: u64,
        /// Where the existing one begins.
        other: Iova,
    },
    /// The range to unmap ends inside a window.
    #[error("unmapping {size:#x} bytes at {iova} would cut the window at {other} in two")]
    CutsWindow {
        /// Where the range begins.
        iova: Iova,
        /// Its length in bytes.
        size: u64,
        /// Where the window begins.
        other: Iova,
    },
    /// There are too many windows.
    #[error("the window at {iova} would be one more than the {MAX_WINDOWS} that are possible")]
    TooManyWindows {
        /// Where it would begin.
        iova: Iova,
    },
    /// There are too many files.
    #[error("guest memory in more than {MAX_FILES} files at once is not supported")]
    TooManyFiles,
    /// The descriptor is no file, or cannot be asked.
    #[error(
        "the descriptor of a window is not a regular file; give the VM its memory as memfd, tmpfs or hugetlbfs"
    )]
    NotAFile,
    /// The file is not open for what the device may do.
    #[error("the file of a window is not open for {need}")]
    NotPermitted {
        /// What it is not open for.
        need: &'static str,
    },
    /// The file ends before the window does.
    #[error("a window reaches to byte {end:#x} of a file that has {len:#x} bytes")]
    BeyondEnd {
        /// Where the window ends in the file, in bytes.
        end: u64,
        /// The file's length in bytes.
        len: u64,
    },
    /// The VMM maps the file privately.
    #[error(
        "the VMM (pid {pid}) maps its guest's memory privately, so that the device would see \
         stale data; start it with shared memory (QEMU: share=on at the memory backend, \
         cloud-hypervisor: --memory shared=on)"
    )]
    NotShared {
        /// The VMM's process id.
        pid: u32,
    },
    /// The operating system refused.
    #[error("{what} failed")]
    Io {
        /// What was tried, as a noun phrase.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl MapError {
    /// The errno that tells a vfio-user client.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Overlap { .. } => libc::EEXIST,
            Self::TooManyWindows { .. } | Self::TooManyFiles => libc::ENOSPC,
            Self::NotPermitted { .. } => libc::EACCES,
            Self::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            Self::BadRange { .. }
            | Self::Misaligned { .. }
            | Self::CutsWindow { .. }
            | Self::NotAFile
            | Self::BeyondEnd { .. }
            | Self::NotShared { .. } => libc::EINVAL,
        }
    }
}

/// Names a mapping of a file for as long as a window uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileId(pub(super) u64);

/// A file is the same when device and inode are: its descriptor stays open with the
/// mapping, so that the inode number cannot come to mean another file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    dev: u64,
    inode: u64,
    writable: bool,
}

#[derive(Debug)]
struct MemoryFile {
    id: FileId,
    identity: Identity,
    guard: sigbus::Guard,
    memory: Arc<MmapRegion>,
    windows: usize,
}

#[derive(Debug)]
pub(super) struct MemoryFiles {
    files: Vec<MemoryFile>,
    next_id: u64,
    lost: Arc<EventFd>,
    /// Holds the files for a successor.
    custody: Custody,
}

/// What the files are kept under, each with its id.
const MEMORY: &str = "memory";

impl MemoryFiles {
    pub(super) fn new(lost: Arc<EventFd>) -> Self {
        Self {
            files: Vec::new(),
            next_id: 0,
            lost,
            custody: Custody::none(),
        }
    }

    /// From now on the files are in custody.
    pub(super) fn keep(&mut self, custody: Custody) {
        self.custody = custody;
    }

    /// Takes up the files that a predecessor had.
    pub(super) fn resume(&mut self) -> Result<(), MapError> {
        for (id, fd) in self.custody.held_all(MEMORY) {
            let failed = |what| {
                move |e: rustix::io::Errno| MapError::Io {
                    what,
                    source: e.into(),
                }
            };
            let stat = fstat(&fd).map_err(failed("asking for the size of a memory file"))?;
            let mode = fcntl_getfl(&fd).map_err(failed("asking for the mode of a memory file"))?;
            let identity = Identity {
                dev: stat.st_dev,
                inode: stat.st_ino,
                writable: mode & OFlags::ACCMODE == OFlags::RDWR,
            };
            self.next_id = id;
            self.map(fd, identity, u64::try_from(stat.st_size).unwrap_or(0))?;
        }
        Ok(())
    }

    /// A descriptor of a file that is mapped.
    pub(super) fn descriptor(&self, id: u64) -> Result<OwnedFd, MapError> {
        let file = self.files.iter().find(|file| file.id.0 == id);
        let file = file.and_then(|file| file.memory.file_offset());
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let fd = file
            .ok_or_else(gone)
            .and_then(|file| file.file().try_clone());
        fd.map(Into::into).map_err(|source| MapError::Io {
            what: "finding the file of a window",
            source,
        })
    }

    fn forget(&self, gone: impl Fn(&MemoryFile) -> bool) {
        let gone = self.files.iter().filter(|file| gone(file));
        let keys: Vec<_> = gone.map(|file| Key::numbered(MEMORY, file.id.0)).collect();
        if !keys.is_empty() {
            self.custody.forget(&keys);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.files.len()
    }

    pub(super) fn lost(&self) -> bool {
        self.files.iter().any(|file| file.guard.was_hit())
    }

    pub(super) fn clear(&mut self) {
        self.forget(|_| true);
        self.files.clear();
    }

    /// The mapping that holds `size` bytes of the file from `offset` on.
    pub(super) fn find_or_map(
        &mut self,
        fd: OwnedFd,
        offset: u64,
        size: u64,
        write: bool,
        peer: Option<u32>,
    ) -> Result<(FileId, Arc<MmapRegion>), MapError> {
        let io = |what| {
            move |e: rustix::io::Errno| MapError::Io {
                what,
                source: e.into(),
            }
        };
        let stat = fstat(&fd).map_err(io("asking for the size of a memory file"))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(MapError::NotAFile);
        }
        let mode = fcntl_getfl(&fd).map_err(io("asking for the mode of a memory file"))?;
        let writable = match mode & OFlags::ACCMODE {
            OFlags::RDWR => true,
            OFlags::RDONLY => false,
            _ => return Err(MapError::NotPermitted { need: "reading" }),
        };
        if write && !writable {
            return Err(MapError::NotPermitted { need: "writing" });
        }
        let len = u64::try_from(stat.st_size).unwrap_or(0);
        let end = offset.checked_add(size).filter(|end| *end <= len);
        let end = end.ok_or(MapError::BeyondEnd {
            end: offset.saturating_add(size),
            len,
        })?;

        let identity = Identity {
            dev: stat.st_dev,
            inode: stat.st_ino,
            writable,
        };
        // A file that has grown is mapped again; windows into its old mapping keep that.
        let known = self
            .files
            .iter()
            .find(|file| file.identity == identity && file.memory.size() as u64 >= end);
        if let Some(file) = known {
            return Ok((file.id, file.memory.clone()));
        }
        check_shared(peer, &stat)?;
        self.map(fd, identity, len)
    }

    fn map(
        &mut self,
        fd: OwnedFd,
        identity: Identity,
        len: u64,
    ) -> Result<(FileId, Arc<MmapRegion>), MapError> {
        if self.files.len() >= MAX_FILES {
            self.drop_idle();
        }
        if self.files.len() >= MAX_FILES {
            return Err(MapError::TooManyFiles);
        }
        let failed = |source| MapError::Io {
            what: "mapping a memory file",
            source,
        };
        let granule = page_size_of(&fd);
        let size =
            usize::try_from(len).map_err(|_| failed(io::Error::from_raw_os_error(libc::ENOMEM)))?;
        let protection = if identity.writable {
            libc::PROT_READ | libc::PROT_WRITE
        } else {
            libc::PROT_READ
        };
        let memory = MmapRegion::build(
            Some(FileOffset::new(File::from(fd), 0)),
            size,
            protection,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
        )
        .map_err(|error| match error {
            vm_memory::mmap::MmapRegionError::Mmap(source) => failed(source),
            other => failed(io::Error::other(other)),
        })?;
        let memory = Arc::new(memory);
        let guard =
            sigbus::Guard::new(&memory, granule, &self.lost).map_err(|source| MapError::Io {
                what: "guarding a memory file",
                source,
            })?;
        let id = FileId(self.next_id);
        self.next_id += 1;
        if let Some(file) = memory.file_offset() {
            let key = Key::numbered(MEMORY, id.0);
            self.custody.keep(vec![(key, file.file().as_fd())]);
        }
        self.files.push(MemoryFile {
            id,
            identity,
            guard,
            memory: memory.clone(),
            windows: 0,
        });
        Ok((id, memory))
    }

    pub(super) fn add_window(&mut self, id: FileId) {
        if let Some(file) = self.files.iter_mut().find(|file| file.id == id) {
            file.windows += 1;
        }
    }

    /// One window of the file is gone. The last file that was in use stays mapped, since
    /// the next window is most likely in it; others without windows go.
    pub(super) fn remove_window(&mut self, id: FileId) {
        let Some(file) = self.files.iter_mut().find(|file| file.id == id) else {
            return;
        };
        file.windows = file.windows.saturating_sub(1);
        if file.windows == 0 {
            self.forget(|file| file.windows == 0 && file.id != id);
            self.files.retain(|file| file.windows > 0 || file.id == id);
        }
    }

    fn drop_idle(&mut self) {
        self.forget(|file| file.windows == 0);
        self.files.retain(|file| file.windows > 0);
    }
}

/// Refuses a file of which the peer is seen to have private, writable mappings only. A
/// peer that cannot be looked at (another user's, or in another namespace) is believed.
fn check_shared(peer: Option<u32>, stat: &Stat) -> Result<(), MapError> {
    match peer {
        Some(pid) if sharing_of(pid, stat) == Sharing::Private => Err(MapError::NotShared { pid }),
        _ => Ok(()),
    }
}

/// The size of the pages that a file's mapping is made of, in bytes.
fn page_size_of(fd: &OwnedFd) -> usize {
    let huge = fstatfs(fd).ok().filter(|fs| fs.f_type == HUGETLBFS_MAGIC);
    huge.and_then(|fs| usize::try_from(fs.f_bsize).ok())
        .unwrap_or(PAGE as usize)
}
