//! The compute half with a guest that does as told, and a device side that answers by hand.

use std::sync::Arc;

use farbus_fabric::FabricError;
use farbus_fabric::wire::{CompleteBatch, CompleteEntry, QueueId, Tag};
use farbus_shadow_mem::nvme::compute::ComputeHalf;
use farbus_shadow_mem::nvme::description::{
    NamespaceFormat, Namespaces, NvmeDescription, guest_cap,
};
use farbus_shadow_mem::session::Session;
use farbus_shadow_mem::shadow::shared_memory;
use farbus_vfio::nvme::{
    CQE_SIZE, CompletionEntry, DOORBELL_BASE, SQE_SIZE, Status, SubmissionEntry, admin, cap, cc,
    csts, nvm, reg,
};
use farbus_vfio::{DmaAccess, DmaWindow, Iova};
use vm_memory::{MmapRegion, VolatileMemory};

use super::wire::{Submitted, Wire, status, tell};

/// Guest memory, from address 0 on. Queue `n` has its rings at `n * 0x2000`.
pub(crate) const MEMORY_LEN: usize = 1 << 20;
/// Where guest memory is free for data.
pub(crate) const DATA: u64 = 0x4_0000;
pub(crate) const SHADOW_LEN: u32 = 16 << 20;
pub(crate) const TAGS: u16 = 1024;
pub(crate) const SQE_BYTES: u64 = SQE_SIZE as u64;
/// Entries of every ring.
pub(crate) const ENTRIES: u32 = 32;
/// CC of a driver that enables the controller.
pub(crate) const CC_ON: u32 = 6 << cc::IOSQES_SHIFT | 4 << cc::IOCQES_SHIFT | cc::EN;
const VECTORS: u32 = 8;

pub(crate) fn description() -> NvmeDescription {
    NvmeDescription {
        cap: guest_cap(1023 | cap::CQR | cap::CSS_NVM),
        vs: 0x1_04_00,
        max_transfer: 1 << 20,
        queue_pairs: 4,
        namespaces: Namespaces::new(vec![NamespaceFormat {
            nsid: 1,
            block_shift: 9,
        }]),
    }
}

/// A completion queue as the guest reads it.
#[derive(Clone, Copy)]
struct Cursor {
    head: u32,
    phase: bool,
}

/// See the module's own description.
pub(crate) struct Guest {
    pub half: ComputeHalf,
    pub session: Session,
    pub wire: Wire,
    pub memory: Arc<MmapRegion>,
    tails: [u32; 5],
    cursors: [Cursor; 5],
}

impl Guest {
    /// A controller after power-on, and guest memory.
    pub(crate) fn new() -> Self {
        let mut half = ComputeHalf::new(description(), SHADOW_LEN, TAGS, VECTORS).unwrap();
        half.offer_shadow_doorbells();
        let memory = shared_memory("guest", MEMORY_LEN).unwrap();
        half.map(&DmaWindow {
            iova: Iova(0),
            memory: memory.clone(),
            offset: 0,
            len: MEMORY_LEN,
            access: DmaAccess::ReadWrite,
        })
        .unwrap();
        let (session, wire) = Wire::session();
        Self {
            half,
            session,
            wire,
            memory,
            tails: [0; 5],
            cursors: [Cursor {
                head: 0,
                phase: true,
            }; 5],
        }
    }

    /// An enabled controller.
    pub(crate) fn enabled() -> Self {
        let mut guest = Self::new();
        guest.enable();
        guest
    }

    /// An enabled controller with one pair of I/O queues, whose interrupt vector is 1.
    pub(crate) fn with_queues() -> Self {
        let mut guest = Self::enabled();
        guest.create_queues();
        guest
    }

    /// Enables the controller, and the device says that it is ready.
    pub(crate) fn enable(&mut self) {
        self.wire.take();
        self.begin_enable();
        self.pump();
        self.device_says(csts::RDY);
        assert_eq!(self.csts(), csts::RDY);
    }

    /// Enables the controller; the device has not answered yet.
    pub(crate) fn begin_enable(&mut self) {
        self.tails = [0; 5];
        self.cursors = [Cursor {
            head: 0,
            phase: true,
        }; 5];
        for queue in 0..5 {
            self.clear_rings(queue);
        }
        self.write32(reg::AQA, (ENTRIES - 1) | (ENTRIES - 1) << 16);
        self.write32(reg::ASQ, sq_base(0) as u32);
        self.write32(reg::ACQ, cq_base(0) as u32);
        self.write32(reg::CC, CC_ON);
    }

    /// Creates pair 1.
    pub(crate) fn create_queues(&mut self) {
        for opcode in [admin::CREATE_CQ, admin::CREATE_SQ] {
            self.submit(0, create(opcode, 1));
            self.complete_all();
        }
        let outcomes = self.completions(0);
        assert!(outcomes.iter().all(|entry| entry.status.is_success()));
        assert_eq!(outcomes.len(), 2);
        self.tails[1] = 0;
        self.cursors[1] = Cursor {
            head: 0,
            phase: true,
        };
    }

    pub(crate) fn clear_rings(&self, queue: u16) {
        self.store(sq_base(queue), &[0; 0x2000]);
    }

    pub(crate) fn store(&self, address: u64, bytes: &[u8]) {
        let at = address as usize;
        self.memory
            .get_slice(at, bytes.len())
            .unwrap()
            .copy_from(bytes);
    }

    pub(crate) fn load<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let slice = self.memory.get_slice(address as usize, N).unwrap();
        slice.copy_to(&mut bytes[..]);
        bytes
    }

    pub(crate) fn write32(&mut self, offset: u64, value: u32) {
        self.half.register_write(offset, &value.to_le_bytes());
    }

    pub(crate) fn csts(&self) -> u32 {
        let mut value = [0; 4];
        self.half.register_read(reg::CSTS, &mut value);
        u32::from_le_bytes(value)
    }

    pub(crate) fn pump(&mut self) {
        self.half.pump(&mut self.session).unwrap();
    }

    /// Puts a command into a queue, rings the doorbell, and has it sent.
    pub(crate) fn submit(&mut self, queue: u16, sqe: SubmissionEntry) {
        let tail = &mut self.tails[usize::from(queue)];
        let address = sq_base(queue) + u64::from(*tail) * SQE_SIZE as u64;
        *tail = (*tail + 1) % ENTRIES;
        let tail = *tail;
        self.store(address, &sqe.0);
        self.ring_sq(queue, tail);
        self.pump();
    }

    pub(crate) fn ring_sq(&mut self, queue: u16, tail: u32) {
        self.write32(DOORBELL_BASE + u64::from(queue) * 8, tail);
    }

    /// Takes the guest's new completions, and says so to the controller.
    pub(crate) fn completions(&mut self, queue: u16) -> Vec<CompletionEntry> {
        let mut found = Vec::new();
        loop {
            let Cursor { head, phase } = self.cursors[usize::from(queue)];
            let at = cq_base(queue) + u64::from(head) * CQE_SIZE as u64;
            let low = u64::from_le_bytes(self.load(at));
            let high = u64::from_le_bytes(self.load(at + 8));
            let entry = CompletionEntry::from_qwords([low, high]);
            if entry.phase != phase {
                break;
            }
            found.push(entry);
            self.cursors[usize::from(queue)] = Cursor {
                head: (head + 1) % ENTRIES,
                phase: phase ^ (head + 1 == ENTRIES),
            };
        }
        let head = self.cursors[usize::from(queue)].head;
        self.write32(DOORBELL_BASE + u64::from(queue) * 8 + 4, head);
        found
    }

    /// The device side tells of CSTS.
    pub(crate) fn device_says(&mut self, value: u32) {
        tell(&mut self.half, &status(value)).unwrap();
        self.pump();
    }

    /// The device side completes a command.
    pub(crate) fn complete(&mut self, tag: Tag, status: Status) -> Result<(), FabricError> {
        self.deliver(&[completion(tag, status, 0)])
    }

    pub(crate) fn deliver(&mut self, entries: &[CompleteEntry]) -> Result<(), FabricError> {
        use farbus_fabric::Sink;
        let mut batch = CompleteBatch::new();
        for entry in entries {
            batch.push(entry)?;
        }
        self.half.deliver(&batch.header(), batch.control())?;
        self.half.pump(&mut self.session)
    }

    /// The device side completes whatever was sent since the last look, with all of its data.
    pub(crate) fn complete_all(&mut self) -> Vec<Submitted> {
        let submitted = self.wire.take_submitted();
        for command in &submitted {
            let len = match command.placement.direction {
                farbus_fabric::wire::Direction::FromDevice => command.placement.data_len,
                _ => 0,
            };
            self.deliver(&[completion(command.placement.tag, Status::SUCCESS, len)])
                .unwrap();
        }
        submitted
    }

    /// The link is cut, and a new one is there.
    pub(crate) fn new_link(&mut self) {
        self.half.link_lost();
        (self.session, self.wire) = Wire::session();
        self.half.link_up(&description(), SHADOW_LEN, TAGS).unwrap();
        self.pump();
    }

    /// Fails unless no command holds a tag or a page of the buffer shadow.
    pub(crate) fn assert_nothing_is_held(&self) {
        let held = self.half.outstanding();
        assert_eq!((held.commands, held.shadow_pages), (0, 0));
    }
}

pub(crate) fn completion(tag: Tag, status: Status, data_len: u32) -> CompleteEntry {
    CompleteEntry {
        tag,
        queue: QueueId(0),
        status: status.0,
        data_len,
        result: 0,
    }
}

pub(crate) fn sq_base(queue: u16) -> u64 {
    u64::from(queue) * 0x2000
}

pub(crate) fn cq_base(queue: u16) -> u64 {
    sq_base(queue) + 0x1000
}

/// Creates one half of a pair, with the interrupt vector of the same number.
pub(crate) fn create(opcode: u8, queue: u16) -> SubmissionEntry {
    let mut sqe = SubmissionEntry::new(opcode);
    let id = u32::from(queue);
    sqe.set_dword(10, id | (ENTRIES - 1) << 16);
    if opcode == admin::CREATE_CQ {
        sqe.set_dword(11, 3 | id << 16);
        sqe.set_prps(cq_base(queue), 0);
    } else {
        sqe.set_dword(11, 1 | id << 16);
        sqe.set_prps(sq_base(queue), 0);
    }
    sqe
}

/// Deletes one half of a pair.
pub(crate) fn delete(opcode: u8, queue: u16) -> SubmissionEntry {
    let mut sqe = SubmissionEntry::new(opcode);
    sqe.set_dword(10, queue.into());
    sqe
}

/// Reads or writes `blocks` blocks, with the data at [`DATA`].
pub(crate) fn block_io(opcode: u8, cid: u16, blocks: u32) -> SubmissionEntry {
    let mut sqe = SubmissionEntry::new(opcode);
    sqe.set_cid(cid);
    sqe.set_nsid(1);
    sqe.set_dword(12, blocks - 1);
    sqe.set_prps(DATA, DATA + 0x1000);
    sqe
}

/// A read of a page.
pub(crate) fn read(cid: u16) -> SubmissionEntry {
    block_io(nvm::READ, cid, 8)
}

/// A write of a page.
pub(crate) fn write(cid: u16) -> SubmissionEntry {
    block_io(nvm::WRITE, cid, 8)
}
