//! `bench`: keeps queues at their depth, and measures.
//!
//! Each target has a thread, which does everything there is to do for it: it takes all
//! completions of a queue, puts as many commands back, rings once, and looks after the link.
//! The clock is read once for a batch. Nothing is allocated between the first command and the
//! last.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use farbus_fabric::Counters;
use farbus_integration::thread_usage::Usage;
use farbus_vfio::nvme::PAGE_SIZE;
use serde_json::json;

use crate::cli::BenchArgs;
use crate::figures::{Figures, combine};
use crate::lane::{Done, Lane, check_length, memory_of};
use crate::target::{Driver, Target, TargetSpec};
use crate::waiting::Waiter;
use crate::workload::Workload;

/// DMA memory besides that of the lanes, in bytes.
const OTHER_MEMORY: usize = 64 * PAGE_SIZE;
/// A target that completes nothing for so long is given up.
const STUCK_NS: u64 = 30_000_000_000;
/// Empty looks at the queues between looks at the clock.
const LOOKS: u32 = 64;

pub(crate) fn run(args: &BenchArgs, specs: &[TargetSpec]) -> anyhow::Result<()> {
    let (ready, is_ready) = channel();
    let figures = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for spec in specs {
            let (go, gone) = channel();
            let ready = ready.clone();
            let thread = scope.spawn(move || {
                let outcome = drive(spec, args, &ready, &gone);
                if outcome.is_err() {
                    // Nobody listens any more if it was ready before it failed.
                    let _ = ready.send(false);
                }
                outcome.with_context(|| spec.to_string())
            });
            threads.push((thread, go));
        }
        // All begin together, or none does.
        let all = is_ready.iter().take(specs.len()).all(|is_ready| is_ready);
        let mut figures = Vec::new();
        let threads: Vec<_> = threads
            .into_iter()
            .map(|(thread, go)| {
                if all {
                    // One that has failed meanwhile says so below.
                    let _ = go.send(());
                }
                thread
            })
            .collect();
        let mut failure = None;
        for thread in threads {
            match thread.join() {
                Ok(Ok(measured)) => figures.push(measured),
                Ok(Err(error)) => {
                    // The others only say that they were called off.
                    if failure.is_none() || !error.is::<CalledOff>() {
                        failure = Some(error);
                    }
                }
                Err(_) => failure = Some(anyhow!("a thread has panicked")),
            }
        }
        failure.map_or(Ok(figures), Err)
    })?;
    report(args, specs, &figures)
}

/// Another target could not be made ready.
#[derive(Debug, thiserror::Error)]
#[error("another target failed")]
struct CalledOff;

fn report(args: &BenchArgs, specs: &[TargetSpec], figures: &[Figures]) -> anyhow::Result<()> {
    let mut total = Figures::new()?;
    for figures in figures {
        total.add(figures)?;
    }
    if args.json {
        let attachments: Vec<_> = specs
            .iter()
            .zip(figures)
            .map(|(spec, figures)| figures.json(&spec.to_string(), args))
            .collect();
        println!(
            "{}",
            json!({ "attachments": attachments, "total": total.json("total", args) })
        );
    } else {
        for (spec, figures) in specs.iter().zip(figures) {
            figures.print(&spec.to_string(), args);
        }
        if figures.len() > 1 {
            total.print("total", args);
        }
    }
    if total.errors > 0 {
        bail!("{} commands failed", total.errors);
    }
    Ok(())
}

/// One target from its first command to its last.
fn drive(
    spec: &TargetSpec,
    args: &BenchArgs,
    ready: &Sender<bool>,
    go: &Receiver<()>,
) -> anyhow::Result<Figures> {
    let target = Target::open(spec)?;
    let len = usize::try_from(args.bs)?;
    let memory = OTHER_MEMORY + usize::from(args.queues) * memory_of(args.iodepth, len);
    let (mut driver, shadow) = target.drive(memory, !args.targets.no_dbbuf)?;
    let shape = driver.namespace()?;
    let len = check_length(&mut driver, args.bs, shape.block_size)?;
    let granted = driver.request_queues(args.queues)?;
    if granted < args.queues {
        bail!("the controller has {granted} queue pairs");
    }
    let mut lanes = Vec::new();
    let mut loads = Vec::new();
    for n in 0..args.queues {
        let lane = Lane::open(&mut driver, n + 1, args.iodepth, len, !args.poll)?;
        lanes.push(lane);
        loads.push(Workload::new(
            args.rw,
            args.rwmixread,
            shape,
            len,
            (n, args.queues),
            args.seed,
        )?);
    }
    let waiter = if args.poll {
        if let Some(link) = &target.link {
            link.keep_looking();
        }
        None
    } else {
        Some(Waiter::new(&driver, &lanes, target.link.clone())?)
    };
    let mut figures = Figures::new()?;
    figures.shadow_doorbells = shadow;
    let depth = usize::from(args.iodepth);
    let mut run = Run {
        sent: vec![(0, false); depth * lanes.len()],
        done: Vec::with_capacity(depth + 1),
        start: Instant::now(),
        waiter,
        figures,
        left: args.count,
        target: &target,
        driver,
        lanes,
        loads,
        before: Before::default(),
    };
    ready.send(true).map_err(|_| CalledOff)?;
    go.recv().map_err(|_| CalledOff)?;
    run.start = Instant::now();
    run.all(args)?;
    Ok(run.figures)
}

/// What the counters were when measuring began.
#[derive(Default)]
struct Before {
    ns: u64,
    usage: Usage,
    doorbells: u64,
    link: Counters,
}

struct Run<'a> {
    target: &'a Target,
    driver: Driver,
    lanes: Vec<Lane>,
    loads: Vec<Workload>,
    waiter: Option<Waiter>,
    /// By lane and slot: when its command was sent (nanoseconds), and whether it reads.
    sent: Vec<(u64, bool)>,
    done: Vec<Done>,
    start: Instant,
    figures: Figures,
    /// Commands that are yet to be sent, if they are counted.
    left: Option<u64>,
    before: Before,
}

impl Run<'_> {
    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    fn all(&mut self, args: &BenchArgs) -> anyhow::Result<()> {
        let ns = |seconds: f64| Duration::from_secs_f64(seconds).as_nanos() as u64;
        let counted = args.count.is_some();
        self.begin();
        let now = self.now();
        for lane in 0..self.lanes.len() {
            for slot in 0..usize::from(args.iodepth) {
                self.send(lane, slot, now)?;
            }
            self.ring(lane)?;
        }
        if counted {
            self.keep_up(u64::MAX)?;
            self.end();
            return Ok(());
        }
        self.keep_up(ns(args.warmup))?;
        self.begin();
        let until = self.before.ns + ns(args.seconds);
        self.keep_up(until)?;
        self.end();
        // What is outstanding completes, so that the controller is left in order.
        self.left = Some(0);
        self.keep_up(u64::MAX)
    }

    /// Measuring begins.
    fn begin(&mut self) {
        self.figures.clear();
        self.before = Before {
            usage: Usage::now(),
            doorbells: self.driver.doorbells_rung(),
            link: self.link(),
            ns: self.now(),
        };
    }

    /// What was measured until now is what counts; later commands change nothing of it.
    fn end(&mut self) {
        let ns = self.now();
        let link = self.link();
        self.figures.elapsed_ns = ns - self.before.ns;
        self.figures.usage = Usage::now().since(self.before.usage);
        self.figures.doorbells = self.driver.doorbells_rung() - self.before.doorbells;
        self.figures.link = self
            .target
            .link
            .as_ref()
            .map(|_| combine(&link, &self.before.link, u64::saturating_sub));
    }

    fn link(&self) -> Counters {
        let link = self.target.link.as_ref();
        link.map(|link| link.counters()).unwrap_or_default()
    }

    fn send(&mut self, lane: usize, slot: usize, now: u64) -> anyhow::Result<()> {
        match &mut self.left {
            Some(0) => return Ok(()),
            Some(left) => *left -= 1,
            None => {}
        }
        let (Some(queue), Some(load)) = (self.lanes.get_mut(lane), self.loads.get_mut(lane)) else {
            return Ok(());
        };
        let (command, reads) = load.next();
        queue.enqueue(&mut self.driver, slot, command)?;
        if let Some(sent) = self.sent.get_mut(lane * queue.depth() + slot) {
            *sent = (now, reads);
        }
        Ok(())
    }

    fn ring(&mut self, lane: usize) -> anyhow::Result<()> {
        match self.lanes.get(lane) {
            Some(lane) => lane.ring(&mut self.driver),
            None => Ok(()),
        }
    }

    /// Keeps the queues full until a point in time, or until nothing is outstanding.
    fn keep_up(&mut self, until: u64) -> anyhow::Result<()> {
        let mut idle = 0;
        let mut last = self.now();
        while self.lanes.iter().any(|lane| lane.outstanding() > 0) {
            match (&mut self.waiter, &self.target.link) {
                (Some(waiter), _) => waiter.wait()?,
                (None, Some(link)) => {
                    link.service();
                }
                (None, None) => {}
            }
            let mut found = None;
            for lane in 0..self.lanes.len() {
                found = self.turn(lane)?.or(found);
            }
            idle = if found.is_some() { 0 } else { idle + 1 };
            let now = match found {
                Some(now) => {
                    last = now;
                    now
                }
                None if self.waiter.is_none() && idle % LOOKS != 0 => continue,
                None => self.now(),
            };
            if let (true, Some(link)) = (idle % LOOKS == 0, &self.target.link) {
                link.tick()?;
            }
            if now >= until {
                return Ok(());
            }
            if now - last > STUCK_NS {
                bail!(
                    "no command has completed for {} s",
                    STUCK_NS / 1_000_000_000
                );
            }
        }
        Ok(())
    }

    /// Takes a queue's completions, if there are any, and sends as many commands; returns when.
    fn turn(&mut self, lane: usize) -> anyhow::Result<Option<u64>> {
        let Some(queue) = self.lanes.get_mut(lane) else {
            return Ok(None);
        };
        let depth = queue.depth();
        self.done.clear();
        queue.reap(&mut self.driver, &mut self.done)?;
        if self.done.is_empty() {
            return Ok(None);
        }
        let now = self.now();
        for n in 0..self.done.len() {
            let Some(&Done { slot, status }) = self.done.get(n) else {
                break;
            };
            let sent = self.sent.get(lane * depth + slot).copied();
            let (at, reads) = sent.unwrap_or((now, true));
            self.figures
                .count(now.saturating_sub(at), reads, status.is_success());
            self.send(lane, slot, now)?;
        }
        self.ring(lane)?;
        Ok(Some(now))
    }
}
