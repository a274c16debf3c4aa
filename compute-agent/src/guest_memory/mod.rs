//! The guest's memory, as a VMM hands it over: ranges of files, each at an IOVA.
//!
//! There is **one mapping per memory file**, whatever the number of windows: with a vIOMMU a
//! guest opens and closes tens of thousands of windows per second, all into the same one or
//! two files. The memory is shared with the guest and changes at any time, so nothing here
//! makes a Rust reference to it; it leaves as [`DmaWindow`]s, for `vm-memory`'s volatile
//! access.
//!
//! A VMM may do three things that would hurt this process, and each is caught here: map
//! beyond the end of a file ([`MapError::BeyondEnd`]), truncate a file under us
//! (see [`farbus_vfio::sigbus`]), and send a file that it maps privately itself, so that its guest and we
//! would see different memory ([`MapError::NotShared`]).

mod file;
mod sharing;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use farbus_vfio::{DmaAccess, DmaWindow, Iova};
use vmm_sys_util::eventfd::EventFd;

pub use self::file::MapError;
use self::file::{FileId, MemoryFiles};
use crate::custody::Custody;
use crate::vfio_user::record::{SessionRecord, WindowRecord};

/// The most windows at once (vfio-user's default for `max_dma_maps`).
pub const MAX_WINDOWS: usize = 65535;

/// Windows begin and end at multiples of this, in bytes.
pub const PAGE: u64 = 4096;

/// A window that a VMM asks for.
#[derive(Debug)]
pub struct MapRequest {
    /// Where the device sees it.
    pub iova: Iova,
    /// Its length in bytes.
    pub size: u64,
    /// What the device may do.
    pub access: DmaAccess,
    /// The file it is in, and where it begins there (bytes). A window without a file is
    /// remembered, so that it cannot be mapped over, and gives access to nothing.
    pub file: Option<(OwnedFd, u64)>,
}

#[derive(Debug)]
struct Window {
    /// Where its last byte is.
    last: u64,
    file: Option<FileId>,
    /// Its place in the record.
    place: usize,
}

/// A window that has been checked and is not entered yet.
#[derive(Debug)]
pub struct Prepared {
    iova: Iova,
    entry: Window,
    access: DmaAccess,
    /// What the function is to be given; `None` for a window without a file.
    pub window: Option<DmaWindow>,
}

/// Windows that are to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where the first one begins.
    pub iova: Iova,
    /// From there to the end of the last one, in bytes.
    pub len: u64,
}

/// All windows of one client.
#[derive(Debug)]
pub struct GuestMemory {
    windows: BTreeMap<u64, Window>,
    files: MemoryFiles,
    /// Where a successor finds the windows, if there is to be one; with the places in there that
    /// are free, as far as they were ever used.
    record: Option<SessionRecord>,
    free_places: Vec<usize>,
    used_places: usize,
}

impl GuestMemory {
    /// No windows yet. `lost` is signalled when a memory file turns out to be truncated;
    /// see [`Self::lost`].
    pub fn new(lost: Arc<EventFd>) -> Self {
        Self {
            windows: BTreeMap::new(),
            files: MemoryFiles::new(lost),
            record: None,
            free_places: Vec::new(),
            used_places: 0,
        }
    }

    /// The same, with the windows in the record and their files in custody.
    pub(crate) fn keep(mut self, record: SessionRecord, custody: Custody) -> Self {
        self.files.keep(custody);
        self.record = Some(record);
        self
    }

    /// Takes up what a predecessor had mapped; says what the function is to be given.
    pub(crate) fn resume(
        &mut self,
        windows: Vec<(usize, WindowRecord)>,
        peer: Option<u32>,
    ) -> Result<Vec<DmaWindow>, MapError> {
        self.files.resume()?;
        let used: BTreeSet<usize> = windows.iter().map(|(place, _)| *place).collect();
        self.used_places = used.last().map_or(0, |last| last + 1);
        self.free_places = (0..self.used_places)
            .filter(|place| !used.contains(place))
            .collect();
        let mut given = Vec::new();
        for (place, window) in windows {
            let file = match window.file {
                Some((id, offset)) => Some((self.files.descriptor(id)?, offset)),
                None => None,
            };
            let request = MapRequest {
                iova: window.iova,
                size: window.size,
                access: window.access,
                file,
            };
            let mut prepared = self.prepare_unaligned(request, peer)?;
            given.extend(prepared.window.take());
            self.enter_at(prepared, place);
        }
        Ok(given)
    }

    /// Checks a request of the process `peer` and maps its file where that is not done yet.
    /// The window counts when [`Self::enter`] has been called.
    pub fn prepare(
        &mut self,
        request: MapRequest,
        peer: Option<u32>,
    ) -> Result<Prepared, MapError> {
        let MapRequest {
            iova, size, file, ..
        } = &request;
        let misaligned = |what, at: u64| {
            let (size, crooked) = (*size, at % PAGE != 0 || size % PAGE != 0);
            crooked.then_some(MapError::Misaligned { what, at, size })
        };
        last_byte(*iova, *size)?;
        let offset = file.as_ref().map_or(0, |(_, offset)| *offset);
        match misaligned("window", iova.0).or(misaligned("range of the file", offset)) {
            Some(error) => Err(error),
            None => self.prepare_unaligned(request, peer),
        }
    }

    /// As [`Self::prepare`], for a window that may begin and end anywhere.
    pub fn prepare_unaligned(
        &mut self,
        request: MapRequest,
        peer: Option<u32>,
    ) -> Result<Prepared, MapError> {
        let MapRequest {
            iova,
            size,
            access,
            file,
        } = request;
        let last = last_byte(iova, size)?;
        // With the very last byte taken, lengths from 0 on would no longer fit in 64 bits.
        if last == u64::MAX {
            return Err(MapError::BadRange { iova, size });
        }
        if let Some((start, window)) = self.windows.range(..=last).next_back() {
            if window.last >= iova.0 {
                let other = Iova(*start);
                return Err(MapError::Overlap { iova, size, other });
            }
        }
        if self.windows.len() >= MAX_WINDOWS {
            return Err(MapError::TooManyWindows { iova });
        }
        let Some((fd, offset)) = file else {
            return Ok(Prepared {
                iova,
                entry: Window {
                    last,
                    file: None,
                    place: 0,
                },
                access,
                window: None,
            });
        };
        let writable = access == DmaAccess::ReadWrite;
        let (id, memory) = self.files.find_or_map(fd, offset, size, writable, peer)?;
        let window = DmaWindow {
            iova,
            memory,
            offset: offset as usize,
            len: size as usize,
            access,
        };
        Ok(Prepared {
            iova,
            entry: Window {
                last,
                file: Some(id),
                place: 0,
            },
            access,
            window: Some(window),
        })
    }

    /// Enters a prepared window.
    pub fn enter(&mut self, prepared: Prepared) {
        let place = self.free_places.pop().unwrap_or_else(|| {
            self.used_places += 1;
            self.used_places - 1
        });
        if let Some(record) = &self.record {
            let offset = prepared.window.as_ref().map_or(0, |window| window.offset);
            let window = WindowRecord {
                iova: prepared.iova,
                size: prepared.entry.last - prepared.iova.0 + 1,
                access: prepared.access,
                file: prepared.entry.file.map(|id| (id.0, offset as u64)),
            };
            record.set_window(place, &window);
        }
        self.enter_at(prepared, place);
    }

    fn enter_at(&mut self, mut prepared: Prepared, place: usize) {
        prepared.entry.place = place;
        if let Some(id) = prepared.entry.file {
            self.files.add_window(id);
        }
        self.windows.insert(prepared.iova.0, prepared.entry);
    }

    /// What the windows with a file within `iova .. iova + size` span; `None` when there
    /// are none, which is no error: a VMM that tears down a vIOMMU domain unmaps
    /// ranges in which nothing is mapped.
    pub fn span_within(&self, iova: Iova, size: u64) -> Result<Option<Span>, MapError> {
        let last = last_byte(iova, size)?;
        // Windows do not overlap, so only the last one that begins before each end of the
        // range can reach across that end.
        let across_first = self
            .windows
            .range(..iova.0)
            .next_back()
            .filter(|(_, w)| w.last >= iova.0);
        let across_last = self
            .windows
            .range(..=last)
            .next_back()
            .filter(|(_, w)| w.last > last);
        if let Some((start, _)) = across_first.or(across_last) {
            return Err(MapError::CutsWindow {
                iova,
                size,
                other: Iova(*start),
            });
        }
        Ok(self.span(iova.0, last))
    }

    fn span(&self, first: u64, last: u64) -> Option<Span> {
        let backed = |(start, window): (&u64, &Window)| window.file.map(|_| (*start, window.last));
        let (start, _) = self.windows.range(first..=last).find_map(backed)?;
        let (_, end) = self.windows.range(first..=last).rev().find_map(backed)?;
        Some(Span {
            iova: Iova(start),
            len: end - start + 1,
        })
    }

    /// What all windows with a file span.
    pub fn whole_span(&self) -> Option<Span> {
        self.span(0, u64::MAX)
    }

    /// Forgets the windows within `iova .. iova + size`, which the function has given back.
    pub fn forget(&mut self, iova: Iova, size: u64) {
        let Ok(last) = last_byte(iova, size) else {
            return;
        };
        while let Some((&start, _)) = self.windows.range(iova.0..=last).next() {
            let Some(Window { file, place, .. }) = self.windows.remove(&start) else {
                return;
            };
            if let Some(record) = &self.record {
                record.clear_window(place);
            }
            self.free_places.push(place);
            file.into_iter().for_each(|id| self.files.remove_window(id));
        }
    }

    /// Forgets everything, which the function has given back.
    pub fn clear(&mut self) {
        for window in self.windows.values() {
            if let Some(record) = &self.record {
                record.clear_window(window.place);
            }
        }
        self.free_places.clear();
        self.used_places = 0;
        self.windows.clear();
        self.files.clear();
    }

    /// How many windows there are.
    pub fn windows(&self) -> usize {
        self.windows.len()
    }

    /// How many mappings of files there are.
    pub fn mappings(&self) -> usize {
        self.files.len()
    }

    /// Whether the file behind some window was truncated while it was in use. What was
    /// lost reads as zeros since then, and the client is not to be served any further.
    pub fn lost(&self) -> bool {
        self.files.lost()
    }
}

fn last_byte(iova: Iova, size: u64) -> Result<u64, MapError> {
    size.checked_sub(1)
        .and_then(|distance| iova.0.checked_add(distance))
        .ok_or(MapError::BadRange { iova, size })
}
