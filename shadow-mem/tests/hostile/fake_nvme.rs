//! A controller whose faults a test chooses, since no real one can be made to show them.
//!
//! It places nothing of its own accord but the answers to admin commands ([`Faults::prompt`]);
//! I/O commands wait until the test completes them. It checks each command that a doorbell
//! tells of: whatever address the device is given must be in the buffer shadow or the arena.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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

const QUEUES: usize = 65;
const PAGE: u64 = PAGE_SIZE as u64;
/// 1024 entries, a time-out of half a second, the NVM command set.
const CAP: u64 = 1023 | cap::CQR | 1 << cap::TO_SHIFT | cap::CSS_NVM;
/// Queue pairs that it grants, 0's based.
const LAST_PAIR: u64 = 3;

/// What is wrong with the controller.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Faults {
    /// Its registers read as all ones.
    pub is_unplugged: bool,
    /// It never becomes ready.
    pub never_starts: bool,
    /// How often CSTS is read, after `CC.EN` fell, before it says that it has stopped.
    pub reads_to_stop: u32,
    /// Resets fail.
    pub resets_fail: bool,
    /// Admin commands are answered as they come, except Asynchronous Event Requests.
    pub prompt: bool,
    /// It refuses the host memory that it asked for.
    pub refuses_host_memory: bool,
    /// It is a device of another class.
    pub is_no_nvme: bool,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            is_unplugged: false,
            never_starts: false,
            reads_to_stop: 0,
            resets_fail: false,
            prompt: true,
            refuses_host_memory: false,
            is_no_nvme: false,
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
    tail: u32,
    phase: bool,
}

/// A command that was placed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed {
    pub queue: u16,
    pub sqe: SubmissionEntry,
}

/// The controller's state, for a test to look at and to spoil.
pub(crate) struct State {
    pub faults: Faults,
    /// The data of Identify Controller.
    pub identity: Vec<u8>,
    /// CSTS.CFS, until the controller has stopped.
    pub is_fatal: bool,
    /// What was placed and not completed, in order.
    pub placed: Vec<Placed>,
    /// Every Set Features that ever came, with the first 16 bytes of the memory that dwords
    /// 13 and 14 point to.
    pub set_features: Vec<(SubmissionEntry, [u8; 16])>,
    pub windows: Vec<DmaWindow>,
    pub resets: u32,
    stop_reads: u32,
    events: Vec<Option<Arc<EventFd>>>,
    cc: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    submission: Vec<Option<SubmissionQueue>>,
    completion: Vec<Option<CompletionQueue>>,
}

/// See the module's own description.
pub(crate) struct FakeNvme {
    info: FunctionInfo,
    state: Mutex<State>,
}

impl FakeNvme {
    /// A drive with one namespace of 512-byte blocks.
    pub(crate) fn new() -> Arc<Self> {
        let mut identity = vec![0; PAGE_SIZE];
        identity[516] = 1;
        Arc::new(Self {
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
                faults: Faults::default(),
                identity,
                is_fatal: false,
                placed: Vec::new(),
                set_features: Vec::new(),
                windows: Vec::new(),
                resets: 0,
                stop_reads: 0,
                events: Vec::new(),
                cc: 0,
                aqa: 0,
                asq: 0,
                acq: 0,
                submission: (0..QUEUES).map(|_| None).collect(),
                completion: (0..QUEUES).map(|_| None).collect(),
            }),
        })
    }

    /// The state. Not to be held over a call of the device half.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // A check that failed has left it locked; the claim still ends on the way out.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Completes the oldest command of this queue and identifier, with success.
    pub(crate) fn complete(&mut self, queue: u16, cid: u16) {
        let is_it = |placed: &Placed| placed.queue == queue && placed.sqe.cid() == cid;
        let at = self.placed.iter().position(is_it).unwrap();
        let placed = self.placed.remove(at);
        self.finish(&placed, Status::SUCCESS, 0);
    }

    /// Posts any completion to the completion queue of a submission queue.
    pub(crate) fn post(&mut self, sent_to: u16, sq_id: u16, cid: u16, status: Status, result: u64) {
        let sq = self.submission[usize::from(sent_to)].as_ref();
        let completion = sq.map_or(sent_to, |sq| sq.completion);
        let cq = self.completion[usize::from(completion)].as_mut().unwrap();
        let at = cq.base + u64::from(cq.tail) * CQE_SIZE as u64;
        let entry = CompletionEntry {
            result,
            sq_head: 0,
            sq_id,
            cid,
            status,
            phase: cq.phase,
        };
        cq.tail += 1;
        if cq.tail == cq.size {
            cq.tail = 0;
            cq.phase = !cq.phase;
        }
        let [low, high] = entry.to_qwords();
        self.store(at, &low.to_le_bytes());
        self.store(at + 8, &high.to_le_bytes());
        if let Some(event) = self.events.iter().flatten().next() {
            event.write(1).unwrap();
        }
    }

    fn finish(&mut self, placed: &Placed, status: Status, result: u64) {
        self.post(placed.queue, placed.queue, placed.sqe.cid(), status, result);
        if placed.queue == 0 && status.is_success() {
            self.follow_queue_command(&placed.sqe);
        }
    }

    fn slice(&self, iova: u64, len: usize) -> Option<VolatileSlice<'_>> {
        self.windows.iter().find_map(|window| {
            let offset = usize::try_from(iova.checked_sub(window.iova.0)?).ok()?;
            (offset.checked_add(len)? <= window.len)
                .then(|| window.memory.get_slice(window.offset + offset, len).ok())
                .flatten()
        })
    }

    pub(crate) fn store(&self, iova: u64, bytes: &[u8]) {
        self.slice(iova, bytes.len())
            .unwrap_or_else(|| panic!("the device was told to write {iova:#x}"))
            .copy_from(bytes);
    }

    pub(crate) fn load<const N: usize>(&self, iova: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.slice(iova, N)
            .unwrap_or_else(|| panic!("the device was told to read {iova:#x}"))
            .copy_to(&mut bytes[..]);
        bytes
    }

    /// Fails unless every address that the command gives to the device, of as many bytes as a
    /// device would move for it, is in the engine's own memory.
    fn check(&self, queue: u16, sqe: &SubmissionEntry) {
        assert_eq!(sqe.0[1], 0, "fused, or with an SGL: {sqe:?}");
        assert_eq!(sqe.mptr(), 0, "metadata of its own: {sqe:?}");
        for (address, len) in self.pages(sqe, data_len(queue, sqe)) {
            assert!(
                self.slice(address, len as usize).is_some(),
                "{address:#x} is no memory of the engine: {sqe:?}"
            );
        }
        for prp in [sqe.prp1(), sqe.prp2()] {
            assert!(
                prp == 0 || self.slice(prp, 1).is_some(),
                "{prp:#x} is no memory of the engine: {sqe:?}"
            );
        }
        let entry = match (queue, sqe.opcode()) {
            (0, admin::CREATE_CQ) => CQE_SIZE,
            (0, admin::CREATE_SQ) => SQE_SIZE,
            _ => return,
        };
        let ring = ((sqe.dword(10) >> 16) as usize + 1) * entry;
        assert!(
            self.slice(sqe.prp1(), ring).is_some() && sqe.prp1() % PAGE == 0,
            "a ring that is no memory of the engine: {sqe:?}"
        );
        assert_eq!(sqe.dword(11) & 1, 1, "a ring of scattered pages: {sqe:?}");
    }

    /// The memory that PRPs name (NVMe 1.4 §4.3), as a device walks them.
    fn pages(&self, sqe: &SubmissionEntry, len: u64) -> Vec<(u64, u64)> {
        let first = (PAGE - sqe.prp1() % PAGE).min(len);
        let mut pages = vec![(sqe.prp1(), first)];
        let mut left = len - first;
        if left > 0 && left <= PAGE {
            pages.push((sqe.prp2(), left));
            left = 0;
        }
        let mut entry = sqe.prp2();
        while left > 0 {
            let here = left.min(PAGE);
            pages.push((u64::from_le_bytes(self.load(entry)), here));
            left -= here;
            entry += 8;
        }
        pages.retain(|(_, len)| *len > 0);
        pages
    }

    fn rang_sq(&mut self, queue: usize, tail: u32) {
        let Some(sq) = self.submission[queue].as_mut() else {
            return;
        };
        let (base, size, mut head) = (sq.base, sq.size, sq.head);
        assert!(tail < size, "tail {tail} of {size} entries");
        sq.head = tail;
        while head != tail {
            let sqe = SubmissionEntry(self.load(base + u64::from(head) * SQE_SIZE as u64));
            head = (head + 1) % size;
            self.check(queue as u16, &sqe);
            let placed = Placed {
                queue: queue as u16,
                sqe,
            };
            if queue == 0 && self.faults.prompt && sqe.opcode() != admin::ASYNC_EVENT {
                self.answer(&placed);
            } else {
                self.placed.push(placed);
            }
        }
    }

    fn answer(&mut self, placed: &Placed) {
        let sqe = &placed.sqe;
        let feature = sqe.dword(10) as u8;
        let (mut status, mut result) = (Status::SUCCESS, 0);
        match sqe.opcode() {
            admin::IDENTIFY => self.store(sqe.prp1(), &self.identify(sqe)),
            admin::SET_FEATURES => {
                let list = u64::from(sqe.dword(13)) | u64::from(sqe.dword(14)) << 32;
                let head = self.slice(list, 16).map_or([0; 16], |_| self.load(list));
                self.set_features.push((*sqe, head));
                match feature {
                    0x07 => result = LAST_PAIR | LAST_PAIR << 16,
                    0x0d if self.faults.refuses_host_memory => status = Status::INVALID_FIELD,
                    _ => {}
                }
            }
            admin::CREATE_CQ | admin::CREATE_SQ | admin::DELETE_CQ | admin::DELETE_SQ
                if !(1..=LAST_PAIR + 1).contains(&u64::from(sqe.dword(10) & 0xffff)) =>
            {
                status = Status::INVALID_QID;
            }
            _ => {}
        }
        self.finish(placed, status, result);
    }

    fn identify(&self, sqe: &SubmissionEntry) -> Vec<u8> {
        let mut page = vec![0; PAGE_SIZE];
        match sqe.dword(10) as u8 {
            cns::CONTROLLER => page.copy_from_slice(&self.identity),
            cns::NAMESPACE_LIST => page[0] = 1,
            _ => page[130] = 9,
        }
        page
    }

    fn follow_queue_command(&mut self, sqe: &SubmissionEntry) {
        let (id, size) = (usize::from(sqe.dword(10) as u16), (sqe.dword(10) >> 16) + 1);
        match sqe.opcode() {
            admin::CREATE_CQ => self.completion[id] = Some(new_cq(sqe.prp1(), size)),
            admin::CREATE_SQ => {
                let completion = (sqe.dword(11) >> 16) as u16;
                self.submission[id] = Some(new_sq(sqe.prp1(), size, completion));
            }
            admin::DELETE_CQ => self.completion[id] = None,
            admin::DELETE_SQ => {
                self.submission[id] = None;
                self.placed.retain(|placed| usize::from(placed.queue) != id);
            }
            _ => {}
        }
    }

    fn forget(&mut self) {
        self.submission.fill_with(|| None);
        self.completion.fill_with(|| None);
        self.placed.clear();
    }

    /// CSTS, which follows CC as well as the faults let it.
    fn status(&mut self) -> u32 {
        let fatal = if self.is_fatal { csts::CFS } else { 0 };
        if self.cc & cc::EN != 0 {
            return fatal | u32::from(!self.faults.never_starts);
        }
        if self.stop_reads > 0 {
            self.stop_reads -= 1;
            return fatal | csts::RDY;
        }
        self.is_fatal = false;
        0
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        match offset {
            _ if self.faults.is_unplugged => u32::MAX,
            reg::CAP => CAP as u32,
            0x04 => (CAP >> 32) as u32,
            reg::VS => 0x1_04_00,
            reg::CC => self.cc,
            reg::CSTS => self.status(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            reg::CC => {
                let before = std::mem::replace(&mut self.cc, value);
                if before & cc::EN != 0 && value & cc::EN == 0 {
                    self.stop_reads = self.faults.reads_to_stop;
                    self.forget();
                } else if value & cc::EN != 0 && before & cc::EN == 0 {
                    assert_eq!(self.stop_reads, 0, "started before it has stopped");
                    self.submission[0] = Some(new_sq(self.asq, (self.aqa & 0xfff) + 1, 0));
                    self.completion[0] = Some(new_cq(self.acq, (self.aqa >> 16 & 0xfff) + 1));
                }
            }
            reg::AQA => self.aqa = value,
            reg::ASQ => self.asq = u64::from(value),
            0x2c => self.asq |= u64::from(value) << 32,
            reg::ACQ => self.acq = u64::from(value),
            0x34 => self.acq |= u64::from(value) << 32,
            DOORBELL_BASE.. => {
                let index = (offset - DOORBELL_BASE) / 4;
                if index % 2 == 0 {
                    self.rang_sq(index as usize / 2, value);
                }
            }
            _ => {}
        }
    }
}

/// Bytes that a device moves for a command (NVMe 1.4 §5 and §6), written down here once more:
/// what the engine takes it for does not count.
fn data_len(queue: u16, sqe: &SubmissionEntry) -> u64 {
    let dword = |n| u64::from(sqe.dword(n));
    if queue > 0 {
        return match sqe.opcode() {
            nvm::READ | nvm::WRITE | nvm::COMPARE => u64::from(sqe.blocks()) << 9,
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
            0x03 => PAGE,
            0x0c => 256,
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
        tail: 0,
        phase: true,
    }
}

impl Function for FakeNvme {
    fn info(&self) -> &FunctionInfo {
        &self.info
    }

    /// Zeroes, but for the class code.
    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        data.fill(0);
        if offset == 8 && !self.state().faults.is_no_nvme {
            data.copy_from_slice(&(PCI_CLASS << 8).to_le_bytes()[..data.len()]);
        }
        Ok(())
    }

    fn config_write(&self, _: u16, _: &[u8]) -> Result<(), FunctionError> {
        Ok(())
    }

    fn region_read(
        &self,
        _: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        let value = self.state().read_register(offset).to_le_bytes();
        data.copy_from_slice(&value[..data.len()]);
        Ok(())
    }

    fn region_write(&self, _: RegionIndex, offset: u64, data: &[u8]) -> Result<(), FunctionError> {
        let value = u32::from_le_bytes(data.try_into().unwrap());
        self.state().write_register(offset, value);
        Ok(())
    }

    fn map_dma(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        self.state().windows.push(window.clone());
        Ok(())
    }

    fn unmap_dma(&self, iova: Iova, _: u64) -> Result<(), FunctionError> {
        self.state().windows.retain(|window| window.iova != iova);
        Ok(())
    }

    fn set_interrupts(
        &self,
        _: InterruptKind,
        _: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        self.state().events = events.to_vec();
        Ok(())
    }

    fn mask_interrupt(&self, _: InterruptKind, _: u32, _: bool) -> Result<(), FunctionError> {
        Ok(())
    }

    fn reset(&self) -> Result<(), FunctionError> {
        let mut state = self.state();
        state.resets += 1;
        if state.faults.resets_fail {
            return Err(FunctionError::Gone("it does not reset".into()));
        }
        state.forget();
        state.cc = 0;
        state.stop_reads = 0;
        state.is_fatal = false;
        Ok(())
    }
}
