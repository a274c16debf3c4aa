//! What an I/O costs each daemon in instructions and system calls: counts, which do not depend on how busy the
//! machine is, held to thresholds.
//!
//! Instructions are those of user space, counted by callgrind over a daemon's whole life; the difference between a
//! life with many I/Os and one with few is what the I/Os took. System calls are counted by strace while the I/Os
//! run. The load is a vfio-user client that submits a batch, waits for all of it, and submits the next one: so a
//! daemon finds the same batches each time. The thresholds are for release builds.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use farbus_integration::attached::{EXPORT, address};
use farbus_integration::counts::{Instructions, SystemCalls, has_tool, patience};
use farbus_integration::daemon::Daemon;
use farbus_integration::process::Kill;
use farbus_integration::report::TestResult;
use farbus_integration::scratch::Scratch;
use farbus_integration::skip;
use farbus_vfio::driver::{DriverConfig, NvmeDriver, block_command};
use farbus_vfio::nvme::nvm;
use farbus_vfio::user::{Client, UserFunction};

const SERVER: &str = "farbus-device-server";
const AGENT: &str = "farbus-compute-agent";
const DRIVE: &str = "backing=null,size=1GiB";
const BLOCK: u32 = 512;
const LEN: usize = 4096;

/// What one I/O may cost a daemon.
struct Threshold {
    opcode: u8,
    depth: usize,
    /// Instructions of the agent, and of the device server.
    instructions: (f64, f64),
    /// System calls of the same.
    calls: (f64, f64),
}

/// About 15 % above what was measured on a quiet machine. On a busy one it is less, at depth 1 by up to a fifth.
const THRESHOLDS: [Threshold; 4] = [
    Threshold {
        opcode: nvm::READ,
        depth: 1,
        instructions: (14_600.0, 6_600.0),
        calls: (7.0, 3.5),
    },
    Threshold {
        opcode: nvm::WRITE,
        depth: 1,
        instructions: (13_800.0, 7_700.0),
        calls: (7.0, 3.5),
    },
    Threshold {
        opcode: nvm::READ,
        depth: 32,
        instructions: (2_740.0, 2_400.0),
        calls: (0.45, 0.22),
    },
    Threshold {
        opcode: nvm::WRITE,
        depth: 32,
        instructions: (2_400.0, 2_730.0),
        calls: (0.45, 0.24),
    },
];

/// I/Os that are counted, after as many as it takes to have touched everything once.
const COUNTED: usize = 3200;
const FIRST: usize = 640;

/// Nothing is waited for so long that it is not stuck, also under valgrind.
const PATIENCE: Duration = Duration::from_secs(30);

/// The two daemons with a drive that holds nothing between them; `under` gives what to run each of them under.
struct Bed {
    server: Daemon,
    agent: Daemon,
    scratch: Scratch,
}

impl Bed {
    fn start(server: &[&str], agent: &[&str]) -> Self {
        let scratch = Scratch::new("instructions").unwrap();
        let socket = scratch.join("disk0.sock").display().to_string();
        let mut arguments = vec!["export", "--soft-nvme", DRIVE, "--name", EXPORT];
        arguments.extend(["--listen", "127.0.0.1:0"]);
        arguments.extend(NEVER);
        let server = Daemon::start_under(server, SERVER, &arguments).unwrap();
        let from = address(&server);
        let mut arguments = vec!["attach", "--from", &from, "--export", EXPORT];
        arguments.extend(["--vfio-user", &socket]);
        arguments.extend(NEVER);
        let agent = Daemon::start_under(agent, AGENT, &arguments).unwrap();
        Self {
            server,
            agent,
            scratch,
        }
    }

    fn drive(&self) -> Load {
        Load::new(&self.scratch.join("disk0.sock"))
    }

    /// Ends both in order, as callgrind writes its count at the end.
    fn end(mut self) {
        for daemon in [&mut self.agent, &mut self.server] {
            daemon.signal(Kill::Term).unwrap();
            assert!(daemon.wait_end(patience()).unwrap().success());
        }
    }
}

/// Without waiting actively, which would count what the machine's speed makes of it.
const NEVER: [&str; 2] = ["--poll", "never"];

/// A driver with one queue, and buffers for the deepest batch.
struct Load {
    driver: NvmeDriver<UserFunction>,
    buffers: Vec<u64>,
}

impl Load {
    fn new(socket: &Path) -> Self {
        let client = Client::connect(socket, PATIENCE).unwrap();
        let function = UserFunction::new(client, "load".into()).unwrap();
        let config = DriverConfig {
            timeout: PATIENCE,
            ..DriverConfig::default()
        };
        let mut driver = NvmeDriver::new(Arc::new(function), config).unwrap();
        driver.enable().unwrap();
        driver.request_queues(1).unwrap();
        driver.create_queue_pair(1, 128, Some(1)).unwrap();
        let depth = THRESHOLDS.iter().map(|t| t.depth).max().unwrap();
        let buffers = (0..depth)
            .map(|_| driver.memory().allocate(LEN).unwrap().iova().0)
            .collect();
        Self { driver, buffers }
    }

    /// `count` I/Os in batches of `depth`.
    fn run(&mut self, opcode: u8, depth: usize, count: usize) {
        let mut done = Vec::with_capacity(depth);
        for batch in 0..count / depth {
            for (at, buffer) in self.buffers[..depth].iter().enumerate() {
                let lba = (batch * depth + at) % 10_000 * (LEN / BLOCK as usize);
                let mut command = block_command(opcode, lba as u64, LEN, BLOCK);
                command.set_prps(*buffer, 0);
                self.driver.enqueue(1, command).unwrap();
            }
            self.driver.ring(1).unwrap();
            let mut outstanding = depth;
            while outstanding > 0 {
                done.clear();
                self.driver.reap(1, &mut done).unwrap();
                assert!(done.iter().all(|entry| entry.status.is_success()));
                outstanding -= done.len();
                if outstanding > 0 && done.is_empty() {
                    let interrupted = self.driver.wait_interrupt(1, PATIENCE).unwrap();
                    assert!(interrupted, "no interrupt");
                }
            }
        }
    }
}

/// Instructions of agent and server over a life with `count` I/Os.
fn life(opcode: u8, depth: usize, count: usize) -> (u64, u64) {
    let scratch = Scratch::new("callgrind").unwrap();
    let agent = Instructions::kept_in(&scratch, "agent");
    let server = Instructions::kept_in(&scratch, "server");
    let bed = Bed::start(&server.wrapper(), &agent.wrapper());
    let mut load = bed.drive();
    load.run(opcode, depth, count);
    drop(load);
    bed.end();
    (agent.read().unwrap(), server.read().unwrap())
}

/// Says what was measured, and returns what is above its threshold.
fn judge(what: &str, threshold: &Threshold, measured: (f64, f64), most: (f64, f64)) -> Vec<String> {
    let name = match threshold.opcode {
        nvm::READ => "read",
        _ => "write",
    };
    let depth = threshold.depth;
    [
        ("agent", measured.0, most.0),
        ("server", measured.1, most.1),
    ]
    .into_iter()
    .filter_map(|(daemon, measured, most)| {
        let line = format!(
            "4k {name} x{depth}: {measured:.2} {what} per I/O of the {daemon}, at most {most}"
        );
        println!("{line}");
        (measured > most).then_some(line)
    })
    .collect()
}

#[test]
fn instructions_per_io_stay_below_their_thresholds() -> TestResult {
    if cfg!(debug_assertions) {
        skip!("the thresholds are those of a release build");
    }
    if let Err(error) = has_tool("valgrind") {
        skip!("{error}");
    }
    let mut exceeded = Vec::new();
    for threshold in &THRESHOLDS {
        let Threshold { opcode, depth, .. } = *threshold;
        let few = life(opcode, depth, FIRST);
        let many = life(opcode, depth, FIRST + COUNTED);
        let per_io = |few: u64, many: u64| (many as f64 - few as f64) / COUNTED as f64;
        let measured = (per_io(few.0, many.0), per_io(few.1, many.1));
        exceeded.extend(judge(
            "instructions",
            threshold,
            measured,
            threshold.instructions,
        ));
    }
    assert!(exceeded.is_empty(), "{exceeded:#?}");
    Ok(())
}

#[test]
fn system_calls_per_io_stay_below_their_thresholds() -> TestResult {
    if cfg!(debug_assertions) {
        skip!("the thresholds are those of a release build");
    }
    if let Err(error) = has_tool("strace") {
        skip!("{error}");
    }
    // `env` executes its argument in place.
    let bed = Bed::start(&["env"], &["env"]);
    let mut load = bed.drive();
    match SystemCalls::of(bed.agent.pid()) {
        Ok(_) => {}
        Err(error) => skip!("{error}"),
    }
    let mut exceeded = Vec::new();
    for threshold in &THRESHOLDS {
        let Threshold { opcode, depth, .. } = *threshold;
        load.run(opcode, depth, FIRST);
        let agent = SystemCalls::of(bed.agent.pid())?;
        let server = SystemCalls::of(bed.server.pid())?;
        load.run(opcode, depth, COUNTED);
        let per_io = |calls: u64| calls as f64 / COUNTED as f64;
        let measured = (per_io(agent.end()?), per_io(server.end()?));
        exceeded.extend(judge("system calls", threshold, measured, threshold.calls));
    }
    drop(load);
    bed.end();
    assert!(exceeded.is_empty(), "{exceeded:#?}");
    Ok(())
}
