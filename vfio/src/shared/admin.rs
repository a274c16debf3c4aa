//! The admin commands of a portion, answered here and now. Only the creation and deletion of queues and
//! the state of the drive's health reach the drive, and none of a claimant's bytes do.

use super::check::NSID;
use super::controller::Controller;
use super::drive::{SMART_LEN, SharedDrive};
use super::identify::{self, LIMIT};
use super::queues::{Cq, Pair, Shape, Sq};
use crate::function::InterruptKind;
use crate::nvme::{PAGE_SIZE, Status, SubmissionEntry, admin, cc, cns, feature, log_page};
use crate::soft_nvme::{descriptors, firmware_log, namespace_list};

/// The namespace id that means all namespaces.
const ALL_NAMESPACES: u32 = 0xffff_ffff;
/// Where in the SMART log the counters are that are the portion's own: data and commands read and
/// written, and time busy; error log entries (NVMe 1.4 figure 194).
const OWN_COUNTERS: std::ops::Range<usize> = 32..112;
const ERROR_ENTRIES: std::ops::Range<usize> = 176..192;
/// Bytes of the Error Information log: one entry, which is never used.
const ERROR_LEN: usize = 64;
/// Where the firmware's revision is in Identify Controller.
const FIRMWARE: std::ops::Range<usize> = 64..72;

/// What became of a command.
enum Outcome {
    Done(u32),
    /// It is an Asynchronous Event Request, which waits.
    Waiting,
}

/// What a portion has read and written, in units of 512 bytes and in commands.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counters {
    read: (u64, u64),
    written: (u64, u64),
}

impl Counters {
    pub(super) fn count_read(&mut self, bytes: u32) {
        self.read = (self.read.0 + u64::from(bytes / 512), self.read.1 + 1);
    }

    pub(super) fn count_write(&mut self, bytes: u32) {
        self.written = (self.written.0 + u64::from(bytes / 512), self.written.1 + 1);
    }

    /// Puts them in a SMART log; data in thousands of units, rounded up.
    fn put(&self, log: &mut [u8; SMART_LEN]) {
        log[OWN_COUNTERS].fill(0);
        log[ERROR_ENTRIES].fill(0);
        let values = [
            self.read.0.div_ceil(1000),
            self.written.0.div_ceil(1000),
            self.read.1,
            self.written.1,
        ];
        for (n, value) in values.into_iter().enumerate() {
            let at = OWN_COUNTERS.start + 16 * n;
            log[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
}

impl Controller {
    /// Carries out what is in the admin queue.
    pub(super) fn run_admin(&mut self, drive: &SharedDrive, index: usize) {
        while self.is_ready() {
            let (Some(Some(sq)), Some(Some(cq))) = (self.sqs.first_mut(), self.cqs.first()) else {
                return;
            };
            if !cq.has_room() {
                return;
            }
            let command = match sq.peek(&self.windows) {
                Ok(Some(command)) => command,
                Ok(None) => return,
                Err(_) => return self.fail("the admin submission queue is not in mapped memory"),
            };
            sq.advance();
            match self.execute(drive, index, &command) {
                Ok(Outcome::Waiting) => {}
                Ok(Outcome::Done(result)) => self.answer(command.cid(), Status::SUCCESS, result),
                Err(status) => self.answer(command.cid(), status, 0),
            }
        }
    }

    fn answer(&mut self, cid: u16, status: Status, result: u32) {
        let (Some(Some(sq)), Some(Some(cq))) = (self.sqs.first(), self.cqs.first_mut()) else {
            return;
        };
        let place = (0, sq.head);
        if cq
            .post(&self.windows, place, cid, status, result.into())
            .is_err()
        {
            return self.fail("the admin completion queue is not in mapped memory");
        }
        self.signal(Some(0));
    }

    fn execute(
        &mut self,
        drive: &SharedDrive,
        index: usize,
        command: &SubmissionEntry,
    ) -> Result<Outcome, Status> {
        if command.fuse() != 0 || command.psdt() != 0 {
            return Err(Status::INVALID_FIELD);
        }
        match command.opcode() {
            admin::IDENTIFY => self.identify(drive, index, command)?,
            admin::GET_LOG_PAGE => self.get_log_page(drive, command)?,
            admin::CREATE_CQ => self.create_cq(command)?,
            admin::CREATE_SQ => self.create_sq(drive, index, command)?,
            admin::DELETE_SQ => self.delete_sq(drive, command.dword(10) as u16)?,
            admin::DELETE_CQ => self.delete_cq(command.dword(10) as u16)?,
            admin::GET_FEATURES => return self.features.get(command).map(Outcome::Done),
            admin::SET_FEATURES => return self.set_features(command).map(Outcome::Done),
            admin::ABORT => return Ok(Outcome::Done(self.abort(command))),
            admin::ASYNC_EVENT if self.requests.len() < LIMIT => {
                self.requests.push(command.cid());
                return Ok(Outcome::Waiting);
            }
            admin::ASYNC_EVENT => return Err(Status::AER_LIMIT_EXCEEDED),
            _ => return Err(Status::INVALID_OPCODE),
        }
        Ok(Outcome::Done(0))
    }

    fn identify(
        &mut self,
        drive: &SharedDrive,
        index: usize,
        command: &SubmissionEntry,
    ) -> Result<(), Status> {
        let nsid = command.nsid();
        let slice = drive.slice(index);
        let page = match command.dword(10) as u8 {
            cns::NAMESPACE | cns::DESCRIPTORS if nsid != NSID => {
                return Err(Status::INVALID_NAMESPACE);
            }
            cns::NAMESPACE_LIST if nsid >= ALL_NAMESPACES - 1 => {
                return Err(Status::INVALID_NAMESPACE);
            }
            cns::NAMESPACE => identify::namespace(drive, slice, &self.identity),
            cns::CONTROLLER => identify::controller(drive, slice, &self.identity),
            cns::NAMESPACE_LIST => namespace_list(nsid),
            cns::DESCRIPTORS => descriptors(&self.identity),
            _ => return Err(Status::INVALID_FIELD),
        };
        self.scratch
            .copy_out(&self.windows, command, PAGE_SIZE, &page)
    }

    fn get_log_page(
        &mut self,
        drive: &SharedDrive,
        command: &SubmissionEntry,
    ) -> Result<(), Status> {
        let dwords =
            u64::from(command.dword(10) >> 16) | u64::from(command.dword(11) & 0xffff) << 16;
        let len = (dwords + 1) * 4;
        let offset = u64::from(command.dword(12)) | u64::from(command.dword(13)) << 32;
        if len > PAGE_SIZE as u64
            || offset % 4 != 0
            || !matches!(command.nsid(), 0 | ALL_NAMESPACES)
        {
            return Err(Status::INVALID_FIELD);
        }
        let mut smart;
        let log: &[u8] = match command.dword(10) as u8 {
            log_page::ERROR => &[0; ERROR_LEN],
            log_page::SMART => {
                smart = drive.smart_log().map_err(|error| {
                    log::debug!("the drive does not tell of its health: {error}");
                    Status::INTERNAL_ERROR
                })?;
                self.counters.put(&mut smart);
                &smart
            }
            log_page::FIRMWARE_SLOT => {
                let revision = drive.page.get(FIRMWARE).and_then(|r| r.try_into().ok());
                &firmware_log(revision.unwrap_or_default())
            }
            _ => return Err(Status::INVALID_LOG_PAGE),
        };
        let rest = usize::try_from(offset).ok().and_then(|at| log.get(at..));
        let rest = rest.ok_or(Status::INVALID_FIELD)?;
        self.scratch
            .copy_out(&self.windows, command, len as usize, rest)
    }

    fn set_features(&mut self, command: &SubmissionEntry) -> Result<u32, Status> {
        let id = command.dword(10) as u8;
        // The write cache is the whole drive's, and not for one to switch.
        if id == feature::VOLATILE_WRITE_CACHE
            && (command.dword(11) & 1 == 1) != self.features.write_cache
        {
            return Err(Status::FEATURE_NOT_CHANGEABLE);
        }
        let has_io_queues = self.cqs.iter().skip(1).any(Option::is_some);
        self.features.set(command, has_io_queues)
    }

    /// The result says whether the command was *not* aborted (NVMe 1.4 §5.1). What is at the drive
    /// stays there.
    fn abort(&mut self, command: &SubmissionEntry) -> u32 {
        let (sq, cid) = (command.dword(10) as u16, (command.dword(10) >> 16) as u16);
        let waiting = self.requests.iter().position(|request| *request == cid);
        let (0, Some(at)) = (sq, waiting) else {
            return 1;
        };
        // Two completions are due, and there is room for one.
        if !matches!(self.cqs.first(), Some(Some(cq)) if cq.has_room_for(2)) {
            return 1;
        }
        self.requests.remove(at);
        self.answer(cid, Status::ABORT_REQUESTED, 0);
        0
    }

    /// The part that Create I/O Queue commands have in common (NVMe 1.4 §5.3, §5.4).
    fn queue_shape(&self, command: &SubmissionEntry) -> Result<Shape, Status> {
        let zeroes_based = (command.dword(10) >> 16) as u16;
        if zeroes_based == 0 || zeroes_based >= self.max_entries {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        if command.dword(11) & 1 == 0 {
            return Err(Status::INVALID_FIELD);
        }
        if command.prp1() % PAGE_SIZE as u64 != 0 {
            return Err(Status::INVALID_PRP_OFFSET);
        }
        Ok(Shape {
            base: command.prp1(),
            entries: zeroes_based + 1,
        })
    }

    fn create_cq(&mut self, command: &SubmissionEntry) -> Result<(), Status> {
        let id = command.dword(10) as u16;
        let shape = self.queue_shape(command)?;
        if self.cc >> cc::IOCQES_SHIFT & 0xf != 4 {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        let (interrupts, vector) = (command.dword(11) >> 1 & 1 == 1, command.dword(11) >> 16);
        if interrupts && vector as usize >= self.listeners.len() {
            return Err(Status::INVALID_VECTOR);
        }
        match self.cqs.get_mut(usize::from(id)) {
            Some(place @ None) if id != 0 => {
                *place = Some(Cq::new(shape, interrupts.then_some(vector as u16)));
                Ok(())
            }
            _ => Err(Status::INVALID_QID),
        }
    }

    /// A submission queue of the driver's is a queue pair of the drive's.
    fn create_sq(
        &mut self,
        drive: &SharedDrive,
        index: usize,
        command: &SubmissionEntry,
    ) -> Result<(), Status> {
        let id = command.dword(10) as u16;
        let cq_id = (command.dword(11) >> 16) as u16;
        let shape = self.queue_shape(command)?;
        if self.cc >> cc::IOSQES_SHIFT & 0xf != 6 {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        if id == 0 || !matches!(self.sqs.get(usize::from(id)), Some(None)) {
            return Err(Status::INVALID_QID);
        }
        let cq = match self.cqs.get(usize::from(cq_id)) {
            Some(Some(cq)) if cq_id != 0 => *cq,
            _ => return Err(Status::INVALID_CQ),
        };
        let slice = drive.slice(index);
        let pair = Pair::new(slice.first_pair + id - 1, id - 1, drive.entries, &self.own);
        let made = self
            .route(drive, pair.id, cq.vector)
            .map_err(|_| Status::INTERNAL_ERROR)
            .and_then(|()| {
                let addresses = pair.addresses(&self.own);
                let interrupts = cq.vector.is_some();
                let made = drive.create_pair(self.generation, pair.id, addresses, interrupts);
                made.map_err(|error| {
                    // A drive that refuses still answers, and works for the others.
                    if error.status().is_none() && !self.is_lost(drive) {
                        drive.fail("making a queue", &error);
                    }
                    error.status().unwrap_or(Status::INTERNAL_ERROR)
                })
            });
        made?;
        self.sqs[usize::from(id)] = Some(Sq::new(shape, cq_id));
        self.pairs[usize::from(id) - 1] = Some(pair);
        Ok(())
    }

    /// Has an interrupt of the drive reach whoever listens to one of the driver's.
    pub(super) fn route(
        &self,
        drive: &SharedDrive,
        pair: u16,
        vector: Option<u16>,
    ) -> Result<(), crate::FunctionError> {
        let listener = vector.and_then(|v| self.listeners.get(usize::from(v)).cloned());
        drive.note(drive.function.set_interrupts(
            InterruptKind::Msix,
            pair.into(),
            &[listener.flatten()],
        ))
    }

    /// Deletes a submission queue, with what has not reached the drive. What the drive has is
    /// completed before.
    fn delete_sq(&mut self, drive: &SharedDrive, id: u16) -> Result<(), Status> {
        if id == 0 || !matches!(self.sqs.get(usize::from(id)), Some(Some(_))) {
            return Err(Status::INVALID_QID);
        }
        if !self.end_pair(drive, id) {
            return Err(Status::INTERNAL_ERROR);
        }
        self.sqs[usize::from(id)] = None;
        Ok(())
    }

    /// Ends the drive's queue pair of a submission queue; whether that has worked. Commands that the drive
    /// dropped have no completion, as NVMe 1.4 §5.6 allows.
    pub(super) fn end_pair(&mut self, drive: &SharedDrive, id: u16) -> bool {
        let at = usize::from(id) - 1;
        let Some(Some(pair)) = self.pairs.get(at).copied() else {
            return true;
        };
        if self.is_lost(drive) {
            return false;
        }
        if let Err(error) = drive.delete_queue(self.generation, admin::DELETE_SQ, pair.id) {
            if !self.is_lost(drive) {
                drive.fail("deleting a queue", &error);
            }
            return false;
        }
        if self.complete_queue(id).is_err() {
            self.fail("a completion queue is not in mapped memory");
        }
        let cq = self
            .sqs
            .get(usize::from(id))
            .copied()
            .flatten()
            .map(|sq| sq.cq);
        while self.slots.take_of(id).is_some() {
            if let Some(Some(cq)) = cq.and_then(|cq| self.cqs.get_mut(usize::from(cq))) {
                cq.reserved = cq.reserved.saturating_sub(1);
            }
        }
        self.pairs[at] = None;
        if let Err(error) = drive.delete_queue(self.generation, admin::DELETE_CQ, pair.id) {
            if !self.is_lost(drive) {
                drive.fail("deleting a queue", &error);
            }
            return false;
        }
        // It belongs to no queue any more.
        let _ = self.route(drive, pair.id, None);
        true
    }

    fn delete_cq(&mut self, id: u16) -> Result<(), Status> {
        if id == 0 || !matches!(self.cqs.get(usize::from(id)), Some(Some(_))) {
            return Err(Status::INVALID_QID);
        }
        if self.sqs.iter().flatten().any(|sq| sq.cq == id) {
            return Err(Status::INVALID_QUEUE_DELETION);
        }
        self.cqs[usize::from(id)] = None;
        Ok(())
    }
}
