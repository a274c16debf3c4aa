//! The tables that a person reads.

use std::fmt::Write as _;

use crate::awake::Awake;
use crate::budgets::Verdict;
use crate::host::Host;
use crate::model::Fit;
use crate::ratios::PEERS;
use crate::results::{Results, Row, Spread, figure};
use crate::session::Plan;
use crate::{budgets, ratios, stolen};

/// All tables of a run.
pub(crate) fn render(
    host: &Host,
    plan: &Plan,
    results: &Results,
    fits: &[Fit],
    verdicts: &[Verdict],
) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{}", host.describe());
    let _ = writeln!(
        out,
        "{} repeats of {} s, of limits and of workloads with several queues (q) or attachments (a) {} s; median, and \
         in brackets the lowest and the highest of the repeats\n\
         H: CPUs halt when idle. S: an idle-class process on each keeps them awake. {NONE}: not measured.\n{}",
        plan.repeats,
        plan.time.as_secs_f64(),
        plan.brief().time.as_secs_f64(),
        stolen::describe(results)
    );
    for part in ["limits", "peers", "farbus", "rdma"] {
        let rows: Vec<&Row> = results.rows().iter().filter(|r| r.part == part).collect();
        if !rows.is_empty() {
            let _ = write!(out, "\n# {}\n{}", heading(part), figures(&rows));
        }
    }
    let costs: Vec<Vec<String>> = results.rows().iter().filter_map(cost).collect();
    if !costs.is_empty() {
        let _ = write!(
            out,
            "\n# cost per I/O, process by process\n{COST_NOTES}\n{}",
            align(&COST, &costs)
        );
    }
    let ratios = ratios(results);
    if !ratios.is_empty() {
        let _ = write!(
            out,
            "\n# ratios: p50 at depth 1 (less is better), otherwise I/Os per second, and to the limit MB/s (more is better); \
             those of all figures are in results.json\n{}",
            align(&RATIO, &ratios)
        );
    }
    if !fits.is_empty() {
        let _ = write!(out, "\n# model: p50 at depth 1\n{}", model(fits));
    }
    if !verdicts.is_empty() {
        let _ = write!(
            out,
            "\n# budgets\n{}",
            align(&budgets::COLUMNS, &judged(verdicts))
        );
    }
    if !results.gaps().is_empty() {
        let _ = writeln!(out, "\n# not measured");
        for gap in results.gaps() {
            let outcome = if gap.failed { "failed" } else { "skipped" };
            let _ = writeln!(out, "{}: {outcome}: {}", gap.subject, gap.reason);
        }
    }
    out
}

fn heading(part: &str) -> &str {
    match part {
        "rdma" => {
            "rdma: soft RoCE in a machine with two emulated CPUs; compare with nothing but itself"
        }
        other => other,
    }
}

const FIGURES: [&str; 8] = [
    "subject", "workload", "", "p50 us", "p99 us", "p99.9 us", "kIOPS", "MB/s",
];

fn figures(rows: &[&Row]) -> String {
    let lines: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            if let Some(remark) = row.remark() {
                let cells = [&row.subject, &row.workload, row.awake.letter(), remark];
                return cells.map(str::to_owned).into();
            }
            let latency = |name| row.spread(name).map_or_else(String::new, |s| range(s, 1.0));
            vec![
                row.subject.clone(),
                row.workload.clone(),
                row.awake.to_string(),
                latency(figure::P50),
                latency(figure::P99),
                row.median(figure::P999).map_or_else(String::new, number),
                row.spread(figure::IOPS)
                    .map_or_else(String::new, |s| range(s, 1e3)),
                row.spread(figure::MB_PER_S)
                    .map_or_else(String::new, |s| range(s, 1.0)),
            ]
        })
        .collect();
    align(&FIGURES, &lines)
}

const COST: [&str; 11] = [
    "subject",
    "workload",
    "",
    "CPU us",
    "switches",
    "syscalls",
    "messages",
    "bytes",
    "packets",
    "packet bytes",
    "MiB",
];

const COST_NOTES: &str = "\
syscalls: under strace, in a run of its own, once; not of the load, nor of what polls. messages, bytes: sent + received by the load \
where it has the compute half in it; no other program tells.\n\
packets, packet bytes: on the loopback device, both ways, with headers and acknowledgements. MiB: private resident memory per \
attachment, where the drive is not in it.";

fn cost(row: &Row) -> Option<Vec<String>> {
    let each = |name: &str| {
        let each: Vec<String> = row
            .per_process(name)
            .map(|(process, value)| format!("{process} {}", number(value)))
            .collect();
        each.join(", ")
    };
    let one = |name: &str| row.median(name).map_or_else(String::new, number);
    let both = |there: &str, back: &str| match (row.median(there), row.median(back)) {
        (Some(there), Some(back)) => format!("{} + {}", number(there), number(back)),
        _ => String::new(),
    };
    let line = vec![
        row.subject.clone(),
        row.workload.clone(),
        row.awake.to_string(),
        each(figure::CPU),
        each(figure::SWITCHES),
        each(figure::SYSCALLS),
        both(figure::MESSAGES_SENT, figure::MESSAGES_RECEIVED),
        both(figure::BYTES_SENT, figure::BYTES_RECEIVED),
        one(figure::PACKETS),
        one(figure::LOOPBACK_BYTES),
        each(figure::RESIDENT),
    ];
    line[3..]
        .iter()
        .any(|cell| !cell.is_empty())
        .then_some(line)
}

/// Stands where there is no figure.
const NONE: &str = "-";

const RATIO: [&str; 8] = [
    "subject",
    "workload",
    "",
    "/ limit",
    "/ NBD",
    "/ NBD null",
    "/ iSCSI",
    "/ SPDK",
];

fn ratios(results: &Results) -> Vec<Vec<String>> {
    let rows = results.rows().iter();
    rows.filter_map(|row| {
        let shown = |ratio: Option<f64>| ratio.map_or_else(String::new, number);
        let mut line = vec![
            row.subject.clone(),
            row.workload.clone(),
            row.awake.to_string(),
            shown(ratios::to_limit(results, row)),
        ];
        line.extend(PEERS.map(|peer| shown(ratios::to_peer(results, row, peer))));
        line[3..]
            .iter()
            .any(|cell| !cell.is_empty())
            .then_some(line)
    })
    .collect()
}

fn model(fits: &[Fit]) -> String {
    let mut out = String::new();
    for fit in fits {
        let _ = writeln!(out, "{fit}");
    }
    out
}

fn judged(verdicts: &[Verdict]) -> Vec<Vec<String>> {
    verdicts.iter().map(Verdict::cells).collect()
}

/// A figure with the range of its repeats.
fn range(spread: &Spread, unit: f64) -> String {
    let median = number(spread.median() / unit);
    if spread.samples().len() < 2 {
        return median;
    }
    let (low, high) = (number(spread.min() / unit), number(spread.max() / unit));
    format!("{median} ({low}-{high})")
}

/// Three significant digits, and all digits before the point.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        size if !size.is_finite() => "-".into(),
        size if size >= 99.95 => format!("{value:.0}"),
        size if size >= 9.995 => format!("{value:.1}"),
        size if size >= 0.0005 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.1e}"),
    }
}

/// Columns that are as wide as their widest cell. A line with fewer cells than columns ends in a remark, which is
/// as wide as it likes.
fn align(header: &[&str], lines: &[Vec<String>]) -> String {
    let shown = |cell: &str| if cell.is_empty() { NONE } else { cell }.to_owned();
    let full = || lines.iter().filter(|line| line.len() == header.len());
    let width = |column: usize| {
        let whole = full().map(|line| &line[column]);
        let begun = lines.iter().filter(|line| column + 1 < line.len());
        let cells = whole.chain(begun.map(|line| &line[column]));
        let widest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
        widest.max(header[column].chars().count())
    };
    // A column that nobody fills is left out.
    let used: Vec<usize> = (0..header.len())
        .filter(|column| full().any(|line| !line[*column].is_empty()))
        .collect();
    let used = if full().next().is_none() {
        (0..header.len()).collect()
    } else {
        used
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut out = String::new();
    let mut push = |cells: Vec<(usize, String)>| {
        let mut text = String::new();
        for (column, cell) in cells {
            let _ = write!(text, "{cell:<width$}  ", width = widths[column]);
        }
        let _ = writeln!(out, "{}", text.trim_end());
    };
    push(
        used.iter()
            .map(|at| (*at, header[*at].to_owned()))
            .collect(),
    );
    for line in lines {
        let cells = used.iter().filter(|at| **at < line.len());
        push(cells.map(|at| (*at, shown(&line[*at]))).collect());
    }
    out
}

/// The states in which something was measured, for captions.
pub(crate) fn caption(awake: Awake) -> &'static str {
    match awake {
        Awake::Halting => "CPUs halt when idle",
        Awake::Spinning => "CPUs kept awake",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results;

    #[test]
    fn numbers_have_about_three_digits() {
        let shown = [1234.5, 123.45, 12.345, 1.2345, 0.0, 0.012].map(number);
        assert_eq!(shown, ["1234", "123", "12.3", "1.23", "0.00", "0.01"]);
    }

    #[test]
    fn columns_are_aligned_and_empty_ones_left_out() {
        let cell = |text: &str| text.to_owned();
        let lines = [
            vec![cell("a"), cell(""), cell("1")],
            vec![cell("long"), cell(""), cell("2")],
        ];
        assert_eq!(
            align(&["x", "y", "z"], &lines),
            "x     z\na     1\nlong  2\n"
        );
    }

    #[test]
    fn what_is_missing_is_a_dash_and_a_remark_needs_no_column() {
        let line = |cells: &[&str]| cells.iter().map(|cell| (*cell).to_owned()).collect();
        let lines: [Vec<String>; 3] = [
            line(&["a", "1", "2", "3"]),
            line(&["b", "", "2", "3"]),
            line(&["c", "1", "not measured: it cannot"]),
        ];
        assert_eq!(
            align(&["", "x", "y", "z"], &lines),
            "   x  y  z\na  1  2  3\nb  -  2  3\nc  1  not measured: it cannot\n"
        );
    }

    #[test]
    fn row_without_figures_says_why() {
        let mut results = Results::default();
        let figures = results::Figures::from([(figure::P50.to_owned(), 40.0)]);
        results.add("peers", "NBD", Awake::Halting, "w", figures);
        results.remark(
            "peers",
            "SPDK",
            Awake::Halting,
            "all",
            "not measured: why".into(),
        );
        let rows: Vec<&Row> = results.rows().iter().collect();
        let shown = super::figures(&rows);
        assert!(
            shown.ends_with("SPDK     all       H  not measured: why\n"),
            "{shown}"
        );
    }
}
