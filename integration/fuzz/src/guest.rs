//! The engine's compute half under a guest that does anything, with a real device half
//! behind it.
//!
//! While the script only lets the guest, the device and the network do what they can do, the
//! two halves must agree: neither may find that the other broke the protocol. When the script
//! speaks in the device server's place ([`step::INJECT`]), the compute half has to survive it.
//! Either way, after a reset every tag and every page of the buffer shadow is there again, and
//! a guest that behaves can use them all ([`Bench::prove`]).

mod bench;
mod proof;

use farbus_fabric::wire::{CompleteBatch, CompleteEntry, Epoch, Header, Kind, QueueId, Tag};
use farbus_shadow_mem::nvme::description::NvmeDescription;
use farbus_vfio::nvme::{PAGE_SIZE, SQE_SIZE, Status, SubmissionEntry, admin, nvm, reg};
use farbus_vfio::{DmaAccess, DmaWindow, Function, InterruptKind, Iova, RegionIndex};

use self::bench::{ACQ, ASQ, Bench, DATA, RAM_BASE, cq_of, sq_of};
use crate::input::Input;
use crate::link::lock;
use crate::nvme::Identity;

/// The steps of a script, each followed by what it needs.
#[allow(missing_docs, reason = "the names say what they do")]
pub mod step {
    pub const BRING_UP: u8 = 0;
    pub const CREATE_QUEUES: u8 = 1;
    pub const COMMANDS: u8 = 2;
    pub const SERVE: u8 = 3;
    pub const COMPLETE: u8 = 4;
    pub const WRITE_REGISTER: u8 = 5;
    pub const READ_REGISTER: u8 = 6;
    pub const DOORBELL: u8 = 7;
    pub const WRITE_MEMORY: u8 = 8;
    pub const PRP_LIST: u8 = 9;
    pub const MAP: u8 = 10;
    pub const UNMAP: u8 = 11;
    pub const RESET: u8 = 12;
    pub const CONFIG: u8 = 13;
    pub const INTERRUPTS: u8 = 14;
    pub const DEVICE_STATUS: u8 = 15;
    pub const NETWORK: u8 = 16;
    pub const CUT: u8 = 17;
    pub const RECONNECT: u8 = 18;
    pub const INJECT: u8 = 19;
    pub const TICK: u8 = 20;
    pub const CONSUME: u8 = 21;
    pub const REPEAT_REGISTER: u8 = 22;
    pub const COUNT: u8 = 23;
}

/// Steps of one input: enough for any story, and an end for any input.
const MAX_STEPS: usize = 600;
const PAGE: u64 = PAGE_SIZE as u64;
/// The last page there is: what lies behind it has no address.
const TOP_PAGE: u64 = !(PAGE - 1);

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut bench = Bench::new();
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        take_step(&mut bench, &mut input);
    }
    bench.prove();
}

fn take_step(bench: &mut Bench, input: &mut Input<'_>) {
    match input.byte() % step::COUNT {
        step::BRING_UP => bring_up(bench, input),
        step::CREATE_QUEUES => create_queues(bench, input),
        step::COMMANDS => commands(bench, input),
        step::SERVE => bench.serve(usize::from(input.byte() % 8)),
        step::COMPLETE => complete(bench, input),
        step::WRITE_REGISTER => write_register(bench, input, 1),
        step::REPEAT_REGISTER => write_register(bench, input, 300),
        step::READ_REGISTER => {
            let mut data = [0; 64];
            let (at, len) = (input.take::<u16>(), usize::from(input.byte()) % 65);
            let _ = bench
                .function
                .region_read(RegionIndex::BAR0, at.into(), &mut data[..len]);
        }
        step::DOORBELL => {
            let (queue, completion) = (input.byte(), input.flag());
            bench.ring(queue.into(), completion, input.take::<u16>().into());
        }
        step::WRITE_MEMORY => {
            let at = input.take::<u32>() as usize;
            let len = usize::from(input.byte()) % 65;
            bench.store(at, input.bytes(len));
        }
        step::PRP_LIST => prp_list(bench, input),
        step::MAP => map(bench, input),
        step::UNMAP => {
            let len = u64::from(input.byte()) * PAGE;
            bench.unmap(address(input), len);
        }
        step::RESET => bench.function.reset().expect("a reset always works"),
        step::CONFIG => config(bench, input),
        step::INTERRUPTS => interrupts(bench, input),
        step::DEVICE_STATUS => device_status(bench, input),
        step::NETWORK => network(bench, input),
        step::CUT => bench.wire.cut(),
        step::RECONNECT => reconnect(bench, input),
        step::INJECT => inject(bench, input),
        step::TICK => bench.function.tick(),
        step::CONSUME => consume(bench, input),
        _ => {}
    }
    bench.look_after_link();
}

/// An address as a guest may name it: mostly of its memory.
fn address(input: &mut Input<'_>) -> u64 {
    match input.byte() {
        page @ 0..128 => DATA + u64::from(page % 64) * PAGE,
        kind @ 128..192 => DATA + u64::from(input.take::<u16>()) + u64::from(kind & 1) * PAGE,
        192..216 => RAM_BASE + u64::from(input.byte()) * PAGE,
        216..224 => u64::MAX - u64::from(input.take::<u16>()),
        224..232 => TOP_PAGE,
        _ => input.take(),
    }
}

fn bring_up(bench: &mut Bench, input: &mut Input<'_>) {
    let size = input.pick(&[64, 2, 512, 4096, 128]);
    let completion_size = input.pick(&[64, 2, 512, 4096, 300]);
    let [asq, acq] = match input.byte() {
        0..224 => [ASQ, ACQ],
        224..232 => [ASQ, TOP_PAGE],
        232..240 => [TOP_PAGE, ACQ],
        _ => [address(input), address(input)],
    };
    bench.enable(asq, size, acq, completion_size);
}

fn create_queues(bench: &mut Bench, input: &mut Input<'_>) {
    let id = u16::from(input.byte() % 4);
    let size = input.pick(&[16, 2, 64, 128, 1024]);
    let completion_size = input.pick(&[16, 2, 64, 128, 1024]);
    let completion_id = match input.byte() {
        0..200 => id,
        other => u16::from(other % 5),
    };
    bench.create_cq(id, completion_size, Some(id));
    bench.serve(4);
    bench.create_sq(id, size, completion_id);
    bench.serve(4);
}

const ADMIN_OPCODES: [u8; 14] = [
    admin::IDENTIFY,
    admin::ASYNC_EVENT,
    admin::GET_FEATURES,
    admin::SET_FEATURES,
    admin::GET_LOG_PAGE,
    admin::ABORT,
    admin::DELETE_SQ,
    admin::DELETE_CQ,
    admin::CREATE_CQ,
    admin::CREATE_SQ,
    admin::GET_LBA_STATUS,
    admin::SELF_TEST,
    admin::FORMAT,
    admin::DOORBELL_BUFFER,
];
const IO_OPCODES: [u8; 8] = [
    nvm::READ,
    nvm::WRITE,
    nvm::FLUSH,
    nvm::DATASET_MANAGEMENT,
    nvm::COMPARE,
    nvm::WRITE_ZEROES,
    nvm::COPY,
    nvm::RESERVATION_REPORT,
];

/// One command some number of times, then the doorbell.
fn commands(bench: &mut Bench, input: &mut Input<'_>) {
    let queue = u16::from(input.byte() % 4);
    let count = match input.byte() {
        count @ 0..240 => u32::from(count % 8) + 1,
        _ => u32::from(input.take::<u16>() % 600),
    };
    let opcode = match (queue, input.byte()) {
        (0, n @ 0..224) => ADMIN_OPCODES[usize::from(n) % ADMIN_OPCODES.len()],
        (_, n @ 0..224) => IO_OPCODES[usize::from(n) % IO_OPCODES.len()],
        _ => input.byte(),
    };
    let mut sqe = SubmissionEntry::new(opcode);
    if let flags @ 240.. = input.byte() {
        sqe.0[1] = flags << 4 | flags & 3;
    }
    sqe.set_nsid(input.pick(&[1, 2, u32::MAX, 0, 3]));
    sqe.set_prps(address(input), address(input));
    match opcode {
        // Blocks 0's based, mostly few.
        nvm::READ | nvm::WRITE | nvm::COMPARE if queue > 0 => {
            sqe.set_dword(12, u32::from(input.byte()));
        }
        admin::DELETE_SQ | admin::DELETE_CQ if queue == 0 => {
            sqe.set_dword(10, u32::from(input.byte() % 5));
        }
        _ => (10..13).for_each(|n| sqe.set_dword(n, input.take())),
    }
    for _ in 0..count {
        bench.place(queue, sqe);
    }
    bench.ring_tail(queue);
}

fn complete(bench: &mut Bench, input: &mut Input<'_>) {
    let (index, count) = (
        usize::from(input.byte()),
        usize::from(input.byte() % 32) + 1,
    );
    let status = match input.byte() {
        0..200 => Status::SUCCESS,
        _ => Status(input.take::<u16>() & 0x7fff),
    };
    let result = u64::from(input.byte());
    let Some(peer) = &bench.peer else {
        return;
    };
    let mut device = peer.device.state();
    for _ in 0..count {
        let outstanding = device.outstanding.len().max(1);
        device.complete(index % outstanding, status, result);
    }
}

fn write_register(bench: &mut Bench, input: &mut Input<'_>, times: usize) {
    const REGISTERS: [u64; 12] = [
        reg::CC,
        reg::AQA,
        reg::ASQ,
        reg::ASQ + 4,
        reg::ACQ,
        reg::ACQ + 4,
        reg::CSTS,
        reg::INTMS,
        reg::INTMC,
        reg::NSSR,
        reg::CAP,
        0xffc,
    ];
    let at = match input.byte() {
        n @ 0..240 => REGISTERS[usize::from(n) % REGISTERS.len()],
        _ => input.take::<u16>().into(),
    };
    let len = input.pick(&[4, 4, 4, 8, 8, 1, 2, 3, 64, 0]);
    let mut data = [0; 64];
    let given = input.bytes(len.min(8));
    data[..given.len()].copy_from_slice(given);
    for _ in 0..times {
        let _ = bench
            .function
            .region_write(RegionIndex::BAR0, at, &data[..len]);
        // So that a register which is written again changes each time.
        data[0] ^= u8::from(times > 1);
    }
}

/// Entries of a list: page by page, backwards, in a circle, or nonsense.
fn prp_list(bench: &mut Bench, input: &mut Input<'_>) {
    let at = (address(input).wrapping_sub(RAM_BASE)) as usize & !7;
    let count = usize::from(input.take::<u16>() % 520);
    let (first, stride) = (address(input), u64::from(input.byte()) * PAGE / 4);
    for index in 0..count {
        let entry = first.wrapping_add(stride.wrapping_mul(index as u64));
        bench.store(at.wrapping_add(index * 8), &entry.to_le_bytes());
    }
}

fn map(bench: &mut Bench, input: &mut Input<'_>) {
    let (memory, size) = bench.pool(input.flag());
    let offset = usize::from(input.byte()) * PAGE_SIZE % size;
    let len = match input.byte() {
        255 => input.take::<u32>() as usize,
        pages => usize::from(pages) * PAGE_SIZE,
    };
    let access = match input.byte() {
        0..192 => DmaAccess::ReadWrite,
        _ => DmaAccess::Read,
    };
    bench.map(DmaWindow {
        iova: Iova(address(input)),
        memory,
        offset,
        len,
        access,
    });
}

fn config(bench: &Bench, input: &mut Input<'_>) {
    let (at, len) = (input.take::<u16>() % 0x120, usize::from(input.byte() % 8));
    let mut data = [0; 8];
    if input.flag() {
        let _ = bench.function.config_read(at, &mut data[..len]);
    } else {
        let given = input.bytes(len);
        let _ = bench.function.config_write(at, given);
    }
}

fn interrupts(bench: &Bench, input: &mut Input<'_>) {
    let first = u32::from(input.byte() % 12);
    if input.flag() {
        let masked = input.flag();
        let _ = bench
            .function
            .mask_interrupt(InterruptKind::Msix, first, masked);
        return;
    }
    let event = input.flag().then(|| bench.event.clone());
    let events = vec![event; usize::from(input.byte() % 12)];
    let kind = input.pick(&[InterruptKind::Msix, InterruptKind::Msi]);
    let _ = bench.function.set_interrupts(kind, first, &events);
}

/// What a controller may do by itself.
fn device_status(bench: &mut Bench, input: &mut Input<'_>) {
    let kind = input.byte() % 8;
    let Some(peer) = &mut bench.peer else {
        return;
    };
    {
        let mut device = peer.device.state();
        match kind {
            0 => device.follow(),
            1 => device.csts |= 2,
            2 => device.csts &= !1,
            3 => device.csts = u32::MAX,
            4 => device.gone = input.flag(),
            5 => device.stuck = input.flag(),
            6 => device.follows = input.flag(),
            _ => device.csts ^= 1 << (input.byte() % 8),
        }
    }
    peer.half.tick();
}

fn network(bench: &Bench, input: &mut Input<'_>) {
    let way = match input.flag() {
        true => &bench.wire.down,
        false => &bench.wire.up,
    };
    let mut way = lock(way);
    match input.byte() % 4 {
        0 => way.stalled = true,
        1 => way.stalled = false,
        2 => way.split = true,
        _ => way.split = false,
    }
}

fn reconnect(bench: &mut Bench, input: &mut Input<'_>) {
    let mut identity = Identity::default();
    let tags = match input.byte() {
        250 => bench::TAGS + 1,
        251 => 3,
        252 => {
            identity.namespaces.pop();
            bench::TAGS
        }
        _ => bench::TAGS,
    };
    if !bench.has_link() && bench.connections < 6 {
        bench.connect(identity, tags);
    }
}

/// A frame that the device half would not have sent.
fn inject(bench: &mut Bench, input: &mut Input<'_>) {
    const KINDS: [Kind; 12] = [
        Kind::Complete,
        Kind::RegisterUpdate,
        Kind::ResetDone,
        Kind::Fault,
        Kind::Ping,
        Kind::Pong,
        Kind::Value,
        Kind::Interrupt,
        Kind::EngineNotice,
        Kind::Released,
        Kind::Submit,
        Kind::Refused,
    ];
    bench.spoiled = true;
    let kind = input.pick(&KINDS);
    if kind == Kind::Complete && input.flag() {
        return inject_completions(bench, input);
    }
    let len = usize::from(input.byte());
    let control = input.bytes(len);
    let header = Header {
        kind,
        count: match kind {
            Kind::Complete | Kind::Submit => u16::from(input.byte()),
            _ => 0,
        },
        control_len: control.len() as u32,
        payload_len: 0,
        epoch: Epoch(bench.connections),
    };
    lock(&bench.wire.up).inject(header, control, &[]);
}

fn inject_completions(bench: &Bench, input: &mut Input<'_>) {
    let mut batch = CompleteBatch::new();
    for _ in 0..input.byte() % 4 + 1 {
        let entry = CompleteEntry {
            tag: Tag(bench::TAGS.wrapping_sub(1 + u16::from(input.byte()))),
            queue: QueueId(u16::from(input.byte() % 4)),
            status: input.take(),
            data_len: input.pick(&[0, 4096, 512, 8192, 65536, 1]),
            result: input.take::<u32>().into(),
        };
        // A batch has room for these.
        let _ = batch.push(&entry);
    }
    let header = Header {
        epoch: Epoch(bench.connections),
        ..batch.header()
    };
    let payload = vec![0x5a; header.payload_len as usize];
    lock(&bench.wire.up).inject(header, batch.control(), &payload);
}

/// Consumes completions, as a driver that keeps no books: the head goes to a given place.
fn consume(bench: &mut Bench, input: &mut Input<'_>) {
    let queue = u16::from(input.byte() % 4);
    let by = u32::from(input.byte());
    bench.advance_head(queue, by);
}

/// What the device half says of itself must be something the compute half takes.
pub(crate) fn check_description(description: &NvmeDescription, shadow_len: u32) {
    let again = NvmeDescription::decode(&description.encode(), shadow_len);
    assert_eq!(again.as_ref(), Ok(description));
}

/// Where entry `index` of a submission queue is in RAM.
fn slot(queue: u16, index: u32) -> usize {
    (sq_of(queue) - RAM_BASE) as usize + index as usize * SQE_SIZE
}

/// Where the ring of a completion queue is in RAM.
fn cq_slot(queue: u16, index: u32) -> usize {
    (cq_of(queue) - RAM_BASE) as usize + index as usize * 16
}
