//! Protection domains, and memory that the network may reach.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use ibverbs_sys as sys;
use vm_memory::MmapRegion;

use super::Context;

/// What belongs together: keys of one domain are worth nothing to a queue pair of another.
#[derive(Debug)]
pub struct Domain {
    domain: NonNull<sys::ibv_pd>,
    context: Arc<Context>,
}

// SAFETY: rule 4 of the module; the pointer is owned.
unsafe impl Send for Domain {}
// SAFETY: rule 4 of the module.
unsafe impl Sync for Domain {}

impl Domain {
    /// A domain of an open device.
    pub fn new(context: &Arc<Context>) -> io::Result<Arc<Self>> {
        // SAFETY: the context is alive.
        let domain = unsafe { sys::ibv_alloc_pd(context.as_ptr()) };
        let domain = NonNull::new(domain).ok_or_else(io::Error::last_os_error)?;
        Ok(Arc::new(Domain {
            domain,
            context: Arc::clone(context),
        }))
    }

    pub(super) fn as_ptr(&self) -> *mut sys::ibv_pd {
        self.domain.as_ptr()
    }

    /// The device.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: allocated once, freed once; what was made in it is gone (rule 1).
        unsafe { sys::ibv_dealloc_pd(self.domain.as_ptr()) };
    }
}

/// Who may do what with a region, besides this side's reading of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nobody else anything.
    Local,
    /// The peer may write.
    RemoteWrite,
}

/// A part of a region, as a work request names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    pub(super) address: u64,
    pub(super) len: u32,
    pub(super) key: u32,
}

impl Piece {
    /// Length in bytes.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes `next` over as well, if it lies right behind.
    pub fn join(&mut self, next: &Piece) -> bool {
        let behind = self.key == next.key && self.address + u64::from(self.len) == next.address;
        match self.len.checked_add(next.len) {
            Some(len) if behind => {
                self.len = len;
                true
            }
            _ => false,
        }
    }

    /// The piece without its last bytes, `len` long, and those bytes.
    pub fn split_at(self, len: u32) -> (Piece, Piece) {
        let len = len.min(self.len);
        let tail = Piece {
            address: self.address + u64::from(len),
            len: self.len - len,
            key: self.key,
        };
        (Piece { len, ..self }, tail)
    }
}

/// Memory that is pinned and has a key, for as long as this lives.
#[derive(Debug)]
pub struct Region {
    region: NonNull<sys::ibv_mr>,
    memory: Arc<MmapRegion>,
    offset: usize,
    len: usize,
    address: u64,
    _domain: Arc<Domain>,
}

// SAFETY: rule 4 of the module; the pointer is owned.
unsafe impl Send for Region {}
// SAFETY: rule 4 of the module.
unsafe impl Sync for Region {}

impl Region {
    /// Registers `memory[offset .. offset + len]`, which the peer names from `address` on.
    pub fn new(
        domain: &Arc<Domain>,
        memory: &Arc<MmapRegion>,
        offset: usize,
        len: usize,
        address: u64,
        access: Access,
    ) -> io::Result<Self> {
        let end = offset.checked_add(len);
        if len == 0 || end.is_none_or(|end| end > memory.size()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = match access {
            Access::Local => sys::ibv_access_flags(0),
            Access::RemoteWrite => {
                sys::ibv_access_flags::IBV_ACCESS_LOCAL_WRITE
                    | sys::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE
            }
        };
        let start = memory.as_ptr().wrapping_add(offset);
        // SAFETY: the domain is alive, and the range is within a mapping that the region holds
        // (rule 2); the kernel checks and pins it.
        let region = unsafe {
            sys::ibv_reg_mr_iova(
                domain.as_ptr(),
                start.cast(),
                len,
                address,
                flags.0 as libc::c_int,
            )
        };
        let region = NonNull::new(region).ok_or_else(io::Error::last_os_error)?;
        Ok(Region {
            region,
            memory: Arc::clone(memory),
            offset,
            len,
            address,
            _domain: Arc::clone(domain),
        })
    }

    /// The key by which the peer names the region.
    pub fn remote_key(&self) -> u32 {
        // SAFETY: the region is alive; the field does not change.
        unsafe { (*self.region.as_ptr()).rkey }
    }

    /// The address at which the region begins, for the peer.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes; it always has some.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The mapping, and where in it the region begins.
    pub fn memory(&self) -> (&Arc<MmapRegion>, usize) {
        (&self.memory, self.offset)
    }

    /// The part of the region at `at`, if it is within.
    pub fn piece(&self, at: usize, len: usize) -> Option<Piece> {
        if at.checked_add(len)? > self.len {
            return None;
        }
        Some(Piece {
            address: self.address + at as u64,
            len: u32::try_from(len).ok()?,
            // SAFETY: the region is alive; the field does not change.
            key: unsafe { (*self.region.as_ptr()).lkey },
        })
    }

    /// Whether the CPU finds what the device would at a piece's address: within this region.
    pub(super) fn holds(&self, piece: &sys::ibv_sge) -> bool {
        let at_own_address = self.memory.as_ptr() as u64 + self.offset as u64 == self.address;
        let end = piece.addr.checked_add(piece.length.into());
        at_own_address
            && piece.addr >= self.address
            && end.is_some_and(|end| end <= self.address + self.len as u64)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: registered once, deregistered once. The mapping is dropped after it.
        unsafe { sys::ibv_dereg_mr(self.region.as_ptr()) };
    }
}
