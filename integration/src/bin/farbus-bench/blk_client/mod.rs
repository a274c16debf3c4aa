//! Load on vhost-user-blk devices, by libblkio: the client that QEMU uses for such devices.
//!
//! It runs in a process of its own, so that its CPU time is known and its end frees the devices. Each device
//! has a thread, which drives all of its queues, as in Farbus' own load.

mod lane;
mod load;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use farbus_integration::deadline::Deadline;
use farbus_integration::process::{Process, mortal_command};

use crate::results::{Figures, figure};
use crate::workload::{Extent, Pattern, Workload};

/// How long connecting and ending may take, beside the load.
const AROUND: Duration = Duration::from_secs(10);
/// How long a counted load may take: what is watched meanwhile may be slow.
const COUNTED: Duration = Duration::from_secs(60);

/// Arguments of `blk-client`.
#[derive(Debug, Args)]
pub(crate) struct ClientArgs {
    /// The socket of a device; given once for each.
    #[arg(long, required = true)]
    path: Vec<PathBuf>,
    #[arg(long, value_enum)]
    rw: Pattern,
    #[arg(long)]
    block: u32,
    /// I/Os in flight of each queue.
    #[arg(long)]
    depth: usize,
    /// Queues of each device.
    #[arg(long, default_value_t = 1)]
    queues: usize,
    #[arg(long, default_value_t = 0.0)]
    warmup: f64,
    #[arg(long, required_unless_present = "count", default_value_t = 0.0)]
    seconds: f64,
    /// So many I/Os of each device, in place of a time.
    #[arg(long, conflicts_with = "seconds")]
    count: Option<u64>,
}

/// Runs the client to its end, on one device for each attachment of the workload.
pub(crate) fn run(sockets: &[PathBuf], workload: &Workload, extent: Extent) -> Result<Figures> {
    let own = std::env::current_exe().context("finding this program")?;
    let mut client = Process::start("blk-client", command(&own, sockets, workload, extent))?;
    let limit = AROUND
        + match extent {
            Extent::For { warmup, time } => warmup + time,
            Extent::Count(_) => COUNTED,
        };
    let status = client.wait(Deadline::after(limit))?;
    ensure!(status.success(), "the libblkio client failed ({status})");
    // Its figures are a few hundred bytes, which the pipe holds.
    let said = client.child().stdout.take().map(std::io::read_to_string);
    let mut figures: Figures = serde_json::from_str(&said.transpose()?.unwrap_or_default())?;
    let iops = *figures.get(figure::IOPS).context("no rate")?;
    figures.insert(
        figure::MB_PER_S.into(),
        iops * f64::from(workload.block) / 1e6,
    );
    Ok(figures)
}

fn command(
    own: &Path,
    sockets: &[PathBuf],
    workload: &Workload,
    extent: Extent,
) -> std::process::Command {
    let mut command = mortal_command(own);
    command.arg("blk-client");
    for socket in sockets {
        command.arg("--path").arg(socket);
    }
    command
        .args(["--rw", workload.pattern.name()])
        .args(["--block", &workload.block.to_string()])
        .args(["--depth", &workload.depth_per_queue().to_string()])
        .args(["--queues", &workload.queues.to_string()]);
    match extent {
        Extent::For { warmup, time } => command
            .args(["--warmup", &warmup.as_secs_f64().to_string()])
            .args(["--seconds", &time.as_secs_f64().to_string()]),
        Extent::Count(count) => command.args(["--count", &count.to_string()]),
    };
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// The client's process.
pub(crate) fn client(args: &ClientArgs) -> Result<()> {
    let figures = load::all(args)?;
    println!("{}", serde_json::to_string(&figures)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{Helper, Options};
    use crate::workload::{READ_32_A8, READ_32_Q4};
    use clap::Parser;

    fn parsed(workload: &Workload, extent: Extent) -> ClientArgs {
        let sockets: Vec<PathBuf> = (0..workload.attachments)
            .map(|n| format!("{n}.sock").into())
            .collect();
        let command = command(Path::new("farbus-bench"), &sockets, workload, extent);
        let words = command.get_args().map(|word| word.to_str().unwrap());
        // What runs the program so that it dies with its parent comes first.
        let words = words.skip_while(|word| *word != "blk-client");
        let options = Options::try_parse_from(["farbus-bench"].into_iter().chain(words)).unwrap();
        match options.helper {
            Some(Helper::BlkClient(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn client_is_told_all_of_a_workload() {
        let time = Duration::from_millis(250);
        let timed = Extent::For { warmup: time, time };
        let many = parsed(&READ_32_A8, timed);
        assert_eq!((many.path.len(), many.queues, many.depth), (8, 1, 4));
        assert_eq!((many.warmup, many.seconds, many.count), (0.25, 0.25, None));
        let counted = parsed(&READ_32_Q4, Extent::Count(7));
        assert_eq!((counted.path.len(), counted.queues), (1, 4));
        assert_eq!((counted.depth, counted.count), (8, Some(7)));
    }
}
