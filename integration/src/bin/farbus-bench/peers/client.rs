//! Load on a vhost-user-blk device, by libblkio.
//!
//! It runs in a process of its own, so that its CPU time is known and its end frees the device.

use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blkio::{Blkio, Blkioq, Completion, ReqFlags};
use clap::Args;
use farbus_integration::deadline::Deadline;
use farbus_integration::process::{Process, mortal_command};
use rustix::time::{ClockId, clock_gettime};

use crate::results::{Figures, figure};
use crate::session::{Latencies, Plan};
use crate::workload::{MIX_READS, Pattern, Workload};

/// Arguments of `blk-client`.
#[derive(Debug, Args)]
pub(crate) struct ClientArgs {
    #[arg(long)]
    path: PathBuf,
    #[arg(long, value_enum)]
    rw: Pattern,
    #[arg(long)]
    block: u32,
    #[arg(long)]
    depth: usize,
    #[arg(long)]
    warmup: f64,
    #[arg(long)]
    seconds: f64,
}

/// Runs the client to its end.
pub(crate) fn run(socket: &Path, workload: &Workload, plan: &Plan) -> Result<Figures> {
    let own = std::env::current_exe().context("finding this program")?;
    let (warmup, time) = (plan.warmup.as_secs_f64(), plan.time.as_secs_f64());
    let mut command = mortal_command(&own);
    command
        .args(["blk-client", "--path"])
        .arg(socket)
        .args(["--rw", workload.pattern.name()])
        .args(["--block", &workload.block.to_string()])
        .args(["--depth", &workload.depth.to_string()])
        .args(["--warmup", &warmup.to_string()])
        .args(["--seconds", &time.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut client = Process::start("blk-client", command)?;
    let status = client.wait(Deadline::after(
        plan.warmup + plan.time + Duration::from_secs(10),
    ))?;
    ensure!(status.success(), "the libblkio client failed ({status})");
    // Its figures are a few hundred bytes, which the pipe holds.
    let said = client.child().stdout.take().map(std::io::read_to_string);
    let mut figures: Figures = serde_json::from_str(&said.transpose()?.unwrap_or_default())?;
    let iops = *figures.get(figure::IOPS).context("no rate")?;
    figures.insert(
        figure::MB_PER_S.into(),
        iops * f64::from(workload.block) / 1e6,
    );
    Ok(figures)
}

/// The client's process.
pub(crate) fn client(args: &ClientArgs) -> Result<()> {
    let figures = load(args)?;
    println!("{}", serde_json::to_string(&figures)?);
    Ok(())
}

fn load(args: &ClientArgs) -> Result<Figures> {
    let path = args.path.display().to_string();
    let block = args.block as usize;
    let mut device = Blkio::new("virtio-blk-vhost-user").map_err(said)?;
    device.set_str("path", &path).map_err(said)?;
    device.connect().map_err(said)?;
    let capacity = device.get_u64("capacity").map_err(said)?;
    let mut queues = device.start().map_err(said)?.queues;
    let memory = device.alloc_mem_region(block * args.depth).map_err(said)?;
    device.map_mem_region(&memory).map_err(said)?;
    let queue = queues.first_mut().context("no queue")?;

    let mut load = Load {
        queue,
        pattern: args.rw,
        block,
        blocks: capacity / u64::from(args.block),
        memory: memory.addr,
        begun: vec![Instant::now(); args.depth],
        next: 0,
        random: 0x9e37_79b9_7f4a_7c15,
    };
    for slot in 0..args.depth {
        load.submit(slot);
    }
    let warm = Instant::now() + Duration::from_secs_f64(args.warmup);
    load.until(warm, None)?;
    let mut latencies = Latencies::new()?;
    let (begun, cpu) = (Instant::now(), cpu_time());
    load.until(
        begun + Duration::from_secs_f64(args.seconds),
        Some(&mut latencies),
    )?;
    let (took, cpu) = (begun.elapsed().as_secs_f64(), cpu_time() - cpu);
    load.finish(args.depth)?;
    let ios = latencies.count().max(1) as f64;
    let mut figures = latencies.figures();
    figures.insert(figure::IOPS.into(), ios / took);
    figures.insert(format!("{}.client", figure::CPU), cpu * 1e6 / ios);
    Ok(figures)
}

/// A queue that is kept filled.
struct Load<'a> {
    queue: &'a mut Blkioq,
    pattern: Pattern,
    block: usize,
    blocks: u64,
    memory: usize,
    /// When the I/O of each slot began.
    begun: Vec<Instant>,
    next: u64,
    random: u64,
}

impl Load<'_> {
    fn submit(&mut self, slot: usize) {
        let at = if self.pattern.is_random() {
            self.draw() % self.blocks
        } else {
            self.next += 1;
            self.next % self.blocks
        };
        let start = at * self.block as u64;
        let buffer = self.memory + slot * self.block;
        let reads = match self.pattern {
            Pattern::RandRead | Pattern::Read => true,
            Pattern::RandWrite | Pattern::Write => false,
            Pattern::RandRw => self.draw() % 100 < u64::from(MIX_READS),
        };
        self.begun[slot] = Instant::now();
        let flags = ReqFlags::empty();
        if reads {
            self.queue
                .read(start, buffer as *mut u8, self.block, slot, flags);
        } else {
            self.queue
                .write(start, buffer as *const u8, self.block, slot, flags);
        }
    }

    /// Runs until `end`; each I/O that completes is followed by another.
    fn until(&mut self, end: Instant, mut latencies: Option<&mut Latencies>) -> Result<()> {
        let mut completions: Vec<MaybeUninit<Completion>> = Vec::new();
        completions.resize_with(self.begun.len(), MaybeUninit::uninit);
        loop {
            let done = self
                .queue
                .do_io(&mut completions, 1, None, None)
                .map_err(said)?;
            let now = Instant::now();
            for completion in &completions[..done] {
                let (slot, result) = outcome(completion);
                if result < 0 {
                    bail!("an I/O failed with error {}", -result);
                }
                if let Some(latencies) = &mut latencies {
                    latencies.add(now.duration_since(self.begun[slot]));
                }
                self.submit(slot);
            }
            if now >= end {
                return Ok(());
            }
        }
    }

    /// Waits for what is in flight: a server that loses its client in the middle of I/Os may die of it.
    fn finish(&mut self, mut in_flight: usize) -> Result<()> {
        let mut completions: Vec<MaybeUninit<Completion>> = Vec::new();
        completions.resize_with(in_flight, MaybeUninit::uninit);
        while in_flight > 0 {
            in_flight -= self
                .queue
                .do_io(&mut completions, 1, None, None)
                .map_err(said)?;
        }
        Ok(())
    }

    /// Marsaglia's xorshift64.
    fn draw(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

/// Slot and result of a completion that `do_io` has filled in.
#[allow(unsafe_code, reason = "libblkio hands out completions this way")]
fn outcome(completion: &MaybeUninit<Completion>) -> (usize, i32) {
    // SAFETY: `do_io` initialises as many completions as it returns, and the caller looks at no others.
    let completion = unsafe { completion.assume_init_ref() };
    (completion.user_data, completion.ret)
}

/// CPU time of this process in seconds.
fn cpu_time() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn said(error: blkio::Error) -> anyhow::Error {
    anyhow::Error::new(error).context("libblkio")
}
