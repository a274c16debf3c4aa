//! The drive, driven: an NVMe host driver that never waits, on top of any [`Function`].
//!
//! [`Drive::bring_up`] does wait, and runs on a thread of its own ([`BringUp`]) while the event
//! loop goes on. From then on commands are put into queues ([`Drive::submit`]), doorbells rung
//! once per turn of the event loop ([`Drive::ring`]), and completions looked for when something
//! may have come ([`Drive::poll`]): the queues have no interrupts, since the function is one of
//! this process. What the drive may know of this process's memory is made here: queues, PRP lists
//! and bounce buffers, at addresses where no guest memory can be.

#![forbid(unsafe_code)]

mod bring_up;
mod shape;
mod watch;

use std::sync::Arc;

use farbus_vfio::Function;
use farbus_vfio::driver::{DmaBuffer, DriverError, NvmeDriver};
use farbus_vfio::nvme::{CompletionEntry, Status, SubmissionEntry, csts, reg};

pub use self::bring_up::{BringUp, DriveError};
pub use self::shape::{BadShape, Shape};
use self::watch::Watch;
use super::pieces::{self, Cursor};
use super::request::Segment;

/// Bytes of a bounce buffer.
pub const BOUNCE: u32 = 64 << 10;
/// How many bounce buffers there are: what does not fit PRPs waits for one.
const BOUNCES: u16 = 32;
/// Entries of an I/O queue.
const ENTRIES: u16 = 256;
/// Most I/O queue pairs, whatever the number of virtqueues.
const MAX_PAIRS: u16 = 8;

/// Where a command's data is.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// It has none.
    None,
    /// In guest memory that PRPs can name.
    Direct {
        /// All of the request's memory.
        segments: &'a [Segment],
        /// Where this command's begins.
        cursor: Cursor,
        /// Bytes of it.
        len: u32,
    },
    /// In a bounce buffer.
    Bounce(BounceId),
}

/// A bounce buffer that somebody holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BounceId(u16);

/// A command that is done.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// As it was submitted with.
    pub token: u64,
    /// Its outcome.
    pub status: Status,
}

struct Pair {
    id: u16,
    /// What each command in flight was submitted with; its PRP list is the one of its slot.
    slots: Vec<u64>,
    free: Vec<u16>,
    /// Slots by command identifier.
    by_cid: Vec<u16>,
    lists: DmaBuffer,
    /// Commands wait for the doorbell.
    unrung: bool,
}

/// See the module's own description.
pub struct Drive {
    driver: NvmeDriver<dyn Function>,
    shape: Shape,
    pairs: Vec<Pair>,
    /// Bytes of a PRP list.
    list: usize,
    bounces: DmaBuffer,
    free_bounces: Vec<BounceId>,
    watch: Watch,
    in_flight: usize,
    /// The entries of a list that is being made.
    entries: Vec<u8>,
    /// What is being taken from a completion queue.
    completions: Vec<CompletionEntry>,
}

impl Drive {
    /// What the drive is.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Commands that have not completed.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The queue pair that a virtqueue uses.
    fn pair(&mut self, queue: u16) -> Option<&mut Pair> {
        let count = self.pairs.len().max(1);
        self.pairs.get_mut(usize::from(queue) % count)
    }

    /// Whether a virtqueue's next command has room.
    pub fn has_room(&mut self, queue: u16) -> bool {
        self.pair(queue).is_some_and(|pair| !pair.free.is_empty())
    }

    /// Takes a bounce buffer, if one is free.
    pub fn take_bounce(&mut self) -> Option<BounceId> {
        self.free_bounces.pop()
    }

    /// Gives a bounce buffer back.
    pub fn free_bounce(&mut self, id: BounceId) {
        self.free_bounces.push(id);
    }

    /// Copies into a bounce buffer, from its beginning.
    pub fn fill_bounce(&mut self, id: BounceId, at: usize, data: &[u8]) -> Result<(), DriverError> {
        let at = usize::from(id.0) * BOUNCE as usize + at;
        self.driver.memory().write(self.bounces, at, data)
    }

    /// Copies out of a bounce buffer, from its beginning.
    pub fn read_bounce(
        &mut self,
        id: BounceId,
        at: usize,
        data: &mut [u8],
    ) -> Result<(), DriverError> {
        let at = usize::from(id.0) * BOUNCE as usize + at;
        self.driver.memory().read(self.bounces, at, data)
    }

    /// Puts a command into the queue pair of a virtqueue, which must have room; the doorbell
    /// waits for [`Self::ring`]. `bytes` is the length of data in a bounce buffer.
    pub fn submit(
        &mut self,
        queue: u16,
        mut command: SubmissionEntry,
        data: Data<'_>,
        bytes: u32,
        token: u64,
    ) -> Result<(), DriverError> {
        let count = self.pairs.len().max(1);
        let pair = self
            .pairs
            .get_mut(usize::from(queue) % count)
            .ok_or(DriverError::NoQueue(queue))?;
        let slot = pair.free.pop().ok_or(DriverError::QueueFull(pair.id))?;
        command.set_nsid(self.shape.nsid);
        let list_at = usize::from(slot) * self.list;
        let list = pair.lists.iova().0 + list_at as u64;
        let entries = &mut self.entries;
        entries.clear();
        let (first, others) = match data {
            Data::None => (0, 0),
            Data::Direct {
                segments,
                cursor,
                len,
            } => pieces::prps(segments, cursor, len, |_, address| {
                entries.extend_from_slice(&address.to_le_bytes());
            }),
            Data::Bounce(id) => {
                let address = self.bounces.iova().0 + u64::from(id.0) * u64::from(BOUNCE);
                let whole = Segment {
                    address,
                    len: bytes,
                };
                pieces::prps(&[whole], Cursor::default(), bytes, |_, address| {
                    entries.extend_from_slice(&address.to_le_bytes());
                })
            }
        };
        let second = match others {
            0 => 0,
            1 => entries.first_chunk().map_or(0, |e| u64::from_le_bytes(*e)),
            _ => {
                self.driver.memory().write(pair.lists, list_at, entries)?;
                list
            }
        };
        command.set_prps(first, second);
        let cid = match self.driver.enqueue(pair.id, command) {
            Ok(cid) => cid,
            Err(error) => {
                pair.free.push(slot);
                return Err(error);
            }
        };
        if let Some(place) = pair.slots.get_mut(usize::from(slot)) {
            *place = token;
        }
        if let Some(place) = pair.by_cid.get_mut(usize::from(cid)) {
            *place = slot;
        }
        pair.unrung = true;
        self.in_flight += 1;
        Ok(())
    }

    /// Rings the doorbells of what was submitted.
    pub fn ring(&mut self) -> Result<(), DriverError> {
        for pair in &mut self.pairs {
            if std::mem::take(&mut pair.unrung) {
                self.driver.ring(pair.id)?;
            }
        }
        Ok(())
    }

    /// Commands that have completed, as many as `into` has capacity for.
    pub fn poll(&mut self, into: &mut Vec<Done>) -> Result<(), DriverError> {
        into.clear();
        for pair in &mut self.pairs {
            if into.capacity() - into.len() < self.completions.capacity() {
                break;
            }
            self.completions.clear();
            self.driver.reap(pair.id, &mut self.completions)?;
            for entry in &self.completions {
                let slot = pair.by_cid.get(usize::from(entry.cid)).copied();
                let slot = slot.unwrap_or_default();
                pair.free.push(slot);
                self.in_flight = self.in_flight.saturating_sub(1);
                into.push(Done {
                    token: pair.slots.get(usize::from(slot)).copied().unwrap_or(0),
                    status: entry.status,
                });
            }
        }
        Ok(())
    }

    /// Room for what [`Self::poll`] finds.
    pub fn room() -> Vec<Done> {
        Vec::with_capacity(usize::from(ENTRIES) * usize::from(MAX_PAIRS))
    }

    /// Hears what the drive says unasked. Whether its size has changed.
    pub fn listen(&mut self) -> Result<bool, DriverError> {
        watch::listen(self)
    }

    /// Asks the drive for its size again; [`Self::listen`] hears the answer.
    pub fn look_again(&mut self) -> Result<(), DriverError> {
        watch::look_again(self)
    }

    /// Whether the controller has failed, so that only a reset helps.
    pub fn has_failed(&self) -> bool {
        match self.driver.read32(reg::CSTS) {
            Ok(status) => status & csts::CFS != 0 || status & csts::RDY == 0,
            Err(_) => true,
        }
    }

    /// Resets the function: whatever was in flight is no more, and touches no memory any more.
    pub fn shut(mut self) -> Arc<dyn Function> {
        let function = Arc::clone(self.driver.function());
        if let Err(error) = self.driver.reset() {
            log::debug!("the drive was not reset: {error}");
        }
        function
    }
}
