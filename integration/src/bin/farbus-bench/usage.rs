//! What processes use while there is load on them.
//!
//! Threads come and go with connections, and what a thread has used is forgotten at its end. So the meter looks
//! twice while the load is steady, and the difference is what the time between took.

use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use farbus_integration::procfs::Proc;

use crate::results::{Figures, figure};

/// A process to watch, under the name that it has in tables.
#[derive(Debug, Clone)]
pub(crate) struct Watched {
    pub(crate) name: &'static str,
    pub(crate) pid: u32,
}

/// What one process used between the two looks.
#[derive(Debug)]
struct Used {
    name: &'static str,
    cpu_ns: f64,
    switches: f64,
}

/// A running measurement.
#[derive(Debug)]
pub(crate) struct Meter {
    looking: JoinHandle<Result<(Vec<Used>, Duration)>>,
}

impl Meter {
    /// Watches from the end of the warming up until shortly before the end; the load begins now.
    pub(crate) fn start(watched: &[Watched], warmup: Duration, time: Duration) -> Self {
        let watched = watched.to_vec();
        let looking = thread::spawn(move || {
            thread::sleep(warmup + time.mul_f64(0.1));
            let (before, begun) = (look(&watched)?, Instant::now());
            thread::sleep(time.mul_f64(0.75));
            let (after, between) = (look(&watched)?, begun.elapsed());
            let used = watched.iter().zip(before).zip(after);
            let used = used.map(|((one, before), after)| Used {
                name: one.name,
                cpu_ns: after.0.saturating_sub(before.0) as f64,
                switches: after.1.saturating_sub(before.1) as f64,
            });
            Ok((used.collect(), between))
        });
        Self { looking }
    }

    /// Adds what was used per I/O to `figures`, which has the rate; processes of one name add up.
    pub(crate) fn stop(self, figures: &mut Figures) -> Result<()> {
        let (used, between) = self
            .looking
            .join()
            .map_err(|_| anyhow!("the thread that watches processes has panicked"))??;
        let iops = figures.get(figure::IOPS).copied().unwrap_or(f64::NAN);
        let ios = iops * between.as_secs_f64();
        for one in used {
            let mut add = |name: &str, value: f64| {
                *figures.entry(format!("{name}.{}", one.name)).or_default() += value / ios;
            };
            add(figure::CPU, one.cpu_ns / 1e3);
            add(figure::SWITCHES, one.switches);
        }
        Ok(())
    }
}

/// CPU time and context switches so far.
fn look(watched: &[Watched]) -> Result<Vec<(u64, u64)>> {
    let each = watched.iter().map(|one| {
        let proc = Proc::of(one.pid);
        Ok((proc.cpu_ns()?, proc.context_switches()?))
    });
    each.collect()
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
}
