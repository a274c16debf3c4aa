//! A guest: memory, one queue, and a driver that makes any chain.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_compute_agent::vhost_user::config::Options;
use farbus_compute_agent::vhost_user::device::Device;
use farbus_compute_agent::vhost_user::drive::Drive;
use farbus_compute_agent::vhost_user::iommu::message::Said;
use farbus_vfio::Function;
use farbus_vfio::soft_nvme::{SoftNvme, SoftNvmeConfig};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::VhostUserBackendReqHandlerMut;
use vhost::vhost_user::message::{
    VhostUserInflight, VhostUserMemoryRegion, VhostUserVringAddrFlags,
};
use vm_memory::{Bytes, FileOffset, MmapRegion, Permissions, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;

/// Guest memory in bytes, at guest address 0.
pub(crate) const MEMORY: u64 = 8 << 20;
/// Where the VMM has it.
pub(crate) const USER: u64 = 0x7000_0000_0000;
/// Entries of the queue.
pub(crate) const SIZE: u16 = 16;
pub(crate) const TABLE: u64 = 0x1000;
pub(crate) const AVAILABLE: u64 = 0x2000;
pub(crate) const USED: u64 = 0x3000;
/// Headers and statuses of requests.
pub(crate) const HEADERS: u64 = 0x4000;
/// From here on there is room for data.
pub(crate) const DATA: u64 = 0x10_0000;

/// Descriptor flags.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A buffer of a chain: guest address, length, whether the device may write.
pub(crate) type Buffer = (u64, u32, bool);

/// Feature bits: the event index, and an IOMMU.
const EVENT_INDEX: u64 = 1 << 29;
/// Protocol feature bits: acknowledgements, a channel back.
const ASKS: u64 = 1 << 3 | 1 << 5;

/// What the VMM's IOMMU does. Neighbouring pages change places, so that nothing of more than a page
/// is in one piece, and nothing is where its address says.
#[derive(Default)]
pub(crate) struct Mappings {
    /// Pages that are not mapped.
    pub(crate) holes: Vec<u64>,
    /// Pages that the device may only read.
    pub(crate) read_only: Vec<u64>,
    /// Questions so far.
    pub(crate) asked: Vec<u64>,
    /// Questions are left unanswered.
    pub(crate) silent: bool,
}

pub(crate) const PAGE: u64 = 4096;

pub(crate) struct Guest {
    pub(crate) device: Device,
    /// The IOMMU that the driver is behind, if it is.
    pub(crate) iommu: Option<Mappings>,
    pub(crate) memory: MmapRegion,
    file: File,
    function: Arc<dyn Function>,
    inflight: Option<File>,
    available: u16,
    seen: u16,
    /// Signalled by the device.
    pub(crate) call: EventFd,
    pub(crate) error: EventFd,
    options: Options,
}

pub(crate) fn options() -> Options {
    Options {
        num_queues: 2,
        queue_size: 64,
        read_only: false,
        serial: Some("serial".into()),
    }
}

fn same(event: &EventFd) -> File {
    let fd = farbus_vfio::user::event::borrow(event);
    File::from(fd.try_clone_to_owned().unwrap())
}

fn device(function: &Arc<dyn Function>, options: &Options) -> Device {
    let drive = Drive::bring_up(function.clone(), options.num_queues).unwrap();
    let lost = Arc::new(EventFd::new(0).unwrap());
    Device::new(function.clone(), drive, options.clone(), lost)
}

impl Guest {
    /// A guest with a drive of 8 MiB.
    pub(crate) fn new(spec: &str) -> Self {
        Self::with(spec, options(), false)
    }

    pub(crate) fn with(spec: &str, options: Options, tracks: bool) -> Self {
        Self::placed(spec, options, tracks, None)
    }

    /// As [`Self::with`], with a driver behind an IOMMU if there is one.
    pub(crate) fn placed(
        spec: &str,
        options: Options,
        tracks: bool,
        iommu: Option<Mappings>,
    ) -> Self {
        let config: SoftNvmeConfig = format!("backing=memory,size=8MiB,{spec}")
            .trim_end_matches(',')
            .parse()
            .unwrap();
        let function: Arc<dyn Function> = Arc::new(SoftNvme::open(&config).unwrap());
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(MEMORY).unwrap();
        let shared = FileOffset::new(file.try_clone().unwrap(), 0);
        let mut guest = Self {
            device: device(&function, &options),
            iommu,
            memory: MmapRegion::from_file(shared, MEMORY as usize).unwrap(),
            file,
            function,
            inflight: None,
            available: 0,
            seen: 0,
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            error: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            options,
        };
        if tracks {
            let asked = VhostUserInflight::new(0, 0, 2, 64);
            guest.inflight = Some(guest.device.get_inflight_fd(&asked).unwrap().1);
        }
        guest.set_up();
        guest
    }

    /// What a VMM says to a backend that it has connected to.
    pub(crate) fn set_up(&mut self) {
        let device = &mut self.device;
        if self.iommu.is_some() {
            device.set_protocol_features(ASKS).unwrap();
            device.ask_anew(true);
        }
        let features = device.get_features().unwrap() & !EVENT_INDEX;
        device.set_features(features).unwrap();
        let region = VhostUserMemoryRegion::new(0, MEMORY, USER, 0);
        device
            .set_mem_table(&[region], vec![self.file.try_clone().unwrap()], None)
            .unwrap();
        if let Some(file) = &self.inflight {
            let len = file.metadata().unwrap().len();
            let given = VhostUserInflight::new(len, 0, 2, 64);
            device
                .set_inflight_fd(&given, file.try_clone().unwrap())
                .unwrap();
        }
        device.set_vring_num(0, SIZE.into()).unwrap();
        device.set_vring_base(0, self.seen.into()).unwrap();
        let flags = VhostUserVringAddrFlags::empty();
        let base = if self.iommu.is_some() { 0 } else { USER };
        let at = |address| base + address;
        device
            .set_vring_addr(0, flags, at(TABLE), at(USED), at(AVAILABLE), 0)
            .unwrap();
        device.set_vring_call(0, Some(same(&self.call))).unwrap();
        device.set_vring_err(0, Some(same(&self.error))).unwrap();
        device.set_vring_kick(0, None).unwrap();
        device.set_vring_enable(0, true).unwrap();
    }

    /// The queue was stopped, and is started again as a VMM does that keeps the inflight record.
    pub(crate) fn go_on(&mut self) {
        self.device.set_vring_kick(0, None).unwrap();
    }

    /// The backend is killed, as far as the drive and the guest can tell, and started again.
    pub(crate) fn restart_backend(&mut self) {
        if let Some(drive) = self.device.take_drive() {
            drive.shut();
        }
        self.device.close();
        self.device = device(&self.function, &self.options);
        self.set_up();
    }

    /// The rings as after a reset, for a client that has connected just now.
    pub(crate) fn start_anew(&mut self) {
        self.put(AVAILABLE, &[0; 64]);
        self.put(USED, &[0; 256]);
        (self.available, self.seen) = (0, 0);
        self.set_up();
    }

    /// Another descriptor of the guest's memory.
    pub(crate) fn file(&self) -> File {
        self.file.try_clone().unwrap()
    }

    /// The drive's controller loses all that it has, and is brought up again.
    pub(crate) fn fail_drive(&mut self) {
        self.function.reset().unwrap();
        let failed = self.device.failed_drive().expect("it has not failed");
        failed.shut();
        let queues = self.options.num_queues;
        let drive = Drive::bring_up(self.function.clone(), queues).unwrap();
        self.device.drive_is_back(drive);
    }

    /// Where in memory something is that the driver has at this address.
    fn place(&self, address: u64) -> u64 {
        match &self.iommu {
            Some(_) => address ^ PAGE,
            None => address,
        }
    }

    /// The parts of a range that are in one piece: where in memory, and which bytes.
    fn parts(&self, address: u64, len: usize) -> Vec<(usize, std::ops::Range<usize>)> {
        let mut parts = Vec::new();
        let mut done = 0;
        while done < len {
            let at = address + done as u64;
            let here = (PAGE - at % PAGE).min((len - done) as u64) as usize;
            parts.push((self.place(at) as usize, done..done + here));
            done += here;
        }
        parts
    }

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        let slice = self.memory.as_volatile_slice();
        for (at, range) in self.parts(address, bytes.len()) {
            slice.write_slice(&bytes[range], at).unwrap();
        }
    }

    pub(crate) fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let slice = self.memory.as_volatile_slice();
        for (at, range) in self.parts(address, len) {
            slice.read_slice(&mut bytes[range], at).unwrap();
        }
        bytes
    }

    /// Has the device do what it can, and answers what it asks.
    pub(crate) fn work(&mut self) {
        self.device.work(true).unwrap();
        self.answer_asks();
    }

    /// What a VMM does when it is asked.
    pub(crate) fn answer_asks(&mut self) {
        let Some(mappings) = &mut self.iommu else {
            assert!(self.device.next_ask().is_none(), "nobody could answer");
            return;
        };
        if mappings.silent {
            return;
        }
        while let Some(ask) = self.device.next_ask() {
            self.device.asked();
            let page = ask.address & !(PAGE - 1);
            mappings.asked.push(page);
            let access = if mappings.read_only.contains(&page) {
                Permissions::Read
            } else {
                Permissions::ReadWrite
            };
            let is_mapped = page < MEMORY && !mappings.holes.contains(&page);
            if is_mapped && access.allow(ask.access) {
                let update = Said::Update {
                    first: page,
                    last: page + PAGE - 1,
                    user: USER + (page ^ PAGE),
                    access,
                };
                assert!(self.device.hear(update));
                self.device.answered(false).unwrap();
            } else {
                self.device.answered(true).unwrap();
            }
        }
    }

    /// The guest unmaps a range, and whoever has it cached forgets it.
    pub(crate) fn invalidate(&mut self, first: u64, last: u64) {
        assert!(self.device.hear(Said::Invalidate { first, last }));
    }

    pub(crate) fn descriptor(
        &self,
        table: u64,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(table + u64::from(index) * 16, &bytes);
    }

    /// Makes a chain of descriptors `first..`.
    pub(crate) fn chain(&self, table: u64, first: u16, buffers: &[Buffer]) {
        for (n, (address, len, writable)) in (0u16..).zip(buffers) {
            let last = usize::from(n) + 1 == buffers.len();
            let flags = if *writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.descriptor(table, first + n, *address, *len, flags, first + n + 1);
        }
    }

    /// Makes a chain available.
    pub(crate) fn offer(&mut self, head: u16) {
        let at = AVAILABLE + 4 + u64::from(self.available % SIZE) * 2;
        self.put(at, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.put(AVAILABLE + 2, &self.available.to_le_bytes());
    }

    pub(crate) fn set_available(&mut self, index: u16) {
        self.available = index;
        self.put(AVAILABLE + 2, &index.to_le_bytes());
    }

    /// Has the device do what it can, until `condition`; whether that came true within some
    /// seconds.
    pub(crate) fn work_until(&mut self, mut condition: impl FnMut(&mut Self) -> bool) -> bool {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            self.work();
            if condition(self) {
                return true;
            }
            std::thread::yield_now();
        }
        false
    }

    /// The next answer, if there is one: head and length.
    pub(crate) fn used(&mut self) -> Option<(u32, u32)> {
        let index = self.get(USED + 2, 2);
        if u16::from_le_bytes([index[0], index[1]]) == self.seen {
            return None;
        }
        let element = self.get(USED + 4 + u64::from(self.seen % SIZE) * 8, 8);
        self.seen = self.seen.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
        Some((word(0), word(4)))
    }

    /// Waits for an answer.
    pub(crate) fn answer(&mut self) -> (u32, u32) {
        let mut found = None;
        assert!(
            self.work_until(|guest| {
                found = guest.used();
                found.is_some()
            }),
            "there was no answer"
        );
        found.unwrap()
    }

    pub(crate) fn header(&self, slot: u64, kind: u32, sector: u64) -> u64 {
        let at = HEADERS + slot * 64;
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        self.put(at, &bytes);
        self.put(at + 32, &[0xff]);
        at
    }

    /// Carries out a request with these data buffers; its status, and the length in the used ring.
    pub(crate) fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        let header = self.header(0, kind, sector);
        let mut buffers = vec![(header, 16, false)];
        buffers.extend(data);
        buffers.push((header + 32, 1, true));
        self.chain(TABLE, 0, &buffers);
        self.offer(0);
        let (head, len) = self.answer();
        assert_eq!(head, 0);
        (self.get(header + 32, 1)[0], len)
    }

    /// Whether the device has told the VMM that the queue is broken.
    pub(crate) fn is_broken(&mut self) -> bool {
        self.work_until(|guest| guest.error.read().is_ok())
    }

    pub(crate) fn is_called(&self) -> bool {
        self.call.read().is_ok()
    }
}
