//! From a device to a connection: the queue pair, the rings, and the proof that they work.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};
use vm_memory::MmapRegion;

use super::link::VerbsLink;
use super::raw::{
    Access, Address, Channel, CompletionQueue, Connection, Domain, Gid, QueuePair, QueueSizes,
    Region,
};
use super::route::{self, Route};
use super::sends::Sends;
use crate::provider::Options;
use crate::wire::{Epoch, RdmaEndpoint, Side};
use crate::{FabricError, Link};

/// Length of the ring that a peer writes its messages to.
const RING: usize = 512 * 1024;
/// Messages in it.
const SLOTS: u16 = 512;
/// Work requests under way.
pub(super) const SENDS: u32 = 512;
/// Pieces that one work request gathers; devices may have less.
pub(super) const MAX_PIECES: usize = 16;
/// Data that a message carries in itself rather than have the device fetch it: a command or two.
const INLINE: u32 = 256;
/// A packet without an answer is sent again after 4.096 µs · 2^13 = 34 ms, six times: so a peer that
/// is gone is known after a quarter of a second; a device that takes four times as long as it
/// is told, as some do, needs a second.
const TIMEOUT: u8 = 13;
const RETRIES: u8 = 6;
/// What the rings and a modest use of a guest's memory need, in bytes.
const LEAST_LOCKED: u64 = 64 << 20;
/// How long the first write to the peer may take: longer than all the retries.
const PROOF: Duration = Duration::from_secs(2);
/// How often is looked for its answer, which takes microseconds: the completion channel is armed for the
/// event loop, later.
const PROOF_STEP: Duration = Duration::from_micros(50);

/// A queue pair that waits for its peer's.
pub(crate) struct Prepared {
    route: Route,
    first_packet: u32,
    pub(super) domain: Arc<Domain>,
    pub(super) channel: Arc<Channel>,
    pub(super) received: Arc<CompletionQueue>,
    pub(super) ring: Region,
    pub(super) sends: Sends,
    pub(super) peer: Option<RdmaEndpoint>,
}

impl Prepared {
    /// Makes everything that this side needs. The error is a reason for people.
    pub(crate) fn new(local: IpAddr, options: &Options) -> Result<Self, String> {
        let route = route::find(local, options)?;
        if let Some(why) = locked_memory() {
            return Err(why);
        }
        let name = route.context.name().to_owned();
        Self::on(route).map_err(|error| match error.kind() {
            io::ErrorKind::OutOfMemory => {
                format!("RDMA device {name} gives no memory or queue: {error} (is LimitMEMLOCK too low?)")
            }
            _ => format!("RDMA device {name} gives no memory or queue: {error}"),
        })
    }

    fn on(route: Route) -> io::Result<Self> {
        let context = &route.context;
        let domain = Domain::new(context)?;
        let channel = Channel::new(context)?;
        let sent = CompletionQueue::new(&channel, context, SENDS + 16)?;
        let received = CompletionQueue::new(&channel, context, u32::from(SLOTS) + 16)?;
        let sizes = QueueSizes {
            sends: SENDS,
            receives: SLOTS.into(),
            pieces: route.max_pieces.min(MAX_PIECES) as u32,
            inline: INLINE,
        };
        let pair = QueuePair::new(&domain, &sent, &received, sizes)?;
        pair.initialise(route.port)?;
        for _ in 0..SLOTS {
            pair.post_receive()?;
        }
        let ring = own_region(&domain, Access::RemoteWrite)?;
        let mirror = own_region(&domain, Access::Local)?;
        let max_pieces = route.max_pieces.min(MAX_PIECES);
        Ok(Prepared {
            first_packet: pair.number().wrapping_mul(0x9e37_79b9) & 0xff_ffff,
            sends: Sends::new(pair, sent, mirror, max_pieces),
            route,
            domain,
            channel,
            received,
            ring,
            peer: None,
        })
    }

    /// What the peer must know.
    pub(crate) fn endpoint(&self) -> RdmaEndpoint {
        RdmaEndpoint {
            gid: self.route.gid.0,
            lid: self.route.lid,
            mtu: self.route.mtu,
            queue_pair: self.sends.pair().number(),
            first_packet: self.first_packet,
            ring_address: self.ring.address(),
            ring_len: RING as u32,
            ring_key: self.ring.remote_key(),
            slots: SLOTS,
        }
    }

    /// Device and address, for people.
    pub(crate) fn describe(&self) -> String {
        let (name, port) = (self.route.context.name(), self.route.port);
        format!("{name} port {port}, address {}", self.route.gid.address())
    }

    /// The port in use.
    pub(super) fn port(&self) -> u8 {
        self.route.port
    }

    /// Joins the queue pair to the peer's.
    pub(crate) fn connect(&mut self, peer: RdmaEndpoint) -> Result<(), String> {
        let connection = Connection {
            port: self.route.port,
            gid_index: self.route.gid_index,
            mtu: self.route.mtu.min(peer.mtu),
            timeout: TIMEOUT,
            retries: RETRIES,
        };
        let address = Address {
            gid: Gid(peer.gid),
            lid: peer.lid,
            queue_pair: peer.queue_pair,
            first_packet: peer.first_packet,
        };
        self.sends
            .pair()
            .connect(&connection, self.first_packet, &address)
            .map_err(|error| {
                let (from, to) = (self.route.gid.address(), Gid(peer.gid).address());
                format!("there is no RDMA path from {from} to {to}: {error}")
            })?;
        self.peer = Some(peer);
        Ok(())
    }

    /// Writes to the peer's ring, where there is no message yet, and waits for the answer: the
    /// path works, both ways.
    pub(crate) fn prove(&mut self) -> Result<(), String> {
        let Some(peer) = self.peer else {
            return Err("the peer has no queue pair".to_owned());
        };
        let until = Instant::now() + PROOF;
        self.sends.prove(peer.ring_address, peer.ring_key);
        while !self.sends.is_quiet() {
            if let Some(why) = self.sends.failure() {
                let to = Gid(peer.gid).address();
                return Err(format!("there is no RDMA path to {to}: {why}"));
            }
            if Instant::now() > until {
                return Err("the RDMA device does not answer".to_owned());
            }
            std::thread::sleep(PROOF_STEP);
        }
        Ok(())
    }

    /// The link, whose frames carry `epoch`. `control` tells of the peer's end. With `wait`, the peer
    /// gives keys before this returns.
    pub(crate) fn into_link(
        self,
        control: Box<dyn Link>,
        side: Side,
        epoch: Epoch,
        wait: Option<Duration>,
    ) -> Result<Box<dyn Link>, FabricError> {
        let mut link = VerbsLink::new(self, control, side, epoch)?;
        if let Some(limit) = wait {
            link.wait_for_key(limit)?;
        }
        Ok(Box::new(link))
    }
}

/// Memory of our own that the device knows by the address that it has here.
fn own_region(domain: &Arc<Domain>, access: Access) -> io::Result<Region> {
    let memory = MmapRegion::new(RING).map_err(io::Error::other)?;
    let memory = Arc::new(memory);
    let address = memory.as_ptr() as u64;
    Region::new(domain, &memory, 0, RING, address, access)
}

/// What is wrong with the limit of locked memory, when the first transfers would find too little.
pub(crate) fn locked_memory() -> Option<String> {
    const CAP_IPC_LOCK: u64 = 1 << 14;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let capabilities = status.lines().find_map(|line| {
        let value = line.strip_prefix("CapEff:")?;
        u64::from_str_radix(value.trim(), 16).ok()
    });
    if capabilities.is_some_and(|set| set & CAP_IPC_LOCK != 0) {
        return None;
    }
    let limit = getrlimit(Resource::Memlock).current?;
    (limit < LEAST_LOCKED).then(|| {
        format!(
            "only {} KiB of memory may be locked, and RDMA locks what it transfers: raise the limit \
             (LimitMEMLOCK=infinity in a unit, ulimit -l), or give the process CAP_IPC_LOCK",
            limit >> 10
        )
    })
}
