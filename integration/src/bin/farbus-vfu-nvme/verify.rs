//! `verify`: a pattern is written all over the namespace, rewritten here and there, and read
//! back. Each block knows how often it was written, so that a write that was lost, went
//! elsewhere, or came late is found.
//!
//! Commands that are outstanding together never touch the same block if one of them writes: a
//! controller may carry them out in any order.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use farbus_vfio::driver::{NamespaceShape, block_command};
use farbus_vfio::nvme::{PAGE_SIZE, nvm};
use serde_json::{Value, json};

use crate::cli::VerifyArgs;
use crate::lane::{Done, Lane, check_length, memory_of};
use crate::pattern::{difference, fill, mix};
use crate::target::{Driver, Target, TargetSpec};
use crate::waiting::Waiter;

/// DMA memory besides that of the lane, in bytes.
const OTHER_MEMORY: usize = 64 * PAGE_SIZE;
/// No command takes longer.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn run(args: &VerifyArgs, specs: &[TargetSpec]) -> anyhow::Result<()> {
    let mut reports = Vec::new();
    let mut failed = 0;
    for spec in specs {
        let outcome = verify(spec, args).with_context(|| spec.to_string());
        let report = match &outcome {
            Ok(bytes) => json!({ "target": spec.to_string(), "ok": true, "bytes": bytes }),
            Err(error) => {
                failed += 1;
                json!({ "target": spec.to_string(), "ok": false, "error": format!("{error:#}") })
            }
        };
        match outcome {
            Ok(bytes) if !args.json => println!("{spec}: {bytes} bytes are as they were written"),
            Err(error) if !args.json => println!("{error:#}"),
            _ => {}
        }
        reports.push(report);
    }
    if args.json {
        println!("{}", Value::from(reports));
    }
    if failed > 0 {
        bail!("{failed} of {} targets failed", specs.len());
    }
    Ok(())
}

/// Returns how many bytes were looked at.
fn verify(spec: &TargetSpec, args: &VerifyArgs) -> anyhow::Result<u64> {
    let target = Target::open(spec)?;
    let memory = OTHER_MEMORY + memory_of(args.iodepth, usize::try_from(args.bs)?);
    let (mut driver, _) = target.drive(memory, !args.targets.no_dbbuf)?;
    let shape = driver.namespace()?;
    let len = check_length(&mut driver, args.bs, shape.block_size)?;
    let block = shape.block_size as usize;
    let all = shape.blocks * u64::from(shape.block_size);
    let size = args.size.unwrap_or(all);
    ensure!(
        size <= all && size >= args.bs,
        "--size must be between --bs and the namespace's {all} bytes"
    );
    driver.request_queues(1)?;
    let lane = Lane::open(&mut driver, 1, args.iodepth, len, true)?;
    let waiter = Waiter::new(&driver, std::slice::from_ref(&lane), target.link.clone())?;
    let per_command = args.bs / u64::from(shape.block_size);
    // Whole commands only; what is left over at the end is not looked at.
    let commands = size / args.bs;
    let mut check = Check {
        target: &target,
        seed: args.seed,
        per_command,
        shape,
        generations: vec![0; (commands * per_command) as usize],
        jobs: vec![None; lane.depth()],
        data: vec![0; len],
        expected: vec![0; block],
        done: Vec::with_capacity(lane.depth() + 1),
        driver,
        lane,
        waiter,
    };
    let places = || (0..commands).map(|n| n * per_command);
    check.pass(nvm::WRITE, places())?;
    check.driver.flush(1)?;
    check.pass(nvm::READ, places())?;
    // Anywhere, so that commands begin in the middle of what others wrote.
    let last = (commands - 1) * per_command + 1;
    let anywhere = (0..commands).map(|n| mix(args.seed ^ mix(n)) % last);
    check.pass(nvm::WRITE, anywhere)?;
    check.driver.flush(1)?;
    check.pass(nvm::READ, places())?;
    Ok(commands * args.bs)
}

/// A command that is outstanding.
#[derive(Clone, Copy)]
struct Job {
    opcode: u8,
    lba: u64,
}

struct Check<'a> {
    target: &'a Target,
    driver: Driver,
    lane: Lane,
    waiter: Waiter,
    seed: u64,
    /// Blocks of one command.
    per_command: u64,
    shape: NamespaceShape,
    /// How often each block was written.
    generations: Vec<u32>,
    /// By slot.
    jobs: Vec<Option<Job>>,
    data: Vec<u8>,
    expected: Vec<u8>,
    done: Vec<Done>,
}

impl Check<'_> {
    /// One command at each of these block addresses.
    fn pass(&mut self, opcode: u8, lbas: impl Iterator<Item = u64>) -> anyhow::Result<()> {
        for lba in lbas {
            let slot = loop {
                let free = self.jobs.iter().position(Option::is_none);
                match free.filter(|_| !self.is_busy(lba)) {
                    Some(slot) => break slot,
                    None => self.settle()?,
                }
            };
            self.send(slot, Job { opcode, lba })?;
        }
        while self.lane.outstanding() > 0 {
            self.settle()?;
        }
        Ok(())
    }

    /// Whether a command at `lba` would touch what an outstanding one touches.
    fn is_busy(&self, lba: u64) -> bool {
        let near = |job: &Job| job.lba.abs_diff(lba) < self.per_command;
        self.jobs.iter().flatten().any(near)
    }

    fn send(&mut self, slot: usize, job: Job) -> anyhow::Result<()> {
        let block = self.shape.block_size as usize;
        if job.opcode == nvm::WRITE {
            for (lba, bytes) in (job.lba..).zip(self.data.chunks_mut(block)) {
                if let Some(generation) = self.generations.get_mut(lba as usize) {
                    *generation += 1;
                    fill(bytes, self.seed, lba, *generation);
                }
            }
        } else {
            // So that a read that moves nothing is found out.
            self.data.fill(0);
        }
        let buffer = self.lane.buffer(slot)?;
        self.driver.memory().write(buffer, 0, &self.data)?;
        let blocks = self.per_command as usize;
        let command = block_command(job.opcode, job.lba, blocks, 1);
        self.lane.enqueue(&mut self.driver, slot, command)?;
        if let Some(place) = self.jobs.get_mut(slot) {
            *place = Some(job);
        }
        // At once: a doorbell for each command, as most drivers do.
        self.lane.ring(&mut self.driver)
    }

    /// Waits for completions, at least one.
    fn settle(&mut self) -> anyhow::Result<()> {
        let start = Instant::now();
        self.done.clear();
        loop {
            self.lane.reap(&mut self.driver, &mut self.done)?;
            if !self.done.is_empty() {
                break;
            }
            self.waiter.wait()?;
            if let Some(link) = &self.target.link {
                link.tick()?;
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "no command has completed for {PATIENCE:?}"
            );
        }
        for n in 0..self.done.len() {
            let Some(&Done { slot, status }) = self.done.get(n) else {
                break;
            };
            let job = self.jobs.get_mut(slot).and_then(Option::take);
            let job = job.context("a command completed that was not sent")?;
            ensure!(
                status.is_success(),
                "command {:#04x} at block {} failed with status {:#06x}",
                job.opcode,
                job.lba,
                status.0
            );
            if job.opcode == nvm::READ {
                self.compare(slot, job.lba)?;
            }
        }
        Ok(())
    }

    fn compare(&mut self, slot: usize, lba: u64) -> anyhow::Result<()> {
        let buffer = self.lane.buffer(slot)?;
        self.driver.memory().read(buffer, 0, &mut self.data)?;
        let block = self.shape.block_size as usize;
        for (lba, bytes) in (lba..).zip(self.data.chunks(block)) {
            let generation = self.generations.get(lba as usize).copied().unwrap_or(0);
            let at = difference(bytes, &mut self.expected, self.seed, lba, generation);
            if let Some(at) = at {
                bail!(
                    "block {lba} differs at byte {at} from what was written there \
                     (the write number {generation})"
                );
            }
        }
        Ok(())
    }
}
