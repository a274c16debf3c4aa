//! What the tests stand on: a device server's manager in a thread, and remote functions with a
//! thread each that does what the agent's event loop does.

use std::io::Write;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use farbus_compute_agent::lanes::LaneThreads;
use farbus_device_server::exports::{Export, Exports};
use farbus_device_server::manager::Manager;
use farbus_fabric::FabricError;
use farbus_fabric::provider::Options;
use farbus_fabric::session::ClaimedLink;
use farbus_fabric::session::client::{self, Wish};
use farbus_fabric::wire::{Epoch, ExportName};
use farbus_integration::scratch::Scratch;
use farbus_shadow_mem::polling::Polling;
use farbus_shadow_mem::remote::{LinkInterest, RemoteFunction};
use farbus_vfio::Function;
use farbus_vfio::driver::{DriverConfig, NvmeDriver};
use farbus_vfio::soft_nvme::SoftNvme;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

pub(crate) const BLOCK: u32 = 512;
const PATIENCE: Duration = Duration::from_secs(20);

/// A device server with one export.
pub(crate) struct Bed {
    pub(crate) address: String,
    pub(crate) scratch: Scratch,
    stop: UnixStream,
    manager: Option<JoinHandle<()>>,
}

pub(crate) fn export_name() -> ExportName {
    ExportName::new("disk0").unwrap()
}

impl Bed {
    /// With a software drive; `options` are those of `--soft-nvme`.
    pub(crate) fn start(options: &str) -> Self {
        let scratch = Scratch::new("path").unwrap();
        let spec = format!("path={},{options}", scratch.join("disk.img").display());
        let drive = SoftNvme::open(&spec.parse().unwrap()).unwrap();
        Self::with_function(scratch, Arc::new(drive))
    }

    /// With any function.
    pub(crate) fn with_function(scratch: Scratch, function: Arc<dyn Function>) -> Self {
        Self::with_export(scratch, Export::new(export_name(), function))
    }

    /// With an export, named [`export_name`].
    pub(crate) fn with_export(scratch: Scratch, export: Export) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let exports = Exports::new(vec![export]);
        // Who sleeps at once misses what is not announced.
        let manager = Manager::new(listener, exports, Polling::Never).unwrap();
        let (stop, stopped) = UnixStream::pair().unwrap();
        let stopped: OwnedFd = stopped.into();
        let manager = std::thread::spawn(move || manager.run(&stopped).unwrap());
        Self {
            address,
            scratch,
            stop,
            manager: Some(manager),
        }
    }

    pub(crate) fn claim(&self) -> Result<ClaimedLink, FabricError> {
        client::claim(&self.address, &export_name(), "test", PATIENCE)
    }

    /// A claim that waits until the export is free.
    pub(crate) fn claim_when_free(&self) -> ClaimedLink {
        eventually("the export is free", || self.claim().ok())
    }

    pub(crate) fn attach(&self) -> Attached {
        Attached::new(self.claim_when_free())
    }

    /// In so many lanes.
    pub(crate) fn attach_in(&self, lanes: u16) -> Attached {
        let claimed = eventually("the export is free", || claim_in(&self.address, lanes).ok());
        assert_eq!(claimed.lanes.len(), usize::from(lanes - 1));
        Attached::new(claimed)
    }
}

/// A claim with so many lanes.
pub(crate) fn claim_in(address: &str, lanes: u16) -> Result<ClaimedLink, FabricError> {
    let options = Options::tcp();
    let export = export_name();
    let wish = Wish {
        lanes,
        ..Wish::of(&export)
    };
    client::claim_as(address, &wish, "test", PATIENCE, &options)
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = self.stop.write_all(b"x");
        if let Some(manager) = self.manager.take() {
            manager.join().unwrap();
        }
    }
}

/// Waits for something to come true, looking again and again.
pub(crate) fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "{what}: not within {PATIENCE:?}"
        );
        std::thread::yield_now();
    }
}

/// A remote function whose link is served.
pub(crate) struct Attached {
    pub(crate) remote: Arc<RemoteFunction>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    lanes: Option<LaneThreads>,
}

impl Attached {
    pub(crate) fn new(claimed: ClaimedLink) -> Self {
        let remote = Arc::new(RemoteFunction::new("test".into(), claimed).unwrap());
        let stop = Arc::new(AtomicBool::new(false));
        let (served, stopped) = (remote.clone(), stop.clone());
        let thread = std::thread::spawn(move || serve(&served, &stopped));
        let lanes = LaneThreads::start(&remote, Polling::Adaptive).unwrap();
        Self {
            lanes: Some(lanes),
            remote,
            stop,
            thread: Some(thread),
        }
    }

    /// A driver for it, enabled, with `queues` pairs of I/O queues.
    pub(crate) fn driver(&self, queues: u16) -> NvmeDriver<RemoteFunction> {
        let config = DriverConfig {
            memory: 64 << 20,
            ..DriverConfig::default()
        };
        let mut driver = NvmeDriver::new(self.remote.clone(), config).unwrap();
        driver.enable().unwrap();
        assert!(driver.request_queues(queues).unwrap() >= queues);
        for queue in 1..=queues {
            driver.create_queue_pair(queue, 64, Some(queue)).unwrap();
        }
        driver
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        self.remote.release();
        drop(self.lanes.take());
    }
}

/// Waits for the link as the agent's event loop does. Allocates nothing while nothing changes.
fn serve(remote: &RemoteFunction, stopped: &AtomicBool) {
    let epoll = Epoll::new().unwrap();
    let mut watched: Option<(LinkInterest, Epoch)> = None;
    let mut ticked = Instant::now();
    let mut events = [EpollEvent::default(); 2];
    let lanes = remote.lanes_event().unwrap();
    let signalled = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 1);
    epoll
        .ctl(ControlOperation::Add, lanes.as_raw_fd(), signalled)
        .unwrap();
    while !stopped.load(Ordering::Acquire) {
        // A new link may well have the old one's descriptor.
        let wanted = remote
            .link_interest()
            .map(|interest| (interest, remote.epoch()));
        if wanted != watched {
            if let Some((old, _)) = watched {
                let _ = epoll.ctl(
                    ControlOperation::Delete,
                    old.descriptor,
                    EpollEvent::default(),
                );
            }
            if let Some((new, _)) = wanted {
                let set = if new.writable {
                    EventSet::IN | EventSet::OUT
                } else {
                    EventSet::IN
                };
                epoll
                    .ctl(
                        ControlOperation::Add,
                        new.descriptor,
                        EpollEvent::new(set, 0),
                    )
                    .unwrap();
            }
            watched = wanted;
        }
        if epoll.wait(5, &mut events).unwrap_or(0) > 0 {
            while remote.service().any() {}
        }
        if ticked.elapsed() > Duration::from_secs(1) {
            ticked = Instant::now();
            remote.tick();
        }
    }
}
