//! CPU time that the hypervisor gave to others. A virtual machine that has used its share of the host stands still for
//! tens of milliseconds, all CPUs at a time; what is measured meanwhile says nothing about its subject.

use std::fs;

use anyhow::Result;

use crate::interrupt;
use crate::results::{Figures, Results, Spread, figure};

/// The share of the CPUs' time that may be missing in a measurement, if it is more than [`GRAIN`].
const TOLERATED: f64 = 0.02;
/// What may be missing in any case, in ticks: the clock has no finer ones.
const GRAIN: u64 = 2;
/// How often something is measured, until no more than that is missing.
const TRIES: u32 = 3;

/// Measures until it was left alone, a few times at most; returns the figures of the time when least was missing, and
/// how much that was.
pub(crate) fn undisturbed(measure: impl FnMut() -> Result<Figures>) -> Result<Figures> {
    least_disturbed(measure, CpuTime::now)
}

fn least_disturbed(
    mut measure: impl FnMut() -> Result<Figures>,
    mut time: impl FnMut() -> Option<CpuTime>,
) -> Result<Figures> {
    let mut least: Option<(f64, Figures)> = None;
    for _ in 0..TRIES {
        interrupt::check()?;
        let before = time();
        let mut figures = match (measure(), &least) {
            // What fails only now is found out by whoever comes next.
            (Err(_), Some(_)) => break,
            (outcome, _) => outcome?,
        };
        // Where nobody tells, nothing was stolen.
        let Some((before, after)) = before.zip(time()) else {
            return Ok(figures);
        };
        let (ticks, share) = after.stolen_since(&before);
        figures.insert(figure::STOLEN.into(), share);
        if least.as_ref().is_none_or(|(other, _)| share < *other) {
            least = Some((share, figures));
        }
        if share <= TOLERATED || ticks <= GRAIN {
            break;
        }
    }
    Ok(least.map(|(_, figures)| figures).unwrap_or_default())
}

/// How much of that there was in a run, for a person.
pub(crate) fn describe(results: &Results) -> String {
    let spreads = results
        .rows()
        .iter()
        .filter_map(|row| row.spread(figure::STOLEN));
    let shares: Vec<f64> = spreads.flat_map(Spread::samples).copied().collect();
    let disturbed = shares.iter().filter(|share| **share > TOLERATED).count();
    let most = shares.iter().copied().fold(0.0, f64::max);
    format!(
        "What the hypervisor takes more than {:.0} % of the CPUs' time from is measured again, {} times at most; it still \
         did in {disturbed} of {} measurements, up to {:.0} %.",
        TOLERATED * 100.0,
        TRIES - 1,
        shares.len(),
        most * 100.0
    )
}

/// Time of all CPUs since the machine was booted, in ticks (proc_stat(5)).
#[derive(Debug, Clone, Copy)]
struct CpuTime {
    all: u64,
    stolen: u64,
}

impl CpuTime {
    fn now() -> Option<Self> {
        Self::of(&fs::read_to_string("/proc/stat").ok()?)
    }

    fn of(table: &str) -> Option<Self> {
        /// `user nice system idle iowait irq softirq steal`; a guest's time is in the first two.
        const COLUMNS: usize = 8;
        let total = table.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let ticks: Vec<u64> = total
            .split_whitespace()
            .take(COLUMNS)
            .map(str::parse)
            .collect::<Result<_, _>>()
            .ok()?;
        Some(Self {
            all: ticks.iter().sum(),
            stolen: *ticks.get(COLUMNS - 1)?,
        })
    }

    /// Ticks that were stolen since `before`, and their share of all. A machine that has moved to another host may
    /// have counted fewer: then none.
    fn stolen_since(&self, before: &Self) -> (u64, f64) {
        let all = self.all.saturating_sub(before.all).max(1);
        let stolen = self.stolen.saturating_sub(before.stolen);
        (stolen, stolen as f64 / all as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stolen_time_is_a_share_of_all() {
        let at = |idle, stolen| {
            let table =
                format!("cpu  10 0 20 {idle} 0 0 0 {stolen} 5 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n");
            CpuTime::of(&table).unwrap()
        };
        let (ticks, share) = at(130, 20).stolen_since(&at(50, 0));
        assert_eq!(ticks, 20);
        assert!((share - 0.2).abs() < 1e-9, "{share}");
        assert_eq!(at(60, 0).stolen_since(&at(50, 20)).0, 0);
        assert!(CpuTime::of("cpu  1 2 3\n").is_none());
    }

    /// What comes of measurements in which so many of a hundred ticks were stolen; figures are their numbers.
    fn disturbed_by(stolen: &[u64]) -> (f64, usize) {
        let mut ticks = stolen.iter().flat_map(|stolen| [0, *stolen]);
        let time = || {
            let stolen = ticks.next()?;
            let all = 1000 + if stolen > 0 { 100 } else { 0 };
            Some(CpuTime { all, stolen })
        };
        let mut times = 0_usize;
        let measure = || {
            times += 1;
            Ok(Figures::from([(figure::IOPS.to_owned(), times as f64)]))
        };
        let figures = least_disturbed(measure, time).unwrap();
        (figures[figure::IOPS], times)
    }

    #[test]
    fn what_was_disturbed_is_measured_again_and_the_best_counts() {
        assert_eq!(disturbed_by(&[1, 9]), (1.0, 1));
        assert_eq!(disturbed_by(&[30, 2]), (2.0, 2));
        assert_eq!(disturbed_by(&[30, 10, 20, 1]), (2.0, 3));
    }

    #[test]
    fn a_failure_counts_unless_there_are_figures_already() {
        let fails_from = |which| {
            let (mut tries, mut time) = (0, 0);
            least_disturbed(
                || {
                    tries += 1;
                    anyhow::ensure!(tries < which, "broken");
                    Ok(Figures::new())
                },
                || {
                    time += 50;
                    Some(CpuTime {
                        all: 2 * time,
                        stolen: time,
                    })
                },
            )
        };
        assert!(fails_from(1).is_err());
        assert!(fails_from(2).is_ok());
    }
}
