//! The controller's view of memory: the windows that were mapped for it, and nothing else.
//!
//! A command *pins* the windows that it uses. Unmapping takes a window out of the table, so
//! that nobody can pin it any more, and then waits for the pins that exist. Looking up and
//! pinning take a short shared lock; no lock is held while data moves. [`Pins`] are what a
//! thread holds on to, so that commands in a row look a window up once.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};

use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileSlice};

use super::lock;
use crate::function::{DmaAccess, DmaWindow, FunctionError, Iova};
use crate::nvme::PAGE_SIZE;

/// The last IOVA that a window may hold: what physical addresses of PCs reach.
pub(super) const IOVA_MAX: u64 = (1 << 52) - 1;
/// How many windows there may be: the default of VFIO's `dma_entry_limit`.
const MAX_WINDOWS: usize = 65_535;
/// Memory is cleared in pieces of this many bytes.
const ZEROES: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// What a command wants to do with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// The controller reads memory.
    Read,
    /// The controller writes memory.
    Write,
}

/// The address is not mapped, or not for this access, or the function may not issue DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unreachable;

/// All windows.
pub(super) struct Dma {
    table: RwLock<BTreeMap<u64, Arc<Window>>>,
    idle: Arc<Idle>,
    /// The Command register's bus master enable: without it there is no DMA at all.
    bus_master: AtomicBool,
}

#[derive(Default)]
struct Idle {
    mutex: Mutex<()>,
    condvar: Condvar,
}

struct Window {
    iova: u64,
    len: u64,
    memory: Arc<MmapRegion>,
    offset: usize,
    writable: bool,
    pins: AtomicUsize,
    closing: AtomicBool,
    idle: Arc<Idle>,
}

impl Window {
    fn end(&self) -> u64 {
        self.iova + self.len
    }

    fn allows(&self, iova: u64, access: Access) -> bool {
        (self.iova..self.end()).contains(&iova) && (access == Access::Read || self.writable)
    }

    /// `at` and `len` in bytes, relative to the window.
    fn slice(&self, at: usize, len: usize) -> Option<VolatileSlice<'_>> {
        self.memory
            .get_slice(self.offset.checked_add(at)?, len)
            .ok()
    }
}

/// Keeps a window's memory in use.
struct Pin(Arc<Window>);

impl Pin {
    fn new(window: &Arc<Window>) -> Self {
        window.pins.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(window))
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        // Either this sees `closing`, or whoever set it sees the count that this left: both
        // are sequentially consistent.
        let last = self.0.pins.fetch_sub(1, Ordering::SeqCst) == 1;
        if last && self.0.closing.load(Ordering::SeqCst) {
            drop(lock(&self.0.idle.mutex));
            self.0.idle.condvar.notify_all();
        }
    }
}

impl Dma {
    pub(super) fn new() -> Self {
        Self {
            table: RwLock::new(BTreeMap::new()),
            idle: Arc::new(Idle::default()),
            bus_master: AtomicBool::new(false),
        }
    }

    pub(super) fn set_bus_master(&self, enabled: bool) {
        self.bus_master.store(enabled, Ordering::SeqCst);
    }

    pub(super) fn map(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        let len = window.len as u64;
        let iova = window.iova.0;
        let refuse = |why| {
            Err(FunctionError::BadWindow {
                iova: window.iova,
                len,
                why,
            })
        };
        let page = PAGE_SIZE as u64;
        if len == 0 {
            return refuse("it is empty");
        }
        let host = (window.memory.as_ptr() as usize).wrapping_add(window.offset);
        if iova % page != 0 || len % page != 0 || host % PAGE_SIZE != 0 {
            return refuse("its address, length and memory must be multiples of 4096");
        }
        if iova.checked_add(len - 1).is_none_or(|last| last > IOVA_MAX) {
            return refuse("it ends past the last usable address");
        }
        let inside = window.offset.checked_add(window.len);
        if inside.is_none_or(|end| end > window.memory.size()) {
            return refuse("it ends past its memory");
        }
        let writable = window.access == DmaAccess::ReadWrite;
        let prot = window.memory.prot();
        if prot & libc::PROT_READ == 0 || (writable && prot & libc::PROT_WRITE == 0) {
            return refuse("its memory is not mapped for that access");
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let before = table.range(..iova + len).next_back();
        if before.is_some_and(|(_, other)| other.end() > iova) {
            return refuse("it overlaps another one");
        }
        if table.len() >= MAX_WINDOWS {
            return refuse("there are 65535 windows already");
        }
        let entry = Window {
            iova,
            len,
            memory: Arc::clone(&window.memory),
            offset: window.offset,
            writable,
            pins: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
            idle: Arc::clone(&self.idle),
        };
        table.insert(iova, Arc::new(entry));
        Ok(())
    }

    /// Waits for the commands that use the windows.
    pub(super) fn unmap(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        let refuse = |why| Err(FunctionError::BadWindow { iova, len, why });
        let Some(end) = iova.0.checked_add(len).filter(|_| len > 0) else {
            return refuse("it is empty or wraps around");
        };
        let removed = {
            let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
            let first = table.range(..iova.0).next_back();
            let last = table.range(..end).next_back();
            if first.is_some_and(|(_, window)| window.end() > iova.0)
                || last.is_some_and(|(_, window)| window.end() > end)
            {
                return refuse("it would cut a window in two");
            }
            let mut inside = Vec::new();
            while let Some((&at, _)) = table.range(iova.0..end).next() {
                inside.extend(table.remove(&at));
            }
            inside
        };
        if removed.is_empty() {
            return refuse("there is none");
        }
        for window in removed {
            window.closing.store(true, Ordering::SeqCst);
            let mut guard = lock(&self.idle.mutex);
            while window.pins.load(Ordering::SeqCst) != 0 {
                guard = self
                    .idle
                    .condvar
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
        Ok(())
    }

    fn pin(&self, iova: u64, access: Access) -> Result<Pin, Unreachable> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let (_, window) = table
            .range((Bound::Unbounded, Bound::Included(iova)))
            .next_back()
            .filter(|(_, window)| window.allows(iova, access))
            .ok_or(Unreachable)?;
        Ok(Pin::new(window))
    }
}

/// How many windows are held on to from one command to the next.
const KEPT: usize = 8;

/// Windows that a thread holds on to, found again without the table. Whoever unmaps one waits
/// for it to be let go of, which must therefore happen before the thread waits for anything.
pub(super) struct Pins(Vec<Pin>);

impl Pins {
    /// Room for `capacity` windows besides those that are kept.
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self(Vec::with_capacity(capacity + KEPT))
    }

    /// Lets go of all windows.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Holds on to a few windows at most.
    fn trim(&mut self) {
        self.0.truncate(KEPT);
    }

    /// The index of the pin of the window that holds `iova`.
    fn find(&mut self, dma: &Dma, iova: u64, access: Access) -> Result<usize, Unreachable> {
        if !dma.bus_master.load(Ordering::SeqCst) {
            return Err(Unreachable);
        }
        let fits = |Pin(window): &Pin| window.allows(iova, access);
        let next = self.0.len();
        // What comes next is often where the last piece was. Few are searched: a command can
        // hold hundreds.
        if self.0.last().is_some_and(fits) {
            return Ok(next - 1);
        }
        if let Some(at) = self.0.iter().take(KEPT).position(fits) {
            return Ok(at);
        }
        self.0.push(dma.pin(iova, access)?);
        Ok(next)
    }

    fn window(&self, index: usize) -> Result<&Window, Unreachable> {
        self.0.get(index).map(|pin| &*pin.0).ok_or(Unreachable)
    }

    /// Copies memory out; in one piece for what does not cross a window.
    pub(super) fn read(
        &mut self,
        dma: &Dma,
        iova: u64,
        data: &mut [u8],
    ) -> Result<(), Unreachable> {
        let mut iova = iova;
        let mut rest = data;
        while !rest.is_empty() {
            let index = self.find(dma, iova, Access::Read)?;
            let window = self.window(index)?;
            let at = iova - window.iova;
            let len = rest
                .len()
                .min(usize::try_from(window.len - at).unwrap_or(usize::MAX));
            let slice = window.slice(at as usize, len).ok_or(Unreachable)?;
            let (now, later) = std::mem::take(&mut rest).split_at_mut(len);
            slice.copy_to(now);
            rest = later;
            iova += len as u64;
        }
        self.trim();
        Ok(())
    }

    /// Stores two quadwords at an address that is a multiple of 16; whoever sees the second
    /// one sees the first one, and everything that this thread stored before.
    pub(super) fn store_pair(
        &mut self,
        dma: &Dma,
        iova: u64,
        qwords: [u64; 2],
    ) -> Result<(), Unreachable> {
        let index = self.find(dma, iova, Access::Write)?;
        let window = self.window(index)?;
        let slice = window
            .slice((iova - window.iova) as usize, 16)
            .ok_or(Unreachable)?;
        let [first, second] = qwords;
        slice
            .store(first.to_le(), 0, Ordering::Relaxed)
            .map_err(|_| Unreachable)?;
        slice
            .store(second.to_le(), 8, Ordering::Release)
            .map_err(|_| Unreachable)?;
        self.trim();
        Ok(())
    }
}

/// The memory of one command's data: pinned pieces, in order. Reused from command to command.
pub(super) struct Scatter {
    pins: Pins,
    pieces: Vec<Piece>,
    total: usize,
}

/// A piece of the window that `pin` indexes; bytes, relative to the window.
struct Piece {
    pin: usize,
    at: usize,
    len: usize,
}

impl Scatter {
    pub(super) fn with_capacity(pieces: usize) -> Self {
        Self {
            pins: Pins::with_capacity(pieces),
            pieces: Vec::with_capacity(pieces),
            total: 0,
        }
    }

    /// Lets go of the memory.
    pub(super) fn clear(&mut self) {
        self.begin();
        self.pins.clear();
    }

    /// Makes ready for another command. A few windows are held on to.
    pub(super) fn begin(&mut self) {
        self.pieces.clear();
        self.pins.trim();
        self.total = 0;
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> usize {
        self.total
    }

    /// Appends `len` bytes at `iova`.
    pub(super) fn add(
        &mut self,
        dma: &Dma,
        iova: u64,
        len: usize,
        access: Access,
    ) -> Result<(), Unreachable> {
        let end = iova.checked_add(len as u64).ok_or(Unreachable)?;
        let mut iova = iova;
        while iova < end {
            let pin = self.pins.find(dma, iova, access)?;
            let window = self.pins.window(pin)?;
            let at = (iova - window.iova) as usize;
            let len = (end.min(window.end()) - iova) as usize;
            match self.pieces.last_mut() {
                Some(last) if last.pin == pin && last.at + last.len == at => last.len += len,
                _ => self.pieces.push(Piece { pin, at, len }),
            }
            self.total += len;
            iova += len as u64;
        }
        Ok(())
    }

    /// The pieces as memory.
    pub(super) fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.pieces.iter().filter_map(|piece| {
            let window = self.pins.window(piece.pin).ok()?;
            window.slice(piece.at, piece.len)
        })
    }

    /// Copies `data` into the memory, as much as fits.
    pub(super) fn fill_from(&self, data: &[u8]) {
        let mut rest = data;
        for slice in self.slices() {
            let (now, later) = rest.split_at(rest.len().min(slice.len()));
            slice.copy_from(now);
            rest = later;
        }
    }

    /// Fills the memory with zeroes, from `skip` bytes on to its end.
    pub(super) fn zero_from(&self, skip: usize) {
        let mut skip = skip;
        for slice in self.slices() {
            let start = skip.min(slice.len());
            skip -= start;
            let mut at = start;
            while at < slice.len() {
                let len = ZEROES.len().min(slice.len() - at);
                if let (Ok(part), Some(zeroes)) = (slice.subslice(at, len), ZEROES.get(..len)) {
                    part.copy_from(zeroes);
                }
                at += len;
            }
        }
    }

    /// Copies from the memory, `skip` bytes on, into `data`, as much as there is.
    pub(super) fn copy_to(&self, skip: usize, data: &mut [u8]) {
        let mut skip = skip;
        let mut rest = data;
        for slice in self.slices() {
            let start = skip.min(slice.len());
            skip -= start;
            let len = rest.len().min(slice.len() - start);
            let (now, later) = std::mem::take(&mut rest).split_at_mut(len);
            if let Ok(part) = slice.subslice(start, len) {
                part.copy_to(now);
            }
            rest = later;
        }
    }
}
