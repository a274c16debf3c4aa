//! A controller for the device half to drive. It keeps to the specification unless the
//! script has it do otherwise, answers at once, and watches what it is given: each command
//! that the device half rings a doorbell for must be one that may cross, with its data in
//! the buffer shadow and everything else in the arena.
//!
//! How much data a command moves is written down here once more, from the specification, since
//! what counts is how much a real device would move.

use std::sync::{Arc, Mutex, MutexGuard};

use farbus_vfio::nvme::{
    CQE_SIZE, CompletionEntry, DOORBELL_BASE, PAGE_SIZE, PCI_CLASS, SQE_SIZE, Status,
    SubmissionEntry, admin, cap, cc, cns, csts, nvm, reg,
};
use farbus_vfio::{
    DmaWindow, Function, FunctionError, FunctionInfo, InterruptCounts, InterruptKind, Iova,
    RegionIndex, RegionInfo,
};
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

    /// Bytes that a device moves for a command (NVMe 1.4 §5 and §6).
    fn data_len(&self, queue: u16, sqe: &SubmissionEntry) -> u64 {
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

    fn block_len(&self, nsid: u32) -> u64 {
        let format = self.identity.namespaces.iter().find(|f| f.nsid == nsid);
        format.map_or(0, |f| (1 << f.shift) + u64::from(f.metadata))
    }

    /// Fails unless the command is one that the device half may place.
    fn check(&self, queue: u16, sqe: &SubmissionEntry) {
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
    fn pages(&self, arena: &DmaWindow, sqe: &SubmissionEntry, len: u64) -> Vec<(u64, u64)> {
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

    fn rang(&mut self, queue: usize, is_completion: bool, value: u32) {
        if self.csts & csts::RDY == 0 {
            return;
        }
        if is_completion {
            if let Some(Some(cq)) = self.completion.get_mut(queue) {
                assert!(value < cq.size, "head {value} of {} entries", cq.size);
                cq.head = value;
            }
            return;
        }
        let Some(Some(sq)) = self.submission.get_mut(queue) else {
            return;
        };
        let (base, size) = (sq.base, sq.size);
        assert!(value < size, "tail {value} of {size} entries");
        let mut head = sq.head;
        sq.head = value;
        while head != value {
            let sqe = SubmissionEntry(self.load(base + u64::from(head) * SQE_SIZE as u64));
            head = (head + 1) % size;
            self.check(queue as u16, &sqe);
            self.outstanding.push(Outstanding {
                queue: queue as u16,
                sqe,
            });
            // The device half waits for its own.
            if queue == 0 && (self.prompt || sqe.cid() == self.tags) {
                self.answer(&sqe);
            }
        }
    }

    /// Does and completes the admin command that was placed last.
    fn answer(&mut self, sqe: &SubmissionEntry) {
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

    fn identify(&self, sqe: &SubmissionEntry) -> Option<Vec<u8>> {
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
    fn queue_status(&self, sqe: &SubmissionEntry) -> Status {
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

    fn created_or_deleted(&mut self, sqe: &SubmissionEntry) {
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

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            reg::CAP => self.identity.cap as u32,
            0x04 => (self.identity.cap >> 32) as u32,
            reg::VS => self.identity.vs,
            reg::CC => self.cc,
            reg::CSTS => self.csts,
            reg::AQA => self.aqa,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            reg::CC => {
                self.cc = value;
                if self.follows {
                    self.follow();
                }
            }
            reg::AQA => self.aqa = value,
            reg::ASQ => self.asq = u64::from(value),
            0x2c => self.asq |= u64::from(value) << 32,
            reg::ACQ => self.acq = u64::from(value),
            0x34 => {
                self.acq |= u64::from(value) << 32;
                // Even a controller that the script has made deaf to CC takes these, since the
                // device half waits for its own commands.
                self.begin();
            }
            _ if offset >= DOORBELL_BASE => {
                let shift = 2 + (self.identity.cap >> cap::DSTRD_SHIFT & 0xf);
                let index = (offset - DOORBELL_BASE) >> shift;
                self.rang(index as usize / 2, index % 2 == 1, value);
            }
            _ => {}
        }
    }

    /// CSTS becomes what CC asks for.
    pub fn follow(&mut self) {
        let enabled = self.cc & cc::EN != 0;
        if enabled && self.csts & csts::RDY == 0 {
            self.forget();
            self.begin();
            self.csts |= csts::RDY;
        } else if !enabled {
            self.forget();
            self.csts = 0;
        }
        if self.cc & cc::SHN_MASK != 0 {
            self.csts = self.csts & !csts::SHST_MASK | csts::SHST_COMPLETE;
        }
    }

    fn begin(&mut self) {
        let (sq, cq) = ((self.aqa & 0xfff) + 1, (self.aqa >> 16 & 0xfff) + 1);
        self.submission[0] = Some(new_sq(self.asq, sq, 0));
        self.completion[0] = Some(new_cq(self.acq, cq));
    }

    fn forget(&mut self) {
        self.submission.fill_with(|| None);
        self.completion.fill_with(|| None);
        self.outstanding.clear();
    }
}

fn ring_size(sqe: &SubmissionEntry) -> u32 {
    (sqe.dword(10) >> 16) + 1
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

fn gone() -> FunctionError {
    FunctionError::Gone("the script says so".into())
}

impl Function for FakeNvme {
    fn info(&self) -> &FunctionInfo {
        &self.info
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        let state = self.state();
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = match at {
                4 | 5 => state.command.get(at - 4).copied().unwrap_or(0),
                9..=11 => (PCI_CLASS >> (8 * (at - 9))) as u8,
                _ => 0,
            };
        }
        Ok(())
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), FunctionError> {
        assert_eq!(
            (offset, data.len()),
            (4, 2),
            "more than the command register"
        );
        self.state().command.copy_from_slice(data);
        Ok(())
    }

    fn region_read(
        &self,
        _region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        let state = self.state();
        if state.gone {
            return Err(gone());
        }
        for (at, byte) in (offset..).zip(data) {
            *byte = (state.read_register(at & !3) >> (at % 4 * 8)) as u8;
        }
        Ok(())
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        let mut state = self.state();
        if state.gone {
            return Err(gone());
        }
        let bytes: [u8; 4] = data.try_into().expect("one aligned dword");
        assert!(region == RegionIndex::BAR0 && offset % 4 == 0);
        if offset + 4 > self.info.regions[0].size {
            return Err(FunctionError::OutOfBounds {
                what: "BAR0".into(),
                offset,
                len: 4,
            });
        }
        state.write_register(offset, u32::from_le_bytes(bytes));
        Ok(())
    }

    fn map_dma(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        let mut state = self.state();
        let end = window.iova.0 + window.len as u64;
        let overlaps = |w: &DmaWindow| w.iova.0 < end && w.iova.0 + w.len as u64 > window.iova.0;
        assert!(!state.windows.iter().any(overlaps), "{window:?} overlaps");
        state.windows.push(window.clone());
        Ok(())
    }

    fn unmap_dma(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        let mut state = self.state();
        let known = |w: &DmaWindow| w.iova == iova && w.len as u64 == len;
        assert!(state.windows.iter().any(known), "{iova} is not mapped");
        // A controller that still has commands would go on writing there.
        let quiet = state.outstanding.is_empty() || state.gone || state.stuck;
        assert!(quiet, "memory was taken from a running controller");
        state.windows.retain(|w| !known(w));
        Ok(())
    }

    fn set_interrupts(
        &self,
        kind: InterruptKind,
        first: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        assert_eq!((kind, first), (InterruptKind::Msix, 0));
        self.state().events = events.to_vec();
        Ok(())
    }

    fn mask_interrupt(&self, _: InterruptKind, _: u32, _: bool) -> Result<(), FunctionError> {
        Ok(())
    }

    fn reset(&self) -> Result<(), FunctionError> {
        let mut state = self.state();
        if state.stuck {
            return Err(gone());
        }
        state.forget();
        state.cc = 0;
        state.csts = 0;
        state.command = [0; 2];
        state.resets += 1;
        Ok(())
    }
}
