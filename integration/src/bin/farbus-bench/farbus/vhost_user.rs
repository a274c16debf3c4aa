//! Farbus at the vhost-user-blk endpoint of a compute agent: with the same client as the peers.

use anyhow::Result;

use super::path::{Attached, Endpoint, Setup};
use super::{SIZE, VHOST_USER};
use crate::blk_client;
use crate::session::{Subject, Take};
use crate::usage::{count_calls, metered};
use crate::workload::{self, BIG_WRITE};

pub(super) struct VhostUser;

impl Subject for VhostUser {
    fn part(&self) -> &'static str {
        "farbus"
    }

    fn name(&self) -> String {
        VHOST_USER.into()
    }

    fn measure(&self, take: &mut Take<'_>) -> Result<()> {
        let workloads = workload::all(take.plan.quick);
        for attachments in [1, 8] {
            let mut attached = Attached::start(Setup {
                attachments,
                endpoint: Endpoint::VhostUserBlk,
                ..Setup::default_of(SIZE)
            })?;
            let watched = attached.watched();
            let fill = (&take.plan.fill()).into();
            blk_client::run(&attached.sockets, &BIG_WRITE, fill)?;
            for workload in workloads.iter().filter(|w| w.attachments == attachments) {
                take.one(&workload.to_string(), |plan| {
                    let plan = plan.of(workload);
                    attached.check()?;
                    let figures = metered(&watched, workload.is_big(), &plan, || {
                        blk_client::run(&attached.sockets, workload, (&plan).into())
                    })?;
                    attached.check()?;
                    Ok(figures)
                })?;
                count_calls(take, workload, &watched, |extent| {
                    blk_client::run(&attached.sockets, workload, extent).map(drop)
                })?;
            }
        }
        Ok(())
    }
}
