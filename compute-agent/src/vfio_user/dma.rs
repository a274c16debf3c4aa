//! `VFIO_USER_DMA_MAP` and `VFIO_USER_DMA_UNMAP`.

use std::os::fd::OwnedFd;

use farbus_vfio::user::WireError;
use farbus_vfio::user::body::{
    DMA_READ, DMA_WRITE, DmaMap, DmaUnmap, UNMAP_ALL, UNMAP_GET_DIRTY_BITMAP, at_least,
};
use farbus_vfio::{DmaAccess, Function, FunctionError, Iova};

use super::refusal::Refusal;
use crate::guest_memory::{GuestMemory, MapRequest, Span};

/// Maps a window. Without a descriptor the client means that the server should ask for the
/// memory by messages; the VMMs do so for what is no RAM, which no function here is to reach,
/// so such a window is only remembered.
pub(super) fn map(
    function: &dyn Function,
    memory: &mut GuestMemory,
    peer: Option<u32>,
    body: &[u8],
    mut fds: Vec<OwnedFd>,
) -> Result<(), Refusal> {
    let ask = DmaMap::decode(body)?;
    at_least(DmaMap::NAME, ask.argsz, DmaMap::LEN)?;
    if fds.len() > 1 {
        return Err(Refusal::FdCount {
            what: DmaMap::NAME,
            fds: fds.len(),
        });
    }
    let access = match ask.flags {
        DMA_READ => DmaAccess::Read,
        f if f & DMA_WRITE != 0 && f & !(DMA_READ | DMA_WRITE) == 0 => DmaAccess::ReadWrite,
        flags => {
            let why = "are neither of readable and writeable, or more than those";
            return Err(WireError::BadFlags {
                what: DmaMap::NAME,
                flags,
                why,
            }
            .into());
        }
    };
    let request = MapRequest {
        iova: Iova(ask.address),
        size: ask.size,
        access,
        file: fds.pop().map(|fd| (fd, ask.offset)),
    };
    let prepared = memory.prepare(request, peer)?;
    if let Some(window) = &prepared.window {
        function.map_dma(window)?;
    }
    memory.enter(prepared);
    Ok(())
}

/// The window that a request to map is about.
pub(super) fn range_of(body: &[u8]) -> Result<(Iova, u64), Refusal> {
    let ask = DmaMap::decode(body)?;
    Ok((Iova(ask.address), ask.size))
}

/// Unmaps every window in a range, or all of them. The reply is the request's own body.
pub(super) fn unmap(
    function: &dyn Function,
    memory: &mut GuestMemory,
    body: &[u8],
) -> Result<DmaUnmap, Refusal> {
    let ask = DmaUnmap::decode(body)?;
    at_least(DmaUnmap::NAME, ask.argsz, DmaUnmap::LEN)?;
    match ask.flags {
        0 => {
            give_back(function, memory.span_within(Iova(ask.address), ask.size)?)?;
            memory.forget(Iova(ask.address), ask.size);
        }
        UNMAP_ALL if ask.address != 0 || ask.size != 0 => {
            return Err(Refusal::UnmapAllRange {
                address: ask.address,
                size: ask.size,
            });
        }
        UNMAP_ALL => unmap_all(function, memory)?,
        flags if flags & UNMAP_GET_DIRTY_BITMAP != 0 => {
            return Err(Refusal::Unsupported("the dirty bitmap of a DMA_UNMAP"));
        }
        flags => {
            let why = "are not defined";
            return Err(WireError::BadFlags {
                what: DmaUnmap::NAME,
                flags,
                why,
            }
            .into());
        }
    }
    Ok(ask)
}

/// Unmaps all windows.
pub(super) fn unmap_all(function: &dyn Function, memory: &mut GuestMemory) -> Result<(), Refusal> {
    give_back(function, memory.whole_span())?;
    memory.clear();
    Ok(())
}

/// Has the function give memory back. One that is gone does not reach any.
fn give_back(function: &dyn Function, span: Option<Span>) -> Result<(), Refusal> {
    let Some(Span { iova, len }) = span else {
        return Ok(());
    };
    match function.unmap_dma(iova, len) {
        Ok(()) | Err(FunctionError::Gone(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
