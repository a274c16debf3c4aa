//! What processes used between two moments.

use std::time::Instant;

use anyhow::Result;
use farbus_integration::procfs::Proc;

use crate::results::{Figures, figure};

/// A process to watch, under the name that it has in tables.
#[derive(Debug, Clone)]
pub(crate) struct Watched {
    pub(crate) name: &'static str,
    pub(crate) pid: u32,
}

#[derive(Debug)]
struct Mark {
    cpu_ns: u64,
    switches: u64,
}

/// The beginning of a measurement.
#[derive(Debug)]
pub(crate) struct Meter<'a> {
    watched: &'a [Watched],
    marks: Vec<Mark>,
    begun: Instant,
}

impl<'a> Meter<'a> {
    pub(crate) fn start(watched: &'a [Watched]) -> Result<Self> {
        let marks = watched.iter().map(|one| mark(one.pid));
        Ok(Self {
            watched,
            marks: marks.collect::<Result<_>>()?,
            begun: Instant::now(),
        })
    }

    /// Adds what was used since, per I/O, to `figures`; processes of one name add up.
    ///
    /// `iops` is the load's own rate. Warming up uses as much per I/O as measuring does, so the number
    /// of I/Os is taken from the rate and `active`, the seconds during which there was load.
    pub(crate) fn stop(self, iops: f64, active: f64, figures: &mut Figures) -> Result<()> {
        let ios = (iops * active.min(self.begun.elapsed().as_secs_f64())).max(1.0);
        for (one, begin) in self.watched.iter().zip(&self.marks) {
            let end = mark(one.pid)?;
            let mut add = |name: &str, from: u64, to: u64, unit: f64| {
                let key = format!("{name}.{}", one.name);
                *figures.entry(key).or_default() += to.saturating_sub(from) as f64 / unit / ios;
            };
            add(figure::CPU, begin.cpu_ns, end.cpu_ns, 1e3);
            add(figure::SWITCHES, begin.switches, end.switches, 1.0);
        }
        Ok(())
    }
}

fn mark(pid: u32) -> Result<Mark> {
    let proc = Proc::of(pid);
    Ok(Mark {
        cpu_ns: proc.cpu_ns()?,
        switches: proc.context_switches()?,
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
