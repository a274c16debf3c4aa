//! Farbus with the compute half in the process of the load.

use anyhow::Result;

use super::load::{self, Target};
use super::path::{Backing, Poll, Server};
use super::{IN_PROCESS, IN_PROCESS_POLLED};
use crate::session::{Subject, Take};
use crate::workload::{self, BIG_WRITE};

const SIZE: u64 = 256 << 20;

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
        let poll = if self.polled {
            Poll::Always
        } else {
            Poll::Never
        };
        let server = Server::start(Backing::Memory, SIZE, 1, poll)?;
        let (address, name) = server.first();
        let target = Target::Export { address, name };
        let watched = [server.watched()];
        load::run(&target, &BIG_WRITE, false, (&take.plan.fill()).into())?;
        for workload in workload::common(take.plan.quick) {
            take.one(&workload.to_string(), |plan| {
                load::measure(&target, &workload, self.polled, &watched, plan)
            })?;
        }
        Ok(())
    }
}
