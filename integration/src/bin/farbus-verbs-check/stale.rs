//! A daemon that was frozen in the middle of I/O, and was replaced meanwhile, wakes up: what it still
//! writes with the keys of its former claim reaches nobody's memory.
//!
//! Packets for a queue pair that is gone are refused before soft RoCE counts them as received. Where
//! the sender is on the same device, as it is here, refused is what was sent and not received.

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use farbus_vfio::driver::{DmaBuffer, DriverConfig, NvmeDriver, block_command};
use farbus_vfio::nvme::{CompletionEntry, nvm};
use farbus_vfio::user::{Client, UserFunction};

use crate::{Outcome, ensure};

const COUNTERS: &str = "/sys/class/infiniband/rxe0/ports/1/hw_counters";
/// A frozen peer is taken for dead after a few seconds of silence, and replaced soon after.
const PATIENCE: Duration = Duration::from_secs(90);
const BLOCK: u32 = 512;
/// Two pages: an entry's two PRPs name them.
const LEN: usize = 8192;
const DEPTH: usize = 16;

/// What the drive holds that is frozen; its replacement is empty.
const OLD: u8 = 0x11;
const NEW: u8 = 0;
/// What buffers hold before a read, and when they are used for something else.
const EMPTY: u8 = 0xee;
const OTHERS: u8 = 0x5a;

/// A drive with buffers, each for one place of it.
struct Load {
    driver: NvmeDriver<UserFunction>,
    buffers: Vec<DmaBuffer>,
    /// The buffer of each outstanding command.
    outstanding: Vec<(u16, usize)>,
}

impl Load {
    fn open(socket: &str) -> Outcome<Self> {
        let client = Client::connect(socket.as_ref(), PATIENCE)?;
        let function = UserFunction::new(client, "stale".into())?;
        let config = DriverConfig {
            timeout: PATIENCE,
            ..DriverConfig::default()
        };
        let mut driver = NvmeDriver::new(Arc::new(function), config)?;
        driver.enable()?;
        driver.request_queues(1)?;
        driver.create_queue_pair(1, 64, None)?;
        let buffers = (0..DEPTH)
            .map(|_| driver.memory().allocate(LEN))
            .collect::<Result<_, _>>()?;
        Ok(Load {
            driver,
            buffers,
            outstanding: Vec::new(),
        })
    }

    /// Sends a command for each of these buffers, with one doorbell.
    fn submit(&mut self, opcode: u8, slots: &[usize]) -> Outcome {
        for &slot in slots {
            let buffer = self.buffers[slot];
            let lba = (slot * LEN / BLOCK as usize) as u64;
            let mut command = block_command(opcode, lba, LEN, BLOCK);
            command.set_prps(buffer.iova().0, buffer.iova().0 + 4096);
            self.outstanding
                .push((self.driver.enqueue(1, command)?, slot));
        }
        Ok(self.driver.ring(1)?)
    }

    fn read(&mut self, slots: &[usize]) -> Outcome {
        for &slot in slots {
            self.fill(slot, EMPTY)?;
        }
        self.submit(nvm::READ, slots)
    }

    /// The buffers whose commands have completed.
    fn reap(&mut self) -> Outcome<Vec<usize>> {
        let mut done: Vec<CompletionEntry> = Vec::with_capacity(DEPTH);
        self.driver.reap(1, &mut done)?;
        let mut slots = Vec::new();
        for entry in done {
            ensure(entry.status.is_success(), format!("{:?}", entry.status))?;
            let at = self
                .outstanding
                .iter()
                .position(|(cid, _)| *cid == entry.cid);
            let (_, slot) = self
                .outstanding
                .remove(at.ok_or("a completion of nothing")?);
            slots.push(slot);
        }
        Ok(slots)
    }

    fn settle(&mut self) -> Outcome {
        let until = Instant::now() + PATIENCE;
        while !self.outstanding.is_empty() {
            ensure(Instant::now() < until, "commands do not complete")?;
            self.reap()?;
            thread::yield_now();
        }
        Ok(())
    }

    fn fill(&mut self, slot: usize, byte: u8) -> Outcome {
        let buffer = self.buffers[slot];
        Ok(self.driver.memory().write(buffer, 0, &[byte; LEN])?)
    }

    fn fill_all(&mut self, byte: u8) -> Outcome {
        (0..DEPTH).try_for_each(|slot| self.fill(slot, byte))
    }

    fn bytes(&mut self, slot: usize) -> Outcome<[u8; LEN]> {
        let mut bytes = [0; LEN];
        let buffer = self.buffers[slot];
        self.driver.memory().read(buffer, 0, &mut bytes)?;
        Ok(bytes)
    }

    fn ensure_all(&mut self, byte: u8, what: &str) -> Outcome {
        for slot in 0..DEPTH {
            ensure(
                self.bytes(slot)? == [byte; LEN],
                format!("buffer {slot} does not hold {what}"),
            )?;
        }
        Ok(())
    }
}

const ALL: [usize; DEPTH] = {
    let mut all = [0; DEPTH];
    let mut slot = 0;
    while slot < DEPTH {
        all[slot] = slot;
        slot += 1;
    }
    all
};

fn signal(name: &str, pid: &str) -> Outcome {
    let done = Command::new("kill").args([name, pid]).status()?;
    ensure(done.success(), format!("kill {name} {pid} failed"))
}

/// Stops a process; when this returns it does nothing any more.
fn freeze(pid: &str) -> Outcome {
    signal("-STOP", pid)?;
    let until = Instant::now() + PATIENCE;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = thread?.path().join("status");
        while !fs::read_to_string(&path)?.contains("State:\tT") {
            ensure(Instant::now() < until, "the process does not stop")?;
            thread::yield_now();
        }
    }
    Ok(())
}

/// Packets that were sent and refused until now.
fn refused() -> Outcome<u64> {
    let count = |name: &str| -> Outcome<u64> {
        let text = fs::read_to_string(format!("{COUNTERS}/{name}"))?;
        Ok(text.trim().parse()?)
    };
    loop {
        let sent = count("sent_pkts")?;
        let received = count("rcvd_pkts")?;
        // Otherwise something was sent meanwhile.
        if sent == count("sent_pkts")? {
            return Ok(sent.saturating_sub(received));
        }
    }
}

/// Long enough for all that a process has to say that was woken up, and for every retry.
const AFTERMATH: Duration = Duration::from_secs(2);

/// Reads through an endpoint whose device server is frozen and replaced by another, which `replace`
/// sees to. The old one holds [`OLD`], which this writes; the new one must be empty.
pub(crate) fn reads(socket: &str, pid: &str, replace: &str) -> Outcome {
    let mut load = Load::open(socket)?;
    load.fill_all(OLD)?;
    load.submit(nvm::WRITE, &ALL)?;
    load.settle()?;
    load.read(&ALL)?;
    // In the middle of reads.
    let mut completed = 0;
    while completed < 20 * DEPTH {
        let slots = load.reap()?;
        completed += slots.len();
        load.read(&slots)?;
    }
    freeze(pid)?;
    // What it has not answered by now it will find when it wakes up; these for certain.
    let slots = load.reap()?;
    load.read(&slots)?;
    let waiting = load.outstanding.len();
    let replaced = Command::new("sh").args(["-c", replace]).status()?;
    ensure(
        replaced.success(),
        "the device server could not be replaced",
    )?;
    let begun = Instant::now();
    load.settle()?;
    println!(
        "{waiting} reads waited for the new device server for {} ms",
        begun.elapsed().as_millis()
    );
    load.ensure_all(NEW, "what the new drive does")?;
    // From here on the guest has other uses for its memory.
    load.fill_all(OTHERS)?;
    let before = refused()?;
    signal("-CONT", pid)?;
    let until = Instant::now() + AFTERMATH;
    while Instant::now() < until {
        load.ensure_all(OTHERS, "what the guest has put there")?;
        thread::yield_now();
    }
    let refused = refused()?.saturating_sub(before);
    println!("packets of the old device server that were refused: {refused}");
    ensure(refused > 0, "the old device server has written nothing")?;
    load.read(&ALL)?;
    load.settle()?;
    load.ensure_all(NEW, "what the new drive does")?;
    println!("stale reads: ok");
    Ok(())
}

/// Writes through an endpoint whose agent is frozen. `replace` gives the export to another agent, with an
/// endpoint at `other`.
pub(crate) fn writes(socket: &str, pid: &str, replace: &str, other: &str) -> Outcome {
    let mut stale = Load::open(socket)?;
    stale.fill_all(OLD)?;
    stale.submit(nvm::WRITE, &ALL)?;
    // In the middle of writes.
    let mut completed = 0;
    while completed < 20 * DEPTH {
        let slots = stale.reap()?;
        completed += slots.len();
        stale.submit(nvm::WRITE, &slots)?;
    }
    freeze(pid)?;
    let slots = stale.reap()?;
    stale.submit(nvm::WRITE, &slots)?;
    let replaced = Command::new("sh").args(["-c", replace]).status()?;
    ensure(replaced.success(), "the agent could not be replaced")?;
    let mut load = Load::open(other)?;
    load.fill_all(OTHERS)?;
    load.submit(nvm::WRITE, &ALL)?;
    load.settle()?;
    let before = refused()?;
    signal("-CONT", pid)?;
    let until = Instant::now() + AFTERMATH;
    while Instant::now() < until {
        load.read(&ALL)?;
        load.settle()?;
        load.ensure_all(OTHERS, "what the new agent wrote")?;
    }
    let refused = refused()?.saturating_sub(before);
    println!("packets of the old agent that were refused: {refused}");
    println!("stale writes: ok");
    Ok(())
}
