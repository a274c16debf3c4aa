//! The command line: what it accepts, and the exit codes.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, Parser, Subcommand, ValueEnum};
use farbus_fabric::provider::Wanted;
use farbus_fabric::wire::ExportName;
use farbus_vfio::soft_nvme::SoftNvmeConfig;
use log::LevelFilter;

use crate::target::TargetSpec;
use crate::{bench, identify, serve, verify};

const EXIT_CODES: &str = "\
Exit codes:
  0  done, and all as it should be
  1  failed: out of reach, a command failed, or data differ
  2  the command line is wrong";

const BENCH_HELP: &str = "\
Example:
  farbus-vfu-nvme bench --from 127.0.0.1:7420 --export disk0 --rw randread --iodepth 32 --poll --json

The JSON object has `attachments`, a list with an object for each target, and `total`. Each of them
has `target`, `rw`, `block_size_bytes`, `iodepth`, `queues`, `poll`, `shadow_doorbells`, `seconds`,
`total_ios`, `read_ios`, `write_ios`, `errors`, `iops`, `mib_per_s`, `latency_us` (with `min`, `mean`,
`p50`, `p99`, `p99.9` and `max`), `cpu_us_per_io`, `voluntary_context_switches_per_io`,
`involuntary_context_switches_per_io` (of the threads that drive, not of those of a --soft-nvme
drive on a file) and `doorbells_per_io` (registers written). With --from there are also
`messages_sent_per_io`, `messages_received_per_io`, `payload_bytes_sent_per_io`,
`payload_bytes_received_per_io`, `bytes_sent_per_io`, `bytes_received_per_io`, `send_calls_per_io`
(with RDMA: work requests), `receive_calls_per_io` and `rdma_doorbells_per_io`; elsewhere they are null.";

/// Drives NVMe controllers the way a guest's driver does: at a vfio-user socket, through the
/// fabric from this process, or in this process.
#[derive(Parser)]
#[command(name = "farbus-vfu-nvme", version, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// What to log to standard error: off, error, warn, info, debug or trace.
    #[arg(long, global = true, default_value = "warn", value_name = "LEVEL")]
    pub(crate) log_level: LevelFilter,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Says what the controller and its namespace are.
    #[command(after_help = format!("\
Example:
  farbus-vfu-nvme identify --vfio-user /run/farbus/disk0.sock

{EXIT_CODES}"))]
    Identify(IdentifyArgs),
    /// Overwrites the namespace with a pattern, rewrites parts of it, and reads all of it back.
    #[command(after_help = format!("\
Example:
  farbus-vfu-nvme verify --vfio-user /run/farbus/disk0.sock --size 64MiB --iodepth 16

All that the namespace held there is lost. The first block that differs is named.

{EXIT_CODES}"))]
    Verify(VerifyArgs),
    /// Measures reads and writes. Writes overwrite the namespace.
    #[command(after_help = format!("{BENCH_HELP}\n\n{EXIT_CODES}"))]
    Bench(BenchArgs),
    /// Offers a software drive at a vfio-user socket until SIGTERM, with no fabric between.
    #[command(after_help = format!("\
Example:
  farbus-vfu-nvme serve --soft-nvme backing=null,size=1GiB --socket /run/farbus/local.sock

Prints one line that begins with \"ready\" when a VMM can connect.

{EXIT_CODES}"))]
    Serve(ServeArgs),
}

/// What is driven; each is one attachment.
#[derive(Args)]
#[command(next_help_heading = "Targets (each may be given several times)")]
pub(crate) struct TargetArgs {
    /// A vfio-user socket with an NVMe controller behind it.
    #[arg(long, value_name = "PATH")]
    vfio_user: Vec<PathBuf>,
    /// A device server; an export of it is claimed by this process itself.
    #[arg(long, value_name = "HOST:PORT", requires = "export")]
    from: Vec<String>,
    /// The export, one for each --from (or several for one).
    #[arg(long, value_name = "NAME", requires = "from", value_parser = parse_export_name)]
    export: Vec<ExportName>,
    /// What carries the data of --from: auto, verbs or tcp.
    #[arg(long, value_name = "PROVIDER", default_value_t)]
    provider: Wanted,
    /// A software drive in this process, as farbus-device-server takes it: path=FILE or
    /// backing=memory|null, with size=, block-size=, queues=, serial=.
    #[arg(long, value_name = "SPEC")]
    soft_nvme: Vec<SoftNvmeConfig>,
    /// Ring doorbells by register even if the controller offers doorbells in memory.
    #[arg(long)]
    pub(crate) no_dbbuf: bool,
}

fn parse_export_name(name: &str) -> Result<ExportName, String> {
    ExportName::new(name).map_err(|error| error.to_string())
}

impl TargetArgs {
    /// All targets, at least one.
    pub(crate) fn specs(&self) -> anyhow::Result<Vec<TargetSpec>> {
        let mut specs: Vec<_> = self
            .vfio_user
            .iter()
            .cloned()
            .map(TargetSpec::VfioUser)
            .collect();
        if self.from.len() != 1 && self.from.len() != self.export.len() {
            bail!("give one --export for each --from, or a single --from");
        }
        for (n, export) in self.export.iter().enumerate() {
            let address = self.from.get(n).or(self.from.first());
            specs.extend(address.map(|address| TargetSpec::Fabric {
                address: address.clone(),
                export: export.clone(),
                provider: self.provider,
            }));
        }
        specs.extend(self.soft_nvme.iter().cloned().map(TargetSpec::SoftNvme));
        if specs.is_empty() {
            bail!("nothing to drive; give --vfio-user, --from with --export, or --soft-nvme");
        }
        Ok(specs)
    }
}

#[derive(Args)]
pub(crate) struct IdentifyArgs {
    #[command(flatten)]
    pub(crate) targets: TargetArgs,
    /// Print a JSON array.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    pub(crate) targets: TargetArgs,
    /// How much of the namespace, from its beginning on; all of it unless told otherwise.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) size: Option<u64>,
    /// Bytes of one command.
    #[arg(long, default_value = "4k", value_name = "SIZE", value_parser = parse_size)]
    pub(crate) bs: u64,
    /// Commands that are outstanding.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1023))]
    pub(crate) iodepth: u16,
    /// What the pattern is made from.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Print a JSON array.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What a command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pattern {
    /// Reads, one behind the other.
    Read,
    /// Writes, one behind the other.
    Write,
    /// Reads anywhere.
    Randread,
    /// Writes anywhere.
    Randwrite,
    /// Both anywhere, as --rwmixread says.
    Randrw,
}

#[derive(Args)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    pub(crate) targets: TargetArgs,
    /// What the commands do.
    #[arg(long, value_enum, default_value = "randread")]
    pub(crate) rw: Pattern,
    /// How many of a hundred commands are reads, with --rw randrw.
    #[arg(long, default_value_t = 70, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) rwmixread: u8,
    /// Bytes of one command.
    #[arg(long, default_value = "4k", value_name = "SIZE", value_parser = parse_size)]
    pub(crate) bs: u64,
    /// Commands that are outstanding in each queue.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1023))]
    pub(crate) iodepth: u16,
    /// Queue pairs of each target.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) queues: u16,
    /// How long to measure.
    #[arg(long, default_value_t = 5.0, conflicts_with = "count", value_parser = parse_seconds)]
    pub(crate) seconds: f64,
    /// How long to do the same before, unmeasured.
    #[arg(long, default_value_t = 1.0, conflicts_with = "count", value_parser = parse_seconds)]
    pub(crate) warmup: f64,
    /// Measure so many commands of each target, from the first one on.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    /// Look for completions all the time, and do not wait for interrupts.
    #[arg(long)]
    pub(crate) poll: bool,
    /// Where random numbers start.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Print a JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct ServeArgs {
    /// The drive, as farbus-device-server takes it.
    #[arg(long, value_name = "SPEC")]
    pub(crate) soft_nvme: SoftNvmeConfig,
    /// The socket; its directory must exist.
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,
}

/// A number of bytes: 4096, 4k, 128KiB, 1MiB, 1g.
fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size; write bytes, or a number with k, m or g");
    let lower = text.to_ascii_lowercase();
    let number = lower.trim_end_matches("ib");
    let (digits, shift) = [("k", 10), ("m", 20), ("g", 30)]
        .into_iter()
        .find_map(|(unit, shift)| Some((number.strip_suffix(unit)?, shift)))
        .unwrap_or((number, 0));
    digits
        .parse::<u64>()
        .ok()
        .and_then(|size| size.checked_mul(1 << shift))
        .filter(|size| *size > 0)
        .ok_or_else(wrong)
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|seconds| (0.0..=86_400.0).contains(seconds))
        .ok_or_else(|| format!("`{text}` is not a number of seconds up to a day"))
}

impl Cli {
    /// Runs the command to its end.
    pub(crate) fn run(self) -> ExitCode {
        let outcome = match &self.command {
            Command::Identify(args) => specs(&args.targets).and_then(|s| identify::run(args, &s)),
            Command::Verify(args) => specs(&args.targets).and_then(|s| verify::run(args, &s)),
            Command::Bench(args) => specs(&args.targets).and_then(|s| bench::run(args, &s)),
            Command::Serve(args) => serve::run(args),
        };
        match outcome {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("farbus-vfu-nvme: {error:#}");
                ExitCode::FAILURE
            }
        }
    }
}

/// The targets; a command line without any ends here, as clap would end it.
fn specs(targets: &TargetArgs) -> anyhow::Result<Vec<TargetSpec>> {
    targets.specs().inspect_err(|error| {
        let error = clap::Error::raw(
            clap::error::ErrorKind::MissingRequiredArgument,
            format!("{error}\n"),
        );
        error.exit()
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_understood() {
        let sizes = [
            ("512", Some(512)),
            ("4k", Some(4096)),
            ("128KiB", Some(128 << 10)),
            ("1M", Some(1 << 20)),
            ("2GiB", Some(2 << 30)),
            ("0", None),
            ("k", None),
            ("-1", None),
            ("99999999999999g", None),
        ];
        for (text, size) in sizes {
            assert_eq!(parse_size(text).ok(), size, "{text}");
        }
    }

    #[test]
    fn exports_go_with_their_servers_or_all_with_one() {
        let targets = |words: &[&str]| {
            let words = ["x", "identify"].iter().chain(words);
            let cli = Cli::try_parse_from(words).ok()?;
            match cli.command {
                Command::Identify(args) => args.targets.specs().ok().map(|specs| specs.len()),
                _ => None,
            }
        };
        assert_eq!(targets(&["--from", "h:1", "--export", "a"]), Some(1));
        let two = ["--from", "h:1", "--export", "a", "--export", "b"];
        assert_eq!(targets(&two), Some(2));
        assert_eq!(targets(&["--from", "h:1"]), None);
        assert_eq!(targets(&[]), None);
    }
}
