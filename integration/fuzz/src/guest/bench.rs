//! A machine around a remote function: guest memory, a link, and the device server's half at
//! its other end.

use std::sync::{Arc, Mutex, OnceLock};

use farbus_fabric::provider::{Choice, Provider};
use farbus_fabric::session::ClaimedLink;
use farbus_fabric::wire::{
    Description, EngineKind, Epoch, InterruptCounts, Label, NEWEST, Region, Side,
};
use farbus_fabric::{FabricError, Received};
use farbus_shadow_mem::nvme::description::NvmeDescription;
use farbus_shadow_mem::nvme::device::{DeviceHalf, Limits};
use farbus_shadow_mem::remote::RemoteFunction;
use farbus_shadow_mem::session::Session;
use farbus_vfio::config::{BarKind, ConfigImage, MsixLayout};
use farbus_vfio::nvme::{DOORBELL_BASE, PAGE_SIZE, SubmissionEntry, admin, cc, reg};
use farbus_vfio::{DmaAccess, DmaWindow, Function, Iova, RegionIndex};
use vm_memory::{MmapRegion, VolatileMemory};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{check_description, slot};
use crate::link::{Ground, Wire, lock};
use crate::nvme::{FakeNvme, Identity};

/// Commands that may be outstanding.
pub(super) const TAGS: u16 = 96;
/// Pages of the buffer shadow.
const SHADOW_PAGES: u32 = 64;
const LIMITS: Limits = Limits {
    shadow_len: SHADOW_PAGES << 12,
    tags: TAGS,
    max_transfer: 64 << 10,
};

const RAM_LEN: usize = 1 << 20;
const OTHER_LEN: usize = 64 << 10;
/// Where the guest's memory begins.
pub(super) const RAM_BASE: u64 = 0x10_0000;
/// Where scripts place data and lists.
pub(super) const DATA: u64 = RAM_BASE + 0x6_0000;
/// Where they place the admin queues, of any size.
pub(super) const ASQ: u64 = RAM_BASE + 0x8_0000;
pub(super) const ACQ: u64 = RAM_BASE + 0xc_0000;

/// The submission ring that scripts give to a queue.
pub(super) fn sq_of(queue: u16) -> u64 {
    match queue {
        0 => ASQ,
        queue => RAM_BASE + u64::from(queue) * 0x1_0000,
    }
}

/// The completion ring.
pub(super) fn cq_of(queue: u16) -> u64 {
    match queue {
        0 => ACQ,
        queue => RAM_BASE + 0x4_0000 + u64::from(queue) * 0x4000,
    }
}

/// The device server's side of a connection.
pub(super) struct Peer {
    pub(super) half: DeviceHalf,
    pub(super) session: Session,
    pub(super) device: Arc<FakeNvme>,
}

impl Peer {
    fn serve(&mut self, messages: usize) -> Result<(), FabricError> {
        self.session.flush()?;
        for _ in 0..messages {
            if self.half.is_backlogged() {
                break;
            }
            if self.session.receive(&mut self.half)? == Received::Idle {
                break;
            }
        }
        self.half.pump(&mut self.session)?;
        self.half.pump(&mut self.session)
    }
}

/// A ring as the script's guest uses it.
#[derive(Clone, Copy, Default)]
pub(super) struct Ring {
    size: u32,
    completion_size: u32,
    tail: u32,
    head: u32,
    cid: u16,
}

/// See the module's own description.
pub(super) struct Bench {
    pub(super) function: RemoteFunction,
    pub(super) peer: Option<Peer>,
    pub(super) wire: Wire,
    /// How many connections there were; the number of each is its epoch.
    pub(super) connections: u64,
    /// The script has spoken for the device server on this connection.
    pub(super) spoiled: bool,
    pub(super) event: Arc<EventFd>,
    ground: Arc<Mutex<Ground>>,
    rings: [Ring; 4],
}

/// Memory for all runs, since mapping it costs more than clearing it.
fn pools() -> &'static [Arc<MmapRegion>; 2] {
    static POOLS: OnceLock<[Arc<MmapRegion>; 2]> = OnceLock::new();
    POOLS.get_or_init(|| {
        [RAM_LEN, OTHER_LEN].map(|len| Arc::new(MmapRegion::new(len).expect("guest memory")))
    })
}

fn event() -> Arc<EventFd> {
    static EVENT: OnceLock<Arc<EventFd>> = OnceLock::new();
    EVENT
        .get_or_init(|| Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd")))
        .clone()
}

impl Bench {
    /// A machine that has just been switched on, with its memory mapped.
    pub(super) fn new() -> Self {
        for pool in pools() {
            for at in (0..pool.size()).step_by(PAGE_SIZE) {
                let page = pool.get_slice(at, PAGE_SIZE).expect("a page of it");
                page.copy_from(&[0u8; PAGE_SIZE]);
            }
        }
        let ground = Arc::new(Mutex::new(Ground {
            watched: pools().to_vec(),
            windows: Vec::new(),
        }));
        let wire = Wire::new();
        let (peer, claimed) = claim(&wire, 1, &ground, Identity::default(), TAGS);
        let function = RemoteFunction::new("fuzz".into(), claimed).expect("a function");
        let mut bench = Self {
            function,
            peer: Some(peer),
            wire,
            connections: 1,
            spoiled: false,
            event: event(),
            ground,
            rings: [Ring::default(); 4],
        };
        bench.map_ram();
        bench
    }

    pub(super) fn map_ram(&mut self) {
        self.map(DmaWindow {
            iova: Iova(RAM_BASE),
            memory: pools()[0].clone(),
            offset: 0,
            len: RAM_LEN,
            access: DmaAccess::ReadWrite,
        });
    }

    /// Memory to map, and its size: the RAM, or the other one.
    pub(super) fn pool(&self, ram: bool) -> (Arc<MmapRegion>, usize) {
        let [first, second] = pools();
        let pool = if ram { first } else { second };
        (pool.clone(), pool.size())
    }

    pub(super) fn map(&mut self, window: DmaWindow) {
        if self.function.map_dma(&window).is_ok() {
            lock(&self.ground).windows.push(window);
        }
    }

    pub(super) fn unmap(&mut self, iova: u64, len: u64) {
        if self.function.unmap_dma(Iova(iova), len).is_ok() {
            let end = iova.saturating_add(len);
            let stays = |w: &DmaWindow| w.iova.0 < iova || w.iova.0 + w.len as u64 > end;
            lock(&self.ground).windows.retain(stays);
        }
    }

    /// Writes guest memory, as far as it is RAM.
    pub(super) fn store(&self, offset: usize, bytes: &[u8]) {
        if let Ok(slice) = pools()[0].get_slice(offset, bytes.len()) {
            slice.copy_from(bytes);
        }
    }

    pub(super) fn load_ram<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        pools()[0]
            .get_slice(offset, N)
            .expect("RAM")
            .copy_to(&mut bytes);
        bytes
    }

    pub(super) fn write(&self, offset: u64, value: u32) {
        self.function
            .region_write(RegionIndex::BAR0, offset, &value.to_le_bytes())
            .expect("a register within the BAR");
    }

    pub(super) fn read(&self, offset: u64) -> u32 {
        let mut value = [0; 4];
        self.function
            .region_read(RegionIndex::BAR0, offset, &mut value)
            .expect("a register within the BAR");
        u32::from_le_bytes(value)
    }

    pub(super) fn ring(&self, queue: u16, completion: bool, value: u32) {
        let index = u64::from(queue) * 2 + u64::from(completion);
        self.write(DOORBELL_BASE + index * 4, value);
    }

    pub(super) fn enable(&mut self, asq: u64, size: u32, acq: u64, completion_size: u32) {
        self.write(reg::CC, 0);
        self.serve(4);
        self.write(reg::AQA, (size - 1) | (completion_size - 1) << 16);
        for (at, base) in [(reg::ASQ, asq), (reg::ACQ, acq)] {
            self.write(at, base as u32);
            self.write(at + 4, (base >> 32) as u32);
        }
        self.write(
            reg::CC,
            6 << cc::IOSQES_SHIFT | 4 << cc::IOCQES_SHIFT | cc::EN,
        );
        self.rings = [Ring::default(); 4];
        self.rings[0] = Ring {
            size,
            completion_size,
            ..Ring::default()
        };
        self.serve(4);
    }

    /// Puts a command into a ring, with an identifier of its own; the doorbell comes later.
    pub(super) fn place(&mut self, queue: u16, mut sqe: SubmissionEntry) {
        let ring = &mut self.rings[usize::from(queue)];
        ring.cid = ring.cid.wrapping_add(1);
        sqe.set_cid(ring.cid);
        let at = slot(queue, ring.tail);
        ring.tail = (ring.tail + 1) % ring.size.max(1);
        self.store(at, &sqe.0);
    }

    pub(super) fn ring_tail(&self, queue: u16) {
        self.ring(queue, false, self.rings[usize::from(queue)].tail);
    }

    pub(super) fn advance_head(&mut self, queue: u16, by: u32) {
        let ring = &mut self.rings[usize::from(queue)];
        ring.head = (ring.head + by) % ring.completion_size.max(1);
        let head = ring.head;
        self.ring(queue, true, head);
    }

    pub(super) fn create_cq(&mut self, id: u16, size: u32, vector: Option<u16>) {
        let mut sqe = SubmissionEntry::new(admin::CREATE_CQ);
        sqe.set_prps(cq_of(id), 0);
        sqe.set_dword(10, u32::from(id) | (size - 1) << 16);
        sqe.set_dword(11, 1 | vector.map_or(0, |v| 2 | u32::from(v) << 16));
        self.place(0, sqe);
        self.ring_tail(0);
        self.rings[usize::from(id)].completion_size = size;
        self.rings[usize::from(id)].head = 0;
    }

    pub(super) fn create_sq(&mut self, id: u16, size: u32, completion: u16) {
        let mut sqe = SubmissionEntry::new(admin::CREATE_SQ);
        sqe.set_prps(sq_of(id), 0);
        sqe.set_dword(10, u32::from(id) | (size - 1) << 16);
        sqe.set_dword(11, 1 | u32::from(completion) << 16);
        self.place(0, sqe);
        self.ring_tail(0);
        if id > 0 {
            let ring = &mut self.rings[usize::from(id)];
            (ring.size, ring.tail) = (size, 0);
        }
    }

    /// Both sides get a turn; the device side takes at most so many messages.
    pub(super) fn serve(&mut self, messages: usize) {
        if let Some(peer) = &mut self.peer {
            match peer.serve(messages) {
                Ok(()) => {}
                Err(FabricError::Closed) => self.hang_up(),
                Err(error) if self.spoiled => {
                    drop(error);
                    self.hang_up();
                }
                Err(error) => panic!("the compute half broke the protocol: {error}"),
            }
        }
        let _ = self.function.service();
        self.look_after_link();
    }

    /// The device server lets go of the claim.
    fn hang_up(&mut self) {
        self.wire.cut();
        self.peer = None;
    }

    pub(super) fn look_after_link(&mut self) {
        let Some(lost) = self.function.take_lost() else {
            return;
        };
        let excused = matches!(
            lost.error,
            FabricError::Closed | FabricError::Timeout { .. }
        );
        assert!(
            self.spoiled || excused,
            "the device half broke the protocol: {}",
            lost.error
        );
        self.hang_up();
    }

    pub(super) fn has_link(&self) -> bool {
        self.function.link_interest().is_some()
    }

    /// A new claim, after the link was lost.
    pub(super) fn connect(&mut self, identity: Identity, tags: u16) {
        self.hang_up();
        self.connections += 1;
        self.wire = Wire::new();
        self.spoiled = false;
        let (peer, claimed) = claim(&self.wire, self.connections, &self.ground, identity, tags);
        if self.function.reconnect(claimed).is_ok() {
            self.peer = Some(peer);
        }
    }
}

/// Claims a fresh controller, as a device server and an agent do together.
fn claim(
    wire: &Wire,
    epoch: u64,
    ground: &Arc<Mutex<Ground>>,
    identity: Identity,
    tags: u16,
) -> (Peer, ClaimedLink) {
    let device = Arc::new(FakeNvme::new(identity, tags));
    let limits = Limits { tags, ..LIMITS };
    let half = DeviceHalf::open(device.clone(), limits).expect("a controller that behaves");
    check_description(half.description(), LIMITS.shadow_len);
    let shadow = Ground::of(half.shadow());
    let description = describe(half.description());
    let session = Session::new(Box::new(wire.end(Side::Device, Epoch(epoch), &shadow)));
    let claimed = ClaimedLink {
        link: Box::new(wire.end(Side::Compute, Epoch(epoch), ground)),
        epoch: Epoch(epoch),
        shadow_len: LIMITS.shadow_len,
        tags,
        description,
        version: NEWEST,
        peer: Label::default(),
        provider: Choice {
            provider: Provider::Tcp,
            why: String::new(),
        },
        lanes: Vec::new(),
    };
    let peer = Peer {
        half,
        session,
        device,
    };
    (peer, claimed)
}

fn describe(nvme: &NvmeDescription) -> Description {
    let layout = MsixLayout {
        vectors: 8,
        table: (RegionIndex::BAR0, 0x2000),
        pba: (RegionIndex::BAR0, 0x3000),
    };
    let config = ConfigImage::new(0x4642, 1, 0x01_08_02)
        .bar(0, BarKind::Memory64)
        .power_management()
        .msix(layout)
        .express()
        .build();
    Description {
        config,
        regions: vec![Region {
            index: 0,
            size: 0x4000,
        }],
        interrupts: InterruptCounts {
            intx: 0,
            msi: 0,
            msix: 8,
        },
        engine: EngineKind::Nvme,
        blob: nvme.encode(),
    }
}
