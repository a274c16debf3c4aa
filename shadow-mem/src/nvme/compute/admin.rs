//! Admin commands that the compute half must understand: those that make and remove queues,
//! and those that name other commands or count queues.

use farbus_vfio::Iova;
use farbus_vfio::nvme::{CQE_SIZE, PAGE_SIZE, SQE_SIZE, Status, SubmissionEntry, admin};

use super::super::transfer::{self, Transfer, feature};
use super::ComputeHalf;
use super::queues::{CompletionQueue, SubmissionQueue};

/// Features whose setting outlives the command and is set again when a controller is
/// rebuilt. A guest that sets more of them than this is answered as usual, but the settings
/// beyond do not survive the loss of the device server.
const MAX_RECORDED_FEATURES: usize = 64;

/// What to do with an admin command that was fetched.
pub(super) enum Verdict {
    /// Send it, in this form.
    Forward(SubmissionEntry),
    /// Answer it here.
    Complete(Status, u64),
}

impl ComputeHalf {
    /// Looks at an admin command before it is sent.
    pub(super) fn admit(&mut self, mut sqe: SubmissionEntry) -> Verdict {
        if let Some((status, result)) = self.answer_coalescing(&sqe) {
            self.changed = true;
            return Verdict::Complete(status, result);
        }
        let verdict = match sqe.opcode() {
            admin::DOORBELL_BUFFER => {
                self.changed = true;
                return Verdict::Complete(self.configure_doorbells(&sqe), 0);
            }
            admin::CREATE_CQ => self.check_create_cq(&sqe),
            admin::CREATE_SQ => self.check_create_sq(&sqe),
            admin::DELETE_SQ => self.check_delete_sq(&sqe).inspect(|()| {
                self.set_deleting(&sqe, true);
            }),
            admin::DELETE_CQ => self.check_delete_cq(&sqe),
            admin::ABORT => return self.translate_abort(sqe),
            admin::SET_FEATURES if sqe.dword(10) as u8 == feature::NUMBER_OF_QUEUES => {
                let limit = u32::from(self.description.queue_pairs) - 1;
                let wanted = sqe.dword(11);
                // 0xffff is not a number of queues (NVMe 1.4 §5.21.1.7); the device says so.
                if wanted & 0xffff != 0xffff && wanted >> 16 != 0xffff {
                    sqe.set_dword(11, clamp_halves(wanted, limit));
                }
                Ok(())
            }
            _ => Ok(()),
        };
        match verdict {
            Ok(()) => Verdict::Forward(sqe),
            Err(status) => Verdict::Complete(status, 0),
        }
    }

    /// Acts on the outcome of an admin command that the device has completed; returns the
    /// result that the guest gets.
    pub(super) fn settle(&mut self, sqe: &SubmissionEntry, status: Status, result: u64) -> u64 {
        if !status.is_success() {
            if sqe.opcode() == admin::DELETE_SQ {
                self.set_deleting(sqe, false);
            }
            return result;
        }
        self.changed = true;
        let queue = sqe.dword(10) as u16;
        match sqe.opcode() {
            admin::CREATE_CQ => {
                let vector = (sqe.dword(11) & 2 != 0).then_some((sqe.dword(11) >> 16) as u16);
                let made = CompletionQueue::new(sqe.prp1(), queue_size(sqe), vector);
                self.clear_doorbell(queue, true);
                self.queues.completion.insert(queue, made);
                self.record_new_completion(queue);
            }
            admin::CREATE_SQ => {
                let completion = (sqe.dword(11) >> 16) as u16;
                let made = SubmissionQueue::new(sqe.prp1(), queue_size(sqe), completion);
                self.clear_doorbell(queue, false);
                self.queues.submission.insert(queue, made);
                self.record_new_submission(queue);
            }
            admin::DELETE_SQ => {
                self.queues.submission.remove(queue);
            }
            admin::DELETE_CQ => {
                let gone = self.queues.completion.remove(queue);
                for tag in gone.into_iter().flat_map(|cq| cq.held) {
                    self.forget(tag);
                }
            }
            admin::SET_FEATURES => {
                self.record_feature(sqe);
                if sqe.dword(10) as u8 == feature::NUMBER_OF_QUEUES {
                    return self.clamp_queues(result);
                }
            }
            admin::GET_FEATURES
                if sqe.dword(10) as u8 == feature::NUMBER_OF_QUEUES
                    && sqe.dword(10) >> 8 & 7 != 3 =>
            {
                return self.clamp_queues(result);
            }
            _ => {}
        }
        result
    }

    fn set_deleting(&mut self, sqe: &SubmissionEntry, deleting: bool) {
        if let Some(sq) = self.queues.sq(sqe.dword(10) as u16) {
            sq.deleting = deleting;
            self.changed = true;
        }
    }

    fn clamp_queues(&self, result: u64) -> u64 {
        let limit = u32::from(self.description.queue_pairs) - 1;
        clamp_halves(result as u32, limit).into()
    }

    fn record_feature(&mut self, sqe: &SubmissionEntry) {
        // Settings with a data structure are left out: what they hold is the guest's memory.
        if transfer::of_admin(sqe) != Ok(Transfer::None) {
            return;
        }
        let same = |other: &SubmissionEntry| feature_key(other) == feature_key(sqe);
        if let Some(known) = self.features.iter_mut().find(|other| same(other)) {
            *known = *sqe;
        } else if self.features.len() < MAX_RECORDED_FEATURES {
            self.features.push(*sqe);
        }
    }

    fn check_create_cq(&self, sqe: &SubmissionEntry) -> Result<(), Status> {
        self.new_queue_id(sqe, |half, id| half.queues.completion.get(id).is_some())?;
        self.check_ring(sqe, CQE_SIZE, true)?;
        let vector = sqe.dword(11) >> 16;
        if sqe.dword(11) & 2 != 0 && vector >= self.interrupts.len() {
            return Err(Status::INVALID_VECTOR);
        }
        Ok(())
    }

    fn check_create_sq(&self, sqe: &SubmissionEntry) -> Result<(), Status> {
        self.new_queue_id(sqe, |half, id| half.queues.submission.get(id).is_some())?;
        let completion = (sqe.dword(11) >> 16) as u16;
        match self.queues.completion.get(completion) {
            // NVMe 1.4 §5.4: the admin completion queue is not one for I/O.
            Some(_) if completion > 0 => {}
            _ => return Err(Status::INVALID_CQ),
        }
        self.check_ring(sqe, SQE_SIZE, false)
    }

    fn new_queue_id(
        &self,
        sqe: &SubmissionEntry,
        exists: impl Fn(&Self, u16) -> bool,
    ) -> Result<(), Status> {
        let id = sqe.dword(10) as u16;
        let possible = (1..=self.description.queue_pairs).contains(&id);
        // One that is being created may exist at the device by now, which takes a second
        // creation for a mistake of ours.
        let is_taken = exists(self, id) || self.tags.has_sent_admin(sqe.opcode(), id);
        if !possible || is_taken {
            return Err(Status::INVALID_QID);
        }
        Ok(())
    }

    fn check_ring(&self, sqe: &SubmissionEntry, entry: usize, write: bool) -> Result<(), Status> {
        let size = queue_size(sqe);
        let limit = (self.description.cap & 0xffff) as u32 + 1;
        if size < 2 || size > limit {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        // CAP.CQR is set: physically contiguous is a must (NVMe 1.4 §5.3).
        if sqe.dword(11) & 1 == 0 {
            return Err(Status::INVALID_FIELD);
        }
        let base = sqe.prp1();
        if base % PAGE_SIZE as u64 != 0 {
            return Err(Status::INVALID_PRP_OFFSET);
        }
        let len = u64::from(size) * entry as u64;
        if !self.memory.covers(Iova(base), len, write) {
            return Err(Status::INVALID_FIELD);
        }
        Ok(())
    }

    fn check_delete_sq(&self, sqe: &SubmissionEntry) -> Result<(), Status> {
        let id = sqe.dword(10) as u16;
        match self.queues.submission.get(id) {
            Some(_) if id > 0 => Ok(()),
            _ => Err(Status::INVALID_QID),
        }
    }

    fn check_delete_cq(&self, sqe: &SubmissionEntry) -> Result<(), Status> {
        let id = sqe.dword(10) as u16;
        match self.queues.completion.get(id) {
            Some(_) if id > 0 => {}
            _ => return Err(Status::INVALID_QID),
        }
        let mut in_use = self.queues.submission.iter();
        if in_use.any(|(_, sq)| sq.completion_queue == id) {
            return Err(Status::INVALID_QUEUE_DELETION);
        }
        Ok(())
    }

    /// An Abort names a command by the guest's identifier; at the device it has its tag.
    fn translate_abort(&self, mut sqe: SubmissionEntry) -> Verdict {
        const NOT_ABORTED: u64 = 1;
        let (queue, cid) = (sqe.dword(10) as u16, (sqe.dword(10) >> 16) as u16);
        match self.tags.find(queue, cid) {
            Some(tag) => {
                sqe.set_dword(10, u32::from(queue) | u32::from(tag.0) << 16);
                Verdict::Forward(sqe)
            }
            None => Verdict::Complete(Status::SUCCESS, NOT_ABORTED),
        }
    }
}

/// Entries of the queue that a Create command makes (0's based in CDW10 31:16).
fn queue_size(sqe: &SubmissionEntry) -> u32 {
    (sqe.dword(10) >> 16) + 1
}

/// Both halves of a number-of-queues dword, each at most `limit` (0's based).
fn clamp_halves(dword: u32, limit: u32) -> u32 {
    (dword & 0xffff).min(limit) | (dword >> 16).min(limit) << 16
}

/// What a setting is of: namespace, feature, and for features with several values which one
/// (NVMe 1.4 §5.21.1.4: threshold type and sensor).
fn feature_key(sqe: &SubmissionEntry) -> (u32, u8, u32) {
    let id = sqe.dword(10) as u8;
    let which = match id {
        feature::TEMPERATURE_THRESHOLD => sqe.dword(11) & 0x003f_0000,
        _ => 0,
    };
    (sqe.nsid(), id, which)
}
