//! What people use instead: a disk of another process, reached over TCP, as a vhost-user-blk device.
//!
//! Each is a chain of programs as one would run it: a server with a disk in memory, and
//! qemu-storage-daemon, which makes a vhost-user-blk device of what that server offers. The client is
//! libblkio, which is also what QEMU uses for such devices; it runs in a process of its own.
//!
//! Several attachments are several qemu-storage-daemons, as several machines would have, each with a connection to
//! the one server; they share its disk.

mod servers;
pub(crate) mod spdk;

use anyhow::{Context, Result};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::peers::Peers;

use self::servers::Chain;
use crate::blk_client;
use crate::session::{Subject, Take};
use crate::usage::{count_calls, metered};
use crate::workload::{self, BIG_WRITE, Workload};

/// Subjects' names, which budgets refer to.
pub(crate) const NBD: &str = "NBD";
pub(crate) const NBD_NULL: &str = "NBD null";
pub(crate) const ISCSI: &str = "iSCSI";
pub(crate) const SPDK_TCP: &str = "SPDK NVMe/TCP";
pub(crate) const SPDK_VFIO_USER: &str = "SPDK vfio-user";

/// Starts a peer with so many attachments.
type Start = fn(&Peers, &Scratch, u32) -> Result<Chain>;

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
        let workloads = workload::all(take.plan.quick);
        for attachments in [1, 8] {
            let some = workloads.iter().filter(|w| w.attachments == attachments);
            self.measure_with(attachments, some, take)?;
        }
        Ok(())
    }
}

impl VhostUserDisk {
    fn measure_with<'a>(
        &self,
        attachments: u32,
        workloads: impl Iterator<Item = &'a Workload>,
        take: &mut Take<'_>,
    ) -> Result<()> {
        let scratch = Scratch::new("peer")?;
        let mut chain = (self.start)(&self.peers, &scratch, attachments)
            .with_context(|| format!("starting {}", self.name))?;
        // All attachments share the disk.
        let fill = (&take.plan.fill()).into();
        let written = blk_client::run(&chain.sockets[..1], &BIG_WRITE, fill);
        chain.check(&scratch)?;
        written.context("filling the disk")?;
        for workload in workloads {
            take.one(&workload.to_string(), |plan| {
                let plan = plan.of(workload);
                chain.check(&scratch)?;
                let figures = metered(&chain.watched, workload.is_big(), &plan, || {
                    blk_client::run(&chain.sockets, workload, (&plan).into())
                })?;
                chain.check(&scratch)?;
                Ok(figures)
            })?;
            count_calls(take, workload, &chain.watched, |extent| {
                blk_client::run(&chain.sockets, workload, extent).map(drop)
            })?;
        }
        Ok(())
    }
}
