//! Farbus with the compute half in the process of the load.

use anyhow::Result;

use super::load::{self, Target};
use super::path::{Backing, Poll, Server};
use super::{IN_PROCESS, IN_PROCESS_POLLED, SIZE};
use crate::peers::spdk;
use crate::session::{Subject, Take};
use crate::usage::count_calls;
use crate::workload::{self, BIG_WRITE};

pub(super) fn subjects() -> Vec<Box<dyn Subject>> {
    [(IN_PROCESS, false), (IN_PROCESS_POLLED, true)]
        .into_iter()
        .map(|(name, polled)| Box::new(InProcess { name, polled }) as Box<dyn Subject>)
        .collect()
}

struct InProcess {
    name: &'static str,
    polled: bool,
}

impl Subject for InProcess {
    fn part(&self) -> &'static str {
        "farbus"
    }

    fn name(&self) -> String {
        self.name.into()
    }

    fn measure(&self, take: &mut Take<'_>) -> Result<()> {
        let quick = take.plan.quick;
        for attachments in [1, 8] {
            if self.polled && attachments > 1 {
                let workloads = workload::of_eight_attachments(quick);
                take.cannot(
                    &workloads,
                    "eight threads that poll on each side want 16 CPUs",
                );
                continue;
            }
            self.measure_with(attachments, take)?;
        }
        Ok(())
    }
}

impl InProcess {
    fn measure_with(&self, attachments: u32, take: &mut Take<'_>) -> Result<()> {
        let poll = if self.polled {
            Poll::Always
        } else {
            Poll::Never
        };
        let size = SIZE / u64::from(attachments);
        let server = Server::start(Backing::Memory, size, attachments, poll)?;
        let (address, names) = server.lent();
        let target = Target::Exports { address, names };
        let watched = [server.watched()];
        let fill = (&take.plan.fill()).into();
        load::run(&target, &BIG_WRITE, false, fill)?;
        let workloads = workload::all(take.plan.quick);
        for workload in workloads.iter().filter(|w| w.attachments == attachments) {
            take.one(&workload.to_string(), |plan| {
                let mut plan = plan.of(workload);
                if self.polled {
                    // What it is compared with has as long. At first, socket buffers come from memory that the
                    // machine may have given back to its host: writing to a page then takes six times as long.
                    plan.warmup = spdk::WARMUP;
                }
                load::measure(&target, workload, self.polled, &watched, &plan)
            })?;
            // What polls makes as many calls as it has time for.
            if !self.polled {
                count_calls(take, workload, &watched, |extent| {
                    load::run(&target, workload, false, extent).map(drop)
                })?;
            }
        }
        Ok(())
    }
}
