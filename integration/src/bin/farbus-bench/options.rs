//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

use crate::blk_client::ClientArgs;
use crate::helpers::{EchoArgs, SpinArgs};

const NOTES: &str = "\
Examples:
  farbus-bench --quick                    a first look, in about four minutes
  farbus-bench --out docs/performance     all of it, with results.json and the plots in that directory
  farbus-bench --only limits,farbus --check

SPDK is measured too where a build is at hand: SPDK_DIR=/path/to/spdk.

Exit codes:
  0    measured; with --check: and no budget that is marked as met is broken
  1    something could not be measured, or with --check a budget is broken
  2    the command line is wrong
  130  interrupted";

/// Measures Farbus, the physical limits and what people use instead, side by side.
#[derive(Debug, Parser)]
#[command(name = "farbus-bench", version, after_help = NOTES, args_conflicts_with_subcommands = true)]
pub(crate) struct Options {
    /// Fewer workloads, shorter and fewer runs.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Measures these parts only.
    #[arg(long, value_delimiter = ',', value_name = "PART,…")]
    pub(crate) only: Vec<Part>,
    /// Fails when a budget that is marked as met is broken.
    #[arg(long)]
    pub(crate) check: bool,
    /// Writes results.json, table.txt and the plots into this directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// How often everything is measured [default: 3; 2 with --quick].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) repeats: Option<u32>,
    /// How long one measurement takes [default: 0.4; 0.3 with --quick]; limits, and workloads with several
    /// queues or attachments, half of that.
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub(crate) seconds: Option<f64>,
    #[command(subcommand)]
    pub(crate) helper: Option<Helper>,
}

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// What the machine itself can do.
    Limits,
    /// NBD, iSCSI, and SPDK where it is at hand.
    Peers,
    /// Farbus.
    Farbus,
    /// Farbus over RDMA, in an emulated machine with soft RoCE.
    Rdma,
}

/// Processes that a measurement needs, started by itself.
#[derive(Debug, Subcommand)]
#[command(hide = true)]
pub(crate) enum Helper {
    /// Keeps one CPU from halting.
    #[command(hide = true)]
    Spin(SpinArgs),
    /// The other end of a connection.
    #[command(hide = true)]
    Echo(EchoArgs),
    /// Puts load on a vhost-user-blk socket.
    #[command(hide = true)]
    BlkClient(ClientArgs),
}

impl Options {
    /// Whether this part is to be measured.
    pub(crate) fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }

    pub(crate) fn repeats(&self) -> u32 {
        self.repeats.unwrap_or(if self.quick { 2 } else { 3 })
    }

    pub(crate) fn seconds(&self) -> f64 {
        self.seconds.unwrap_or(if self.quick { 0.3 } else { 0.4 })
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|seconds| (0.05..=600.0).contains(seconds))
        .ok_or_else(|| "expected seconds between 0.05 and 600".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn parts_are_all_unless_some_are_named() {
        let all = Options::parse_from(["farbus-bench"]);
        let some = Options::parse_from(["farbus-bench", "--only", "limits,peers"]);
        assert!(all.wants(Part::Farbus) && some.wants(Part::Peers));
        assert!(!some.wants(Part::Farbus));
    }
}
