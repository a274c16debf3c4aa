//! SPDK, which no distribution packages: measured where `SPDK_DIR` names a build of it.
//!
//! Target and perf tool poll, each on a CPU of its own, without huge pages and without PCI. The perf tool is
//! initiator and load in one process, so it compares with Farbus' compute half in the load's process.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farbus_integration::process::{Process, mortal_command, run_tool};
use farbus_integration::scratch::Scratch;

use super::servers::{free_port, start, wait};
use super::{SPDK_TCP, SPDK_VFIO_USER};
use crate::awake::Awake;
use crate::results::{Figures, figure};
use crate::session::{Skip, Subject, Take};
use crate::sides::Side;
use crate::usage::{Meter, Watched};
use crate::workload::{self, BIG_WRITE, MIX_READS, Pattern, Workload};

/// Environment variable: a tree in which SPDK was built.
const DIR_ENV: &str = "SPDK_DIR";
const NQN: &str = "nqn.2016-06.io.spdk:bench";
const TARGET_CPU: &str = "0x1";
const PERF_CPU: &str = "0x2";
/// The tool counts in whole seconds.
pub(crate) const WARMUP: Duration = Duration::from_secs(1);
/// Of either program; the target has the disk in it.
const MEMORY_MIB: &str = "1024";
const DISK_MIB: &str = "256";

pub(super) fn subjects() -> Vec<Box<dyn Subject>> {
    vec![
        Box::new(Spdk {
            name: SPDK_TCP,
            vfio_user: false,
        }),
        Box::new(Spdk {
            name: SPDK_VFIO_USER,
            vfio_user: true,
        }),
    ]
}

struct Spdk {
    name: &'static str,
    vfio_user: bool,
}

impl Subject for Spdk {
    fn part(&self) -> &'static str {
        "peers"
    }

    fn name(&self) -> String {
        self.name.into()
    }

    /// It never sleeps.
    fn states(&self) -> &'static [Awake] {
        &[Awake::Halting]
    }

    fn measure(&self, take: &mut Take<'_>) -> Result<()> {
        let Some(dir) = std::env::var_os(DIR_ENV).map(PathBuf::from) else {
            return Err(Skip::because(format!("{DIR_ENV} names no build of SPDK")));
        };
        let scratch = Scratch::new("spdk")?;
        let wide: Vec<Workload> = workload::all(take.plan.quick);
        let wide: Vec<Workload> = wide.into_iter().filter(Workload::is_wide).collect();
        take.cannot(&wide, "its perf tool has one queue of one controller here");
        let (target, transport) = self.start(&dir, &scratch)?;
        let watched = [Watched {
            name: "target",
            pid: target.id(),
            side: Side::Device,
        }];
        // As the other peers' and daemons' disks in memory: what was never written is one page of zeroes, which stays in the cache.
        perf(&dir, &transport, &BIG_WRITE, Duration::from_secs(1)).context("filling the disk")?;
        for workload in workload::common(take.plan.quick) {
            take.one(&workload.to_string(), |plan| {
                // The tool counts in whole seconds.
                let time = Duration::from_secs(plan.time.as_secs_f64().ceil() as u64);
                let meter = Meter::start(&watched, WARMUP, time);
                let mut figures = perf(&dir, &transport, &workload, time)?;
                meter.stop(&mut figures)?;
                Ok(figures)
            })?;
        }
        Ok(())
    }
}

impl Spdk {
    /// Starts the target with a disk in memory; returns how the perf tool reaches it.
    fn start(&self, dir: &Path, scratch: &Scratch) -> Result<(Process, String)> {
        let control = scratch.join("rpc.sock");
        let mut command = mortal_command(&dir.join("build/bin/nvmf_tgt"));
        command
            .args(["-m", TARGET_CPU, "--no-huge", "--no-pci", "-s", MEMORY_MIB])
            .arg("-r")
            .arg(&control);
        let mut target = start("nvmf_tgt", command, scratch)?;
        let rpc = |words: &str| {
            let mut command = Command::new(dir.join("scripts/rpc.py"));
            command
                .arg("-s")
                .arg(&control)
                .args(words.split_whitespace());
            run_tool(&mut command)
        };
        wait(&mut target, scratch, || rpc("spdk_get_version").is_ok())?;
        let socket_dir = scratch.path().display();
        let port = free_port()?;
        let (kind, listener, transport) = if self.vfio_user {
            (
                "VFIOUSER",
                format!("-t VFIOUSER -a {socket_dir} -s 0"),
                format!("trtype:VFIOUSER traddr:{socket_dir} subnqn:{NQN}"),
            )
        } else {
            (
                "TCP",
                format!("-t TCP -f ipv4 -a 127.0.0.1 -s {port}"),
                format!("trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:{port} subnqn:{NQN}"),
            )
        };
        for words in [
            format!("nvmf_create_transport -t {kind}"),
            format!("bdev_malloc_create -b disk {DISK_MIB} 512"),
            format!("nvmf_create_subsystem {NQN} -a -s bench"),
            format!("nvmf_subsystem_add_ns {NQN} disk"),
            format!("nvmf_subsystem_add_listener {NQN} {listener}"),
        ] {
            rpc(&words)?;
        }
        Ok((target, transport))
    }
}

/// Runs `spdk_nvme_perf`.
fn perf(dir: &Path, transport: &str, workload: &Workload, time: Duration) -> Result<Figures> {
    let mut command = mortal_command(&dir.join("build/bin/spdk_nvme_perf"));
    command
        .args(["-c", PERF_CPU, "--no-huge", "-s", MEMORY_MIB])
        .args(["-q", &workload.depth.to_string()])
        .args(["-o", &workload.block.to_string()])
        .args(["-w", workload.pattern.name()])
        .args(["-a", &WARMUP.as_secs().to_string()])
        .args(["-t", &time.as_secs().to_string()])
        .args(["-L", "-r", transport]);
    if workload.pattern == Pattern::RandRw {
        command.args(["-M", &MIX_READS.to_string()]);
    }
    let said = run_tool(&mut command)?;
    let figures = parse(&String::from_utf8_lossy(&said));
    ensure!(
        figures.contains_key(figure::IOPS) && figures.contains_key(figure::P50),
        "spdk_nvme_perf said nothing that is understood"
    );
    Ok(figures)
}

/// Reads `Total : IOPS MiB/s average min max` and the lines `50.00000% : 9.523us` of the summary.
fn parse(text: &str) -> Figures {
    let mut figures = Figures::new();
    for line in text.lines() {
        let Some((key, values)) = line.trim().split_once(':') else {
            continue;
        };
        let mut values = values.split_whitespace();
        let mut next = || values.next()?.trim_end_matches("us").parse::<f64>().ok();
        if key.trim() == "Total" {
            let names = [figure::IOPS, figure::MB_PER_S, figure::MEAN];
            for (name, unit) in names.into_iter().zip([1.0, 1.048_576, 1.0]) {
                figures.extend(next().map(|value| (name.to_owned(), value * unit)));
            }
        }
        let percentile = match key.trim() {
            "50.00000%" => figure::P50,
            "99.00000%" => figure::P99,
            "99.90000%" => figure::P999,
            _ => continue,
        };
        figures.extend(next().map(|value| (percentile.to_owned(), value)));
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_of_the_perf_tool_is_understood() {
        let figures = parse(
            "Device Information : IOPS MiB/s Average min max\n\
             Total                    :   85000.00     332.00      11.72       8.93     180.02\n\
             Summary latency data for TCP:\n  1.00000% :     9.309us\n 50.00000% :    10.938us\n \
             99.00000% :    20.5us\n 99.90000% :    33.0us\n",
        );
        assert_eq!(figures[figure::IOPS], 85000.0);
        assert_eq!(figures[figure::P50], 10.938);
        assert_eq!(figures[figure::P999], 33.0);
        assert_eq!(figures[figure::MEAN], 11.72);
    }
}
