//! The device half with a peer that sends as told, and a controller that is spoilt by hand.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_fabric::wire::{
    CompleteEntry, Direction, FaultCode, Message, Placement, QueueId, SubmitBatch, Tag,
};
use farbus_fabric::{FabricError, Sink};
use farbus_shadow_mem::nvme::device::{DeviceHalf, Limits};
use farbus_shadow_mem::session::Session;
use farbus_vfio::nvme::{SubmissionEntry, admin, csts, nvm, reg};

use super::fake_nvme::FakeNvme;
use super::guest::CC_ON;
use super::wire::{Wire, configure, landing, register_of, tell};

pub(crate) const LIMITS: Limits = Limits {
    shadow_len: 1 << 20,
    tags: 64,
    max_transfer: 64 << 10,
};
/// How long anything may take here.
const PATIENCE: Duration = Duration::from_secs(10);

/// See the module's own description.
pub(crate) struct Claim {
    pub half: DeviceHalf,
    pub session: Session,
    pub wire: Wire,
    pub device: Arc<FakeNvme>,
}

impl Claim {
    /// A claim on a controller, which stays disabled.
    pub(crate) fn of(device: Arc<FakeNvme>) -> Self {
        let half = DeviceHalf::open(device.clone(), LIMITS).unwrap();
        let (session, wire) = Wire::session();
        Self {
            half,
            session,
            wire,
            device,
        }
    }

    /// A claim on a controller that works, enabled, with one pair of I/O queues.
    pub(crate) fn with_queues() -> Self {
        let mut claim = Self::of(FakeNvme::new());
        claim.enable();
        claim.create_queues();
        claim
    }

    pub(crate) fn enable(&mut self) {
        self.tell(&configure(CC_ON)).unwrap();
        self.until_status(csts::RDY);
    }

    /// Pair 1.
    pub(crate) fn create_queues(&mut self) {
        for opcode in [admin::CREATE_CQ, admin::CREATE_SQ] {
            self.submit(0, 0, create(opcode, 1)).unwrap();
            assert_eq!(self.completed()[0].status, 0);
        }
    }

    pub(crate) fn tell(&mut self, message: &Message) -> Result<(), FabricError> {
        tell(&mut self.half, message)?;
        self.half.pump(&mut self.session)
    }

    /// Sends one command, with the data that the engine expects for it.
    pub(crate) fn submit(
        &mut self,
        tag: u16,
        queue: u16,
        sqe: SubmissionEntry,
    ) -> Result<(), FabricError> {
        use farbus_shadow_mem::nvme::transfer::{Transfer, of_admin, of_nvm};
        let transfer = match queue {
            0 => of_admin(&sqe),
            _ => of_nvm(&sqe, &self.half.description().namespaces),
        };
        let (direction, data_len) = match transfer {
            Ok(Transfer::ToDevice(len)) => (Direction::ToDevice, len),
            Ok(Transfer::FromDevice(len)) => (Direction::FromDevice, len),
            _ => (Direction::None, 0),
        };
        self.place(
            &Placement {
                tag: Tag(tag),
                queue: QueueId(queue),
                shadow_offset: 0,
                data_len,
                direction,
            },
            sqe,
        )
    }

    /// Sends one command just so.
    pub(crate) fn place(
        &mut self,
        placement: &Placement,
        sqe: SubmissionEntry,
    ) -> Result<(), FabricError> {
        let mut batch = SubmitBatch::new();
        batch.push(placement, &sqe.0, &[])?;
        if batch.header().payload_len > 0 {
            landing(&mut self.half, &batch.header(), batch.control())?;
        }
        self.half.deliver(&batch.header(), batch.control())
    }

    /// The device has signalled; the completions that come of it.
    pub(crate) fn completed(&mut self) -> Vec<CompleteEntry> {
        self.half.pump(&mut self.session).unwrap();
        self.wire.take_completed()
    }

    /// Looks after the controller until the peer hears a message that is wanted. Everything
    /// that was heard before it is dropped.
    pub(crate) fn until<T>(&mut self, what: &str, wanted: impl Fn(&Message) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            self.half.pump(&mut self.session).unwrap();
            if let Some(found) = self.wire.take_messages().iter().find_map(&wanted) {
                return found;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "{what}: not within {PATIENCE:?}"
            );
            self.half.tick();
        }
    }

    pub(crate) fn until_status(&mut self, expected: u32) {
        self.until("a status", |message| {
            (register_of(message) == Some((reg::CSTS, expected))).then_some(())
        });
    }

    pub(crate) fn until_fault(&mut self) -> FaultCode {
        self.until("a fault", |message| match message {
            Message::Fault { code, .. } => Some(*code),
            _ => None,
        })
    }

    /// Fails unless a read goes to the device and back.
    pub(crate) fn assert_io_works(&mut self) {
        self.submit(9, 1, read(8)).unwrap();
        self.device.state().complete(1, 9);
        let completed = self.completed();
        assert_eq!((completed[0].tag, completed[0].status), (Tag(9), 0));
    }
}

/// Creates one half of a pair of 32 entries.
pub(crate) fn create(opcode: u8, queue: u32) -> SubmissionEntry {
    create_sized(opcode, queue, 32)
}

pub(crate) fn create_sized(opcode: u8, queue: u32, entries: u32) -> SubmissionEntry {
    let mut sqe = SubmissionEntry::new(opcode);
    sqe.set_dword(10, queue | (entries - 1) << 16);
    sqe.set_dword(11, 1 | queue << 16);
    sqe
}

/// Reads blocks of 512 bytes.
pub(crate) fn read(blocks: u32) -> SubmissionEntry {
    let mut sqe = SubmissionEntry::new(nvm::READ);
    sqe.set_nsid(1);
    sqe.set_dword(12, blocks - 1);
    sqe
}

/// A placement of data for the device to fill.
pub(crate) fn placement(tag: u16, queue: u16, shadow_offset: u32, data_len: u32) -> Placement {
    Placement {
        tag: Tag(tag),
        queue: QueueId(queue),
        shadow_offset,
        data_len,
        direction: Direction::FromDevice,
    }
}
