//! No allocation per I/O on either side: the whole path in one process (software drive,
//! connection manager, TCP, remote function, vfio-user endpoint in the agent's own event loop),
//! driven through the socket as a VMM drives it, under an allocator that counts for each
//! thread.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use farbus_compute_agent::custody::Custody;
use farbus_compute_agent::reconnect::Source;
use farbus_compute_agent::vfio_user::Endpoint;
use farbus_compute_agent::worker::Worker;
use farbus_device_server::exports::{Export, Exports};
use farbus_device_server::manager::Manager;
use farbus_fabric::FabricError;
use farbus_fabric::provider::Options;
use farbus_fabric::session::{ClaimedLink, client};
use farbus_fabric::wire::{ExportName, RateLimits};
use farbus_integration::counting::{self, Counting};
use farbus_integration::scratch::Scratch;
use farbus_shadow_mem::polling::Polling;
use farbus_shadow_mem::remote::RemoteFunction;
use farbus_shadow_mem::shadow::shared_memory;
use farbus_vfio::driver::{DmaBuffer, DriverConfig, NvmeDriver, Prps, block_command};
use farbus_vfio::nvme::{PAGE_SIZE, SubmissionEntry, nvm};
use farbus_vfio::soft_nvme::SoftNvme;
use farbus_vfio::user::{Client, UserFunction};
use farbus_vfio::{DmaAccess, DmaWindow, Function, Iova};
use rustix::process::{Signal, getpid, kill_process};
use rustix::thread::gettid;

const BLOCK: u32 = 512;
const PATIENCE: Duration = Duration::from_secs(20);
const QUEUES: u16 = 2;
const DEPTH: usize = 32;
const SIZES: [usize; 6] = [512, 4096, 12 << 10, 64 << 10, 128 << 10, 1 << 20];

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often each thread of the daemons has allocated: all threads but this one, which drives
/// the test as a VMM would, and the test harness's.
fn daemon_allocations() -> BTreeMap<String, u64> {
    counting::allocations(|id| id != gettid() && id != getpid())
}

/// The threads that allocated while `act` ran, and how often.
fn allocated_during(act: impl FnOnce()) -> BTreeMap<String, u64> {
    let before = daemon_allocations();
    act();
    counting::since(&before, daemon_allocations())
}

/// Fails unless threads with these names are among those that allocated.
fn assert_seen(allocated: &BTreeMap<String, u64>, names: &[&str]) {
    for name in names {
        assert!(
            allocated.keys().any(|thread| thread.starts_with(name)),
            "the counter does not see {name}, but {allocated:?}"
        );
    }
}

/// Both daemons' working parts, each in a thread of this process.
struct Daemons {
    scratch: Scratch,
    source: Source,
    stop_manager: UnixStream,
    manager: JoinHandle<()>,
    agent: JoinHandle<()>,
}

impl Daemons {
    fn start() -> Self {
        let scratch = Scratch::new("allocations").unwrap();
        let spec = format!("path={},size=256MiB", scratch.join("disk.img").display());
        let drive = SoftNvme::open(&spec.parse().unwrap()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let source = Source {
            address: listener.local_addr().unwrap().to_string(),
            export: ExportName::new("disk0").unwrap(),
            providers: Options::tcp(),
            allow_tcp_fallback: false,
            limits: RateLimits::NONE,
        };
        let exports = Exports::new(vec![Export::new(source.export.clone(), Arc::new(drive))]);
        let manager = Manager::new(listener, exports, Polling::Adaptive).unwrap();
        let (stop_manager, stopped) = UnixStream::pair().unwrap();
        let stopped: OwnedFd = stopped.into();
        let manager = Builder::new()
            .name("manager".into())
            .spawn(move || manager.run(&stopped).unwrap())
            .unwrap();
        let claimed = claim(&source).unwrap();
        let remote = Arc::new(RemoteFunction::new("test".into(), claimed).unwrap());
        let endpoint = Endpoint::bind(&scratch.join("disk0.sock"), remote.clone()).unwrap();
        let export = source.clone();
        let agent = Builder::new()
            .name("agent".into())
            .spawn(move || {
                let worker =
                    Worker::new(endpoint, remote, export, Polling::Adaptive, Custody::none())
                        .unwrap();
                worker.run().unwrap();
            })
            .unwrap();
        Self {
            scratch,
            source,
            stop_manager,
            manager,
            agent,
        }
    }

    fn connect(&self) -> NvmeDriver<UserFunction> {
        let path = self.scratch.join("disk0.sock");
        let function = Arc::new(user_function(&path));
        let config = DriverConfig {
            memory: 128 << 20,
            ..DriverConfig::default()
        };
        let mut driver = NvmeDriver::new(function, config).unwrap();
        driver.enable().unwrap();
        assert!(driver.request_queues(QUEUES).unwrap() >= QUEUES);
        for queue in 1..=QUEUES {
            driver.create_queue_pair(queue, 64, Some(queue)).unwrap();
        }
        driver
    }

    /// What a second claimant gets.
    fn claim(&self) -> Result<ClaimedLink, FabricError> {
        claim(&self.source)
    }

    /// Ends the agent as an operator would, then the device server.
    fn stop(mut self) {
        kill_process(getpid(), Signal::TERM).unwrap();
        self.agent.join().unwrap();
        self.stop_manager.write_all(b"x").unwrap();
        self.manager.join().unwrap();
    }
}

fn claim(source: &Source) -> Result<ClaimedLink, FabricError> {
    client::claim(&source.address, &source.export, "test", PATIENCE)
}

fn user_function(path: &Path) -> UserFunction {
    let client = Client::connect(path, PATIENCE).unwrap();
    UserFunction::new(client, "test".into()).unwrap()
}

/// Buffers with the PRPs for each size, made ready once.
struct Workload {
    /// By size, then by slot: contiguous memory, from the middle of a page on.
    contiguous: Vec<Vec<Prps>>,
    /// By size: every other page of its buffer, which no two pages of can be joined.
    scattered: Vec<[u64; 2]>,
}

impl Workload {
    fn new(driver: &mut NvmeDriver<UserFunction>) -> Self {
        let longest = SIZES[SIZES.len() - 1];
        let buffers: Vec<_> = (0..DEPTH * usize::from(QUEUES))
            .map(|_| driver.memory().allocate(longest + PAGE_SIZE).unwrap())
            .collect();
        let contiguous = SIZES
            .iter()
            .map(|len| {
                let prps = |buffer: &DmaBuffer| driver.prps(*buffer, 512, *len).unwrap();
                buffers.iter().map(prps).collect()
            })
            .collect();
        let sparse = driver.memory().allocate(2 * longest).unwrap();
        let page = |n: usize| sparse.iova().0 + (2 * n * PAGE_SIZE) as u64;
        let scattered = SIZES
            .iter()
            .map(|len| match len.div_ceil(PAGE_SIZE) {
                1 => [page(0), 0],
                2 => [page(0), page(1)],
                pages => {
                    let list = driver.memory().allocate(pages * 8).unwrap();
                    for n in 1..pages {
                        let entry = page(n).to_le_bytes();
                        driver.memory().write(list, (n - 1) * 8, &entry).unwrap();
                    }
                    [page(0), list.iova().0]
                }
            })
            .collect();
        Self {
            contiguous,
            scattered,
        }
    }

    /// Reads and writes of every size, one at a time, on both queues, scattered and not.
    fn one_at_a_time(&self, driver: &mut NvmeDriver<UserFunction>) {
        for (index, len) in SIZES.into_iter().enumerate() {
            let prps = self.contiguous[index][0];
            for [prp1, prp2] in [self.scattered[index], [prps.prp1, prps.prp2]] {
                for opcode in [nvm::WRITE, nvm::READ] {
                    for queue in 1..=QUEUES {
                        let command = io(opcode, 0, len, prp1, prp2);
                        driver.command(queue, command).unwrap();
                    }
                }
            }
        }
    }

    /// Reads and writes of every size, on each queue as many at a time as its depth; every
    /// third has its data scattered.
    fn at_depth(&self, driver: &mut NvmeDriver<UserFunction>) {
        for (index, len) in SIZES.into_iter().enumerate() {
            for opcode in [nvm::WRITE, nvm::READ] {
                let mut sent = Vec::new();
                for (slot, prps) in self.contiguous[index].iter().enumerate() {
                    let queue = 1 + slot as u16 % QUEUES;
                    let lba = (slot * SIZES[SIZES.len() - 1]) as u64 / u64::from(BLOCK);
                    let [prp1, prp2] = match slot % 3 {
                        0 => self.scattered[index],
                        _ => [prps.prp1, prps.prp2],
                    };
                    let command = io(opcode, lba, len, prp1, prp2);
                    sent.push((queue, driver.submit(queue, command).unwrap()));
                }
                for (queue, cid) in sent {
                    assert!(driver.wait(queue, cid).unwrap().status.is_success());
                }
            }
        }
    }
}

fn io(opcode: u8, lba: u64, len: usize, prp1: u64, prp2: u64) -> SubmissionEntry {
    let mut command = block_command(opcode, lba, len, BLOCK);
    command.set_prps(prp1, prp2);
    command
}

/// Repeats something for so long that what the daemons do every second is done, too.
fn for_a_while(mut act: impl FnMut()) {
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(1500) {
        act();
    }
}

#[test]
fn neither_side_allocates_for_io() {
    let daemons = Daemons::start();
    let mut driver = daemons.connect();
    let workload = Workload::new(&mut driver);
    // What is kept for good is set aside by the first commands of each kind.
    for _ in 0..3 {
        workload.one_at_a_time(&mut driver);
        workload.at_depth(&mut driver);
    }

    let one_at_a_time = allocated_during(|| {
        for_a_while(|| workload.one_at_a_time(&mut driver));
    });
    let at_depth = allocated_during(|| {
        for_a_while(|| workload.at_depth(&mut driver));
    });

    assert_eq!(one_at_a_time, BTreeMap::new());
    assert_eq!(at_depth, BTreeMap::new());

    // The counter does see those of whom it counts nothing: the agent allocates for memory
    // that it is given, the device server for a second claimant.
    let more = DmaWindow {
        iova: Iova(0x10_0000_0000),
        memory: shared_memory("more", PAGE_SIZE).unwrap(),
        offset: 0,
        len: PAGE_SIZE,
        access: DmaAccess::ReadWrite,
    };
    let mapped = allocated_during(|| driver.function().map_dma(&more).unwrap());
    assert_seen(&mapped, &["agent"]);
    let refused = allocated_during(|| assert!(daemons.claim().is_err()));
    assert_seen(&refused, &["manager"]);
    // The thread of the claim at hand has allocated all it needs to get where it is.
    assert_seen(&daemon_allocations(), &["agent", "attachment", "nvme-io"]);
    drop(driver);
    daemons.stop();
}
