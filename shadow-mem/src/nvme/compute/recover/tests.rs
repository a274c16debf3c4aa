//! A controller whose process is killed at each of its steps: every command is completed once, with
//! its data, whatever was lost with the process.

#[path = "../../../../tests/hostile/wire.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use farbus_fabric::Sink;
use farbus_fabric::wire::{CompleteBatch, CompleteEntry, Data, Message};
use farbus_vfio::nvme::{DOORBELL_BASE, SubmissionEntry, admin, cap, csts, nvm, reg};
use farbus_vfio::{DmaAccess, DmaWindow, Iova, RegionIndex};
use proptest::prelude::*;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use self::wire::{Sent, Submitted, Wire, landing, tell};
use crate::nvme::compute::ComputeHalf;
use crate::nvme::description::{NamespaceFormat, Namespaces, NvmeDescription, guest_cap};
use crate::nvme::record::{Record, kill};
use crate::session::Session;
use crate::shadow::shared_memory;

const TAGS: u16 = 64;
const SHADOW_LEN: u32 = 256 << 10;
const VECTORS: u32 = 2;
/// Small, so that the rings wrap, and completions are held back.
const ENTRIES: u32 = 4;
const COMMANDS: u16 = 14;
/// The identifier of the first of them.
const FIRST: u16 = 1000;
const ADMIN: u64 = 0;
const IO: u64 = 0x4000;
const BUFFERS: u64 = 0x10000;
const MEMORY: usize = 1 << 20;

fn description() -> NvmeDescription {
    NvmeDescription {
        cap: guest_cap(cap::CSS_NVM | 1023),
        vs: 0x0001_0400,
        max_transfer: 64 << 10,
        queue_pairs: 4,
        namespaces: Namespaces::new(vec![NamespaceFormat {
            nsid: 1,
            block_shift: 9,
        }]),
    }
}

/// What the guest's driver knows of one pair of queues.
#[derive(Default)]
struct Pair {
    base: u64,
    tail: u32,
    seen: u64,
}

struct World {
    memory: Arc<MmapRegion>,
    record: OwnedFd,
    half: Option<ComputeHalf>,
    session: Session,
    wire: Wire,
    /// Queues of the device since its last reset, and commands that it has not completed.
    made: BTreeSet<u16>,
    pending: Vec<Submitted>,
    pairs: [Pair; 2],
    completed: BTreeMap<u16, u32>,
    /// Steps after which the successors die.
    kills: Vec<u32>,
    deaths: u32,
    choices: u64,
}

impl World {
    fn new(kills: Vec<u32>, choices: u64) -> Self {
        let memory = shared_memory("guest", MEMORY).unwrap();
        let record = Record::create().unwrap();
        let descriptor = record.descriptor().unwrap().try_clone_to_owned().unwrap();
        let (session, wire) = Wire::session();
        let mut half = ComputeHalf::new(description(), SHADOW_LEN, TAGS, VECTORS).unwrap();
        half.keep_record(record);
        let mut world = Self {
            memory,
            record: descriptor,
            half: Some(half),
            session,
            wire,
            made: BTreeSet::new(),
            pending: Vec::new(),
            pairs: Default::default(),
            completed: BTreeMap::new(),
            kills,
            deaths: 0,
            choices: choices | 1,
        };
        world.pairs[1].base = IO;
        let window = world.window();
        world.half.as_mut().unwrap().map(&window).unwrap();
        world.arm();
        world
    }

    fn arm(&mut self) {
        kill::after(self.kills.pop());
    }

    fn window(&self) -> DmaWindow {
        DmaWindow {
            iova: Iova(0),
            memory: self.memory.clone(),
            offset: 0,
            len: MEMORY,
            access: DmaAccess::ReadWrite,
        }
    }

    fn choose(&mut self, of: usize) -> usize {
        self.choices ^= self.choices << 13;
        self.choices ^= self.choices >> 7;
        self.choices ^= self.choices << 17;
        (self.choices % of.max(1) as u64) as usize
    }

    /// Has the process do something; whether it survived. If it did not, a successor has taken
    /// over.
    fn act(&mut self, act: impl FnOnce(&mut ComputeHalf, &mut Session)) -> bool {
        let (half, session) = (self.half.as_mut().unwrap(), &mut self.session);
        if kill::survives(|| act(half, session)).is_some() {
            return true;
        }
        self.half = None;
        loop {
            self.deaths += 1;
            self.arm();
            let fd = self.record.try_clone().unwrap();
            let window = self.window();
            let resumed = kill::survives(|| {
                let record = Record::open(fd).unwrap();
                let half = ComputeHalf::resume(description(), SHADOW_LEN, TAGS, VECTORS, record);
                let mut half = half.unwrap();
                half.map(&window).unwrap();
                half.recover().unwrap();
                half.link_up(&description(), SHADOW_LEN, TAGS).unwrap();
                half
            });
            if let Some(half) = resumed {
                self.half = Some(half);
                break;
            }
        }
        (self.session, self.wire) = Wire::session();
        self.made.clear();
        self.pending.clear();
        false
    }

    /// A message of the VMM: one that was not handled to its end is handled again.
    fn write(&mut self, offset: u64, value: u32) {
        while !self.act(|half, _| half.register_write(offset, &value.to_le_bytes())) {}
    }

    fn csts(&self) -> u32 {
        let mut value = [0; 4];
        self.half
            .as_ref()
            .unwrap()
            .register_read(reg::CSTS, &mut value);
        u32::from_le_bytes(value)
    }

    /// The link's turn, the device's, and the guest's.
    fn turn(&mut self) {
        self.act(|half, session| half.pump(session).unwrap());
        for sent in self.wire.take() {
            match sent {
                Sent::Submit(submitted) => self.pending.push(submitted),
                Sent::Message(message) => {
                    if !self.hear(&message) {
                        break;
                    }
                }
                Sent::Complete(_) => unreachable!(),
            }
        }
        if !self.pending.is_empty() {
            let which = self.choose(self.pending.len());
            let command = self.pending.swap_remove(which);
            self.carry_out(&command);
        }
        self.reap();
    }

    fn hear(&mut self, message: &Message) -> bool {
        let answer = match message {
            Message::RegisterWrite { data, .. } => {
                let enabled = data.first().is_some_and(|byte| byte & 1 != 0);
                let value = if enabled { csts::RDY } else { 0 };
                if !enabled {
                    self.made.clear();
                    self.pending.clear();
                }
                Message::RegisterUpdate {
                    region: RegionIndex::BAR0.0,
                    offset: reg::CSTS,
                    data: Data::new(&value.to_le_bytes()).unwrap(),
                }
            }
            Message::Reset { request } => Message::ResetDone {
                request: *request,
                outcome: Ok(()),
            },
            _ => return true,
        };
        self.act(|half, _| tell(half, &answer).unwrap())
    }

    /// The device does a command: what its queues are must be what they are here.
    fn carry_out(&mut self, command: &Submitted) {
        let (sqe, placement) = (command.sqe, command.placement);
        let named = sqe.dword(10) as u16;
        match (placement.queue.0, sqe.opcode()) {
            (0, admin::CREATE_SQ) => assert!(self.made.insert(named), "{named} is made twice"),
            (0, admin::DELETE_SQ) => assert!(self.made.remove(&named)),
            (0, _) => {}
            (queue, _) => assert!(self.made.contains(&queue), "there is no queue {queue}"),
        }
        let is_read = placement.queue.0 > 0 && sqe.opcode() == nvm::READ;
        let mut batch = CompleteBatch::new();
        let entry = CompleteEntry {
            tag: placement.tag,
            queue: placement.queue,
            status: 0,
            data_len: if is_read { placement.data_len } else { 0 },
            result: 0,
        };
        batch.push(&entry).unwrap();
        let data = sqe.dword(10) as u8 + 1;
        self.act(|half, _| {
            for span in landing(half, &batch.header(), batch.control()).unwrap() {
                let slice = span.memory.get_slice(span.offset, span.len).unwrap();
                slice.copy_from(&vec![data; span.len]);
            }
            half.deliver(&batch.header(), batch.control()).unwrap();
        });
    }

    fn submit(&mut self, queue: u16, sqe: &SubmissionEntry) {
        let pair = &mut self.pairs[usize::from(queue)];
        let at = pair.base + u64::from(pair.tail) * 64;
        pair.tail = (pair.tail + 1) % ENTRIES;
        let tail = pair.tail;
        let slice = self.memory.get_slice(at as usize, 64).unwrap();
        slice.copy_from(&sqe.0);
        self.write(DOORBELL_BASE + u64::from(queue) * 8, tail);
    }

    /// The guest takes what is new in its completion queues.
    fn reap(&mut self) {
        for queue in 0..2u16 {
            loop {
                let pair = &self.pairs[usize::from(queue)];
                let (index, pass) = (
                    pair.seen % u64::from(ENTRIES),
                    pair.seen / u64::from(ENTRIES),
                );
                let at = (pair.base + 0x2000 + index * 16) as usize;
                let high: u64 = self
                    .memory
                    .as_volatile_slice()
                    .load(at + 8, std::sync::atomic::Ordering::Acquire)
                    .unwrap();
                if (high >> 48 & 1 == 1) != (pass % 2 == 0) {
                    break;
                }
                assert_eq!(high >> 49, 0, "the command failed");
                *self.completed.entry((high >> 32) as u16).or_default() += 1;
                self.pairs[usize::from(queue)].seen += 1;
                let head = (self.pairs[usize::from(queue)].seen % u64::from(ENTRIES)) as u32;
                self.write(DOORBELL_BASE + u64::from(queue) * 8 + 4, head);
            }
        }
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        for _ in 0..2000 {
            if done(self) {
                return;
            }
            self.turn();
        }
        panic!("{what} never came, after {} deaths", self.deaths);
    }

    fn admin(&mut self, cid: u16, opcode: u8, dword10: u32, dword11: u32, address: u64) {
        let mut sqe = SubmissionEntry::new(opcode);
        sqe.set_dword(0, u32::from(opcode) | u32::from(cid) << 16);
        sqe.set_dword(6, address as u32);
        sqe.set_dword(10, dword10);
        sqe.set_dword(11, dword11);
        self.submit(0, &sqe);
        self.until("an admin command's end", |world| {
            world.completed.contains_key(&cid)
        });
    }

    /// I/O commands that have completed.
    fn ended(&self) -> usize {
        self.completed.range(FIRST..).count()
    }

    /// Everything that a guest does: set-up, I/O, and the end of it.
    fn life(&mut self) {
        self.write(reg::AQA, (ENTRIES - 1) | (ENTRIES - 1) << 16);
        self.write(reg::ASQ, ADMIN as u32);
        self.write(reg::ACQ, ADMIN as u32 + 0x2000);
        self.write(reg::CC, 1 | 6 << 16 | 4 << 20);
        self.until("readiness", |world| world.csts() & csts::RDY != 0);
        let size = (ENTRIES - 1) << 16;
        self.admin(1, admin::SET_FEATURES, 7, 0, 0);
        self.admin(2, admin::CREATE_CQ, 1 | size, 3 | 1 << 16, IO + 0x2000);
        self.admin(3, admin::CREATE_SQ, 1 | size, 1 | 1 << 16, IO);
        for number in 0..COMMANDS {
            self.until("room", |world| {
                usize::from(number) - world.ended() < ENTRIES as usize - 1
            });
            let is_read = number % 3 == 1;
            let opcode = if is_read { nvm::READ } else { nvm::WRITE };
            let mut sqe = SubmissionEntry::new(opcode);
            sqe.set_dword(0, u32::from(opcode) | u32::from(FIRST + number) << 16);
            sqe.set_dword(1, 1);
            sqe.set_dword(6, BUFFERS as u32 + u32::from(number) * 4096);
            sqe.set_dword(10, number.into());
            self.submit(1, &sqe);
            if self.choose(2) == 0 {
                self.turn();
            }
        }
        self.until("the last command", |world| {
            world.ended() == usize::from(COMMANDS)
        });
        for number in (1..COMMANDS).step_by(3) {
            let at = BUFFERS as usize + usize::from(number) * 4096;
            let byte: u8 = self
                .memory
                .as_volatile_slice()
                .load(at, std::sync::atomic::Ordering::Acquire)
                .unwrap();
            assert_eq!(u16::from(byte), number + 1, "the data of read {number}");
        }
        self.admin(4, admin::DELETE_SQ, 1, 0, 0);
        self.admin(5, admin::DELETE_CQ, 1, 0, 0);
        assert!(
            self.completed.values().all(|times| *times == 1),
            "{:?}",
            self.completed
        );
        assert_eq!(self.half.as_ref().unwrap().outstanding().commands, 0);
        self.write(reg::CC, 0);
        self.until("the end", |world| world.csts() & csts::RDY == 0);
    }
}

#[test]
fn a_process_that_is_killed_at_any_step_has_a_successor_that_completes_each_command_once() {
    let mut steps = 0;
    loop {
        let mut world = World::new(vec![steps], 7);
        world.life();
        if kill::is_pending() {
            break;
        }
        assert_eq!(world.deaths, 1);
        steps += 1;
    }
    kill::after(None);
    assert!(steps > 500, "{steps} steps");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_process_that_is_killed_again_and_again_makes_no_difference(
        kills in proptest::collection::vec(0u32..150, 1..20), choices in any::<u64>(),
    ) {
        let mut world = World::new(kills, choices);
        world.life();
        kill::after(None);
    }
}
