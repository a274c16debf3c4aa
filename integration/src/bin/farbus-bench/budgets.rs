//! The budgets: ratios between rows of one run, each with the bound that it is to keep.
//!
//! A budget that is marked as met and is broken fails `--check`. One that is not met yet is shown with
//! what it comes to, and fails nothing.

use std::fmt::Write as _;

use serde::Serialize;

use crate::awake::Awake;
use crate::farbus::{
    ENDPOINT, ENDPOINT_ADAPTIVE, ENDPOINT_NULL, GUEST, GUEST_LOCAL, IN_PROCESS_POLLED,
};
use crate::limits::{self, How, TCP, round_trip};
use crate::peers::{NBD, SPDK_TCP};
use crate::results::{Results, Row, figure};
use crate::table::number;
use crate::workload::{
    BIG_READ, BIG_WRITE, READ_1, READ_32, READ_32_A2, READ_32_A8, READ_256_A8, Workload,
};

/// Whether Farbus is said to keep a budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Claim {
    Met,
    NotMetYet,
}

use Claim::{Met, NotMetYet};

/// What a ratio is to keep to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

use Bound::{AtLeast, AtMost};

impl Bound {
    fn holds(self, value: f64) -> bool {
        match self {
            AtMost(bound) => value <= bound,
            AtLeast(bound) => value >= bound,
        }
    }
}

const BOTH: &[Awake] = &Awake::BOTH;
/// Of what polls: nothing sleeps, so the state of the CPUs does not matter.
const ANY: &[Awake] = &[Awake::Halting];

struct Budget {
    /// Also the name in the JSON document.
    name: &'static str,
    /// How the ratio is made from rows.
    ratio: &'static str,
    value: fn(&Results, Awake) -> Option<f64>,
    states: &'static [Awake],
    bound: Bound,
    claim: Claim,
}

const BUDGETS: &[Budget] = &[
    Budget {
        name: "messages per I/O, each way",
        ratio: "the most of any row in process",
        value: messages,
        states: ANY,
        // Beside the I/Os there are a few messages at the beginning and the end.
        bound: AtMost(1.01),
        claim: Met,
    },
    Budget {
        name: "4k read x1, in process, polled",
        ratio: "(p50 - 1 us) / polled TCP round trip of a 4 KiB read",
        value: |results, state| {
            let limit = round_trip(limits::READ, How::Polled);
            let limit = results.median(TCP, state, &limit, figure::P50)?;
            Some((p50(results, IN_PROCESS_POLLED, state)? - 1.0) / limit)
        },
        states: ANY,
        bound: AtMost(1.25),
        claim: Met,
    },
    Budget {
        name: "4k read x1, endpoint, nobody polls",
        ratio: "p50 / p50 of NBD",
        value: |results, state| Some(p50(results, ENDPOINT, state)? / p50(results, NBD, state)?),
        states: BOTH,
        bound: AtMost(0.75),
        claim: NotMetYet,
    },
    Budget {
        name: "4k read x32, in process, polled",
        ratio: "IOPS / IOPS of SPDK NVMe/TCP",
        value: |results, state| {
            let own = iops(results, IN_PROCESS_POLLED, state, READ_32)?;
            Some(own / iops(results, SPDK_TCP, state, READ_32)?)
        },
        states: ANY,
        bound: AtLeast(0.9),
        claim: NotMetYet,
    },
    Budget {
        name: "4k read x32, endpoint",
        ratio: "IOPS / IOPS of NBD",
        value: |results, state| {
            let own = iops(results, ENDPOINT_ADAPTIVE, state, READ_32)?;
            Some(own / iops(results, NBD, state, READ_32)?)
        },
        states: BOTH,
        bound: AtLeast(3.0),
        claim: Met,
    },
    Budget {
        name: "4k read x32, endpoint, CPU",
        ratio: "CPU time per I/O of both daemons / of NBD's servers",
        value: |results, state| {
            let own = servers_cpu(results, ENDPOINT_ADAPTIVE, state)?;
            Some(own / servers_cpu(results, NBD, state)?)
        },
        states: BOTH,
        bound: AtMost(0.5),
        claim: Met,
    },
    Budget {
        name: "128k read x8, endpoint",
        ratio: "MB/s / MB/s of one raw TCP connection, in turns",
        value: |results, state| of_raw(results, ENDPOINT_ADAPTIVE, state, BIG_READ),
        states: BOTH,
        bound: AtLeast(0.9),
        claim: NotMetYet,
    },
    Budget {
        name: "128k read x8, endpoint, null drive",
        ratio: "MB/s / MB/s of one raw TCP connection, in turns",
        value: |results, state| of_raw(results, ENDPOINT_NULL, state, BIG_READ),
        states: BOTH,
        bound: AtLeast(0.9),
        claim: NotMetYet,
    },
    Budget {
        name: "128k write x8, endpoint",
        ratio: "MB/s / MB/s of one raw TCP connection, in turns",
        value: |results, state| of_raw(results, ENDPOINT_ADAPTIVE, state, BIG_WRITE),
        states: BOTH,
        bound: AtLeast(0.9),
        claim: NotMetYet,
    },
    Budget {
        name: "128k write x8, endpoint, null drive",
        ratio: "MB/s / MB/s of one raw TCP connection, in turns",
        value: |results, state| of_raw(results, ENDPOINT_NULL, state, BIG_WRITE),
        states: BOTH,
        bound: AtLeast(0.9),
        claim: NotMetYet,
    },
    Budget {
        name: "8 attachments against 1, 4k read x32",
        ratio: "IOPS / IOPS",
        value: |results, state| of_one(results, state, READ_32_A8),
        states: BOTH,
        bound: AtLeast(0.85),
        claim: NotMetYet,
    },
    Budget {
        name: "8 attachments against 1, 4k read x32 each",
        ratio: "IOPS / IOPS",
        value: |results, state| of_one(results, state, READ_256_A8),
        states: BOTH,
        bound: AtLeast(1.0),
        claim: NotMetYet,
    },
    Budget {
        name: "adaptive against never, 2 attachments, 4k read x32",
        ratio: "IOPS / IOPS",
        value: |results, state| of_never(results, state, READ_32_A2),
        states: BOTH,
        // They are equal, but for the time in which the threads find out; either differs by 20 % from run to run.
        bound: AtLeast(0.75),
        claim: Met,
    },
    Budget {
        name: "adaptive against never, 8 attachments, 4k read x32",
        ratio: "IOPS / IOPS",
        value: |results, state| of_never(results, state, READ_32_A8),
        states: BOTH,
        bound: AtLeast(0.75),
        claim: Met,
    },
    Budget {
        name: "private resident memory per attachment, MiB",
        ratio: "the most of any daemon in any row",
        value: |results, state| {
            let rows = results.rows().iter().filter(|row| row.awake == state);
            most(rows.flat_map(|row| row.per_process(figure::RESIDENT).map(|(_, mib)| mib)))
        },
        states: BOTH,
        bound: AtMost(32.0),
        claim: Met,
    },
    Budget {
        name: "guest's fio, 4k read x1",
        ratio: "(p50 - blocking TCP round trip) / p50 without a fabric",
        value: |results, state| {
            let raw = round_trip(limits::SMALL, How::Blocking);
            let raw = results.median(TCP, state, &raw, figure::P50)?;
            Some((p50(results, GUEST, state)? - raw) / p50(results, GUEST_LOCAL, state)?)
        },
        states: BOTH,
        bound: AtMost(1.1),
        claim: NotMetYet,
    },
];

fn p50(results: &Results, subject: &str, state: Awake) -> Option<f64> {
    results.median(subject, state, &READ_1.to_string(), figure::P50)
}

fn iops(results: &Results, subject: &str, state: Awake, workload: Workload) -> Option<f64> {
    results.median(subject, state, &workload.to_string(), figure::IOPS)
}

/// Several attachments beside one with 32 reads in flight.
fn of_one(results: &Results, state: Awake, workload: Workload) -> Option<f64> {
    let many = iops(results, ENDPOINT_ADAPTIVE, state, workload)?;
    Some(many / iops(results, ENDPOINT_ADAPTIVE, state, READ_32)?)
}

/// Where CPUs are scarce: daemons as by default beside daemons that sleep at once.
fn of_never(results: &Results, state: Awake, workload: Workload) -> Option<f64> {
    let default = iops(results, ENDPOINT_ADAPTIVE, state, workload)?;
    Some(default / iops(results, ENDPOINT, state, workload)?)
}

fn of_raw(results: &Results, subject: &str, state: Awake, workload: Workload) -> Option<f64> {
    results.median(subject, state, &workload.to_string(), figure::OF_RAW)
}

/// CPU time per I/O of all but the process that makes the load.
fn servers_cpu(results: &Results, subject: &str, state: Awake) -> Option<f64> {
    let row = results.row(subject, state, &READ_32.to_string())?;
    row.servers(figure::CPU)
}

fn messages(results: &Results, _state: Awake) -> Option<f64> {
    let both =
        |row: &Row| [figure::MESSAGES_SENT, figure::MESSAGES_RECEIVED].map(|name| row.median(name));
    most(results.rows().iter().flat_map(both).flatten())
}

fn most(values: impl Iterator<Item = f64>) -> Option<f64> {
    values.reduce(f64::max)
}

/// What a budget came to.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Verdict {
    pub(crate) budget: &'static str,
    pub(crate) ratio: &'static str,
    pub(crate) awake: Awake,
    /// `None`: a row that it is made of was not measured.
    pub(crate) value: Option<f64>,
    pub(crate) bound: Bound,
    pub(crate) claim: Claim,
    pub(crate) holds: Option<bool>,
}

/// Columns of [`Verdict::cells`].
pub(crate) const COLUMNS: [&str; 6] = ["budget", "", "measured", "bound", "verdict", "ratio"];

impl Verdict {
    /// Measured, and not what it is said to be.
    pub(crate) fn is_broken(&self) -> bool {
        self.claim == Met && self.holds == Some(false)
    }

    pub(crate) fn cells(&self) -> Vec<String> {
        let mut bound = String::new();
        // Writing to a String cannot fail.
        let _ = match self.bound {
            AtMost(most) => write!(bound, "<= {most}"),
            AtLeast(least) => write!(bound, ">= {least}"),
        };
        let verdict = match (self.holds, self.claim) {
            (None, _) => "not measured",
            (Some(true), Met) => "met",
            (Some(true), NotMetYet) => "holds, marked as not met",
            (Some(false), Met) => "BROKEN",
            (Some(false), NotMetYet) => "not met yet",
        };
        vec![
            self.budget.to_owned(),
            self.awake.to_string(),
            self.value.map_or_else(|| "-".into(), number),
            bound,
            verdict.to_owned(),
            self.ratio.to_owned(),
        ]
    }
}

/// Judges a run.
pub(crate) fn judge(results: &Results) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for budget in BUDGETS {
        for awake in budget.states {
            let value = (budget.value)(results, *awake).filter(|value| value.is_finite());
            verdicts.push(Verdict {
                budget: budget.name,
                ratio: budget.ratio,
                awake: *awake,
                value,
                bound: budget.bound,
                claim: budget.claim,
                holds: value.map(|value| budget.bound.holds(value)),
            });
        }
    }
    verdicts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Figures;

    fn results(own: f64, nbd: f64) -> Results {
        let mut results = Results::default();
        for (subject, p50) in [(ENDPOINT, own), (NBD, nbd)] {
            let figures = Figures::from([(figure::P50.to_owned(), p50)]);
            let workload = READ_1.to_string();
            results.add("x", subject, Awake::Halting, &workload, figures);
        }
        results
    }

    fn verdict(results: &Results) -> Verdict {
        let is_it = |verdict: &Verdict| {
            verdict.budget.contains("nobody polls") && verdict.awake == Awake::Halting
        };
        judge(results).into_iter().find(is_it).unwrap()
    }

    #[test]
    fn ratio_decides() {
        let good = verdict(&results(60.0, 100.0));
        let bad = verdict(&results(80.0, 100.0));
        assert_eq!((good.value, good.holds), (Some(0.6), Some(true)));
        assert_eq!(bad.holds, Some(false));
    }

    #[test]
    fn what_was_not_measured_is_not_broken() {
        let mut verdict = verdict(&Results::default());
        verdict.claim = Met;
        assert_eq!(verdict.value, None);
        assert!(!verdict.is_broken());
    }

    #[test]
    fn only_a_budget_that_is_said_to_be_met_can_be_broken() {
        let mut verdict = verdict(&results(80.0, 100.0));
        verdict.claim = NotMetYet;
        assert!(!verdict.is_broken());
        verdict.claim = Met;
        assert!(verdict.is_broken());
    }
}
