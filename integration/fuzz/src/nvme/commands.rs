//! What the controller does with commands, and what it demands of them.

use farbus_vfio::DmaWindow;
use farbus_vfio::nvme::{CQE_SIZE, PAGE_SIZE, SQE_SIZE, Status, SubmissionEntry, admin, cns, nvm};

use super::{PAGE, QUEUES, State, new_cq, new_sq};

impl State {
    /// Bytes that a device moves for a command (NVMe 1.4 §5 and §6).
    pub(super) fn data_len(&self, queue: u16, sqe: &SubmissionEntry) -> u64 {
        let dword = |n| u64::from(sqe.dword(n));
        if queue > 0 {
            return match sqe.opcode() {
                nvm::READ | nvm::WRITE | nvm::COMPARE => {
                    u64::from(sqe.blocks()) * self.block_len(sqe.nsid())
                }
                nvm::DATASET_MANAGEMENT => ((dword(10) & 0xff) + 1) * 16,
                nvm::FLUSH | nvm::WRITE_UNCORRECTABLE | nvm::WRITE_ZEROES | nvm::VERIFY => 0,
                other => panic!("I/O opcode {other:#x} must not reach the device"),
            };
        }
        match sqe.opcode() {
            admin::IDENTIFY => PAGE,
            admin::GET_LOG_PAGE => ((dword(10) >> 16 | (dword(11) & 0xffff) << 16) + 1) * 4,
            admin::GET_LBA_STATUS => (dword(12) + 1) * 4,
            // Asking for a feature's capabilities moves nothing.
            admin::GET_FEATURES if dword(10) >> 8 & 7 == 3 => 0,
            admin::SET_FEATURES | admin::GET_FEATURES => match dword(10) & 0xff {
                0x03 => 4096,
                0x0c => 256,
                0x0d => 4096,
                0x0e => 8,
                0x13 | 0x16 => 512,
                0x81 => 8 << (dword(11) & 1),
                _ => 0,
            },
            admin::CREATE_CQ
            | admin::CREATE_SQ
            | admin::DELETE_CQ
            | admin::DELETE_SQ
            | admin::ABORT
            | admin::ASYNC_EVENT
            | admin::SELF_TEST
            | admin::KEEP_ALIVE => 0,
            other => panic!("admin opcode {other:#x} must not reach the device"),
        }
    }

    pub(super) fn block_len(&self, nsid: u32) -> u64 {
        let format = self.identity.namespaces.iter().find(|f| f.nsid == nsid);
        format.map_or(0, |f| (1 << f.shift) + u64::from(f.metadata))
    }

    /// Fails unless the command is one that the device half may place.
    pub(super) fn check(&self, queue: u16, sqe: &SubmissionEntry) {
        assert_eq!(sqe.0[1], 0, "fused or with an SGL: {sqe:?}");
        assert_eq!(sqe.mptr(), 0, "metadata of its own: {sqe:?}");
        let own = sqe.cid() == self.tags;
        assert!(own || sqe.cid() < self.tags, "no tag: {sqe:?}");
        let len = self.data_len(queue, sqe);
        let [shadow, arena, ..] = self.windows.as_slice() else {
            panic!("a command before its memory");
        };
        // The device half's own commands have their page in the arena.
        let data = if own { arena } else { shadow };
        for (address, len) in self.pages(arena, sqe, len) {
            let end = address.checked_add(len).expect("an end");
            assert!(
                address >= data.iova.0 && end <= data.iova.0 + data.len as u64,
                "{address:#x} is not in {data:?}: {sqe:?}"
            );
        }
        if queue == 0 && matches!(sqe.opcode(), admin::CREATE_CQ | admin::CREATE_SQ) {
            let entry = match sqe.opcode() {
                admin::CREATE_CQ => CQE_SIZE as u64,
                _ => SQE_SIZE as u64,
            };
            let end = sqe.prp1() + u64::from(ring_size(sqe)) * entry;
            assert!(
                sqe.prp1() >= arena.iova.0 && end <= arena.iova.0 + arena.len as u64,
                "a ring that is not in the arena: {sqe:?}"
            );
            assert_eq!(sqe.dword(11) & 1, 1, "a ring of scattered pages: {sqe:?}");
            assert_eq!(
                sqe.prp1() % PAGE,
                0,
                "a ring that begins in a page: {sqe:?}"
            );
        }
    }

    /// The memory that a command's PRPs name (NVMe 1.4 §4.3), as a device walks them.
    pub(super) fn pages(
        &self,
        arena: &DmaWindow,
        sqe: &SubmissionEntry,
        len: u64,
    ) -> Vec<(u64, u64)> {
        let mut pages = Vec::new();
        if len == 0 {
            return pages;
        }
        let first = (PAGE - sqe.prp1() % PAGE).min(len);
        pages.push((sqe.prp1(), first));
        let mut left = len - first;
        if left == 0 {
            return pages;
        }
        if left <= PAGE {
            pages.push((sqe.prp2(), left));
            return pages;
        }
        let mut entry = sqe.prp2();
        while left > 0 {
            let last_of_list = entry % PAGE == PAGE - 8 && left > PAGE;
            assert!(!last_of_list, "lists are not chained: {sqe:?}");
            assert!(
                entry >= arena.iova.0 && entry + 8 <= arena.iova.0 + arena.len as u64,
                "a list that is not in the arena: {sqe:?}"
            );
            pages.push((u64::from_le_bytes(self.load(entry)), left.min(PAGE)));
            left -= left.min(PAGE);
            entry += 8;
        }
        pages
    }

    /// Does and completes the admin command that was placed last.
    pub(super) fn answer(&mut self, sqe: &SubmissionEntry) {
        let last = self.outstanding.len() - 1;
        let (mut status, mut result) = (Status::SUCCESS, 0);
        match sqe.opcode() {
            admin::ASYNC_EVENT => return,
            admin::IDENTIFY if self.holds && sqe.cid() != self.tags => return,
            admin::IDENTIFY => match self.identify(sqe) {
                Some(page) => self.store(sqe.prp1(), &page),
                None => status = Status::INVALID_FIELD,
            },
            admin::SET_FEATURES | admin::GET_FEATURES if sqe.dword(10) & 0xff == 7 => {
                result = self.identity.queues.into();
            }
            admin::CREATE_CQ | admin::CREATE_SQ | admin::DELETE_CQ | admin::DELETE_SQ => {
                status = self.queue_status(sqe);
            }
            _ => {}
        }
        self.complete(last, status, result);
    }

    pub(super) fn identify(&self, sqe: &SubmissionEntry) -> Option<Vec<u8>> {
        let mut page = vec![0; PAGE_SIZE];
        match sqe.dword(10) as u8 {
            cns::CONTROLLER => {
                for (at, value) in &self.identity.controller {
                    page[usize::from(*at) % PAGE_SIZE] = *value;
                }
            }
            cns::NAMESPACE_LIST if self.identity.no_list => return None,
            cns::NAMESPACE_LIST => {
                for (slot, format) in page.chunks_exact_mut(4).zip(&self.identity.namespaces) {
                    slot.copy_from_slice(&format.nsid.to_le_bytes());
                }
            }
            cns::NAMESPACE => {
                let known = self.identity.namespaces.iter();
                let format = known.into_iter().find(|f| f.nsid == sqe.nsid())?;
                page[26] = u8::from(format.extended) << 4;
                page[128..130].copy_from_slice(&format.metadata.to_le_bytes());
                page[130] = format.shift;
            }
            _ => return None,
        }
        Some(page)
    }

    /// What a controller says to a change of its queues (NVMe 1.4 §5.3 to §5.6).
    pub(super) fn queue_status(&self, sqe: &SubmissionEntry) -> Status {
        let id = usize::from(sqe.dword(10) as u16);
        let has_sq = matches!(self.submission.get(id), Some(Some(_)));
        let has_cq = matches!(self.completion.get(id), Some(Some(_)));
        let of_sq = (sqe.dword(11) >> 16) as usize;
        let possible = (1..QUEUES).contains(&id);
        let in_use = |id| {
            self.submission
                .iter()
                .flatten()
                .any(|sq| sq.completion == id)
        };
        match sqe.opcode() {
            admin::CREATE_CQ if !possible || has_cq => Status::INVALID_QID,
            admin::CREATE_SQ if !possible || has_sq => Status::INVALID_QID,
            admin::CREATE_SQ if of_sq == 0 => Status::INVALID_CQ,
            admin::CREATE_SQ if !matches!(self.completion.get(of_sq), Some(Some(_))) => {
                Status::INVALID_CQ
            }
            admin::DELETE_CQ if !possible || !has_cq => Status::INVALID_QID,
            admin::DELETE_CQ if in_use(id as u16) => Status::INVALID_QUEUE_DELETION,
            admin::DELETE_SQ if !possible || !has_sq => Status::INVALID_QID,
            _ => Status::SUCCESS,
        }
    }

    pub(super) fn created_or_deleted(&mut self, sqe: &SubmissionEntry) {
        let (id, size) = (usize::from(sqe.dword(10) as u16), ring_size(sqe));
        if !(1..QUEUES).contains(&id) {
            return;
        }
        match sqe.opcode() {
            admin::CREATE_CQ => self.completion[id] = Some(new_cq(sqe.prp1(), size)),
            admin::CREATE_SQ => {
                let completion = (sqe.dword(11) >> 16) as u16;
                self.submission[id] = Some(new_sq(sqe.prp1(), size, completion));
            }
            admin::DELETE_CQ => self.completion[id] = None,
            admin::DELETE_SQ => {
                self.submission[id] = None;
                self.outstanding.retain(|c| usize::from(c.queue) != id);
            }
            _ => {}
        }
    }
}

pub(super) fn ring_size(sqe: &SubmissionEntry) -> u32 {
    (sqe.dword(10) >> 16) + 1
}
