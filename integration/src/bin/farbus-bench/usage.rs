//! What processes use while there is load on them.
//!
//! Threads come and go with connections, and what a thread has used is forgotten at its end. So the meter looks
//! twice while the load is steady, and the difference is what the time between took.

use std::fs;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use farbus_integration::counts::{SystemCalls, has_tool};
use farbus_integration::procfs::Proc;

use crate::awake::Awake;
use crate::results::{Figures, figure};
use crate::session::{Plan, Skip, Take};
use crate::sides::{Apart, Side};
use crate::workload::{Extent, Workload};

/// A process to watch, under the name that it has in tables.
#[derive(Debug, Clone)]
pub(crate) struct Watched {
    pub(crate) name: &'static str,
    pub(crate) pid: u32,
    pub(crate) side: Side,
}

/// What there was at one moment, since the beginning of each process and of the machine.
#[derive(Debug)]
pub(crate) struct Seen {
    at: Instant,
    watched: Vec<Watched>,
    /// CPU time in nanoseconds, and context switches, of each.
    each: Vec<(u64, u64)>,
    loopback: Loopback,
}

impl Seen {
    pub(crate) fn now(watched: &[Watched]) -> Result<Self> {
        let each = watched.iter().map(|one| {
            let proc = Proc::of(one.pid);
            Ok((proc.cpu_ns()?, proc.context_switches()?))
        });
        Ok(Self {
            each: each.collect::<Result<_>>()?,
            watched: watched.to_vec(),
            loopback: Loopback::now()?,
            at: Instant::now(),
        })
    }

    /// Adds what was used since `before` for each of so many I/Os; processes of one name add up.
    pub(crate) fn per_io(&self, before: &Self, ios: f64, figures: &mut Figures) {
        for ((one, before), after) in self.watched.iter().zip(&before.each).zip(&self.each) {
            let mut add = |name: &str, value: f64| {
                *figures.entry(format!("{name}.{}", one.name)).or_default() += value / ios;
            };
            add(figure::CPU, after.0.saturating_sub(before.0) as f64 / 1e3);
            add(figure::SWITCHES, after.1.saturating_sub(before.1) as f64);
        }
        let Loopback { bytes, packets } = self.loopback;
        let mut add = |name: &str, value: u64| figures.insert(name.into(), value as f64 / ios);
        add(
            figure::PACKETS,
            packets.saturating_sub(before.loopback.packets),
        );
        add(
            figure::LOOPBACK_BYTES,
            bytes.saturating_sub(before.loopback.bytes),
        );
    }
}

/// What has crossed the loopback device.
#[derive(Debug, Clone, Copy)]
struct Loopback {
    bytes: u64,
    packets: u64,
}

impl Loopback {
    fn now() -> Result<Self> {
        let table =
            fs::read_to_string("/proc/self/net/dev").context("reading /proc/self/net/dev")?;
        Self::of(&table).context("/proc/self/net/dev has no loopback device")
    }

    fn of(table: &str) -> Option<Self> {
        let line = table
            .lines()
            .find_map(|line| line.trim().strip_prefix("lo:"))?;
        let mut numbers = line.split_whitespace().map(str::parse);
        Some(Self {
            bytes: numbers.next()?.ok()?,
            packets: numbers.next()?.ok()?,
        })
    }
}

/// A running measurement.
#[derive(Debug)]
pub(crate) struct Meter {
    looking: JoinHandle<Result<(Seen, Seen)>>,
}

impl Meter {
    /// Watches from the end of the warming up until shortly before the end; the load begins now.
    pub(crate) fn start(watched: &[Watched], warmup: Duration, time: Duration) -> Self {
        let watched = watched.to_vec();
        let looking = thread::spawn(move || {
            thread::sleep(warmup + time.mul_f64(0.1));
            let before = Seen::now(&watched)?;
            thread::sleep(time.mul_f64(0.75));
            Ok((before, Seen::now(&watched)?))
        });
        Self { looking }
    }

    /// Adds what was used per I/O to `figures`, which has the rate.
    pub(crate) fn stop(self, figures: &mut Figures) -> Result<()> {
        let (before, after) = self
            .looking
            .join()
            .map_err(|_| anyhow!("the thread that watches processes has panicked"))??;
        let iops = figures.get(figure::IOPS).copied().unwrap_or(f64::NAN);
        let ios = iops * (after.at - before.at).as_secs_f64();
        after.per_io(&before, ios, figures);
        Ok(())
    }
}

/// Runs a load, and adds what the `watched` processes used; with the sides [`Apart`] if wanted.
pub(crate) fn metered(
    watched: &[Watched],
    apart: bool,
    plan: &Plan,
    load: impl FnOnce() -> Result<Figures>,
) -> Result<Figures> {
    let _apart = apart.then(|| Apart::keep(watched)).transpose()?;
    let meter = Meter::start(watched, plan.warmup, plan.time);
    let mut figures = load()?;
    meter.stop(&mut figures)?;
    Ok(figures)
}

/// I/Os of a run whose system calls are counted.
const COUNTED: u64 = 2000;

/// Counts the system calls of each process per I/O, in a run of its own.
///
/// Being counted slows a process down, and so it finds more to do each time that it looks: at depth, a count is a
/// lower bound of what the undisturbed process does. As it is a count, once is enough, and one state of the CPUs.
pub(crate) fn count_calls(
    take: &mut Take<'_>,
    workload: &Workload,
    watched: &[Watched],
    load: impl FnOnce(Extent) -> Result<()>,
) -> Result<()> {
    if take.repeat > 0 || take.awake != Awake::Halting || workload.is_wide() {
        return Ok(());
    }
    if let Err(error) = has_tool("strace") {
        take.missed("system calls", &Skip::because(error.to_string()));
        return Ok(());
    }
    let counters = watched.iter().map(|one| SystemCalls::of(one.pid));
    let Ok(counters) = counters.collect::<Result<Vec<_>, _>>() else {
        let reason = "strace may not attach to processes: see /proc/sys/kernel/yama/ptrace_scope";
        take.missed("system calls", &Skip::because(reason));
        return Ok(());
    };
    take.once(&workload.to_string(), |_| {
        load(Extent::Count(COUNTED))?;
        let mut figures = Figures::new();
        for (one, counter) in watched.iter().zip(counters) {
            let calls = counter.end()? as f64 / COUNTED as f64;
            let key = format!("{}.{}", figure::SYSCALLS, one.name);
            *figures.entry(key).or_default() += calls;
        }
        Ok(figures)
    })
}

/// Adds the private memory of each process, divided by the attachments, to `figures`.
pub(crate) fn resident(watched: &[Watched], attachments: u32, figures: &mut Figures) -> Result<()> {
    for one in watched {
        let mib = Proc::of(one.pid).anonymous_bytes()? as f64 / f64::from(1 << 20);
        let key = format!("{}.{}", figure::RESIDENT, one.name);
        *figures.entry(key).or_default() += mib / f64::from(attachments);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_of_one_name_add_up_per_io() {
        let own = Watched {
            name: "own",
            pid: std::process::id(),
            side: Side::Compute,
        };
        let time = Duration::from_millis(40);
        let meter = Meter::start(&[own.clone(), own], Duration::ZERO, time);
        let begun = Instant::now();
        while begun.elapsed() < time {
            std::hint::spin_loop();
        }
        let mut figures = Figures::from([(figure::IOPS.to_owned(), 1000.0)]);
        meter.stop(&mut figures).unwrap();
        let cpu = figures[&format!("{}.own", figure::CPU)];
        assert!(cpu.is_finite() && cpu > 0.0, "{cpu}");
    }

    #[test]
    fn loopback_is_found_among_devices() {
        let table = "Inter-|   Receive  |  Transmit\n face |bytes packets\n  eth0: 1 2 3\n    lo: 700 8 0 0\n";
        let Loopback { bytes, packets } = Loopback::of(table).unwrap();
        assert_eq!((bytes, packets), (700, 8));
        assert!(Loopback::of("eth0: 1 2").is_none());
    }
}
