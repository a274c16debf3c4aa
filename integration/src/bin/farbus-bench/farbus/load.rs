//! Runs `farbus-vfu-nvme bench`, the load, and reads what it reports.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farbus_integration::daemon::Daemon;
use farbus_integration::deadline::Deadline;
use serde_json::Value;

use crate::results::{Figures, figure};
use crate::session::Plan;
use crate::usage::{Watched, metered};
use crate::workload::{Extent, MIX_READS, Pattern, Workload};

pub(crate) const TOOL: &str = "farbus-vfu-nvme";

/// Where the load is put.
#[derive(Debug)]
pub(crate) enum Target<'a> {
    /// The endpoints of agents.
    Endpoints(Vec<&'a Path>),
    /// Exports of a device server, with the compute half in the load's own process.
    Exports {
        address: &'a str,
        names: &'a [String],
    },
}

impl Target<'_> {
    fn arguments(&self) -> Vec<String> {
        match self {
            Self::Endpoints(sockets) => sockets
                .iter()
                .flat_map(|socket| ["--vfio-user".to_owned(), socket.display().to_string()])
                .collect(),
            Self::Exports { address, names } => {
                let names = names.iter();
                let each = names.flat_map(|name| ["--export".to_owned(), name.clone()]);
                ["--from", address]
                    .map(str::to_owned)
                    .into_iter()
                    .chain(each)
                    .collect()
            }
        }
    }
}

/// Runs the load, and adds what the `watched` processes used.
pub(crate) fn measure(
    target: &Target<'_>,
    workload: &Workload,
    polled: bool,
    watched: &[Watched],
    plan: &Plan,
) -> Result<Figures> {
    // Two that poll have a CPU each, as SPDK's have.
    let apart = polled || workload.is_big();
    metered(watched, apart, plan, || {
        let report = run(target, workload, polled, plan.into())?;
        Ok(figures(&report, workload))
    })
}

/// Runs the load to its end; returns its report.
pub(crate) fn run(
    target: &Target<'_>,
    workload: &Workload,
    polled: bool,
    extent: Extent,
) -> Result<Value> {
    let mut arguments = vec!["bench".to_owned()];
    arguments.extend(target.arguments());
    let depth = workload.depth_per_queue().to_string();
    let queues = workload.queues.to_string();
    let block = workload.block.to_string();
    arguments.extend(
        [
            "--rw",
            workload.pattern.name(),
            "--bs",
            &block,
            "--iodepth",
            &depth,
            "--queues",
            &queues,
            "--json",
        ]
        .map(str::to_owned),
    );
    if workload.pattern == Pattern::RandRw {
        arguments.extend(["--rwmixread".to_owned(), MIX_READS.to_string()]);
    }
    if polled {
        arguments.push("--poll".to_owned());
    }
    let mut limit = Duration::from_secs(30);
    match extent {
        Extent::For { warmup, time } => {
            limit += warmup + time;
            arguments.extend(["--warmup".to_owned(), warmup.as_secs_f64().to_string()]);
            arguments.extend(["--seconds".to_owned(), time.as_secs_f64().to_string()]);
        }
        Extent::Count(count) => arguments.extend(["--count".to_owned(), count.to_string()]),
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ended = Daemon::run(TOOL, &arguments, Deadline::after(limit))?;
    ensure!(
        ended.status.success(),
        "{TOOL} failed ({}): {}",
        ended.status,
        ended.stderr.trim()
    );
    serde_json::from_str(&ended.stdout).with_context(|| format!("{TOOL} said: {}", ended.stdout))
}

/// The tool's figures under the names that they have here.
pub(crate) fn figures(report: &Value, workload: &Workload) -> Figures {
    const NAMES: [(&str, &str); 11] = [
        ("/latency_us/mean", figure::MEAN),
        ("/latency_us/p50", figure::P50),
        ("/latency_us/p99", figure::P99),
        ("/latency_us/p99.9", figure::P999),
        ("/iops", figure::IOPS),
        ("/cpu_us_per_io", "cpu_us_per_io.client"),
        ("/doorbells_per_io", figure::DOORBELLS),
        ("/messages_sent_per_io", figure::MESSAGES_SENT),
        ("/messages_received_per_io", figure::MESSAGES_RECEIVED),
        ("/bytes_sent_per_io", figure::BYTES_SENT),
        ("/bytes_received_per_io", figure::BYTES_RECEIVED),
    ];
    let number = |path: &str| report.pointer(&format!("/total{path}"))?.as_f64();
    let mut figures: Figures = NAMES
        .iter()
        .filter_map(|(path, name)| Some(((*name).to_owned(), number(path)?)))
        .collect();
    let switches = ["voluntary", "involuntary"]
        .map(|kind| number(&format!("/{kind}_context_switches_per_io")));
    if let [Some(voluntary), Some(other)] = switches {
        let name = format!("{}.client", figure::SWITCHES);
        figures.insert(name, voluntary + other);
    }
    if let Some(iops) = figures.get(figure::IOPS) {
        let rate = iops * f64::from(workload.block) / 1e6;
        figures.insert(figure::MB_PER_S.into(), rate);
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::BIG_READ;
    use serde_json::json;

    #[test]
    fn report_is_read_as_far_as_it_goes() {
        let report = json!({"total": {"latency_us": {"p50": 9.5, "p99.9": 20}, "iops": 1000.0}});
        let figures = figures(&report, &BIG_READ);
        assert_eq!(figures[figure::P50], 9.5);
        assert_eq!(figures[figure::P999], 20.0);
        assert_eq!(figures[figure::MB_PER_S], 131.072);
        assert!(!figures.contains_key(figure::P99));
    }
}
