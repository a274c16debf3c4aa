//! Runs subjects in turns, and collects what they measure.

use std::error::Error;
use std::fmt;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;

use crate::awake::{Awake, Keeper};
use crate::results::{Figures, Results, figure};
use crate::workload::{Extent, Workload};
use crate::{interrupt, stolen};

/// How long and how much to measure.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) warmup: Duration,
    pub(crate) time: Duration,
    pub(crate) repeats: u32,
    pub(crate) quick: bool,
}

impl Plan {
    /// For what is measured in many ways, or differs little from one moment to the next.
    pub(crate) fn brief(&self) -> Self {
        Self {
            warmup: self.warmup / 2,
            time: self.time / 2,
            ..*self
        }
    }

    /// For a workload.
    pub(crate) fn of(&self, workload: &Workload) -> Self {
        if workload.is_wide() {
            self.brief()
        } else {
            *self
        }
    }

    /// For writing a disk in memory once, before anything is measured on it: memory that was never written
    /// costs reads less and writes more.
    pub(crate) fn fill(&self) -> Self {
        Self {
            warmup: Duration::ZERO,
            time: Duration::from_millis(if self.quick { 200 } else { 400 }),
            ..*self
        }
    }
}

impl From<&Plan> for Extent {
    fn from(plan: &Plan) -> Self {
        Self::For {
            warmup: plan.warmup,
            time: plan.time,
        }
    }
}

/// Something that is measured.
pub(crate) trait Subject {
    /// `limits`, `peers`, `farbus` or `rdma`.
    fn part(&self) -> &'static str;

    /// Its name in the table.
    fn name(&self) -> String;

    /// States of the CPUs in which it is measured.
    fn states(&self) -> &'static [Awake] {
        &Awake::BOTH
    }

    /// What takes long to start, such as a machine, is started once for all repeats: it makes
    /// [`Take::rounds`] of its own.
    fn has_own_rounds(&self) -> bool {
        false
    }

    /// Starts what it needs, and measures each workload once, or in each of its rounds.
    fn measure(&self, take: &mut Take<'_>) -> Result<()>;
}

/// Why a subject is not measured here: not an error.
#[derive(Debug)]
pub(crate) struct Skip(String);

impl Skip {
    pub(crate) fn because(reason: impl Into<String>) -> anyhow::Error {
        Self(reason.into()).into()
    }
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Skip {}

/// One turn of one subject.
pub(crate) struct Take<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) awake: Awake,
    pub(crate) repeat: u32,
    part: &'static str,
    subject: String,
    results: &'a mut Results,
    progress: &'a mut Progress,
}

impl Take<'_> {
    /// Measures one workload, until it was left alone for that time, or a few times. What goes wrong is noted, and the others go on;
    /// only an interruption is returned.
    pub(crate) fn one(
        &mut self,
        workload: &str,
        mut measure: impl FnMut(&Plan) -> Result<Figures>,
    ) -> Result<()> {
        self.once(workload, |plan| stolen::undisturbed(|| measure(plan)))
    }

    /// As [`Take::one`], but once in any case: what takes long, or does not depend on time.
    pub(crate) fn once(
        &mut self,
        workload: &str,
        measure: impl FnOnce(&Plan) -> Result<Figures>,
    ) -> Result<()> {
        let subject = self.subject.clone();
        self.one_of(&subject, workload, measure)
    }

    /// As [`Take::once`], in the name of another subject.
    pub(crate) fn one_of(
        &mut self,
        subject: &str,
        workload: &str,
        measure: impl FnOnce(&Plan) -> Result<Figures>,
    ) -> Result<()> {
        interrupt::check()?;
        self.progress
            .show(&self.subject, self.awake, subject, workload);
        match measure(self.plan) {
            Ok(figures) => {
                self.results
                    .add(self.part, subject, self.awake, workload, figures);
            }
            Err(error) => {
                interrupt::check()?;
                self.remark(subject, workload, &error);
                self.missed(&format!("{subject}, {workload}"), &error);
            }
        }
        Ok(())
    }

    /// Puts into a row why it has no figures.
    fn remark(&mut self, subject: &str, workload: &str, error: &anyhow::Error) {
        let remark = match error.downcast_ref::<Skip>() {
            Some(skip) => format!("not measured: {skip}"),
            // What failed may have much to say; that is below the tables.
            None => "failed".into(),
        };
        self.results
            .remark(self.part, subject, self.awake, workload, remark);
    }

    /// The repeats of a subject that makes them itself; in a quick run there is one.
    pub(crate) fn rounds(&self) -> std::ops::Range<u32> {
        0..if self.plan.quick {
            1
        } else {
            self.plan.repeats
        }
    }

    /// Says in their rows that the subject cannot do these workloads.
    pub(crate) fn cannot(&mut self, workloads: &[Workload], reason: &str) {
        let (part, subject, awake) = (self.part, self.subject.clone(), self.awake);
        for workload in workloads {
            let remark = format!("not measured: {reason}");
            self.results
                .remark(part, &subject, awake, &workload.to_string(), remark);
        }
    }

    /// Notes that something was not measured.
    pub(crate) fn missed(&mut self, what: &str, error: &anyhow::Error) {
        let failed = error.downcast_ref::<Skip>().is_none();
        let reason = format!("{error:#}");
        let line = format!("{what}: {}: {reason}", outcome(failed));
        if self.results.gap(what, reason, failed) {
            self.progress.line(&line);
        }
    }
}

fn outcome(failed: bool) -> &'static str {
    if failed { "failed" } else { "skipped" }
}

/// Measures all subjects, in turns.
pub(crate) fn measure(subjects: &[Box<dyn Subject>], plan: &Plan) -> Result<Results> {
    let mut results = Results::default();
    let turns = plan.repeats as usize * Awake::BOTH.len() * subjects.len();
    let mut progress = Progress::new(turns);
    for repeat in 0..plan.repeats {
        for awake in Awake::BOTH {
            let _keeper = Keeper::start(awake)?;
            for subject in subjects {
                progress.turn += 1;
                let left_out = repeat > 0 && subject.has_own_rounds();
                if !subject.states().contains(&awake) || left_out {
                    continue;
                }
                let mut take = Take {
                    plan,
                    awake,
                    repeat,
                    part: subject.part(),
                    subject: subject.name(),
                    results: &mut results,
                    progress: &mut progress,
                };
                if let Err(error) = subject.measure(&mut take) {
                    interrupt::check()?;
                    take.remark(&subject.name(), "all", &error);
                    take.missed(&subject.name(), &error);
                }
            }
        }
    }
    progress.end();
    results.arrange();
    Ok(results)
}

/// Says on stderr what is being measured.
#[derive(Debug)]
struct Progress {
    turn: usize,
    turns: usize,
    begun: Instant,
    terminal: bool,
    shown: String,
}

impl Progress {
    fn new(turns: usize) -> Self {
        Self {
            turn: 0,
            turns,
            begun: Instant::now(),
            terminal: std::io::stderr().is_terminal(),
            shown: String::new(),
        }
    }

    fn show(&mut self, turn: &str, awake: Awake, subject: &str, workload: &str) {
        let share = self.turn.saturating_sub(1) * 100 / self.turns.max(1);
        let time = self.begun.elapsed().as_secs();
        let clock = format!("{}:{:02}", time / 60, time % 60);
        if self.terminal {
            eprint!("\r\x1b[K{clock} {share:3} %  {awake}  {subject}: {workload}");
            let _ = std::io::stderr().flush();
        } else if self.shown != format!("{turn} {awake}") {
            // A log gets a line for each turn only.
            self.shown = format!("{turn} {awake}");
            eprintln!("{clock} {share:3} %  {awake}  {turn}");
        }
    }

    /// Prints a line that stays.
    fn line(&mut self, line: &str) {
        self.end();
        eprintln!("{line}");
    }

    fn end(&self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }
}

/// Latencies of many I/Os.
#[derive(Debug)]
pub(crate) struct Latencies {
    histogram: Histogram<u64>,
}

impl Latencies {
    pub(crate) fn new() -> Result<Self> {
        const LONGEST_NS: u64 = 60_000_000_000;
        let histogram = Histogram::new_with_bounds(1, LONGEST_NS, 3);
        Ok(Self {
            histogram: histogram.context("making a histogram")?,
        })
    }

    pub(crate) fn add(&mut self, latency: Duration) {
        self.histogram.saturating_record(latency.as_nanos() as u64);
    }

    pub(crate) fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// Adds what was measured at the same time.
    pub(crate) fn merge(&mut self, other: &Self) -> Result<()> {
        self.histogram.add(&other.histogram).context("adding up")
    }

    /// Mean and percentiles.
    pub(crate) fn figures(&self) -> Figures {
        let at = |quantile| self.histogram.value_at_quantile(quantile) as f64 / 1e3;
        Figures::from([
            (figure::MEAN.into(), self.histogram.mean() / 1e3),
            (figure::P50.into(), at(0.5)),
            (figure::P99.into(), at(0.99)),
            (figure::P999.into(), at(0.999)),
        ])
    }
}
