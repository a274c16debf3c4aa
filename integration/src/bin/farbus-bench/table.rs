//! The tables that a person reads.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use crate::awake::Awake;
use crate::budgets::Verdict;
use crate::farbus::{GUEST, GUEST_LOCAL, IN_PROCESS_POLLED};
use crate::host::Host;
use crate::limits::How;
use crate::model::Fit;
use crate::peers::{ISCSI, NBD, NBD_NULL, SPDK_TCP};
use crate::results::{Results, Row, Spread, figure};
use crate::session::Plan;
use crate::workload::is_judged_by_latency;
use crate::{budgets, limits};

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
        "{} repeats of {:.1} s; median, and in brackets the lowest and the highest of the repeats\n\
         H: CPUs halt when idle. S: an idle-class process on each keeps them awake.",
        plan.repeats,
        plan.time.as_secs_f64()
    );
    for part in ["limits", "peers", "farbus"] {
        let rows: Vec<&Row> = results.rows().iter().filter(|r| r.part == part).collect();
        if !rows.is_empty() {
            let _ = write!(out, "\n# {part}\n{}", figures(&rows));
        }
    }
    let costs: Vec<Vec<String>> = results.rows().iter().filter_map(cost).collect();
    if !costs.is_empty() {
        let _ = write!(
            out,
            "\n# cost per I/O, process by process\n{}",
            align(&COST, &costs)
        );
    }
    let ratios = ratios(results);
    if !ratios.is_empty() {
        let _ = write!(
            out,
            "\n# ratios: p50 at depth 1 (less is better), I/Os per second otherwise (more is better)\n{}",
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

const FIGURES: [&str; 8] = [
    "subject", "workload", "", "p50 us", "p99 us", "p99.9 us", "kIOPS", "MB/s",
];

fn figures(rows: &[&Row]) -> String {
    let lines: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
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

const COST: [&str; 9] = [
    "subject", "workload", "", "CPU us", "switches", "syscalls", "messages", "bytes", "MiB",
];

fn cost(row: &Row) -> Option<Vec<String>> {
    let each = |name: &str| {
        let each: Vec<String> = row
            .per_process(name)
            .map(|(process, value)| format!("{process} {}", number(value)))
            .collect();
        each.join(", ")
    };
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
        each(figure::RESIDENT),
    ];
    line[3..]
        .iter()
        .any(|cell| !cell.is_empty())
        .then_some(line)
}

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
    // What emulated CPUs do is compared with nothing but itself.
    let compared = |row: &&Row| row.part != "limits" && !is_in_guest(row);
    let disks = results.rows().iter().filter(compared);
    disks
        .filter_map(|row| {
            let mut line = vec![
                row.subject.clone(),
                row.workload.clone(),
                row.awake.to_string(),
                to_limit(results, row).map_or_else(String::new, number),
            ];
            for peer in [NBD, NBD_NULL, ISCSI, SPDK_TCP] {
                let ratio = to_peer(results, row, peer).filter(|_| peer != row.subject);
                line.push(ratio.map_or_else(String::new, number));
            }
            line[3..]
                .iter()
                .any(|cell| !cell.is_empty())
                .then_some(line)
        })
        .collect()
}

/// Whether a row is what an emulated guest saw.
pub(crate) fn is_in_guest(row: &Row) -> bool {
    [GUEST, GUEST_LOCAL].contains(&row.subject.as_str())
}

/// At depth 1, the p50 in blocking raw round trips (polled ones for what polls); for large blocks, the
/// share of one connection's raw throughput.
pub(crate) fn to_limit(results: &Results, row: &Row) -> Option<f64> {
    if is_judged_by_latency(&row.workload) {
        let how = if row.subject == IN_PROCESS_POLLED || row.subject == SPDK_TCP {
            How::Polled
        } else {
            How::Blocking
        };
        let limit = limits::round_trip(limits::READ, how);
        let limit = results.median(limits::TCP, row.awake, &limit, figure::P50)?;
        return Some(row.median(figure::P50)? / limit);
    }
    let limit = match row.workload.split(' ').take(2).collect::<Vec<_>>()[..] {
        ["128k", "read"] => limits::RECEIVED,
        ["128k", "write"] => limits::SENT,
        _ => return None,
    };
    let limit = results.median(limits::TCP, row.awake, limit, figure::MB_PER_S)?;
    Some(row.median(figure::MB_PER_S)? / limit)
}

/// The same against a peer under the same workload.
pub(crate) fn to_peer(results: &Results, row: &Row, peer: &str) -> Option<f64> {
    let name = if is_judged_by_latency(&row.workload) {
        figure::P50
    } else {
        figure::IOPS
    };
    // Peers have one queue and one attachment.
    let plain = |word: &&str| !word.starts_with(['q', 'a']);
    let workload: Vec<&str> = row.workload.split(' ').filter(plain).collect();
    let peer = results.median(peer, row.awake, &workload.join(" "), name)?;
    Some(row.median(name)? / peer)
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

/// Columns that are as wide as their widest cell.
fn align(header: &[&str], lines: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        let widest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
        widest.max(header[column].chars().count())
    };
    // A column that nobody fills is left out.
    let used: BTreeSet<usize> = (0..header.len())
        .filter(|column| lines.iter().any(|line| !line[*column].is_empty()))
        .collect();
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut out = String::new();
    let mut push = |cells: &mut dyn Iterator<Item = (usize, &str)>| {
        let mut text = String::new();
        for (column, cell) in cells {
            let _ = write!(text, "{cell:<width$}  ", width = widths[column]);
        }
        let _ = writeln!(out, "{}", text.trim_end());
    };
    push(&mut used.iter().map(|column| (*column, header[*column])));
    for line in lines {
        push(&mut used.iter().map(|column| (*column, line[*column].as_str())));
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
}
