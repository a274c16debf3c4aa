//! A small NVMe host driver on top of any [`Function`].
//!
//! It is for tools and tests, and for a device server that wants to know what it exports: it
//! looks for completions on the calling thread, with a deadline for everything. It trusts the
//! function no more than it has to; whatever the function does, calls end with an error at
//! worst.
//!
//! `memory` is the DMA memory, `queue` the rings, `shadow` the doorbells in memory, `commands` has the common commands as
//! methods, and this file the controller's registers and the way of one command.

#![forbid(unsafe_code)]

mod commands;
mod error;
mod memory;
mod queue;
mod shadow;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::poll::PollContext;

pub use commands::{NamespaceShape, Prps, block_command};
pub use error::DriverError;
pub use memory::{DmaBuffer, DmaMemory};
use queue::QueuePair;
use shadow::ShadowDoorbells;

use crate::function::{Function, InterruptKind, Iova, RegionIndex};
use crate::nvme::{CompletionEntry, DOORBELL_BASE, PAGE_SIZE, SubmissionEntry, cap, cc, csts, reg};

/// How often the queues are looked at when no interrupt comes.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// How often they are looked at where there are no interrupts.
const LOOK: Duration = Duration::from_micros(100);
/// How often a register is read whose change is waited for; none has an interrupt.
const REGISTER_LOOK: Duration = Duration::from_micros(200);
/// Command register: memory space and bus master (PCI 3.0 §6.2.2).
const COMMAND_OFFSET: u16 = 4;
const COMMAND_BITS: u16 = 1 << 2 | 1 << 1;
/// Entries of the admin queues.
const ADMIN_ENTRIES: u16 = 32;

/// What a driver needs to be told.
#[derive(Clone, Copy, Debug)]
pub struct DriverConfig {
    /// Where the function is to see the DMA memory.
    pub iova: Iova,
    /// How much DMA memory there is, in bytes; a multiple of 4096.
    pub memory: usize,
    /// How long any one thing may take.
    pub timeout: Duration,
}

impl Default for DriverConfig {
    fn default() -> Self {
        Self {
            iova: Iova(0x1_0000_0000),
            memory: 8 << 20,
            timeout: Duration::from_secs(10),
        }
    }
}

/// A host driver for one NVMe controller.
///
/// Dropping it disables the controller, and takes its memory and eventfds back.
pub struct NvmeDriver<F: Function + ?Sized> {
    function: Arc<F>,
    timeout: Duration,
    memory: DmaMemory,
    /// By queue id; 0 is the admin pair. Empty while the controller is disabled.
    queues: BTreeMap<u16, QueuePair>,
    events: Vec<Arc<EventFd>>,
    doorbell_stride: u64,
    /// Doorbells in memory, of the I/O queues.
    shadow: Option<ShadowDoorbells>,
    /// Doorbell registers written for I/O queues since the controller was enabled.
    rung: u64,
}

impl<F: Function + ?Sized> NvmeDriver<F> {
    /// Takes hold of the function: memory space and bus mastering on, an eventfd for each of
    /// up to 64 MSI-X vectors, DMA memory mapped. The controller stays as it is.
    pub fn new(function: Arc<F>, config: DriverConfig) -> Result<Self, DriverError> {
        let mut command = [0; 2];
        function.config_read(COMMAND_OFFSET, &mut command)?;
        let command = u16::from_le_bytes(command) | COMMAND_BITS;
        function.config_write(COMMAND_OFFSET, &command.to_le_bytes())?;
        let vectors = function.info().interrupts.msix.min(64);
        let events = (0..vectors)
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new))
            .collect::<io::Result<Vec<_>>>()
            .map_err(|source| DriverError::Io {
                what: "making an eventfd",
                source,
            })?;
        let listeners: Vec<_> = events.iter().cloned().map(Some).collect();
        if !listeners.is_empty() {
            function.set_interrupts(InterruptKind::Msix, 0, &listeners)?;
        }
        let memory = DmaMemory::new(config.iova, config.memory)?;
        function.map_dma(&memory.window())?;
        let mut driver = Self {
            function,
            timeout: config.timeout,
            memory,
            queues: BTreeMap::new(),
            events,
            doorbell_stride: 4,
            shadow: None,
            rung: 0,
        };
        let capabilities = driver.read64(reg::CAP)?;
        driver.doorbell_stride = 4 << ((capabilities & cap::DSTRD_MASK) >> cap::DSTRD_SHIFT);
        Ok(driver)
    }

    /// The function that is driven.
    pub fn function(&self) -> &Arc<F> {
        &self.function
    }

    /// How long any one thing may take from now on.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// The DMA memory.
    pub fn memory(&mut self) -> &mut DmaMemory {
        &mut self.memory
    }

    /// The eventfd of an interrupt vector.
    pub fn event(&self, vector: u16) -> Option<&Arc<EventFd>> {
        self.events.get(usize::from(vector))
    }

    /// Reads a register of 32 bits.
    pub fn read32(&self, offset: u64) -> Result<u32, DriverError> {
        let mut bytes = [0; 4];
        self.function
            .region_read(RegionIndex::BAR0, offset, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Reads a register of 64 bits.
    pub fn read64(&self, offset: u64) -> Result<u64, DriverError> {
        let mut bytes = [0; 8];
        self.function
            .region_read(RegionIndex::BAR0, offset, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes a register of 32 bits.
    pub fn write32(&self, offset: u64, value: u32) -> Result<(), DriverError> {
        Ok(self
            .function
            .region_write(RegionIndex::BAR0, offset, &value.to_le_bytes())?)
    }

    /// Writes a register of 64 bits.
    pub fn write64(&self, offset: u64, value: u64) -> Result<(), DriverError> {
        Ok(self
            .function
            .region_write(RegionIndex::BAR0, offset, &value.to_le_bytes())?)
    }

    /// Writes a doorbell: the tail of a submission queue.
    pub fn ring_sq(&self, queue: u16, tail: u32) -> Result<(), DriverError> {
        self.write32(self.doorbell(u64::from(queue) * 2), tail)
    }

    /// Writes a doorbell: the head of a completion queue.
    pub fn ring_cq(&self, queue: u16, head: u32) -> Result<(), DriverError> {
        self.write32(self.doorbell(u64::from(queue) * 2 + 1), head)
    }

    fn doorbell(&self, index: u64) -> u64 {
        DOORBELL_BASE + index * self.doorbell_stride
    }

    /// Disables the controller if it is enabled, sets up the admin queues, and enables it
    /// (NVMe 1.4 §7.6.1).
    pub fn enable(&mut self) -> Result<(), DriverError> {
        self.disable()?;
        let capabilities = self.read64(reg::CAP)?;
        if capabilities & cap::CSS_NVM == 0 {
            return Err(DriverError::Unusable(
                "it does not have the NVM command set",
            ));
        }
        if capabilities & cap::MPSMIN_MASK != 0 {
            return Err(DriverError::Unusable("it does not do pages of 4 KiB"));
        }
        let pair = QueuePair::new(&mut self.memory, 0, ADMIN_ENTRIES, Some(0))?;
        let entries = u32::from(ADMIN_ENTRIES) - 1;
        self.write32(reg::AQA, entries | entries << 16)?;
        self.write64(reg::ASQ, pair.sq_iova())?;
        self.write64(reg::ACQ, pair.cq_iova())?;
        self.queues.insert(0, pair);
        let sizes = 6 << cc::IOSQES_SHIFT | 4 << cc::IOCQES_SHIFT;
        self.write32(reg::CC, sizes | cc::EN)?;
        self.await_status("enabling the controller", csts::RDY, csts::RDY)
    }

    /// Disables the controller and waits until it is. All queues go.
    pub fn disable(&mut self) -> Result<(), DriverError> {
        let configuration = self.read32(reg::CC)?;
        self.write32(reg::CC, configuration & !(cc::EN | cc::SHN_MASK))?;
        let deadline = Deadline::after(self.timeout);
        while self.read32(reg::CSTS)? & csts::RDY != 0 {
            deadline.pause("disabling the controller")?;
        }
        self.forget_queues();
        Ok(())
    }

    /// What a reset of the controller does to our side of it.
    fn forget_queues(&mut self) {
        for pair in std::mem::take(&mut self.queues).into_values() {
            pair.free(&mut self.memory);
        }
        if let Some(shadow) = self.shadow.take() {
            shadow.free(&mut self.memory);
        }
        self.rung = 0;
    }

    /// Shuts the controller down in order (NVMe 1.4 §7.6.2). It has to be enabled anew.
    pub fn shutdown(&mut self) -> Result<(), DriverError> {
        let configuration = self.read32(reg::CC)? & !cc::SHN_MASK;
        self.write32(reg::CC, configuration | 1 << cc::SHN_MASK.trailing_zeros())?;
        self.await_status("shutting down", csts::SHST_MASK, csts::SHST_COMPLETE)
    }

    /// Waits until the bits in `mask` of `CSTS` are `bits`.
    fn await_status(&self, what: &str, mask: u32, bits: u32) -> Result<(), DriverError> {
        let deadline = Deadline::after(self.timeout);
        loop {
            let csts = self.read32(reg::CSTS)?;
            if csts & csts::CFS != 0 {
                return Err(DriverError::Fatal { csts });
            }
            if csts & mask == bits {
                return Ok(());
            }
            deadline.pause(what)?;
        }
    }

    /// Puts a command into a queue and rings its doorbell; returns the identifier that it was
    /// given.
    pub fn submit(&mut self, queue: u16, command: SubmissionEntry) -> Result<u16, DriverError> {
        let cid = self.enqueue(queue, command)?;
        self.ring(queue)?;
        Ok(cid)
    }

    /// Lets the controller know of all commands that were enqueued, with one doorbell, or none
    /// if it needs none.
    pub fn ring(&mut self, queue: u16) -> Result<(), DriverError> {
        let pair = self
            .queues
            .get_mut(&queue)
            .ok_or(DriverError::NoQueue(queue))?;
        let tail = pair.tail();
        let old = std::mem::replace(&mut pair.told().tail, tail);
        self.tell(u64::from(queue) * 2, old, tail)
    }

    /// Gives the entries of all completions back that were taken, with one doorbell at most.
    fn ring_head(&mut self, queue: u16) -> Result<(), DriverError> {
        let pair = self
            .queues
            .get_mut(&queue)
            .ok_or(DriverError::NoQueue(queue))?;
        let head = pair.head();
        let old = std::mem::replace(&mut pair.told().head, head);
        self.tell(u64::from(queue) * 2 + 1, old, head)
    }

    /// Sets a doorbell, counted as in the register array. Those of the admin queues are always
    /// registers: nothing is gained there.
    fn tell(&mut self, index: u64, old: u16, new: u16) -> Result<(), DriverError> {
        if old == new {
            return Ok(());
        }
        if let Some(shadow) = self.shadow.as_ref().filter(|_| index > 1) {
            let at = (index * self.doorbell_stride) as usize;
            if !shadow.advance(&self.memory, at, old, new)? {
                return Ok(());
            }
        }
        self.rung += u64::from(index > 1);
        self.write32(self.doorbell(index), u32::from(new))
    }

    /// Doorbell registers written for I/O queues since the controller was enabled.
    pub fn doorbells_rung(&self) -> u64 {
        self.rung
    }

    /// As [`Self::submit`], without the doorbell. The identifier is less than the queue has
    /// entries, and no other outstanding command of the queue has it: it may index a table.
    pub fn enqueue(&mut self, queue: u16, command: SubmissionEntry) -> Result<u16, DriverError> {
        let pair = self
            .queues
            .get_mut(&queue)
            .ok_or(DriverError::NoQueue(queue))?;
        pair.push(&self.memory, command)
    }

    /// Where the tail of a submission queue is: the value for its doorbell.
    pub fn tail(&self, queue: u16) -> Result<u16, DriverError> {
        Ok(self.pair(queue)?.tail())
    }

    /// Takes the next completion of a queue, if there is one, and gives its entry back.
    pub fn poll(&mut self, queue: u16) -> Result<Option<CompletionEntry>, DriverError> {
        let pair = self
            .queues
            .get_mut(&queue)
            .ok_or(DriverError::NoQueue(queue))?;
        if let Some(entry) = pair.take_set_aside(None) {
            return Ok(Some(entry));
        }
        self.poll_ring(queue)
    }

    fn poll_ring(&mut self, queue: u16) -> Result<Option<CompletionEntry>, DriverError> {
        self.function.service();
        let pair = self
            .queues
            .get_mut(&queue)
            .ok_or(DriverError::NoQueue(queue))?;
        let Some(entry) = pair.pop(&self.memory)? else {
            return Ok(None);
        };
        self.ring_head(queue)?;
        Ok(Some(entry))
    }

    /// Takes all completions that are there, up to the free capacity of `into`, and gives their
    /// entries back with one doorbell at most. Allocates nothing.
    pub fn reap(&mut self, queue: u16, into: &mut Vec<CompletionEntry>) -> Result<(), DriverError> {
        self.function.service();
        let pair = self
            .queues
            .get_mut(&queue)
            .ok_or(DriverError::NoQueue(queue))?;
        while into.len() < into.capacity() {
            let set_aside = if pair.has_set_aside() {
                pair.take_set_aside(None)
            } else {
                None
            };
            match set_aside {
                Some(entry) => into.push(entry),
                None => match pair.pop(&self.memory)? {
                    Some(entry) => into.push(entry),
                    None => break,
                },
            }
        }
        self.ring_head(queue)
    }

    /// Waits for the completion of one command; those of others are kept for later.
    pub fn wait(&mut self, queue: u16, cid: u16) -> Result<CompletionEntry, DriverError> {
        let deadline = Deadline::after(self.timeout);
        loop {
            let pair = self
                .queues
                .get_mut(&queue)
                .ok_or(DriverError::NoQueue(queue))?;
            if let Some(entry) = pair.take_set_aside(Some(cid)) {
                return Ok(entry);
            }
            let vector = pair.vector();
            match self.poll_ring(queue)? {
                Some(entry) if entry.cid == cid => return Ok(entry),
                Some(entry) => {
                    if let Some(pair) = self.queues.get_mut(&queue) {
                        pair.set_aside(entry);
                    }
                }
                None => {
                    let csts = self.read32(reg::CSTS)?;
                    if csts & csts::CFS != 0 {
                        return Err(DriverError::Fatal { csts });
                    }
                    deadline.check("a command")?;
                    self.wait_event(vector, POLL_INTERVAL)?;
                }
            }
        }
    }

    /// Waits for an interrupt, at most this long; returns whether there was one.
    pub fn wait_interrupt(&self, vector: u16, limit: Duration) -> Result<bool, DriverError> {
        self.wait_event(Some(vector), limit)
    }

    fn wait_event(&self, vector: Option<u16>, limit: Duration) -> Result<bool, DriverError> {
        let event = vector.and_then(|vector| self.events.get(usize::from(vector)));
        let Some(event) = event else {
            std::thread::sleep(limit.min(LOOK));
            return Ok(false);
        };
        let fail = |source| DriverError::Io {
            what: "waiting for an interrupt",
            source,
        };
        let poll: PollContext<u32> = PollContext::new().map_err(|e| fail(e.into()))?;
        poll.add(&**event, 0).map_err(|e| fail(e.into()))?;
        let signalled = poll
            .wait_timeout(limit)
            .map_err(|e| fail(e.into()))?
            .iter()
            .count()
            > 0;
        // Takes the events, which are as many as there were interrupts.
        Ok(signalled && event.read().is_ok())
    }

    /// Carries out a command of any outcome.
    pub fn execute(
        &mut self,
        queue: u16,
        command: SubmissionEntry,
    ) -> Result<CompletionEntry, DriverError> {
        let cid = self.submit(queue, command)?;
        self.wait(queue, cid)
    }

    /// Carries out a command that must succeed; returns its result.
    pub fn command(&mut self, queue: u16, command: SubmissionEntry) -> Result<u64, DriverError> {
        let entry = self.execute(queue, command)?;
        if entry.status.is_success() {
            return Ok(entry.result);
        }
        Err(DriverError::Command {
            opcode: command.opcode(),
            status: entry.status,
        })
    }

    fn pair(&self, queue: u16) -> Result<&QueuePair, DriverError> {
        self.queues.get(&queue).ok_or(DriverError::NoQueue(queue))
    }

    /// Resets the function and sets what a reset clears in its Command register. All queues
    /// go.
    pub fn reset(&mut self) -> Result<(), DriverError> {
        self.function.reset()?;
        self.function
            .config_write(COMMAND_OFFSET, &COMMAND_BITS.to_le_bytes())?;
        self.forget_queues();
        Ok(())
    }
}

impl<F: Function + ?Sized> Drop for NvmeDriver<F> {
    fn drop(&mut self) {
        if let Err(error) = self.disable() {
            log::debug!("the controller was not disabled: {error}");
        }
        let silence = vec![None; self.events.len()];
        if let Err(error) = self
            .function
            .set_interrupts(InterruptKind::Msix, 0, &silence)
        {
            log::debug!("the driver's eventfds were not taken back: {error}");
        }
        let window = self.memory.window();
        if let Err(error) = self.function.unmap_dma(window.iova, window.len as u64) {
            log::debug!("the driver's DMA memory was not unmapped: {error}");
        }
    }
}

/// A point in time by which something must have happened.
struct Deadline {
    limit: Duration,
    start: Instant,
}

impl Deadline {
    fn after(limit: Duration) -> Self {
        Self {
            limit,
            start: Instant::now(),
        }
    }

    fn check(&self, what: &str) -> Result<(), DriverError> {
        if self.start.elapsed() < self.limit {
            return Ok(());
        }
        Err(DriverError::Timeout {
            what: what.to_owned(),
            limit: self.limit,
        })
    }

    /// Checks, and waits a little.
    fn pause(&self, what: &str) -> Result<(), DriverError> {
        self.check(what)?;
        std::thread::sleep(REGISTER_LOOK);
        Ok(())
    }
}

/// Number of pages that `len` bytes take.
fn pages(len: usize) -> usize {
    len.div_ceil(PAGE_SIZE)
}
