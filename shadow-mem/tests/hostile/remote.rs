//! A remote function over a real connection, whose other end a test writes by hand.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_fabric::provider::{Choice, Provider};
use farbus_fabric::session::ClaimedLink;
use farbus_fabric::wire::{
    CompleteBatch, Description, EngineKind, Epoch, Header, InterruptCounts, Kind, Label, Message,
    NEWEST, Region, Side, Submit, Tag,
};
use farbus_fabric::{FabricError, Link, Received, Sink, Span, TcpLink};
use farbus_shadow_mem::remote::{RemoteError, RemoteFunction};
use farbus_shadow_mem::shadow::shared_memory;
use farbus_vfio::nvme::{DOORBELL_BASE, PAGE_SIZE, Status, SubmissionEntry, admin, csts, reg};
use farbus_vfio::{DmaAccess, DmaWindow, Function, Iova, RegionIndex};
use vm_memory::{MmapRegion, VolatileMemory};
use vmm_sys_util::poll::PollContext;

use super::guest::{CC_ON, SHADOW_LEN, TAGS, completion, description};
use super::wire::status;

/// How long anything may take here.
const PATIENCE: Duration = Duration::from_secs(10);
pub(crate) const MEMORY_LEN: usize = 1 << 20;
const EPOCH: Epoch = Epoch(1);
/// Offset of the PCI Express capability in the configuration space below.
const PCIE: usize = 0x60;
/// Device Control, and in it "initiate function level reset" (PCIe 5.0 §7.5.3.4).
const DEVICE_CONTROL: u16 = PCIE as u16 + 8;
const INITIATE_FLR: u16 = 1 << 15;

/// Both ends of a connection.
fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

/// The configuration space of an NVMe controller with MSI-X, and with function level reset.
fn configuration_space() -> Vec<u8> {
    let mut config = vec![0; 256];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x00, &[0xde, 0x1a, 0x01, 0x00]);
    put(0x06, &[0x10, 0x00]); // Status: has capabilities
    put(0x08, &[0x00, 0x02, 0x08, 0x01]); // NVMe controller
    put(0x10, &[0x04]); // BAR0: 64 bits
    put(0x34, &[0x40]);
    put(
        0x40,
        &[0x11, PCIE as u8, 7, 0, 0x00, 0x20, 0, 0, 0x00, 0x30, 0, 0],
    ); // MSI-X, 8 vectors
    put(PCIE, &[0x10, 0x00, 0x02, 0x00]); // PCI Express endpoint
    put(PCIE + 4, &(1u32 << 28).to_le_bytes()); // Device Capabilities: FLR
    config
}

/// The claim of a controller with 16 KiB of registers, on this connection.
fn claim(stream: TcpStream, tags: u16, shadow_len: u32) -> ClaimedLink {
    let mut link = TcpLink::new(stream, Side::Compute).unwrap();
    link.set_epoch(EPOCH);
    ClaimedLink {
        link: Box::new(link),
        epoch: EPOCH,
        shadow_len,
        tags,
        description: Description {
            config: configuration_space(),
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
            blob: description().encode(),
        },
        version: NEWEST,
        peer: Label::new("a test").unwrap(),
        provider: Choice {
            provider: Provider::Tcp,
            why: String::new(),
        },
        lanes: Vec::new(),
    }
}

/// What becomes of a claim with these grants.
pub(crate) fn with_grant(tags: u16, shadow_len: u32) -> Result<RemoteFunction, RemoteError> {
    let (near, _far) = connection();
    RemoteFunction::new("test".into(), claim(near, tags, shadow_len))
}

/// The commands that the compute side sends.
#[derive(Default)]
struct Heard(Vec<Tag>);

impl Sink for Heard {
    fn land(&mut self, _: &Header, _: &[u8], _: &mut Vec<Span>) -> Result<(), FabricError> {
        Err(FabricError::violation("no command here has data"))
    }

    fn deliver(&mut self, header: &Header, control: &[u8]) -> Result<(), FabricError> {
        if header.kind == Kind::Submit {
            let batch = Submit::decode(header, control)?;
            self.0
                .extend(batch.entries().map(|entry| entry.placement.tag));
        }
        Ok(())
    }
}

/// An enabled controller of a guest with 1 MiB of memory, and the device side's end.
pub(crate) struct Bench {
    pub function: RemoteFunction,
    pub memory: Arc<MmapRegion>,
    peer: TcpLink,
    raw: TcpStream,
    /// Bytes that the device side has sent.
    sent: u64,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let (near, far) = connection();
        let raw = far.try_clone().unwrap();
        let mut peer = TcpLink::new(far, Side::Device).unwrap();
        peer.set_epoch(EPOCH);
        let function = RemoteFunction::new("test".into(), claim(near, TAGS, SHADOW_LEN)).unwrap();
        let memory = shared_memory("guest", MEMORY_LEN).unwrap();
        let mut bench = Self {
            function,
            memory,
            peer,
            raw,
            sent: 0,
        };
        bench.function.map_dma(&bench.window()).unwrap();
        bench.enable();
        bench
    }

    /// All of the guest's memory, at address 0.
    pub(crate) fn window(&self) -> DmaWindow {
        DmaWindow {
            iova: Iova(0),
            memory: self.memory.clone(),
            offset: 0,
            len: MEMORY_LEN,
            access: DmaAccess::ReadWrite,
        }
    }

    fn enable(&mut self) {
        for (offset, value) in [
            (reg::AQA, 0x001f_001f),
            (reg::ACQ, 0x1000),
            (reg::CC, CC_ON),
        ] {
            self.write32(offset, value);
        }
        self.send(&[status(csts::RDY)]);
        self.until("ready", |bench| bench.csts() == csts::RDY);
    }

    pub(crate) fn write32(&self, offset: u64, value: u32) {
        self.function
            .region_write(RegionIndex::BAR0, offset, &value.to_le_bytes())
            .unwrap();
    }

    pub(crate) fn csts(&self) -> u32 {
        let mut value = [0; 4];
        self.function
            .region_read(RegionIndex::BAR0, reg::CSTS, &mut value)
            .unwrap();
        u32::from_le_bytes(value)
    }

    /// The guest's function level reset, through configuration space.
    pub(crate) fn function_level_reset(&self) {
        self.function
            .config_write(DEVICE_CONTROL, &INITIATE_FLR.to_le_bytes())
            .unwrap();
    }

    /// Sends these bytes as they are.
    fn write(&mut self, bytes: &[u8]) {
        self.raw.write_all(bytes).unwrap();
        self.sent += bytes.len() as u64;
    }

    /// Sends messages, all in one piece.
    pub(crate) fn send(&mut self, messages: &[Message]) {
        let mut bytes = Vec::new();
        for message in messages {
            let mut control = Vec::new();
            let header = Header {
                epoch: EPOCH,
                ..message.encode(&mut control).unwrap()
            };
            bytes.extend(header.encode());
            bytes.extend(control);
        }
        self.write(&bytes);
    }

    /// Serves the link as an event loop does, which sleeps until there is a reason not to,
    /// until something holds.
    pub(crate) fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        let poll: PollContext<u32> = PollContext::new().unwrap();
        let link = self.function.link_interest().unwrap();
        poll.add(&Descriptor(link.descriptor), 0).unwrap();
        while !holds(self) {
            assert!(
                start.elapsed() < PATIENCE,
                "{what}: not within {PATIENCE:?}"
            );
            let ready = poll.wait_timeout(PATIENCE).unwrap().iter().count() > 0;
            assert!(ready, "{what}: nothing woke the event loop");
            while self.function.service().any() {}
        }
    }

    /// Serves the link until everything that the device side sent has arrived.
    fn until_arrived(&mut self) {
        let sent = self.sent;
        self.until("the bytes that were sent", |bench| {
            bench.function.counters().unwrap().bytes_received == sent
        });
    }

    /// The guest identifies the controller into its memory at `address`. The device side sends
    /// the completion with the first half of the data.
    pub(crate) fn begin_identify(&mut self, address: u64) {
        let mut sqe = SubmissionEntry::new(admin::IDENTIFY);
        sqe.set_dword(10, 1);
        sqe.set_prps(address, 0);
        self.memory.get_slice(0, 64).unwrap().copy_from(&sqe.0[..]);
        self.write32(DOORBELL_BASE, 1);
        let tag = self.hear();
        let mut batch = CompleteBatch::new();
        batch
            .push(&completion(tag, Status::SUCCESS, PAGE_SIZE as u32))
            .unwrap();
        let header = Header {
            epoch: EPOCH,
            ..batch.header()
        };
        let bytes = [
            &header.encode()[..],
            batch.control(),
            &[0xaa; PAGE_SIZE / 2],
        ]
        .concat();
        self.write(&bytes);
        self.until_arrived();
    }

    /// The device side sends the rest of the data.
    pub(crate) fn end_identify(&mut self) {
        self.write(&[0xaa; PAGE_SIZE / 2]);
        self.until_arrived();
    }

    /// The tag of the command that comes next.
    fn hear(&mut self) -> Tag {
        let start = Instant::now();
        let mut heard = Heard::default();
        loop {
            while self.peer.receive(&mut heard).unwrap() != Received::Idle {}
            if let Some(tag) = heard.0.first() {
                return *tag;
            }
            assert!(start.elapsed() < PATIENCE, "no command came");
            std::thread::yield_now();
        }
    }

    /// How many bytes of a page of guest memory are not zero.
    pub(crate) fn landed(&self, address: u64) -> usize {
        let mut page = [0u8; PAGE_SIZE];
        let slice = self.memory.get_slice(address as usize, PAGE_SIZE).unwrap();
        slice.copy_to(&mut page[..]);
        page.iter().filter(|byte| **byte != 0).count()
    }

    /// The guest puts a page of its memory to another use.
    pub(crate) fn clear(&self, address: u64) {
        let slice = self.memory.get_slice(address as usize, PAGE_SIZE).unwrap();
        slice.copy_from(&[0u8; PAGE_SIZE][..]);
    }
}

/// A descriptor that someone else closes.
struct Descriptor(std::os::fd::RawFd);

impl std::os::fd::AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0
    }
}
