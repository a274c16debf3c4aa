//! Farbus over RDMA, beside what the RDMA device does by itself and beside TCP, all in one emulated machine.
//!
//! The device is soft RoCE: a packet costs what the machine's kernel takes for it, on emulated CPUs. So these rows
//! have a limit of their own, and are compared with nothing outside of that machine. In what state the host's CPUs are
//! makes no difference to speak of.

use std::time::Duration;

use anyhow::Result;
use farbus_integration::guest::Guest;
use farbus_integration::rdma::{
    DRIVE, LOOPBACK, WRITES, bare_round_trip, bare_writes, lent_over, load, one_machine, serve,
};
use farbus_integration::tools::kernel::Kernel;

use crate::awake::Awake;
use crate::farbus::load::figures;
use crate::results::{Figures, Results, Row, figure};
use crate::session::{Plan, Skip, Subject, Take};
use crate::workload::{
    self, BIG_READ, BIG_WRITE, MIX_READS, MIXED_32, Pattern, READ_1, READ_32, WRITE_1, WRITE_32,
    Workload, is_judged_by_latency,
};

pub(crate) const PART: &str = "rdma";

/// The device by itself.
const DEVICE: &str = "soft RoCE";
/// 64 bytes there with WRITE_WITH_IMM, 4 KiB and a WRITE_WITH_IMM back.
const ROUND_TRIP: &str = "64 B / 4 KiB, polled";
const WRITTEN: &str = "128 KiB written";
/// The software drive in the process of the load.
const DRIVE_ALONE: &str = "drive, no fabric";
const OVER_RDMA: &str = "Farbus over RDMA";
const OVER_TCP: &str = "Farbus over TCP";

/// Round trips of the device alone.
const ROUND_TRIPS: u32 = 1000;

pub(crate) struct Rdma;

impl Subject for Rdma {
    fn part(&self) -> &'static str {
        PART
    }

    fn name(&self) -> String {
        OVER_RDMA.into()
    }

    fn states(&self) -> &'static [Awake] {
        &[Awake::Halting]
    }

    fn has_own_rounds(&self) -> bool {
        true
    }

    fn measure(&self, take: &mut Take<'_>) -> Result<()> {
        if !cfg!(feature = "verbs") {
            return Err(Skip::because("built without RDMA"));
        }
        take.cannot(
            &workload::of_eight_attachments(take.plan.quick),
            "two emulated CPUs are too few for eight attachments",
        );
        let (machine, guest) = one_machine(Kernel::Rdma6_1)?;
        let _server = serve(&guest, LOOPBACK, DRIVE)?;
        let local = "--soft-nvme backing=memory,size=64MiB".to_owned();
        let (verbs, tcp) = (lent_over("verbs"), lent_over("tcp"));
        let targets = [(DRIVE_ALONE, local), (OVER_RDMA, verbs), (OVER_TCP, tcp)];
        for round in take.rounds() {
            take.one_of(DEVICE, ROUND_TRIP, |_| round_trip(&guest))?;
            take.one_of(DEVICE, WRITTEN, |plan| written(&guest, plan))?;
            for (name, target) in &targets {
                for workload in workloads(name, round, take.plan.quick) {
                    take.one_of(name, &workload.to_string(), |plan| {
                        let options = options(&workload, &plan.brief());
                        Ok(figures(&load(&guest, target, &options)?, &workload))
                    })?;
                }
            }
        }
        Ok(machine.quit()?)
    }
}

/// Programs start slowly on emulated CPUs: what says most is in every round, the rest in the first.
fn workloads(subject: &str, round: u32, quick: bool) -> Vec<Workload> {
    let mut workloads = match subject {
        DRIVE_ALONE => vec![READ_1],
        _ => vec![READ_1, BIG_READ, BIG_WRITE],
    };
    if subject == OVER_RDMA && round == 0 && !quick {
        workloads.extend([WRITE_1, READ_32, WRITE_32, MIXED_32]);
        workloads.extend(workload::of_four_queues(false));
    }
    workloads
}

fn round_trip(guest: &Guest) -> Result<Figures> {
    let found = bare_round_trip(guest, ROUND_TRIPS)?;
    Ok(Figures::from([
        (figure::P50.into(), found.p50_us),
        (figure::P99.into(), found.p99_us),
    ]))
}

fn written(guest: &Guest, plan: &Plan) -> Result<Figures> {
    let rates = bare_writes(guest, plan.brief().time.as_millis() as u32)?;
    let sizes = WRITES.iter().zip(rates);
    let big = sizes.filter(|(size, _)| **size == BIG_READ.block as usize);
    let rates = big.map(|(_, mib)| (figure::MB_PER_S.to_owned(), mib * 1.048_576));
    Ok(rates.collect())
}

/// For the load generator. At depth 1 it polls, as the round trip of the device alone does.
fn options(workload: &Workload, plan: &Plan) -> String {
    // What has to be registered with the device is registered at its first use.
    let warmup = plan.warmup.max(Duration::from_millis(200));
    let mut options = format!(
        "--rw {} --bs {} --iodepth {} --queues {} --warmup {} --seconds {}",
        workload.pattern.name(),
        workload.block,
        workload.depth_per_queue(),
        workload.queues,
        warmup.as_secs_f64(),
        plan.time.as_secs_f64(),
    );
    if workload.pattern == Pattern::RandRw {
        options += &format!(" --rwmixread {MIX_READS}");
    }
    if workload.depth == 1 {
        options += " --poll";
    }
    options
}

/// What a row of this part is compared with.
pub(crate) fn limit_of<'a>(results: &'a Results, row: &Row) -> Option<&'a Row> {
    if row.subject == DEVICE {
        return None;
    }
    let limit = if is_judged_by_latency(&row.workload) {
        ROUND_TRIP
    } else {
        WRITTEN
    };
    results.row(DEVICE, row.awake, limit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::READ_32_Q4;

    #[test]
    fn rows_have_the_bare_device_for_a_limit() {
        let mut results = Results::default();
        let read = READ_1.to_string();
        for (subject, workload) in [(DEVICE, ROUND_TRIP), (OVER_RDMA, &read)] {
            let figures = Figures::from([(figure::P50.to_owned(), 60.0)]);
            results.add(PART, subject, Awake::Halting, workload, figures);
        }
        let [device, farbus] = [0, 1].map(|at| &results.rows()[at]);
        let limit = limit_of(&results, farbus).unwrap();
        assert_eq!(
            (limit.subject.as_str(), limit.workload.as_str()),
            (DEVICE, ROUND_TRIP)
        );
        assert!(limit_of(&results, device).is_none());
    }

    #[test]
    fn first_round_over_rdma_has_everything_but_several_attachments() {
        let first = workloads(OVER_RDMA, 0, false);
        let all = workload::all(false).into_iter();
        let wanted: Vec<Workload> = all.filter(|w| w.attachments == 1).collect();
        assert_eq!(first.len(), wanted.len());
        assert!(wanted.iter().all(|workload| first.contains(workload)));
        assert!(workloads(OVER_TCP, 1, false).contains(&BIG_WRITE));
    }

    #[test]
    fn only_one_at_a_time_is_polled_for() {
        let plan = Plan {
            warmup: Duration::ZERO,
            time: Duration::from_secs(1),
            repeats: 1,
            quick: false,
        };
        assert!(options(&READ_1, &plan).ends_with("--warmup 0.2 --seconds 1 --poll"));
        assert!(options(&READ_32_Q4, &plan).contains("--iodepth 8 --queues 4"));
        assert!(!options(&READ_32_Q4, &plan).contains("--poll"));
    }
}
