//! Farbus at the vfio-user endpoint of a compute agent.

use std::path::Path;

use anyhow::Result;
use farbus_integration::counts::{SystemCalls, has_tool};

use super::load::{self, Extent, Target};
use super::path::{Attached, Backing, Poll};
use super::{ENDPOINT, ENDPOINT_ADAPTIVE, ENDPOINT_NULL, ENDPOINT_THREADS};
use crate::results::{Figures, figure};
use crate::session::{Plan, Skip, Subject, Take};
use crate::usage;
use crate::workload::{self, BIG_READ, BIG_WRITE, READ_1, READ_32, Workload};

/// Size of each drive.
const SIZE: u64 = 256 << 20;

/// I/Os of a run whose system calls are counted.
const COUNTED: u64 = 2000;

pub(super) fn subjects() -> Vec<Box<dyn Subject>> {
    let endpoint = |name, backing, poll| -> Box<dyn Subject> {
        Box::new(Endpoint {
            name,
            backing,
            poll,
            threads: 1,
        })
    };
    vec![
        endpoint(ENDPOINT, Backing::Memory, Poll::Never),
        endpoint(ENDPOINT_ADAPTIVE, Backing::Memory, Poll::Adaptive),
        Box::new(Endpoint {
            name: ENDPOINT_THREADS,
            backing: Backing::Memory,
            poll: Poll::Adaptive,
            threads: 2,
        }),
        endpoint(ENDPOINT_NULL, Backing::Null, Poll::Adaptive),
    ]
}

struct Endpoint {
    name: &'static str,
    backing: Backing,
    poll: Poll,
    /// Data threads on each side.
    threads: u16,
}

impl Endpoint {
    fn workloads(&self, quick: bool) -> Vec<Workload> {
        match self.backing {
            // Each thread has queues of its own.
            Backing::Memory if self.threads > 1 => workload::of_several_queues(quick),
            Backing::Memory => workload::wide(quick),
            Backing::Null => vec![READ_1, READ_32, BIG_READ],
        }
    }
}

impl Subject for Endpoint {
    fn part(&self) -> &'static str {
        "farbus"
    }

    fn name(&self) -> String {
        self.name.into()
    }

    fn measure(&self, take: &mut Take<'_>) -> Result<()> {
        let workloads = self.workloads(take.plan.quick);
        for attachments in [1, 8] {
            let mut some = workloads
                .iter()
                .filter(|workload| workload.attachments == attachments)
                .peekable();
            if some.peek().is_none() {
                continue;
            }
            // The same data in all, however many there are.
            let size = SIZE / u64::from(attachments);
            let mut attached =
                Attached::start(self.backing, size, attachments, self.poll, self.threads)?;
            let fill = (&take.plan.fill()).into();
            load::run(&target(&attached), &BIG_WRITE, false, fill)?;
            for workload in some {
                let counts = take.repeat == 0 && [READ_1, READ_32].contains(workload);
                take.one(&workload.to_string(), |plan| {
                    attached.check()?;
                    let figures = self.figures(&attached, workload, plan)?;
                    attached.check()?;
                    Ok(figures)
                })?;
                if counts {
                    take.one(&workload.to_string(), |_| system_calls(&attached, workload))?;
                }
            }
        }
        Ok(())
    }
}

impl Endpoint {
    fn figures(&self, attached: &Attached, workload: &Workload, plan: &Plan) -> Result<Figures> {
        let watched = attached.watched();
        let mut figures = load::measure(&target(attached), workload, false, &watched, plan)?;
        // A drive in memory is the server's memory, but not what an attachment costs.
        if self.backing == Backing::Null {
            usage::resident(&watched, workload.attachments, &mut figures)?;
        }
        Ok(figures)
    }
}

fn target(attached: &Attached) -> Target<'_> {
    Target::Endpoints(attached.sockets.iter().map(AsRef::<Path>::as_ref).collect())
}

/// System calls of each daemon per I/O. Being counted slows a daemon down, and so it finds more to do each
/// time that it looks: at depth, a count is a lower bound of what the undisturbed daemon does.
fn system_calls(attached: &Attached, workload: &Workload) -> Result<Figures> {
    if let Err(error) = has_tool("strace") {
        return Err(Skip::because(format!("system calls: {error}")));
    }
    let watched = attached.watched();
    let counters = watched.iter().map(|one| SystemCalls::of(one.pid));
    let counters: Vec<SystemCalls> = counters.collect::<Result<_, _>>()?;
    load::run(&target(attached), workload, false, Extent::Count(COUNTED))?;
    let mut figures = Figures::new();
    for (one, counter) in watched.iter().zip(counters) {
        let calls = counter.end()? as f64 / COUNTED as f64;
        figures.insert(format!("{}.{}", figure::SYSCALLS, one.name), calls);
    }
    Ok(figures)
}
