//! A controller for the device half to drive. It keeps to the specification unless the
//! script has it do otherwise, answers at once, and watches what it is given: each command
//! that the device half rings a doorbell for must be one that may cross, with its data in
//! the buffer shadow and everything else in the arena.
//!
//! How much data a command moves is written down here once more, from the specification, since
//! what counts is how much a real device would move.

mod commands;
mod registers;

use std::sync::{Arc, Mutex, MutexGuard};

use farbus_vfio::nvme::{CQE_SIZE, CompletionEntry, PAGE_SIZE, Status, SubmissionEntry, cap};
use farbus_vfio::{DmaWindow, FunctionInfo, InterruptCounts, RegionIndex, RegionInfo};
use vm_memory::VolatileMemory;
use vm_memory::volatile_memory::VolatileSlice;
use vmm_sys_util::eventfd::EventFd;

use crate::link::lock;

const QUEUES: usize = 65;
const PAGE: u64 = PAGE_SIZE as u64;
/// Where Identify Controller says how much host memory is wanted: preferred and minimum
/// (NVMe 1.4 §5.15.2.2).
const HMPRE: usize = 272;
/// CAP of a plain controller: 1024 entries, half a second, the NVM command set.
pub const PLAIN_CAP: u64 = 1023 | cap::CQR | 1 << cap::TO_SHIFT | cap::CSS_NVM;

/// How a namespace is formatted.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// Its id.
    pub nsid: u32,
    /// Log2 of a block's data bytes.
    pub shift: u8,
    /// Bytes of metadata of a block.
    pub metadata: u16,
    /// Whether the metadata is part of the block.
    pub extended: bool,
}

/// What a controller is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The CAP register.
    pub cap: u64,
    /// The VS register.
    pub vs: u32,
    /// Bytes of the Identify Controller page that are not zero: offset and value.
    pub controller: Vec<(u16, u8)>,
    /// The namespaces, as it lists them.
    pub namespaces: Vec<Format>,
    /// Whether it refuses the namespace list, as controllers before NVMe 1.1 do.
    pub no_list: bool,
    /// What it answers to the wish for queues.
    pub queues: u32,
}

impl Default for Identity {
    /// A drive with one namespace of 512-byte blocks, and one of 4096.
    fn default() -> Self {
        let format = |nsid, shift| Format {
            nsid,
            shift,
            metadata: 0,
            extended: false,
        };
        Self {
            cap: PLAIN_CAP,
            vs: 0x1_04_00,
            controller: vec![(77, 5), (516, 2)],
            namespaces: vec![format(1, 9), format(2, 12)],
            no_list: false,
            queues: 7 | 7 << 16,
        }
    }
}

struct SubmissionQueue {
    base: u64,
    size: u32,
    head: u32,
    completion: u16,
}

struct CompletionQueue {
    base: u64,
    size: u32,
    head: u32,
    tail: u32,
    phase: bool,
}

/// A command that is not completed.
#[derive(Clone, Copy, Debug)]
pub struct Outstanding {
    /// The queue that it came from.
    pub queue: u16,
    /// As it was placed there.
    pub sqe: SubmissionEntry,
}

/// The controller's state, for the script to look at and to spoil.
pub struct State {
    identity: Identity,
    tags: u16,
    windows: Vec<DmaWindow>,
    events: Vec<Option<Arc<EventFd>>>,
    command: [u8; 2],
    cc: u32,
    /// The CSTS register.
    pub csts: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    submission: Vec<Option<SubmissionQueue>>,
    completion: Vec<Option<CompletionQueue>>,
    /// What was placed and is not completed, in order.
    pub outstanding: Vec<Outstanding>,
    /// Completes admin commands as they come, except those that wait for an event.
    pub prompt: bool,
    /// Leaves Identify to the script, like commands that wait for an event.
    pub holds: bool,
    /// CSTS follows CC at once; otherwise the script sets it.
    pub follows: bool,
    /// Accesses fail from now on.
    pub gone: bool,
    /// Resets fail from now on.
    pub stuck: bool,
    resets: u32,
}

/// See the module's own description.
pub struct FakeNvme {
    info: FunctionInfo,
    state: Mutex<State>,
}

impl FakeNvme {
    /// A controller for a device half that is granted `tags`.
    pub fn new(identity: Identity, tags: u16) -> Self {
        Self {
            info: FunctionInfo {
                label: "fake".into(),
                config_size: 256,
                regions: vec![RegionInfo {
                    index: RegionIndex::BAR0,
                    size: 0x4000,
                }],
                interrupts: InterruptCounts {
                    intx: 0,
                    msi: 0,
                    msix: 8,
                },
                resettable: true,
                iova_ranges: vec![0..=(1 << 40)],
            },
            state: Mutex::new(State {
                identity,
                tags,
                windows: Vec::new(),
                events: vec![None; 8],
                command: [0; 2],
                cc: 0,
                csts: 0,
                aqa: 0,
                asq: 0,
                acq: 0,
                submission: (0..QUEUES).map(|_| None).collect(),
                completion: (0..QUEUES).map(|_| None).collect(),
                outstanding: Vec::new(),
                prompt: true,
                holds: false,
                follows: true,
                gone: false,
                stuck: false,
                resets: 0,
            }),
        }
    }

    /// The state. Not to be held over a call of the device half.
    pub fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl State {
    /// Whether nothing of the claim is left: reset since, and no memory.
    pub fn is_let_go(&self) -> bool {
        self.windows.is_empty() && self.outstanding.is_empty() && self.resets > 1
    }

    /// Completes the outstanding command at `index`, if there is one and room for its entry.
    pub fn complete(&mut self, index: usize, status: Status, result: u64) {
        let Some(Outstanding { queue, sqe }) = self.outstanding.get(index).copied() else {
            return;
        };
        let Some(Some(sq)) = self.submission.get(usize::from(queue)) else {
            return;
        };
        let (completion, sq_head) = (sq.completion, sq.head as u16);
        let Some(Some(cq)) = self.completion.get_mut(usize::from(completion)) else {
            return;
        };
        if (cq.tail + 1) % cq.size == cq.head {
            return;
        }
        let at = cq.base + u64::from(cq.tail) * CQE_SIZE as u64;
        let entry = CompletionEntry {
            result,
            sq_head,
            sq_id: queue,
            cid: sqe.cid(),
            status,
            phase: cq.phase,
        };
        cq.tail += 1;
        if cq.tail == cq.size {
            cq.tail = 0;
            cq.phase = !cq.phase;
        }
        self.outstanding.remove(index);
        self.store(at, &entry.to_qwords().map(u64::to_le_bytes).concat());
        self.signal();
        if queue == 0 && status.is_success() {
            self.created_or_deleted(&sqe);
        }
    }

    /// Whether the device half waits for this controller's answers while it runs: when it lends
    /// it host memory. One that mixes up its admin completions then is waited for in vain, for
    /// seconds, which is no way to fuzz.
    fn is_waited_for(&self) -> bool {
        let lent = |(at, value): &(u16, u8)| {
            (HMPRE..HMPRE + 8).contains(&(usize::from(*at) % PAGE_SIZE)) && *value > 0
        };
        self.identity.controller.iter().any(lent)
    }

    /// Stores anything in a completion queue's slot.
    pub fn forge(&mut self, queue: u16, slot: u32, entry: CompletionEntry) {
        if queue == 0 && self.is_waited_for() {
            return;
        }
        let Some(Some(cq)) = self.completion.get(usize::from(queue)) else {
            return;
        };
        let at = cq.base + u64::from(slot % cq.size) * CQE_SIZE as u64;
        self.store(at, &entry.to_qwords().map(u64::to_le_bytes).concat());
        self.signal();
    }

    /// Where the next completion of a queue goes, and its phase.
    pub fn next_slot(&self, queue: u16) -> Option<(u32, bool)> {
        let cq = self.completion.get(usize::from(queue))?.as_ref()?;
        Some((cq.tail, cq.phase))
    }

    /// Stores anything anywhere in the memory that the device can reach: `offset` counts
    /// through all windows.
    pub fn scribble(&mut self, mut offset: usize, bytes: &[u8]) {
        for window in &self.windows {
            if offset < window.len {
                let at = window.iova.0 + offset as u64;
                let len = bytes.len().min(window.len - offset);
                let admin = self.acq..self.acq + PAGE;
                let hits = at < admin.end && at + len as u64 > admin.start;
                if !hits || !self.is_waited_for() {
                    self.store(at, &bytes[..len]);
                }
                return;
            }
            offset -= window.len;
        }
    }

    /// Signals an interrupt; the device half has one eventfd for all.
    pub fn signal(&self) {
        if let Some(event) = self.events.iter().flatten().next() {
            let _ = event.write(1);
        }
    }

    fn slice(&self, iova: u64, len: usize) -> Option<VolatileSlice<'_>> {
        self.windows.iter().find_map(|window| {
            let offset = usize::try_from(iova.checked_sub(window.iova.0)?).ok()?;
            let end = offset.checked_add(len)?;
            (end <= window.len)
                .then(|| window.memory.get_slice(window.offset + offset, len).ok())
                .flatten()
        })
    }

    fn store(&self, iova: u64, bytes: &[u8]) {
        if let Some(slice) = self.slice(iova, bytes.len()) {
            slice.copy_from(bytes);
        }
    }

    fn load<const N: usize>(&self, iova: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.slice(iova, N)
            .unwrap_or_else(|| panic!("the device was told to read {iova:#x}"))
            .copy_to(&mut bytes);
        bytes
    }
}

fn new_sq(base: u64, size: u32, completion: u16) -> SubmissionQueue {
    SubmissionQueue {
        base,
        size,
        head: 0,
        completion,
    }
}

fn new_cq(base: u64, size: u32) -> CompletionQueue {
    CompletionQueue {
        base,
        size,
        head: 0,
        tail: 0,
        phase: true,
    }
}
