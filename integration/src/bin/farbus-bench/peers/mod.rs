//! What people use instead: a disk of another process, reached over TCP, as a vhost-user-blk device.
//!
//! Each is a chain of programs as one would run it: a server with a disk in memory, and
//! qemu-storage-daemon, which makes a vhost-user-blk device of what that server offers. The client is
//! libblkio, which is also what QEMU uses for such devices; it runs in a process of its own.

pub(crate) mod client;
mod servers;
mod spdk;

use anyhow::{Context, Result};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::peers::Peers;

use self::servers::Chain;
use crate::results::Figures;
use crate::session::{Plan, Subject, Take};
use crate::usage::Meter;
use crate::workload::{self, BIG_WRITE, Workload};

/// Subjects' names, which budgets refer to.
pub(crate) const NBD: &str = "NBD";
pub(crate) const NBD_NULL: &str = "NBD null";
pub(crate) const ISCSI: &str = "iSCSI";
pub(crate) const SPDK_TCP: &str = "SPDK NVMe/TCP";
pub(crate) const SPDK_VFIO_USER: &str = "SPDK vfio-user";

type Start = fn(&Peers, &Scratch) -> Result<Chain>;

/// All peers.
pub(crate) fn subjects(peers: &Peers) -> Vec<Box<dyn Subject>> {
    let chains: [(&'static str, Start); 3] = [
        (NBD, servers::nbd),
        (NBD_NULL, servers::nbd_null),
        (ISCSI, servers::iscsi),
    ];
    let mut subjects: Vec<Box<dyn Subject>> = Vec::new();
    for (name, start) in chains {
        subjects.push(Box::new(VhostUserDisk {
            name,
            start,
            peers: peers.clone(),
        }));
    }
    subjects.extend(spdk::subjects());
    subjects
}

struct VhostUserDisk {
    name: &'static str,
    start: Start,
    peers: Peers,
}

impl Subject for VhostUserDisk {
    fn part(&self) -> &'static str {
        "peers"
    }

    fn name(&self) -> String {
        self.name.into()
    }

    fn measure(&self, take: &mut Take<'_>) -> Result<()> {
        let scratch = Scratch::new("peer")?;
        let mut chain = (self.start)(&self.peers, &scratch)
            .with_context(|| format!("starting {}", self.name))?;
        let written = client::run(&chain.socket, &BIG_WRITE, &take.plan.fill());
        chain.check(&scratch)?;
        written.context("filling the disk")?;
        for workload in workload::common(take.plan.quick) {
            take.one(&workload.to_string(), |plan| {
                chain.check(&scratch)?;
                let figures = measure(&chain, &workload, plan)?;
                chain.check(&scratch)?;
                Ok(figures)
            })?;
        }
        Ok(())
    }
}

fn measure(chain: &Chain, workload: &Workload, plan: &Plan) -> Result<Figures> {
    let meter = Meter::start(&chain.watched, plan.warmup, plan.time);
    let mut figures = client::run(&chain.socket, workload, plan)?;
    meter.stop(&mut figures)?;
    Ok(figures)
}
