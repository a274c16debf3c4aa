//! Farbus at the vfio-user endpoint of a compute agent.

use std::path::Path;

use anyhow::Result;

use super::load::{self, Target};
use super::path::{Attached, Backing, Poll, Setup};
use super::{ENDPOINT, ENDPOINT_ADAPTIVE, ENDPOINT_NULL, ENDPOINT_THREADS, SIZE};
use crate::limits::wire::Place;
use crate::limits::{BIG, stream};
use crate::results::{Figures, figure};
use crate::session::{Plan, Subject, Take};
use crate::usage::{self, count_calls};
use crate::workload::{self, BIG_READ, BIG_WRITE, READ_1, READ_32, Workload};

pub(super) fn subjects() -> Vec<Box<dyn Subject>> {
    let default = Setup::default_of(SIZE);
    let never = Setup {
        poll: Poll::Never,
        ..default
    };
    let two_threads = Setup {
        threads: 2,
        ..default
    };
    let null = Setup {
        backing: Backing::Null,
        ..default
    };
    [
        (ENDPOINT, never),
        (ENDPOINT_ADAPTIVE, default),
        (ENDPOINT_THREADS, two_threads),
        (ENDPOINT_NULL, null),
    ]
    .into_iter()
    .map(|(name, setup)| Box::new(Endpoint { name, setup }) as Box<dyn Subject>)
    .collect()
}

struct Endpoint {
    name: &'static str,
    /// With one attachment.
    setup: Setup,
}

impl Endpoint {
    fn workloads(&self, quick: bool) -> Vec<Workload> {
        match self.setup.backing {
            // Each thread has queues of its own.
            Backing::Memory if self.setup.threads > 1 => workload::of_four_queues(quick),
            Backing::Memory => [workload::all(quick), workload::crowded(quick)].concat(),
            Backing::Null => vec![READ_1, READ_32, BIG_READ, BIG_WRITE],
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
        for attachments in [1, 2, 8] {
            let mut some = workloads
                .iter()
                .filter(|workload| workload.attachments == attachments)
                .peekable();
            if some.peek().is_none() {
                continue;
            }
            let mut attached = Attached::start(Setup {
                attachments,
                ..self.setup
            })?;
            let watched = attached.watched();
            let fill = (&take.plan.fill()).into();
            load::run(&target(&attached), &BIG_WRITE, false, fill)?;
            for workload in some {
                let raw = self.raw_of(workload);
                for _ in 0..raw.map_or(1, |_| PAIRS) {
                    take.one(&workload.to_string(), |plan| {
                        attached.check()?;
                        let figures = match raw {
                            None => self.figures(&attached, workload, &plan.of(workload)),
                            Some(raw) => beside(raw, &plan.brief(), |plan| {
                                self.figures(&attached, workload, plan)
                            }),
                        }?;
                        attached.check()?;
                        Ok(figures)
                    })?;
                }
                count_calls(take, workload, &watched, |extent| {
                    load::run(&target(&attached), workload, false, extent).map(drop)
                })?;
            }
        }
        Ok(())
    }
}

/// Throughput of a raw connection with messages of this size.
type Raw = fn(&Place<'_>, usize, &Plan) -> Result<Figures>;

/// How often Farbus and a raw connection take turns in each repeat.
const PAIRS: u32 = 3;

/// Measures between two measurements of a raw connection: what that can do differs by a factor of two from one
/// second to the next, on some machines, and what is measured minutes later says little.
fn beside(
    raw: Raw,
    plan: &Plan,
    measure: impl FnOnce(&Plan) -> Result<Figures>,
) -> Result<Figures> {
    let rate = |figures: &Figures| figures.get(figure::MB_PER_S).copied();
    let raw = || Ok::<_, anyhow::Error>(rate(&raw(&Place::loopback(), BIG, plan)?));
    let before = raw()?;
    let mut figures = measure(plan)?;
    if let (Some(before), Some(own), Some(after)) = (before, rate(&figures), raw()?) {
        figures.insert(figure::OF_RAW.into(), 2.0 * own / (before + after));
    }
    Ok(figures)
}

impl Endpoint {
    /// What a workload is compared with in turns.
    fn raw_of(&self, workload: &Workload) -> Option<Raw> {
        match *workload {
            BIG_READ if self.name != ENDPOINT => Some(stream::receive),
            BIG_WRITE if self.name != ENDPOINT => Some(stream::send),
            _ => None,
        }
    }

    fn figures(&self, attached: &Attached, workload: &Workload, plan: &Plan) -> Result<Figures> {
        let watched = attached.watched();
        let mut figures = load::measure(&target(attached), workload, false, &watched, plan)?;
        // A drive in memory is the server's memory, but not what an attachment costs.
        if self.setup.backing == Backing::Null {
            usage::resident(&watched, workload.attachments, &mut figures)?;
        }
        Ok(figures)
    }
}

fn target(attached: &Attached) -> Target<'_> {
    Target::Endpoints(attached.sockets.iter().map(AsRef::<Path>::as_ref).collect())
}
