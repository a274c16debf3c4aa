//! What the portions of one drive share: the function, its admin queue, and its fate.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::check::Bounds;
use super::notices::{Bells, Crier};
use super::portion::Portion;
use super::share::Share;
use super::slices::{Namespace, SharedError, SliceSpec, plan};
use crate::driver::{DriverConfig, DriverError, NvmeDriver};
use crate::function::{Function, FunctionError, FunctionInfo, Iova, RegionIndex};
use crate::nvme::{
    DOORBELL_BASE, PAGE_SIZE, SubmissionEntry, admin, cap, cns, csts, feature, log_page, reg,
};

/// How long bringing the controller up may take.
const STARTING: Duration = Duration::from_secs(30);
/// How long an admin command may take: deleting a queue waits for its commands, a Flush of a slow
/// disk among them, and to give up on one is to reset the drive for all.
const COMMAND: Duration = Duration::from_secs(15);
/// How old an answer about the drive's health may be: portions may ask as often as they like.
const HEALTH: Duration = Duration::from_secs(1);
/// Bytes of the log about it.
pub(super) const SMART_LEN: usize = 512;
/// Memory of the admin queue and its data, in bytes.
const ADMIN_MEMORY: usize = 256 << 10;
/// Addresses of one portion, in bytes. Portions have addresses of their own, so that the memory of
/// one is never at an address of another's.
const ADDRESSES: u64 = 256 << 20;
/// Largest transfer of one command, as a power of two of pages: 1 MiB. A list of its pages fits a
/// page.
const MAX_MDTS: u8 = 8;
/// Queue pairs that are divided, at most.
const MAX_PAIRS: u16 = 63;
/// Namespaces that are looked at.
const MAX_NAMESPACES: usize = 1024;

/// Offsets into Identify Controller (NVMe 1.4 §5.15.2.2, figure 247).
const MDTS: usize = 77;
const ONCS: usize = 520;

/// A controller that several have a portion of.
pub struct SharedDrive {
    pub(super) function: Arc<dyn Function>,
    /// Its admin queue, for everything that is not I/O.
    driver: Mutex<NvmeDriver<dyn Function>>,
    /// The log about its health, and when it was asked for.
    health: Mutex<Option<(Instant, [u8; SMART_LEN])>>,
    /// The function is there no more.
    gone: AtomicBool,
    /// The controller has failed in a way that shows in none of its registers.
    failed: AtomicBool,
    /// How often the controller was brought up; queues of before are no more.
    generation: AtomicU64,
    stride: u64,
    /// Entries of each I/O queue.
    pub(super) entries: u16,
    /// Identify Controller.
    pub(super) page: Vec<u8>,
    namespaces: Vec<Namespace>,
    slices: Vec<Slice>,
    pub(super) share: Share,
    _crier: Option<Crier>,
}

/// A portion's part of everything.
pub(super) struct Slice {
    pub(super) name: String,
    pub(super) bounds: Bounds,
    /// Its addresses; the upper ones are its own, for its queues.
    pub(super) addresses: RangeInclusive<u64>,
    /// Its first I/O queue pair and interrupt, and how many.
    pub(super) first_pair: u16,
    pub(super) pairs: u16,
    pub(super) bells: Arc<Bells>,
    taken: AtomicBool,
}

impl SharedDrive {
    /// Takes hold of a function, resets it, brings its controller up, and divides it.
    pub fn open(
        function: Arc<dyn Function>,
        specs: &[SliceSpec],
    ) -> Result<Arc<Self>, SharedError> {
        let mut addresses = address_ranges(function.info(), specs.len() + 1)
            .ok_or(SharedError::NoIova(specs.len()))?;
        let own = addresses.pop().ok_or(SharedError::NoIova(specs.len()))?;
        if function.info().resettable {
            function.reset()?;
        }
        let config = DriverConfig {
            iova: Iova(*own.start()),
            memory: ADMIN_MEMORY,
            timeout: STARTING,
        };
        let mut driver = NvmeDriver::new(function.clone(), config)?;
        driver.enable()?;
        driver.set_timeout(COMMAND);
        let capabilities = driver.read64(reg::CAP)?;
        let page = driver.identify(cns::CONTROLLER, 0)?;
        let namespaces = namespaces(&mut driver)?;
        let byte = |at: usize| page.get(at).copied().unwrap_or(0);
        let mdts = match byte(MDTS) {
            0 => MAX_MDTS,
            mdts => mdts.min(MAX_MDTS),
        };
        let oncs = u16::from_le_bytes([byte(ONCS), byte(ONCS + 1)]);
        let planned = plan(specs, &namespaces, (PAGE_SIZE as u32) << mdts, oncs)?;
        let vectors = function
            .info()
            .interrupts
            .msix
            .min(u32::from(MAX_PAIRS) + 1) as u16;
        let pairs = driver
            .request_queues(MAX_PAIRS)?
            .min(MAX_PAIRS)
            .min(vectors.saturating_sub(1));
        let each = pairs / specs.len() as u16;
        if each == 0 {
            return Err(SharedError::TooMany {
                slices: specs.len(),
                pairs,
            });
        }
        let slices = specs.iter().zip(planned).zip(addresses).enumerate();
        let slices = slices.map(|(n, ((spec, bounds), addresses))| {
            Ok(Slice {
                name: spec.name.clone(),
                bounds,
                addresses,
                first_pair: 1 + n as u16 * each,
                pairs: each,
                bells: Arc::new(Bells::new()?),
                taken: AtomicBool::new(false),
            })
        });
        let slices: Vec<Slice> = slices.collect::<Result<_, FunctionError>>()?;
        let bells: Vec<_> = slices.iter().map(|slice| slice.bells.clone()).collect();
        Ok(Arc::new(Self {
            _crier: Crier::start(function.as_ref(), bells)?,
            function,
            driver: Mutex::new(driver),
            health: Mutex::new(None),
            gone: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            generation: AtomicU64::new(1),
            stride: 4 << ((capabilities & cap::DSTRD_MASK) >> cap::DSTRD_SHIFT),
            entries: ((capabilities & cap::MQES_MASK) as u16).clamp(1, 1023) + 1,
            share: Share::new(specs.len()),
            page,
            namespaces,
            slices,
        }))
    }

    /// The portion of one slice, in the order of the slices; one at a time.
    pub fn portion(self: &Arc<Self>, index: usize) -> Result<Portion, SharedError> {
        let slice = self.slices.get(index).ok_or(SharedError::NoSlices)?;
        if self.gone.load(Ordering::SeqCst) {
            return Err(SharedError::Gone("its function is gone".into()));
        }
        if slice.taken.swap(true, Ordering::SeqCst) {
            return Err(SharedError::Taken(slice.name.clone()));
        }
        slice.bells.silence();
        Portion::new(self.clone(), index).inspect_err(|_| self.give_back(index))
    }

    /// The function is there no more, or no more to be used, and everybody is told.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }

    pub(super) fn slice(&self, index: usize) -> &Slice {
        // Portions are made with an index that is there.
        &self.slices[index]
    }

    pub(super) fn give_back(&self, index: usize) {
        self.slice(index).taken.store(false, Ordering::SeqCst);
    }

    /// Identify data of the namespace that a slice is of.
    pub(super) fn namespace_page(&self, nsid: u32) -> &[u8] {
        let found = self.namespaces.iter().find(|n| n.nsid == nsid);
        found.map_or(&[], |namespace| &namespace.page)
    }

    /// A panic elsewhere leaves the driver sound: each of its calls does one thing.
    fn driver(&self) -> MutexGuard<'_, NvmeDriver<dyn Function>> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The controller's status: CSTS, with fatal status also where only this side knows of it.
    pub(super) fn status(&self) -> Result<u32, FunctionError> {
        let gone = || FunctionError::Gone("it does not answer, or its host wants it back".into());
        if self.is_gone() {
            return Err(gone());
        }
        let mut bytes = [0; 4];
        let read = self
            .function
            .region_read(RegionIndex::BAR0, reg::CSTS, &mut bytes);
        self.note(read)?;
        let status = u32::from_le_bytes(bytes);
        if status == u32::MAX {
            self.declare_gone();
            return Err(gone());
        }
        if self.failed.load(Ordering::SeqCst) || status & csts::RDY == 0 {
            return Ok(status | csts::CFS);
        }
        Ok(status)
    }

    /// Notices a function that says that it is gone.
    pub(super) fn note<T>(&self, outcome: Result<T, FunctionError>) -> Result<T, FunctionError> {
        if let Err(FunctionError::Gone(_)) = &outcome {
            self.declare_gone();
        }
        outcome
    }

    fn declare_gone(&self) {
        if !self.gone.swap(true, Ordering::SeqCst) {
            for slice in &self.slices {
                slice.bells.unplug();
            }
        }
    }

    /// The controller does not do what it is asked for; only a reset helps, which all portions
    /// notice.
    pub(super) fn fail(&self, what: &str, error: &DriverError) {
        if !self.failed.swap(true, Ordering::SeqCst) {
            log::warn!(
                "{}: {what} failed, so the whole drive has: {error}",
                self.function.info().label
            );
        }
    }

    /// Resets the function and brings the controller up again, after it has failed. Queues of all
    /// portions are gone then; each notices by the generation.
    pub(super) fn recover(&self) -> Result<(), FunctionError> {
        let mut driver = self.driver();
        // Someone else may have been first.
        if self.status()? & csts::CFS == 0 {
            return Ok(());
        }
        log::warn!(
            "{}: resetting the drive, which has failed; all of its portions notice",
            self.function.info().label
        );
        self.generation.fetch_add(1, Ordering::AcqRel);
        driver.set_timeout(STARTING);
        let outcome = driver
            .reset()
            .and_then(|()| driver.enable())
            .and_then(|()| driver.request_queues(MAX_PAIRS).map(|_| ()));
        driver.set_timeout(COMMAND);
        self.failed.store(outcome.is_err(), Ordering::SeqCst);
        outcome.map_err(|error| match error {
            DriverError::Function(error) => error,
            other => FunctionError::Unsupported(format!(
                "the shared drive could not be brought up again: {other}"
            )),
        })
    }

    /// The driver, as long as the drive is as it was in a portion's `generation`. Who waits for it may
    /// wait for a reset.
    fn driver_of(
        &self,
        generation: u64,
    ) -> Result<MutexGuard<'_, NvmeDriver<dyn Function>>, DriverError> {
        let driver = self.driver();
        if self.generation() == generation {
            return Ok(driver);
        }
        let reset = "the drive was reset meanwhile".to_owned();
        Err(DriverError::Function(FunctionError::Unsupported(reset)))
    }

    /// Creates a queue pair in a portion's memory, with the interrupt of the same number if
    /// `interrupts` says so.
    pub(super) fn create_pair(
        &self,
        generation: u64,
        id: u16,
        (sq, cq): (u64, u64),
        interrupts: bool,
    ) -> Result<(), DriverError> {
        let mut driver = self.driver_of(generation)?;
        let size_and_id = u32::from(self.entries - 1) << 16 | u32::from(id);
        let mut command = SubmissionEntry::new(admin::CREATE_CQ);
        command.set_prps(cq, 0);
        command.set_dword(10, size_and_id);
        command.set_dword(11, u32::from(id) << 16 | u32::from(interrupts) << 1 | 1);
        driver.command(0, command)?;
        let mut command = SubmissionEntry::new(admin::CREATE_SQ);
        command.set_prps(sq, 0);
        command.set_dword(10, size_and_id);
        command.set_dword(11, u32::from(id) << 16 | 1);
        let created = driver.command(0, command);
        if created.is_err() {
            let mut command = SubmissionEntry::new(admin::DELETE_CQ);
            command.set_dword(10, id.into());
            driver.command(0, command)?;
        }
        created.map(|_| ())
    }

    /// Deletes one of the two queues of a pair. When the submission queue is deleted, none of its
    /// commands is under way any more (NVMe 1.4 §5.6).
    pub(super) fn delete_queue(
        &self,
        generation: u64,
        opcode: u8,
        id: u16,
    ) -> Result<(), DriverError> {
        let mut command = SubmissionEntry::new(opcode);
        command.set_dword(10, id.into());
        let mut driver = self.driver_of(generation)?;
        driver.command(0, command).map(|_| ())
    }

    /// The drive's log about its health, of now or a moment ago.
    pub(super) fn smart_log(&self) -> Result<[u8; SMART_LEN], DriverError> {
        let mut known = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((when, log)) = *known {
            if when.elapsed() < HEALTH {
                return Ok(log);
            }
        }
        let mut log = [0; SMART_LEN];
        let mut driver = match (self.driver.try_lock(), *known) {
            (Ok(driver), _) => driver,
            // Somebody else's command takes long: an old answer is better than to wait for it.
            (Err(_), Some((_, log))) => return Ok(log),
            (Err(_), None) => self.driver(),
        };
        driver.log_page(log_page::SMART, 0, &mut log)?;
        *known = Some((Instant::now(), log));
        Ok(log)
    }

    /// Whether the drive's volatile write cache is on.
    pub(super) fn has_write_cache(&self) -> bool {
        let value = self.driver().get_feature(feature::VOLATILE_WRITE_CACHE, 0);
        value.is_ok_and(|value| value & 1 == 1)
    }

    /// Writes a doorbell.
    pub(super) fn ring(
        &self,
        pair: u16,
        completion: bool,
        value: u16,
    ) -> Result<(), FunctionError> {
        let index = u64::from(pair) * 2 + u64::from(completion);
        let rung = self.function.region_write(
            RegionIndex::BAR0,
            DOORBELL_BASE + index * self.stride,
            &u32::from(value).to_le_bytes(),
        );
        self.note(rung)
    }
}

/// The namespaces that are there and have no metadata.
fn namespaces(driver: &mut NvmeDriver<dyn Function>) -> Result<Vec<Namespace>, DriverError> {
    let list = driver.identify(cns::NAMESPACE_LIST, 0)?;
    let ids = list
        .chunks_exact(4)
        .filter_map(|id| id.first_chunk().map(|id| u32::from_le_bytes(*id)))
        .take_while(|id| *id != 0)
        .take(MAX_NAMESPACES);
    let mut found = Vec::new();
    for nsid in ids {
        let page = driver.identify(cns::NAMESPACE, nsid)?;
        found.extend(Namespace::from_page(nsid, page));
    }
    Ok(found)
}

/// As many disjoint ranges of addresses, away from address 0.
fn address_ranges(info: &FunctionInfo, count: usize) -> Option<Vec<RangeInclusive<u64>>> {
    let mut found = Vec::with_capacity(count);
    for range in &info.iova_ranges {
        let mut start = (*range.start())
            .max(ADDRESSES)
            .checked_next_multiple_of(ADDRESSES);
        while let Some(first) = start.filter(|_| found.len() < count) {
            match first.checked_add(ADDRESSES - 1) {
                Some(last) if last <= *range.end() => found.push(first..=last),
                _ => break,
            }
            start = first.checked_add(ADDRESSES);
        }
    }
    (found.len() == count).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::function::InterruptCounts;

    #[test]
    fn address_ranges_are_disjoint_and_those_of_the_function() {
        let info = FunctionInfo {
            label: "test".into(),
            config_size: 4096,
            regions: Vec::new(),
            interrupts: InterruptCounts::default(),
            resettable: true,
            iova_ranges: vec![0..=0x3fff_ffff, 0x1_0000_1000..=0x1_3fff_ffff],
        };
        let found = address_ranges(&info, 6).unwrap();
        assert_eq!(found[0], 0x1000_0000..=0x1fff_ffff);
        assert_eq!(found[3], 0x1_1000_0000..=0x1_1fff_ffff);
        assert!(found.windows(2).all(|pair| pair[0].end() < pair[1].start()));
        assert!(address_ranges(&info, 7).is_none());
    }
}
