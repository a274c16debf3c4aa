//! Keeps the queues of one device after the other full, and measures.

use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use blkio::{Blkio, Completion};
use farbus_integration::thread_usage::Usage;

use super::ClientArgs;
use super::lane::{Lane, Source, outcome, said, wait};
use crate::results::{Figures, figure};
use crate::session::Latencies;

/// What a device's thread has measured.
struct Measured {
    latencies: Latencies,
    took: Duration,
    usage: Usage,
}

/// Puts load on all devices at once.
pub(super) fn all(args: &ClientArgs) -> Result<Figures> {
    let disks = args.path.iter().enumerate();
    let disks: Vec<Disk> = disks
        .map(|(number, path)| Disk::open(path, number, args))
        .collect::<Result<_>>()?;
    let start = Barrier::new(disks.len());
    let each: Vec<Result<Measured>> = thread::scope(|scope| {
        let threads: Vec<_> = disks
            .into_iter()
            .map(|mut disk| {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    disk.run(args)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| match thread.join() {
                Ok(measured) => measured,
                Err(_) => Err(anyhow!("a thread has panicked")),
            })
            .collect()
    });
    let mut latencies = Latencies::new()?;
    let (mut took, mut usage) = (Duration::ZERO, Usage::default());
    for measured in each {
        let measured = measured?;
        latencies.merge(&measured.latencies)?;
        took = took.max(measured.took);
        usage = usage.and(measured.usage);
    }
    let ios = latencies.count().max(1) as f64;
    let mut figures = latencies.figures();
    figures.insert(figure::IOPS.into(), ios / took.as_secs_f64());
    let mut add = |name: &str, value: f64| figures.insert(format!("{name}.client"), value / ios);
    add(figure::CPU, usage.cpu_ns as f64 / 1e3);
    add(
        figure::SWITCHES,
        (usage.voluntary + usage.involuntary) as f64,
    );
    Ok(figures)
}

/// A device with all of its queues.
struct Disk {
    lanes: Vec<Lane>,
    done: Vec<MaybeUninit<Completion>>,
    /// I/Os that are yet to begin, if they are counted.
    left: Option<u64>,
    // Last, as the queues use its memory.
    _device: Blkio,
}

impl Disk {
    fn open(path: &Path, number: usize, args: &ClientArgs) -> Result<Self> {
        let (block, depth) = (args.block as usize, args.depth);
        let mut device = Blkio::new("virtio-blk-vhost-user").map_err(said)?;
        let path = path.display().to_string();
        device.set_str("path", &path).map_err(said)?;
        device.connect().map_err(said)?;
        let queues = i32::try_from(args.queues)?;
        device.set_i32("num-queues", queues).map_err(said)?;
        let capacity = device.get_u64("capacity").map_err(said)?;
        let queues = device.start().map_err(said)?.queues;
        ensure!(queues.len() == args.queues, "{} queues", queues.len());
        let memory = device
            .alloc_mem_region(block * depth * queues.len())
            .map_err(said)?;
        device.map_mem_region(&memory).map_err(said)?;
        let count = queues.len();
        let lanes = queues.into_iter().enumerate().map(|(n, queue)| {
            let source = Source::new(args.rw, args.block, capacity, (n, count), number);
            Lane::new(queue, memory.addr + n * block * depth, depth, source)
        });
        Ok(Self {
            lanes: lanes.collect(),
            done: (0..depth).map(|_| MaybeUninit::uninit()).collect(),
            left: args.count,
            _device: device,
        })
    }

    fn run(&mut self, args: &ClientArgs) -> Result<Measured> {
        let mut latencies = Latencies::new()?;
        let (mut begun, mut before) = (Instant::now(), Usage::now());
        for lane in &mut self.lanes {
            for slot in 0..args.depth {
                submit(lane, slot, &mut self.left);
            }
        }
        if args.count.is_some() {
            while self.turn(Some(&mut latencies))? {}
        } else {
            let end = begun + Duration::from_secs_f64(args.warmup);
            while self.turn(None)? && Instant::now() < end {}
            (begun, before) = (Instant::now(), Usage::now());
            let end = begun + Duration::from_secs_f64(args.seconds);
            while self.turn(Some(&mut latencies))? && Instant::now() < end {}
        }
        let measured = Measured {
            latencies,
            took: begun.elapsed(),
            usage: Usage::now().since(before),
        };
        // Waits for what is in flight: a server that loses its client in the middle of I/Os may die of it.
        self.left = Some(0);
        while self.turn(None)? {}
        Ok(measured)
    }

    /// Takes what has completed, of at least one queue, and begins as many I/Os; false when none is in flight.
    fn turn(&mut self, mut latencies: Option<&mut Latencies>) -> Result<bool> {
        if let [lane] = self.lanes.as_mut_slice() {
            let least = usize::from(lane.in_flight > 0);
            take(lane, least, &mut self.done, &mut self.left, &mut latencies)?;
            return Ok(lane.in_flight > 0);
        }
        let mut found = 0;
        for lane in &mut self.lanes {
            found += take(lane, 0, &mut self.done, &mut self.left, &mut latencies)?;
        }
        let busy = self.lanes.iter().any(|lane| lane.in_flight > 0);
        if found == 0 && busy {
            wait(&mut self.lanes, |lane| {
                take(lane, 0, &mut self.done, &mut self.left, &mut latencies)
            })?;
        }
        Ok(busy)
    }
}

/// Takes at least so many completions of a queue; returns how many there were.
fn take(
    lane: &mut Lane,
    least: usize,
    done: &mut [MaybeUninit<Completion>],
    left: &mut Option<u64>,
    latencies: &mut Option<&mut Latencies>,
) -> Result<usize> {
    let found = lane.queue.do_io(done, least, None, None).map_err(said)?;
    let now = Instant::now();
    for completion in &done[..found] {
        let (slot, result) = outcome(completion);
        ensure!(result >= 0, "an I/O failed with error {}", -result);
        lane.in_flight -= 1;
        if let Some(latencies) = latencies {
            latencies.add(now.duration_since(lane.begun[slot]));
        }
        submit(lane, slot, left);
    }
    Ok(found)
}

fn submit(lane: &mut Lane, slot: usize, left: &mut Option<u64>) {
    match left {
        Some(0) => return,
        Some(left) => *left -= 1,
        None => {}
    }
    lane.submit(slot);
}
