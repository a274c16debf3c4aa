//! The engine's device half between a peer that sends anything and a controller that does
//! anything.
//!
//! What the controller is told to do is checked by [`crate::nvme`], what the peer is sent by
//! [`crate::link`]; here the script lets them loose on the device half, and at the end the
//! function must be free of it.

use std::collections::HashMap;
use std::sync::Arc;

use farbus_fabric::wire::{
    Body, Data, Direction, Epoch, Header, Kind, Message, Placement, QueueId, RequestId, Side,
    SubmitBatch, Tag, decode_body,
};
use farbus_fabric::{FabricError, Link, Received, Sink, Span};
use farbus_shadow_mem::nvme::device::{DeviceHalf, Limits};
use farbus_shadow_mem::nvme::transfer::{self, Transfer};
use farbus_shadow_mem::session::Session;
use farbus_vfio::nvme::{
    CompletionEntry, PAGE_SIZE, Status, SubmissionEntry, admin, cap, cc, nvm, reg,
};
use vm_memory::MmapRegion;

use crate::guest::check_description;
use crate::input::Input;
use crate::link::{FakeLink, Ground, Wire, lock};
use crate::nvme::{FakeNvme, Format, Identity, PLAIN_CAP};

/// The steps of a script, each followed by what it needs.
#[allow(missing_docs, reason = "the names say what they do")]
pub mod step {
    pub const CONFIGURE: u8 = 0;
    pub const CREATE_QUEUES: u8 = 1;
    pub const SUBMIT: u8 = 2;
    pub const SERVE: u8 = 3;
    pub const COMPLETE: u8 = 4;
    pub const FORGE: u8 = 5;
    pub const SCRIBBLE: u8 = 6;
    pub const DEVICE: u8 = 7;
    pub const ACCESS: u8 = 8;
    pub const RESET: u8 = 9;
    pub const TICK: u8 = 10;
    pub const NETWORK: u8 = 11;
    pub const FRAME: u8 = 12;
    pub const COUNT: u8 = 13;
}

const LIMITS: Limits = Limits {
    shadow_len: 64 << 12,
    tags: 32,
    max_transfer: 64 << 10,
};
const EPOCH: Epoch = Epoch(3);
const MAX_STEPS: usize = 600;

/// Runs one input: a controller, then a script.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let device = Arc::new(FakeNvme::new(identity(&mut input), LIMITS.tags));
    let Ok(half) = DeviceHalf::open(device.clone(), LIMITS) else {
        return;
    };
    check_description(half.description(), LIMITS.shadow_len);
    let mut claim = Claim::new(half, device.clone());
    for _ in 0..MAX_STEPS {
        if input.is_empty() || claim.step(&mut input).is_err() {
            break;
        }
    }
    {
        let mut state = device.state();
        state.gone = false;
        state.stuck = false;
    }
    drop(claim);
    assert!(device.state().is_let_go(), "the function is not let go");
}

/// A controller that describes itself as the input wants. It starts and answers in time:
/// what it is like when it does not is for tests with a clock.
fn identity(input: &mut Input<'_>) -> Identity {
    let plain = Identity::default();
    if input.flag() {
        return plain;
    }
    let stride = u64::from(input.byte() % 4);
    let controller = (0..input.byte() % 16)
        .map(|_| (input.take(), input.byte()))
        .collect();
    let namespaces = (0..input.byte() % 6)
        .map(|_| Format {
            nsid: input.byte().into(),
            shift: input.pick(&[9, 12, 16, 8, 17, 0, 255]),
            metadata: input.pick(&[0, 8, 64, u16::MAX]),
            extended: input.flag(),
        })
        .collect();
    Identity {
        cap: PLAIN_CAP ^ (input.take::<u64>() & !(0xf_ffff << cap::TO_SHIFT))
            | stride << cap::DSTRD_SHIFT,
        vs: input.take(),
        controller,
        namespaces,
        no_list: input.flag(),
        queues: input.take(),
    }
}

/// A claim, and the peer that has it.
struct Claim {
    half: DeviceHalf,
    session: Session,
    device: Arc<FakeNvme>,
    wire: Wire,
    peer: FakeLink,
    /// Commands of the peer that were not completed.
    sent: Sent,
}

impl Claim {
    fn new(half: DeviceHalf, device: Arc<FakeNvme>) -> Self {
        let wire = Wire::new();
        let shadow = Ground::of(half.shadow());
        let session = Session::new(Box::new(wire.end(Side::Device, EPOCH, &shadow)));
        let peer = wire.end(Side::Compute, EPOCH, &Arc::default());
        Self {
            half,
            session,
            device,
            wire,
            peer,
            sent: Sent::default(),
        }
    }

    fn step(&mut self, input: &mut Input<'_>) -> Result<(), FabricError> {
        match input.byte() % step::COUNT {
            step::CONFIGURE => self.configure(input),
            step::CREATE_QUEUES => self.create_queues(input),
            step::SUBMIT => self.submit(input),
            step::SERVE => self.serve()?,
            step::COMPLETE => self.complete(input),
            step::FORGE => self.forge(input),
            step::SCRIBBLE => {
                let at = input.take::<u32>() as usize % (8 << 20);
                let len = usize::from(input.byte());
                let bytes = input.bytes(len);
                self.device.state().scribble(at, bytes);
            }
            step::DEVICE => self.spoil(input),
            step::ACCESS => self.access(input),
            step::RESET => self.send(&Message::Reset {
                request: RequestId(input.byte().into()),
            }),
            step::TICK => self.half.tick(),
            step::NETWORK => {
                let mut way = lock(match input.flag() {
                    true => &self.wire.up,
                    false => &self.wire.down,
                });
                match input.flag() {
                    true => way.stalled = !way.stalled,
                    false => way.split = !way.split,
                }
            }
            step::FRAME => self.frame(input),
            _ => {}
        }
        Ok(())
    }

    /// The device side's event loop has a turn, then the peer hears what came of it.
    fn serve(&mut self) -> Result<(), FabricError> {
        self.session.flush()?;
        while !self.half.is_backlogged() {
            if self.session.receive(&mut self.half)? == Received::Idle {
                break;
            }
        }
        self.half.pump(&mut self.session)?;
        self.half.pump(&mut self.session)?;
        while let Received::Message = self.peer.receive(&mut self.sent)? {}
        self.peer.flush()
    }

    fn send(&mut self, message: &Message) {
        let mut control = Vec::new();
        if let Ok(header) = message.encode(&mut control) {
            self.inject(header, &control, &[]);
        }
    }

    fn inject(&mut self, header: Header, control: &[u8], payload: &[u8]) {
        let header = Header {
            epoch: EPOCH,
            ..header
        };
        lock(&self.wire.down).inject(header, control, payload);
    }

    fn configure(&mut self, input: &mut Input<'_>) {
        let value = match input.byte() {
            0..160 => cc::EN,
            160..200 => 0,
            200..224 => cc::EN | 1 << 14,
            _ => input.take(),
        };
        if let Ok(data) = Data::new(&value.to_le_bytes()) {
            self.send(&Message::RegisterWrite {
                region: 0,
                offset: reg::CC,
                data,
            });
        }
    }

    fn create_queues(&mut self, input: &mut Input<'_>) {
        let id = u32::from(input.byte() % 8);
        let mut sizes = || match input.byte() {
            0 => input.take::<u16>().into(),
            n => u32::from(n % 64),
        };
        let (completion_size, size) = (sizes(), sizes());
        // Bit 0, physically contiguous, and for completion queues bit 1, interrupts.
        let flags = match input.byte() {
            0..200 => 1,
            other => u32::from(other & 7),
        };
        for (opcode, size, other) in [
            (admin::CREATE_CQ, completion_size, 2 | id << 16),
            (admin::CREATE_SQ, size, id << 16),
        ] {
            let mut sqe = SubmissionEntry::new(opcode);
            sqe.set_dword(10, id | size << 16);
            sqe.set_dword(11, flags | other);
            sqe.set_prps(input.byte().into(), 0);
            let placement = Placement {
                tag: Tag(input.byte().into()),
                queue: QueueId(0),
                shadow_offset: 0,
                data_len: 0,
                direction: Direction::None,
            };
            self.batch(&[(placement, sqe)]);
        }
    }

    /// A batch of commands, mostly with the data that they have.
    fn submit(&mut self, input: &mut Input<'_>) {
        let entries: Vec<_> = (0..input.byte() % 4 + 1)
            .map(|_| self.command(input))
            .collect();
        self.batch(&entries);
    }

    fn command(&self, input: &mut Input<'_>) -> (Placement, SubmissionEntry) {
        const ADMIN: [u8; 12] = [
            admin::IDENTIFY,
            admin::ASYNC_EVENT,
            admin::DELETE_SQ,
            admin::DELETE_CQ,
            admin::GET_FEATURES,
            admin::SET_FEATURES,
            admin::GET_LOG_PAGE,
            admin::ABORT,
            admin::GET_LBA_STATUS,
            admin::FORMAT,
            admin::CREATE_SQ,
            admin::CREATE_CQ,
        ];
        const IO: [u8; 8] = [
            nvm::READ,
            nvm::WRITE,
            nvm::FLUSH,
            nvm::DATASET_MANAGEMENT,
            nvm::COPY,
            nvm::COMPARE,
            nvm::WRITE_ZEROES,
            nvm::RESERVATION_REPORT,
        ];
        let queue = u16::from(input.byte() % 8);
        let opcode = match (queue, input.byte()) {
            (0, n @ 0..224) => ADMIN[usize::from(n) % ADMIN.len()],
            (_, n @ 0..224) => IO[usize::from(n) % IO.len()],
            _ => input.byte(),
        };
        let mut sqe = SubmissionEntry::new(opcode);
        if let flags @ 250.. = input.byte() {
            sqe.0[1] = flags << 4 | flags & 3;
        }
        sqe.set_nsid(input.byte().into());
        sqe.set_mptr(input.byte().into());
        match opcode {
            nvm::READ | nvm::WRITE | nvm::COMPARE if queue > 0 => {
                sqe.set_dword(12, input.byte().into());
            }
            _ => {
                sqe.set_dword(10, input.take::<u16>().into());
                sqe.set_dword(11, input.take::<u16>().into());
                sqe.set_dword(12, input.byte().into());
            }
        }
        let right = match queue {
            0 => transfer::of_admin(&sqe),
            _ => transfer::of_nvm(&sqe, &self.half.description().namespaces),
        };
        let (direction, data_len) = match (input.byte(), right) {
            (0..240, Ok(Transfer::FromDevice(len))) => (Direction::FromDevice, len),
            (0..240, Ok(Transfer::ToDevice(len))) => (Direction::ToDevice, len),
            (0..240, _) => (Direction::None, 0),
            (kind, _) => {
                let direction = match kind % 3 {
                    0 => Direction::None,
                    1 => Direction::ToDevice,
                    _ => Direction::FromDevice,
                };
                (direction, input.take::<u16>().into())
            }
        };
        let shadow_offset = match input.byte() {
            page @ 0..250 => u32::from(page % 66) * PAGE_SIZE as u32,
            _ => input.take(),
        };
        let placement = Placement {
            tag: Tag(input.byte().into()),
            queue: QueueId(queue),
            shadow_offset,
            data_len,
            direction,
        };
        (placement, sqe)
    }

    fn batch(&mut self, entries: &[(Placement, SubmissionEntry)]) {
        let mut batch = SubmitBatch::new();
        for (placement, sqe) in entries {
            // What cannot be encoded cannot be sent either.
            if batch.push(placement, &sqe.0, &[]).is_ok() {
                self.sent.add(placement.tag);
            }
        }
        let payload = vec![0xa5; batch.header().payload_len as usize];
        if !batch.is_empty() {
            self.inject(batch.header(), batch.control(), &payload);
        }
    }

    fn complete(&mut self, input: &mut Input<'_>) {
        let (index, count) = (usize::from(input.byte()), input.byte() % 32 + 1);
        let status = match input.byte() {
            0..200 => Status::SUCCESS,
            _ => Status(input.take::<u16>() & 0x7fff),
        };
        let result = input.byte().into();
        let mut device = self.device.state();
        for _ in 0..count {
            let outstanding = device.outstanding.len().max(1);
            device.complete(index % outstanding, status, result);
        }
    }

    /// A completion that the controller made up.
    fn forge(&mut self, input: &mut Input<'_>) {
        let queue = u16::from(input.byte() % 8);
        let mut device = self.device.state();
        let (slot, phase) = match input.flag() {
            true => (input.byte().into(), input.flag()),
            false => device.next_slot(queue).unwrap_or_default(),
        };
        let entry = CompletionEntry {
            result: input.take(),
            sq_head: input.byte().into(),
            sq_id: u16::from(input.byte() % 8),
            cid: u16::from(input.byte() % 40),
            status: match input.byte() {
                0..200 => Status::SUCCESS,
                _ => Status(input.take::<u16>() & 0x7fff),
            },
            phase,
        };
        device.forge(queue, slot, entry);
    }

    fn spoil(&mut self, input: &mut Input<'_>) {
        let mut device = self.device.state();
        match input.byte() % 8 {
            0 => device.gone = !device.gone,
            1 => device.stuck = !device.stuck,
            // A host that is lent memory is waited for; it answers.
            2 => device.follows = !device.follows,
            3 => device.prompt = !device.prompt,
            4 => device.follow(),
            5 => device.csts = u32::MAX,
            6 => device.csts = input.take(),
            _ => device.csts ^= 1 << (input.byte() % 8),
        }
    }

    /// The small messages.
    fn access(&mut self, input: &mut Input<'_>) {
        let request = RequestId(input.byte().into());
        let offset = input.take::<u16>();
        let message = match input.byte() % 7 {
            0 => Message::RegisterRead {
                request,
                region: input.byte() % 7,
                offset: offset.into(),
                len: input.byte() % 9,
            },
            1 => Message::ConfigRead {
                request,
                offset,
                len: input.byte().into(),
            },
            kind @ 2..=3 => {
                let len = usize::from(input.byte() % 65);
                let Ok(data) = Data::new(input.bytes(len)) else {
                    return;
                };
                match kind {
                    2 => Message::ConfigWrite { offset, data },
                    _ => Message::RegisterWrite {
                        region: input.byte() % 7,
                        offset: offset.into(),
                        data,
                    },
                }
            }
            4 => Message::Pong { nonce: 1 },
            5 => Message::Release,
            _ => Message::Ping { nonce: 1 },
        };
        self.send(&message);
    }

    /// Any frame at all.
    fn frame(&mut self, input: &mut Input<'_>) {
        let kind = input.pick(Kind::ALL);
        let len = input.take::<u16>() % 1024;
        let control = input.bytes(len.into());
        let header = Header {
            kind,
            count: input.byte().into(),
            control_len: control.len() as u32,
            payload_len: input.take::<u16>().into(),
            epoch: EPOCH,
        };
        if let Ok(Body::Submit(submit)) = decode_body(&header, control) {
            for entry in submit.entries() {
                self.sent.add(entry.placement.tag);
            }
        }
        let payload = vec![0; header.payload_len as usize];
        self.inject(header, control, &payload);
    }
}

/// What the peer hears: whatever the controller does, only commands that were sent complete.
#[derive(Default)]
struct Sent {
    /// How often each tag was sent more often than it was completed.
    tags: HashMap<Tag, u32>,
    scratch: Option<Arc<MmapRegion>>,
}

impl Sent {
    fn add(&mut self, tag: Tag) {
        *self.tags.entry(tag).or_default() += 1;
    }
}

impl Sink for Sent {
    fn land(
        &mut self,
        header: &Header,
        _control: &[u8],
        spans: &mut Vec<Span>,
    ) -> Result<(), FabricError> {
        let len = header.payload_len as usize;
        let memory = self.scratch.get_or_insert_with(|| {
            let len = farbus_fabric::wire::MAX_PAYLOAD as usize;
            Arc::new(MmapRegion::new(len).expect("memory"))
        });
        spans.push(Span {
            memory: memory.clone(),
            offset: 0,
            len,
        });
        Ok(())
    }

    fn deliver(&mut self, header: &Header, control: &[u8]) -> Result<(), FabricError> {
        if let Body::Complete(complete) = decode_body(header, control)? {
            for entry in complete.entries() {
                let left = self.tags.get_mut(&entry.tag).filter(|left| **left > 0);
                let left = left.unwrap_or_else(|| panic!("{} was not sent", entry.tag));
                *left -= 1;
            }
        }
        Ok(())
    }
}
