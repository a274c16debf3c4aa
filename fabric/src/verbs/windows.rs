//! This side's memory that takes part in transfers, and its registration with the device.
//!
//! Memory is registered in pieces of [`PIECE`] bytes, each when something first uses it: a guest's
//! memory is large, pinning it takes time, and what is never used for I/O need not be pinned. The device
//! side registers what it has at once, since its peer must know the keys before it can send anything.
//! Nothing outside the windows is registered.

use std::io;
use std::sync::Arc;

use vm_memory::MmapRegion;

use super::raw::{Access, Domain, Piece, Region};
use crate::wire::RdmaKey;
use crate::{FabricError, RemoteSpan, Span};

/// What is registered at a time, in bytes.
pub(super) const PIECE: usize = 16 << 20;

struct Window {
    span: Span,
    address: u64,
    access: Access,
    pieces: Vec<Option<Region>>,
    /// The last work request that reads it.
    last_use: u64,
}

impl Window {
    fn host(&self) -> usize {
        self.span.memory.as_ptr() as usize + self.span.offset
    }

    /// The piece that `at` is in, registered if it was not; a key that is new is appended.
    fn piece(
        &mut self,
        domain: &Arc<Domain>,
        at: usize,
        news: &mut Vec<RdmaKey>,
    ) -> Result<&Region, FabricError> {
        let index = at / PIECE;
        let start = index * PIECE;
        let len = PIECE.min(self.span.len - start);
        let out_of_bounds = FabricError::SpanOutOfBounds {
            offset: at,
            len: 1,
            size: self.span.len,
        };
        let slot = self.pieces.get_mut(index).ok_or(out_of_bounds)?;
        if slot.is_none() {
            let address = self.address + start as u64;
            let offset = self.span.offset + start;
            let region = Region::new(domain, &self.span.memory, offset, len, address, self.access)
                .map_err(|source| register_error(len, source))?;
            if self.access == Access::RemoteWrite {
                news.push(key_of(&region, true));
            }
            *slot = Some(region);
        }
        slot.as_ref().ok_or(FabricError::Closed)
    }
}

fn key_of(region: &Region, alive: bool) -> RdmaKey {
    RdmaKey {
        address: region.address(),
        len: region.len() as u64,
        key: region.remote_key(),
        alive,
    }
}

/// Says what to do about a registration that failed.
fn register_error(len: usize, source: io::Error) -> FabricError {
    let remedy = match source.kind() {
        io::ErrorKind::OutOfMemory => {
            "; it must be locked: raise the limit (LimitMEMLOCK=infinity in a unit, ulimit -l), \
             or give the process CAP_IPC_LOCK"
        }
        _ => "",
    };
    FabricError::Register {
        len,
        remedy,
        source,
    }
}

/// The windows of one connection.
pub(super) struct Windows {
    domain: Arc<Domain>,
    /// Ascending by address, disjoint.
    windows: Vec<Window>,
    /// Where each begins in this process, ascending, and its address.
    hosts: Vec<(usize, u64)>,
    eager: bool,
}

impl Windows {
    pub(super) fn new(domain: Arc<Domain>, eager: bool) -> Self {
        Windows {
            domain,
            windows: Vec::new(),
            hosts: Vec::new(),
            eager,
        }
    }

    pub(super) fn domain(&self) -> &Domain {
        &self.domain
    }

    /// Takes a window over. New keys are appended to `news`.
    pub(super) fn add(
        &mut self,
        span: &Span,
        address: u64,
        news: &mut Vec<RdmaKey>,
    ) -> Result<(), FabricError> {
        crate::link::check_span(span)?;
        // Memory that this process cannot write to, no peer can write to through it.
        let writable = span.memory.prot() & libc::PROT_WRITE != 0;
        let mut window = Window {
            span: span.clone(),
            address,
            access: if writable {
                Access::RemoteWrite
            } else {
                Access::Local
            },
            pieces: (0..span.len.div_ceil(PIECE)).map(|_| None).collect(),
            last_use: 0,
        };
        if self.eager {
            for at in (0..span.len).step_by(PIECE) {
                window.piece(&self.domain, at, news)?;
            }
        }
        let host = (window.host(), address);
        let at = self.hosts.partition_point(|known| *known < host);
        self.hosts.insert(at, host);
        let at = self
            .windows
            .partition_point(|known| known.address < address);
        self.windows.insert(at, window);
        Ok(())
    }

    /// Forgets a window, and deregisters what was registered of it. Dead keys are appended.
    pub(super) fn remove(&mut self, address: u64, news: &mut Vec<RdmaKey>) {
        let at = self
            .windows
            .partition_point(|known| known.address < address);
        if self
            .windows
            .get(at)
            .is_some_and(|window| window.address == address)
        {
            let window = self.windows.remove(at);
            self.hosts.retain(|(_, known)| *known != address);
            news.extend(
                window
                    .pieces
                    .iter()
                    .flatten()
                    .map(|piece| key_of(piece, false)),
            );
        }
    }

    /// Deregisters every piece in a range of memory: when this returns, the keys are dead. They are
    /// appended. The windows stay, and get other keys when they are next used.
    pub(super) fn revoke(
        &mut self,
        memory: &MmapRegion,
        offset: usize,
        len: usize,
        news: &mut Vec<RdmaKey>,
    ) {
        let start = (memory.as_ptr() as usize).saturating_add(offset);
        let end = start.saturating_add(len);
        for window in &mut self.windows {
            let host = window.host();
            for (index, slot) in window.pieces.iter_mut().enumerate() {
                let first = host + index * PIECE;
                let last = slot.as_ref().map_or(first, |piece| first + piece.len());
                if first < end && last > start {
                    if let Some(piece) = slot.take() {
                        news.push(key_of(&piece, false));
                    }
                }
            }
        }
    }

    /// Makes sure that the peer can write to a span, by keys that are appended where it cannot
    /// have them yet.
    pub(super) fn expose(
        &mut self,
        span: &RemoteSpan,
        news: &mut Vec<RdmaKey>,
    ) -> Result<(), FabricError> {
        let mut address = span.address;
        let mut left = u64::from(span.len);
        while left > 0 {
            let at = self
                .windows
                .partition_point(|window| window.address <= address);
            let window = at.checked_sub(1).and_then(|at| self.windows.get_mut(at));
            let within = |window: &Window| (address - window.address) as usize;
            let Some(window) = window.filter(|window| within(window) < window.span.len) else {
                return Err(FabricError::violation(format!(
                    "{left} bytes at {address:#x} are not registered"
                )));
            };
            let at = within(window);
            let piece = window.piece(&self.domain, at, news)?;
            let rest = (piece.len() - at % PIECE) as u64;
            let step = rest.min(left);
            left -= step;
            address += step;
        }
        Ok(())
    }

    /// The registered pieces that a span is of, joined where they lie behind each other, for the
    /// work request `user` to read.
    pub(super) fn gather(
        &mut self,
        span: &Span,
        user: u64,
        pieces: &mut Vec<Piece>,
        news: &mut Vec<RdmaKey>,
    ) -> Result<(), FabricError> {
        let mut host = span.memory.as_ptr() as usize + span.offset;
        let mut left = span.len;
        while left > 0 {
            let not_registered = FabricError::SpanOutOfBounds {
                offset: span.offset,
                len: span.len,
                size: span.memory.size(),
            };
            let (domain, window) = (&self.domain, find(&self.hosts, &mut self.windows, host));
            let window = window.ok_or(not_registered)?;
            let at = host - window.host();
            window.last_use = user;
            let region = window.piece(domain, at, news)?;
            let within = at % PIECE;
            let len = left.min(region.len() - within);
            let piece = region.piece(within, len).ok_or(FabricError::Closed)?;
            if !pieces.last_mut().is_some_and(|last| last.join(&piece)) {
                pieces.push(piece);
            }
            host += len;
            left -= len;
        }
        Ok(())
    }

    /// The last work request that reads from a range of memory, or from near it.
    pub(super) fn last_use(&self, memory: &MmapRegion, offset: usize, len: usize) -> u64 {
        let start = (memory.as_ptr() as usize).saturating_add(offset);
        let end = start.saturating_add(len);
        let touches =
            |window: &&Window| window.host() < end && window.host() + window.span.len > start;
        let uses = self.windows.iter().filter(touches);
        uses.map(|window| window.last_use).max().unwrap_or(0)
    }
}

/// The window that holds an address of this process. Windows may show the same memory, so one that
/// begins earlier may be the one.
fn find<'a>(
    hosts: &[(usize, u64)],
    windows: &'a mut [Window],
    host: usize,
) -> Option<&'a mut Window> {
    let behind = hosts.partition_point(|(start, _)| *start <= host);
    let candidates = hosts.get(..behind)?.iter().rev();
    let index = candidates.into_iter().find_map(|(start, address)| {
        let index = windows.binary_search_by_key(address, |w| w.address).ok()?;
        (host - start < windows[index].span.len).then_some(index)
    })?;
    windows.get_mut(index)
}
