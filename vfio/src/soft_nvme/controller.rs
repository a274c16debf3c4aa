//! What the threads of one controller share, and the life of a command: fetched once, carried
//! out, completed.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::backing::Backing;
use super::dma::{Access, Dma, Pins, Scatter, Unreachable};
use super::events::{Event, Events};
use super::features::Features;
use super::front::Front;
use super::health::{Health, warning};
use super::identity::Identity;
use super::irq::Interrupts;
use super::queues::{Cq, Fetched, Queues, Sq};
use super::size::Size;
use super::sys::Vectors;
use super::work::WorkQueue;
use super::{identify, io, lock, prp};
use crate::nvme::{PAGE_SIZE, Status, SubmissionEntry, csts};

/// Largest transfer in bytes.
pub(super) const MAX_TRANSFER: usize = PAGE_SIZE << identify::MDTS;
/// Pages that a transfer can touch at most: one more than it fills, as it may begin anywhere.
const MAX_PAGES: usize = MAX_TRANSFER / PAGE_SIZE + 1;
/// Pages of rings and PRP lists that one command can need.
const MAX_OTHER_PAGES: usize = 8;
/// Size of a thread's own buffers in bytes.
const BUFFER: usize = 64 << 10;
/// The same for those that there are many of: what Dataset Management needs.
const SMALL_BUFFER: usize = PAGE_SIZE;

/// The namespace's shape at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Log2 of the block size in bytes.
    pub(super) block_shift: u8,
    /// Number of blocks.
    pub(super) blocks: u64,
    /// Deallocated blocks read as zero.
    pub(super) reads_zero: bool,
}

/// Everything that exists once for each controller.
pub(super) struct Controller {
    pub(super) backing: Backing,
    pub(super) identity: Identity,
    /// Log2 of the block size in bytes.
    pub(super) block_shift: u8,
    pub(super) size: Size,
    pub(super) queue_pairs: u16,
    pub(super) dma: Dma,
    pub(super) interrupts: Interrupts,
    pub(super) front: Front,
    pub(super) queues: RwLock<Queues>,
    pub(super) work: WorkQueue,
    pub(super) events: Events,
    pub(super) features: Mutex<Features>,
    /// The volatile write cache is on; the same as in `features`, for the I/O path.
    pub(super) write_cache: AtomicBool,
    pub(super) health: Health,
    /// No more commands are fetched: fatal error, or shut down.
    pub(super) halted: AtomicBool,
    /// Fatal status has been in the log.
    pub(super) reported_fatal: AtomicBool,
}

/// What a thread needs to carry out commands, made once.
pub(super) struct Scratch {
    /// Where rings and PRP lists are.
    pub(super) pins: Pins,
    pub(super) data: Scatter,
    pub(super) vectors: Vectors,
    pub(super) buffer: Box<[u8]>,
    pub(super) other: Box<[u8]>,
    list: Box<[u64; prp::LIST_ENTRIES]>,
}

impl Scratch {
    pub(super) fn new() -> Self {
        Self::with_buffers(BUFFER)
    }

    /// With small buffers.
    pub(super) fn small() -> Self {
        Self::with_buffers(SMALL_BUFFER)
    }

    fn with_buffers(size: usize) -> Self {
        Self {
            pins: Pins::with_capacity(MAX_OTHER_PAGES),
            data: Scatter::with_capacity(MAX_PAGES),
            vectors: Vectors::with_capacity(MAX_PAGES),
            buffer: vec![0; size].into(),
            other: vec![0; size].into(),
            list: Box::new([0; prp::LIST_ENTRIES]),
        }
    }

    /// Lets go of all memory.
    pub(super) fn release(&mut self) {
        self.pins.clear();
        self.data.clear();
    }

    /// Finds and pins the memory of a command's data.
    pub(super) fn map(
        &mut self,
        dma: &Dma,
        command: &SubmissionEntry,
        len: usize,
        access: Access,
    ) -> Result<(), Status> {
        // SGLs are not advertised (§4.4).
        if command.psdt() != 0 || len > MAX_TRANSFER {
            return Err(Status::INVALID_FIELD);
        }
        self.data.begin();
        let Self {
            pins, data, list, ..
        } = self;
        let read_list = |address, entries: &mut [u64]| read_list(dma, pins, address, entries);
        let emit = |address, len| data.add(dma, address, len, access);
        prp::walk((command.prp1(), command.prp2()), len, list, read_list, emit)
    }
}

/// Copies entries of a PRP list out of memory, once.
fn read_list(
    dma: &Dma,
    pins: &mut Pins,
    address: u64,
    entries: &mut [u64],
) -> Result<(), Unreachable> {
    let mut bytes = [0; PAGE_SIZE];
    let bytes = bytes.get_mut(..entries.len() * 8).ok_or(Unreachable)?;
    pins.read(dma, address, bytes)?;
    for (entry, bytes) in entries.iter_mut().zip(bytes.chunks_exact(8)) {
        *entry = bytes
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes));
    }
    Ok(())
}

impl Controller {
    /// The namespace's shape as it is now.
    pub(super) fn shape(&self) -> Shape {
        Shape {
            block_shift: self.block_shift,
            blocks: self.size.blocks(),
            reads_zero: self.backing.reads_zero(),
        }
    }

    pub(super) fn queues(&self) -> RwLockReadGuard<'_, Queues> {
        self.queues.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn queues_mut(&self) -> RwLockWriteGuard<'_, Queues> {
        self.queues.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A doorbell was written: `index` counts dwords, even ones are submission queues.
    pub(super) fn ring(&self, index: u64, value: u32) {
        let queues = self.queues();
        if queues.sq(0).is_none() {
            // Not enabled: nobody would hear of it.
            return;
        }
        let id = (index / 2) as u16;
        // The upper half of a doorbell is reserved (§3.1.24).
        let value = value as u16;
        let outcome = if index % 2 == 0 {
            let sq = queues.sq(id).cloned();
            drop(queues);
            sq.map(|sq| sq.set_tail(value).map(|()| self.wake(&sq)))
        } else {
            let cq = queues.cq(id).cloned();
            drop(queues);
            cq.map(|cq| {
                cq.set_head(value).map(|starved| {
                    if starved {
                        self.feed(id);
                    }
                })
            })
        };
        let event = match outcome {
            Some(Ok(())) => return,
            Some(Err(_)) => Event::InvalidDoorbellValue,
            None => Event::InvalidDoorbell,
        };
        self.health.record_doorbell(id);
        self.raise(event);
    }

    /// There is room again in a completion queue that commands wait for.
    fn feed(&self, cq: u16) {
        for id in 0..=self.queue_pairs {
            if let Some(sq) = self.sq(id).filter(|sq| sq.cq.id == cq) {
                self.wake(&sq);
            }
        }
        if cq == 0 {
            self.front.request_delivery();
        }
    }

    /// A submission queue may have commands.
    fn wake(&self, sq: &Sq) {
        if sq.is_inline() {
            self.run(sq);
        } else if sq.id == 0 {
            self.front.request_commands();
        } else {
            self.work.push(sq.id);
        }
    }

    pub(super) fn raise(&self, event: Event) {
        self.events.raise(event);
        self.front.request_delivery();
    }

    /// Takes the next command of a queue, if there is one to take.
    pub(super) fn fetch(&self, sq: &Sq, pins: &mut Pins) -> Option<(SubmissionEntry, bool)> {
        self.fetched(&sq.fetch(&self.dma, pins, || self.is_running()))
    }

    pub(super) fn is_running(&self) -> bool {
        !self.halted.load(Ordering::SeqCst)
    }

    pub(super) fn fetched(
        &self,
        outcome: &Result<Fetched, Unreachable>,
    ) -> Option<(SubmissionEntry, bool)> {
        match outcome {
            Ok(Fetched::Command { entry, more }) => Some((*entry, *more)),
            Ok(Fetched::Nothing) => None,
            Err(Unreachable) => {
                self.fail("a submission queue");
                None
            }
        }
    }

    /// Carries out the next command of an I/O queue, if there is one, on this thread.
    pub(super) fn step(&self, id: u16, scratch: &mut Scratch) {
        let Some(sq) = self.sq(id) else {
            return;
        };
        let fetched = self.fetch(&sq, &mut scratch.pins);
        scratch.release();
        let Some((command, more)) = fetched else {
            return;
        };
        if more {
            self.work.push(id);
        }
        let status = io::execute(self, &command, scratch);
        // The memory is let go of before anyone can know that the command is done.
        scratch.release();
        self.complete(&sq, &mut scratch.pins, &command, status, 0);
        scratch.release();
        sq.finish();
    }

    /// Posts a completion, for which there is room, and raises the interrupt.
    pub(super) fn complete(
        &self,
        sq: &Sq,
        pins: &mut Pins,
        command: &SubmissionEntry,
        status: Status,
        result: u32,
    ) {
        self.note_failure(sq, command, status);
        self.post(sq, pins, command.cid(), status, result);
    }

    pub(super) fn note_failure(&self, sq: &Sq, command: &SubmissionEntry, status: Status) {
        if !status.is_success() && status != Status::ABORT_REQUESTED {
            self.health.record_failure(sq.id, command, status);
        }
    }

    /// As [`Self::complete`], for a command that is no longer at hand.
    pub(super) fn post(&self, sq: &Sq, pins: &mut Pins, cid: u16, status: Status, result: u32) {
        if self.post_quietly(sq, pins, cid, status, result) {
            self.signal(&sq.cq);
        }
    }

    /// As [`Self::post`], without the interrupt; returns whether one is due.
    pub(super) fn post_quietly(
        &self,
        sq: &Sq,
        pins: &mut Pins,
        cid: u16,
        status: Status,
        result: u32,
    ) -> bool {
        let posted = sq.cq.post((&self.dma, pins), sq, cid, status, result);
        if posted.is_err() {
            self.fail("a completion queue");
        }
        posted.is_ok()
    }

    /// Raises the interrupt of a completion queue, if it has one.
    pub(super) fn signal(&self, cq: &Cq) {
        if let Some(vector) = cq.vector {
            self.interrupts.signal(vector);
        }
    }

    /// Queue memory is out of reach: a fatal error (NVMe 1.4 §9.5), from which only a
    /// controller reset leads back.
    fn fail(&self, what: &str) {
        if !self.halted.swap(true, Ordering::SeqCst) {
            self.report_fatal(format_args!(
                "{what} is not in mapped memory, or bus mastering is off"
            ));
        }
    }

    /// Sets fatal status. Whoever drives the controller can bring this about as often as they
    /// like, so the log at its usual level hears of it once.
    pub(super) fn report_fatal(&self, why: std::fmt::Arguments<'_>) {
        let first = !self.reported_fatal.swap(true, Ordering::Relaxed);
        let level = if first {
            log::Level::Warn
        } else {
            log::Level::Debug
        };
        log::log!(level, "controller fatal status: {why}");
        self.front.set_status(csts::CFS, csts::CFS);
    }

    /// The SMART log's critical warning as it is now.
    pub(super) fn critical_warning(&self) -> u8 {
        let mut warnings = 0;
        if lock(&self.features).is_temperature_critical() {
            warnings |= warning::TEMPERATURE;
        }
        if self.backing.has_lost_writes() {
            warnings |= warning::RELIABILITY | warning::READ_ONLY;
        }
        warnings
    }

    /// Puts all completed writes on stable storage.
    pub(super) fn flush(&self) -> Result<(), Status> {
        self.noting_loss(|| self.backing.flush())
    }

    /// Does something to the backing file, and reports it if that lost data.
    pub(super) fn noting_loss(
        &self,
        change: impl FnOnce() -> Result<(), Status>,
    ) -> Result<(), Status> {
        let before = self.backing.has_lost_writes();
        let outcome = change();
        if outcome.is_err() && !before && self.backing.has_lost_writes() {
            let reported = lock(&self.features).reported_warnings();
            if reported & (warning::RELIABILITY | warning::READ_ONLY) != 0 {
                self.raise(Event::ReliabilityDegraded);
            }
        }
        outcome
    }

    /// The queue with this id, held on to.
    pub(super) fn sq(&self, id: u16) -> Option<Arc<Sq>> {
        self.queues().sq(id).cloned()
    }
}
