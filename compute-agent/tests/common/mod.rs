//! A function that records what is done to it, an endpoint that serves it in a thread of its
//! own, and a client that sends whatever bytes a test wants.
#![allow(
    dead_code,
    unused_imports,
    reason = "each test file uses what it needs of it"
)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use farbus_compute_agent::api::Msix;
use farbus_compute_agent::vfio_user::Endpoint;
use farbus_vfio::config::{BarKind, ConfigImage, MsixLayout};
use farbus_vfio::user::body::{DmaMap, IrqAction, IrqData, SetIrqs, Version};
pub(crate) use farbus_vfio::user::event::borrow;
use farbus_vfio::user::{Client, Command, Header};
use farbus_vfio::{
    DmaAccess, DmaWindow, Function, FunctionError, FunctionInfo, InterruptCounts, InterruptKind,
    Iova, RegionIndex, RegionInfo,
};
use vm_memory::{Bytes, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::tempdir::TempDir;

/// How long a test waits for what must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) const BAR0_SIZE: u64 = 0x4000;
pub(crate) const ROM_SIZE: u64 = 0x1000;
pub(crate) const MSIX: u32 = 40;

/// A write of an IOVA here makes the function write [`DMA_MARK`] to that address.
pub(crate) const DMA_DOORBELL: u64 = 0x3ff8;
pub(crate) const DMA_MARK: u64 = 0x5555_aaaa_1234_fedc;

/// What was done to the function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    ConfigWrite(u16, Vec<u8>),
    RegionWrite(u8, u64, Vec<u8>),
    Map(u64, usize, DmaAccess),
    Unmap(u64, u64),
    /// Which vectors from the first on got an eventfd.
    Interrupts(InterruptKind, u32, Vec<bool>),
    Mask(InterruptKind, u32, bool),
    Reset,
}

pub(crate) struct TestFunction {
    info: FunctionInfo,
    config: Mutex<Vec<u8>>,
    bar: Mutex<Vec<u8>>,
    pub(crate) windows: Mutex<BTreeMap<u64, DmaWindow>>,
    pub(crate) events: Mutex<BTreeMap<(InterruptKind, u32), Arc<EventFd>>>,
    calls: Mutex<Vec<Call>>,
    /// How long each register write takes.
    pub(crate) write_takes: Mutex<Duration>,
}

impl TestFunction {
    pub(crate) fn new() -> Self {
        let config = (0..4096).map(|at| (at % 251) as u8).collect();
        Self {
            info: FunctionInfo {
                label: "test".into(),
                config_size: 4096,
                regions: vec![
                    RegionInfo {
                        index: RegionIndex::BAR0,
                        size: BAR0_SIZE,
                    },
                    RegionInfo {
                        index: RegionIndex::ROM,
                        size: ROM_SIZE,
                    },
                ],
                interrupts: InterruptCounts {
                    intx: 0,
                    msi: 4,
                    msix: MSIX,
                },
                resettable: true,
                iova_ranges: vec![0..=u64::MAX],
            },
            config: Mutex::new(config),
            bar: Mutex::new(vec![0; BAR0_SIZE as usize]),
            windows: Mutex::default(),
            events: Mutex::default(),
            calls: Mutex::default(),
            write_takes: Mutex::default(),
        }
    }

    /// One with a configuration space that means something: an NVMe controller's, whose MSI-X has its
    /// table and pending bits in BAR 0.
    pub(crate) fn with_msix(layout: MsixLayout) -> Self {
        let image = ConfigImage::new(0x4642, 1, 0x01_08_02)
            .bar(0, BarKind::Memory64)
            .power_management()
            .msix(layout)
            .express()
            .build();
        Self {
            config: Mutex::new(image),
            ..Self::new()
        }
    }

    /// What was done since the last time.
    pub(crate) fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    fn record(&self, call: Call) {
        self.calls.lock().unwrap().push(call);
    }

    /// Raises an interrupt.
    pub(crate) fn fire(&self, kind: InterruptKind, vector: u32) {
        self.events.lock().unwrap()[&(kind, vector)]
            .write(1)
            .unwrap();
    }

    /// Writes to memory as the device.
    pub(crate) fn dma_write(&self, iova: u64, value: u64) {
        let windows = self.windows.lock().unwrap();
        let (start, window) = windows.range(..=iova).next_back().expect("no window there");
        assert!(
            iova - start + 8 <= window.len as u64,
            "past the end of {window:?}"
        );
        let memory = window.memory.as_volatile_slice();
        memory
            .write_obj(value, window.offset + (iova - start) as usize)
            .unwrap();
    }
}

impl Function for TestFunction {
    fn info(&self) -> &FunctionInfo {
        &self.info
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        let at = usize::from(offset);
        data.copy_from_slice(&self.config.lock().unwrap()[at..at + data.len()]);
        Ok(())
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), FunctionError> {
        let at = usize::from(offset);
        self.config.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        self.record(Call::ConfigWrite(offset, data.to_vec()));
        Ok(())
    }

    fn region_read(&self, _: RegionIndex, at: u64, data: &mut [u8]) -> Result<(), FunctionError> {
        let at = at as usize;
        data.copy_from_slice(&self.bar.lock().unwrap()[at..at + data.len()]);
        Ok(())
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        std::thread::sleep(*self.write_takes.lock().unwrap());
        if offset == DMA_DOORBELL {
            self.dma_write(u64::from_ne_bytes(data.try_into().unwrap()), DMA_MARK);
        }
        let at = offset as usize;
        self.bar.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        self.record(Call::RegionWrite(region.0, offset, data.to_vec()));
        Ok(())
    }

    fn map_dma(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        self.record(Call::Map(window.iova.0, window.len, window.access));
        self.windows
            .lock()
            .unwrap()
            .insert(window.iova.0, window.clone());
        Ok(())
    }

    fn unmap_dma(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        self.record(Call::Unmap(iova.0, len));
        let within = |start: &u64| (iova.0..iova.0 + len).contains(start);
        self.windows
            .lock()
            .unwrap()
            .retain(|start, _| !within(start));
        Ok(())
    }

    fn set_interrupts(
        &self,
        kind: InterruptKind,
        first: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        let set = events.iter().map(Option::is_some).collect();
        self.record(Call::Interrupts(kind, first, set));
        let mut all = self.events.lock().unwrap();
        for (vector, event) in (first..).zip(events) {
            all.remove(&(kind, vector));
            all.extend(event.clone().map(|event| ((kind, vector), event)));
        }
        Ok(())
    }

    fn mask_interrupt(&self, kind: InterruptKind, at: u32, to: bool) -> Result<(), FunctionError> {
        self.record(Call::Mask(kind, at, to));
        Ok(())
    }

    fn reset(&self) -> Result<(), FunctionError> {
        self.record(Call::Reset);
        self.bar.lock().unwrap().fill(0);
        Ok(())
    }
}

/// An endpoint in an event loop in a thread.
pub(crate) struct Server {
    pub(crate) function: Arc<TestFunction>,
    pub(crate) path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _directory: TempDir,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::offer(TestFunction::new(), Msix::Auto)
    }

    /// Offers this function, with MSI-X kept like that.
    pub(crate) fn offer(function: TestFunction, msix: Msix) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("fn.sock");
        let function = Arc::new(function);
        let endpoint = Endpoint::bind(&path, function.clone())
            .unwrap()
            .with_msix(msix);
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let stop = stop.clone();
            move || {
                let mut events = EventManager::new().unwrap();
                let id = events.add_subscriber(endpoint);
                while !stop.load(Ordering::SeqCst) {
                    events.run_with_timeout(5).unwrap();
                }
                events.remove_subscriber(id).unwrap().shutdown();
            }
        });
        Self {
            function,
            path,
            stop,
            thread: Some(thread),
            _directory: directory,
        }
    }

    /// Shuts the endpoint down in order.
    pub(crate) fn stop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread
            .take()
            .map_or(Ok(()), JoinHandle::join)
            .expect("the server panicked");
    }

    pub(crate) fn client(&self) -> Client {
        connected(&self.path)
    }

    pub(crate) fn raw(&self) -> Raw {
        Raw::connect(&self.path)
    }

    /// A connection that is past its handshake.
    pub(crate) fn greeted(&self) -> Raw {
        let mut raw = self.raw();
        raw.hello();
        raw
    }

    /// Asserts that the server still does what it should for a client that behaves.
    pub(crate) fn assert_serves(&self) {
        let mut client = self.client();
        let mut data = [0; 8];
        client.region_write(0, 0x1000, &7u64.to_ne_bytes()).unwrap();
        client.region_read(0, 0x1000, &mut data).unwrap();
        assert_eq!(u64::from_ne_bytes(data), 7);
        drop(client);
        self.wait_for(|calls| calls.contains(&Call::Reset));
        self.function.take_calls();
    }

    /// Waits until what was done to the function fulfils `condition`.
    pub(crate) fn wait_for(&self, condition: impl Fn(&[Call]) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !condition(&self.function.calls()) {
            assert!(
                Instant::now() < end,
                "never happened; calls: {:?}",
                self.function.calls()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Connects and shakes hands; while the end of the client before is still being worked on,
/// the server says that it is busy.
pub(crate) fn connected(path: &Path) -> Client {
    let end = Instant::now() + PATIENCE;
    loop {
        match Client::connect(path, PATIENCE) {
            Ok(client) => return client,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A reply's header and body.
pub(crate) type Answer = (Header, Vec<u8>);

/// A client that sends any bytes.
pub(crate) struct Raw {
    pub(crate) stream: UnixStream,
}

impl Raw {
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub(crate) fn send_fds(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        assert_eq!(
            self.stream.send_with_fds(&[bytes], &fds).unwrap(),
            bytes.len()
        );
    }

    pub(crate) fn hello(&mut self) {
        self.send(&hello());
        let (header, _) = self.reply();
        assert!(!header.is_error(), "{header:?}");
    }

    /// The next reply.
    pub(crate) fn reply(&mut self) -> Answer {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).expect("no reply");
        let header = Header::decode(&head);
        let mut body = vec![0; header.size as usize - head.len()];
        self.stream.read_exact(&mut body).expect("half a reply");
        (header, body)
    }

    /// Sends a message and returns its reply.
    pub(crate) fn ask(&mut self, bytes: &[u8]) -> Answer {
        self.send(bytes);
        self.reply()
    }

    /// The errno of the next reply, which must be an error; it has no body.
    pub(crate) fn errno(&mut self) -> i32 {
        let (header, body) = self.reply();
        assert!(header.is_error() && body.is_empty(), "{header:?}");
        header.error as i32
    }

    pub(crate) fn ask_errno(&mut self, bytes: &[u8]) -> i32 {
        self.send(bytes);
        self.errno()
    }

    /// Asserts that the connection is past what went wrong, and in step.
    pub(crate) fn assert_in_step(&mut self) {
        let read = message(
            0x7777,
            Command::RegionRead as u16,
            0,
            &region_access(7, 0, 4),
        );
        let (header, body) = self.ask(&read);
        assert_eq!(
            (header.id, header.is_error(), body.len()),
            (0x7777, false, 20)
        );
    }

    /// Asserts that the server closes the connection, with nothing more to read.
    pub(crate) fn assert_closed(&mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => assert_eq!(rest, [0u8; 0]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
    }
}

/// A message with a header of its own making.
pub(crate) fn message(id: u16, command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
    let header = Header {
        id,
        command,
        size: 16 + body.len() as u32,
        flags,
        error: 0,
    };
    [&header.encode()[..], body].concat()
}

pub(crate) fn command(command: Command, body: &[u8]) -> Vec<u8> {
    message(1, command as u16, 0, body)
}

pub(crate) fn hello() -> Vec<u8> {
    let version = Version { major: 0, minor: 1 };
    let data = b"{\"capabilities\":{\"max_msg_fds\":1}}\0";
    command(Command::Version, &[&version.encode()[..], data].concat())
}

pub(crate) fn region_access(region: u32, offset: u64, count: u32) -> [u8; 16] {
    farbus_vfio::user::body::RegionAccess {
        offset,
        region,
        count,
    }
    .encode()
}

pub(crate) fn dma_map(address: u64, size: u64, offset: u64, flags: u32) -> Vec<u8> {
    command(
        Command::DmaMap,
        &DmaMap {
            argsz: 32,
            flags,
            offset,
            address,
            size,
        }
        .encode(),
    )
}

pub(crate) fn memfd(size: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, size).unwrap();
    fd
}

/// Reads 8 bytes of a file, as the guest would see them.
pub(crate) fn peek(file: &OwnedFd, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::pread(file, &mut bytes, offset).unwrap();
    u64::from_ne_bytes(bytes)
}

pub(crate) fn eventfd() -> EventFd {
    EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap()
}

pub(crate) fn fds<T: AsFd>(owners: &[T]) -> Vec<BorrowedFd<'_>> {
    owners.iter().map(AsFd::as_fd).collect()
}

/// Sets MSI-X eventfds from vector `start` on.
pub(crate) fn set_vectors(client: &mut Client, start: u32, events: &[EventFd]) {
    let fds: Vec<_> = events.iter().map(borrow).collect();
    let request = SetIrqs {
        index: 2,
        start,
        count: events.len() as u32,
        action: IrqAction::Trigger,
        data: IrqData::EventFd,
    };
    client.set_irqs(&request, &fds).unwrap();
}
