//! A device server and its claimants in one process, with a real NVMe controller behind VFIO: what
//! a tenant leaves behind, and what an I/O costs.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use farbus_device_server::exports::{Export, Exports};
use farbus_device_server::manager::Manager;
use farbus_fabric::session::client;
use farbus_fabric::wire::ExportName;
use farbus_integration::counting;
use farbus_shadow_mem::polling::Polling;
use farbus_shadow_mem::remote::{LinkInterest, RemoteFunction};
use farbus_vfio::Function;
use farbus_vfio::driver::{DriverConfig, NvmeDriver, block_command};
use farbus_vfio::nvme::{PAGE_SIZE, SubmissionEntry, cc, csts, nvm, reg};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::watched::Watched;
use super::{Outcome, ensure, open};

const PATIENCE: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_millis(50);
/// Blocks that the first tenant writes, and how it fills them.
const PATTERN: u8 = 0xa5;
const PATTERN_LEN: usize = 64 << 10;
/// Features with values that a driver changes (NVMe 1.4 §5.21.1): temperature threshold,
/// volatile write cache, asynchronous event configuration; and what they are changed to.
const FEATURES: [(u8, u32); 3] = [(4, 0x0123), (6, 0), (11, 0x0003)];
/// Transfers whose cost is looked at; QEMU's controller takes no longer ones.
const SIZES: [usize; 4] = [512, 4096, 64 << 10, 512 << 10];

/// A device server's connection manager with one export.
struct Server {
    address: String,
    name: ExportName,
    stop: UnixStream,
    manager: JoinHandle<std::io::Result<()>>,
}

impl Server {
    fn start(function: Arc<dyn Function>) -> Outcome<Self> {
        let name = ExportName::new("disk0")?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        let exports = Exports::new(vec![Export::new(name.clone(), function)]);
        let manager = Manager::new(listener, exports, Polling::Adaptive)?;
        let (stop, stopped) = UnixStream::pair()?;
        let stopped: OwnedFd = stopped.into();
        Ok(Self {
            address,
            name,
            stop,
            manager: thread::spawn(move || manager.run(&stopped)),
        })
    }

    /// Claims the export, which may still be on its way back from the claimant before.
    fn claim(&self) -> Outcome<Tenant> {
        let begun = Instant::now();
        let claimed = loop {
            match client::claim(&self.address, &self.name, "check", PATIENCE) {
                Ok(claimed) => break claimed,
                Err(error) if begun.elapsed() > PATIENCE => return Err(error.into()),
                // Each try is a thread of the device server's, and these are counted.
                Err(_) => thread::sleep(RETRY),
            }
        };
        let remote = Arc::new(RemoteFunction::new("check".into(), claimed)?);
        let stop = Arc::new(AtomicBool::new(false));
        let (served, stopped) = (remote.clone(), stop.clone());
        let link =
            thread::spawn(move || serve(&served, &stopped).map_err(|error| error.to_string()));
        Ok(Tenant { remote, stop, link })
    }

    fn stop(mut self) -> Outcome {
        self.stop.write_all(b"x")?;
        self.manager
            .join()
            .map_err(|_| "the manager has panicked")??;
        Ok(())
    }
}

/// Whoever has the claim; a thread serves its link as the agent's event loop does.
struct Tenant {
    remote: Arc<RemoteFunction>,
    stop: Arc<AtomicBool>,
    link: JoinHandle<Result<(), String>>,
}

impl Tenant {
    /// Enables the controller and gives it two queue pairs.
    fn driver(&self) -> Outcome<NvmeDriver<RemoteFunction>> {
        let config = DriverConfig {
            memory: 16 << 20,
            timeout: PATIENCE,
            ..DriverConfig::default()
        };
        let mut driver = NvmeDriver::new(self.remote.clone(), config)?;
        driver.enable()?;
        driver.request_queues(2)?;
        for queue in [1, 2] {
            driver.create_queue_pair(queue, 64, Some(queue))?;
        }
        Ok(driver)
    }

    /// Ends as a process does that is killed: the connection closes, and nothing is put in order.
    fn vanish(self) -> Outcome {
        self.stop.store(true, Ordering::Release);
        self.link
            .join()
            .map_err(|_| "the link's thread has panicked")??;
        Ok(())
    }
}

/// Serves a link as the agent's event loop does.
fn serve(remote: &RemoteFunction, stopped: &AtomicBool) -> Outcome {
    let epoll = Epoll::new()?;
    let mut watched: Option<LinkInterest> = None;
    let mut ticked = Instant::now();
    let mut events = [EpollEvent::default()];
    while !stopped.load(Ordering::Acquire) {
        let wanted = remote.link_interest();
        if wanted != watched {
            if let Some(old) = watched {
                epoll.ctl(ControlOperation::Delete, old.descriptor, events[0])?;
            }
            if let Some(new) = wanted {
                let mut set = EventSet::IN;
                set.set(EventSet::OUT, new.writable);
                epoll.ctl(
                    ControlOperation::Add,
                    new.descriptor,
                    EpollEvent::new(set, 0),
                )?;
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
    Ok(())
}

/// The whole check, on a controller with at least two I/O queues and 16 MiB.
pub(crate) fn check(address: &str) -> Outcome {
    let watched = Arc::new(Watched::new(Arc::new(open(address)?)));
    let server = Server::start(watched.clone())?;

    let first = server.claim()?;
    let mut driver = first.driver()?;
    let block = driver.namespace()?.block_size;
    let before = features(&mut driver)?;
    for (id, value) in FEATURES {
        driver.set_feature(id, value)?;
    }
    let changed = features(&mut driver)?;
    println!("features: {before:x?}, changed to {changed:x?}");
    ensure(
        before.iter().zip(&changed).all(|(a, b)| a != b),
        "a feature has not changed",
    )?;
    let pattern = vec![PATTERN; PATTERN_LEN];
    driver.write(1, 0, block, &pattern)?;
    let mut read = vec![0; PATTERN_LEN];
    driver.read(2, 0, block, &mut read)?;
    ensure(read == pattern, "the data came back changed")?;
    drop(driver);
    first.vanish()?;

    let second = server.claim()?;
    let seen = watched.seen();
    println!("memory of the first tenant and of the second: {seen:?}");
    ensure(
        seen.used_when_given == 0,
        "the device got memory that had been used",
    )?;
    ensure(
        seen.used_when_taken >= PATTERN_LEN as u64,
        "the first tenant's data were not where they were looked for",
    )?;
    let mut status = [0; 4];
    for (register, bit) in [(reg::CSTS, csts::RDY), (reg::CC, cc::EN)] {
        let bar = farbus_vfio::RegionIndex::BAR0;
        second.remote.region_read(bar, register, &mut status)?;
        ensure(
            u32::from_le_bytes(status) & bit == 0,
            "the controller is on",
        )?;
    }
    let mut driver = second.driver()?;
    let found = features(&mut driver)?;
    println!("features of the second tenant: {found:x?}");
    ensure(found == before, "a feature is as the first tenant left it")?;

    cost(&second, &mut driver, block)?;
    drop(driver);
    second.vanish()?;
    server.stop()
}

fn features(driver: &mut NvmeDriver<RemoteFunction>) -> Outcome<Vec<u32>> {
    let values = FEATURES.iter().map(|(id, _)| driver.get_feature(*id, 0));
    Ok(values.collect::<Result<_, _>>()?)
}

/// How often the device server's thread of this claim has allocated so far.
fn allocations() -> BTreeMap<String, u64> {
    let mut all = counting::allocations(|_| true);
    all.retain(|thread, _| thread.starts_with("attachment"));
    all
}

/// One message each way per command of any size, and no allocation in the device server.
fn cost(tenant: &Tenant, driver: &mut NvmeDriver<RemoteFunction>, block: u32) -> Outcome {
    let longest = SIZES.iter().max().copied().unwrap_or_default();
    let buffer = driver.memory().allocate(longest + PAGE_SIZE)?;
    let mut commands = Vec::new();
    for len in SIZES.into_iter().filter(|len| *len >= block as usize) {
        for opcode in [nvm::WRITE, nvm::READ] {
            let prps = driver.prps(buffer, 512, len)?;
            let mut command = block_command(opcode, 0, len, block);
            command.set_prps(prps.prp1, prps.prp2);
            commands.push((opcode, len, command));
        }
    }
    for (opcode, len, command) in &commands {
        let bytes = *len as u64;
        let expected = match *opcode {
            nvm::WRITE => [1, 1, bytes, 0],
            _ => [1, 1, 0, bytes],
        };
        // A ping a second may fall in between.
        let mut seen = Vec::new();
        for _ in 0..3 {
            seen.push(crossed(tenant, driver, *command)?);
        }
        println!("opcode {opcode:#x}, {len} bytes: {:?}", seen[0]);
        ensure(
            seen.contains(&expected),
            format!("messages and bytes each way: {seen:?}, not {expected:?}"),
        )?;
    }

    let before = allocations();
    ensure(
        !before.is_empty(),
        format!(
            "the counter does not see the device server, but {:?}",
            counting::allocations(|_| true)
        ),
    )?;
    let begun = Instant::now();
    let mut done = 0_u64;
    while begun.elapsed() < Duration::from_secs(2) {
        for (_, _, command) in &commands {
            driver.command(1, *command)?;
            done += 1;
        }
    }
    let allocated = counting::since(&before, allocations());
    println!("allocations during {done} commands: {allocated:?}");
    ensure(allocated.is_empty(), "the device server allocates for I/O")
}

/// Messages and bytes of data that a command sends and receives.
fn crossed(
    tenant: &Tenant,
    driver: &mut NvmeDriver<RemoteFunction>,
    command: SubmissionEntry,
) -> Outcome<[u64; 4]> {
    let before = tenant.remote.counters().ok_or("there is no link")?;
    driver.command(1, command)?;
    let after = tenant.remote.counters().ok_or("there is no link")?;
    Ok([
        after.messages_sent - before.messages_sent,
        after.messages_received - before.messages_received,
        after.payload_sent - before.payload_sent,
        after.payload_received - before.payload_received,
    ])
}
