//! What must be true after anything that a script can do.

use std::sync::OnceLock;

use farbus_vfio::Function;
use farbus_vfio::nvme::{Status, SubmissionEntry, admin, cns, csts, nvm, reg};

use super::bench::{ACQ, ASQ, Bench, DATA, TAGS};
use super::cq_slot;
use crate::nvme::Identity;

/// Entries of each ring: more than there are tags.
const RING: u32 = 256;
/// Turns in which everything that waits gets done.
const TURNS: usize = 64;
/// Turns in a row in which nothing was sent, after which nothing waits.
const QUIET: usize = 3;

/// How much a guest can have under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Capacity {
    /// Reads of a page each.
    reads: usize,
    /// I/O commands, with those.
    io: usize,
    /// Admin commands with a page each, besides all of those.
    admin: usize,
}

impl Capacity {
    /// What a machine that has just been switched on can do.
    fn learn() -> Self {
        let fresh = |reads, flushes, identifies| {
            let mut bench = Bench::new();
            bench.start();
            bench.load(reads, flushes, identifies);
            bench.under_way()
        };
        let many = RING as usize - 1;
        let [_, reads] = fresh(many, 0, 0);
        let [_, io] = fresh(0, many, 0);
        let [admin, _] = fresh(reads, io - reads, usize::from(TAGS));
        let capacity = Self { reads, io, admin };
        assert!(reads >= 16 && io > reads && admin > 0, "{capacity:?}");
        capacity
    }

    fn get() -> Self {
        static CAPACITY: OnceLock<Capacity> = OnceLock::new();
        *CAPACITY.get_or_init(Self::learn)
    }
}

impl Bench {
    /// A guest that behaves brings the controller up after a reset, and can have as much under
    /// way as ever; none of it is lost with the link, and every command completes.
    pub(super) fn prove(&mut self) {
        // A device server that was spoken for, or whose device failed, is not to be relied on.
        let broken = self.peer.as_ref().is_none_or(|peer| {
            let device = peer.device.state();
            device.gone || device.stuck
        });
        if self.spoiled || broken {
            self.wire.cut();
        }
        self.wire.clear();
        self.settle();
        if !self.has_link() {
            self.connect(Identity::default(), TAGS);
        }
        assert!(self.has_link(), "the same export is not taken back");
        if let Some(peer) = &mut self.peer {
            let mut device = peer.device.state();
            device.follows = true;
            device.follow();
        }
        self.unmap(0, u64::MAX);
        self.map_ram();
        self.settle();
        self.function.reset().expect("a reset always works");
        self.settle();
        self.start();
        let capacity = Capacity::get();
        let Capacity { reads, io, admin } = capacity;
        self.load(reads, io - reads, admin);
        assert_eq!(self.under_way(), [admin, io], "tags or pages were lost");
        self.lose_and_regain();
        assert_eq!(self.under_way(), [admin, io], "commands were lost");
        self.drain(io);
    }

    fn settle(&mut self) {
        let mut quiet = 0;
        for _ in 0..TURNS {
            let before = self.frames();
            self.serve(64);
            quiet = if self.frames() == before {
                quiet + 1
            } else {
                0
            };
            if quiet == QUIET {
                return;
            }
        }
    }

    fn frames(&self) -> [u64; 2] {
        let ours = self.function.counters().unwrap_or_default();
        let theirs = self.peer.as_ref().map(|peer| peer.session.counters());
        [ours, theirs.unwrap_or_default()].map(|c| c.messages_sent + c.messages_received)
    }

    /// Brings the controller up, with one pair of queues.
    fn start(&mut self) {
        self.enable(ASQ, RING, ACQ, RING);
        self.settle();
        self.check_ready();
        self.create_cq(1, RING, Some(1));
        self.settle();
        self.create_sq(1, RING, 1);
        self.settle();
    }

    fn check_ready(&self) {
        assert_eq!(
            self.read(reg::CSTS) & (csts::RDY | csts::CFS),
            csts::RDY,
            "the controller is not ready"
        );
    }

    /// Commands that the device does not complete for now.
    fn load(&mut self, reads: usize, flushes: usize, identifies: usize) {
        self.hold();
        let mut read = SubmissionEntry::new(nvm::READ);
        read.set_nsid(2);
        read.set_prps(DATA, 0);
        let mut flush = SubmissionEntry::new(nvm::FLUSH);
        flush.set_nsid(1);
        let mut identify = SubmissionEntry::new(admin::IDENTIFY);
        identify.set_prps(DATA, 0);
        identify.set_dword(10, cns::CONTROLLER.into());
        (0..reads).for_each(|_| self.place(1, read));
        (0..flushes).for_each(|_| self.place(1, flush));
        self.ring_tail(1);
        self.settle();
        (0..identifies).for_each(|_| self.place(0, identify));
        self.ring_tail(0);
        self.settle();
    }

    fn hold(&self) {
        if let Some(peer) = &self.peer {
            peer.device.state().holds = true;
        }
    }

    /// How many commands of each of the two queues are at the device.
    fn under_way(&self) -> [usize; 2] {
        let peer = self.peer.as_ref().expect("a connection");
        let device = peer.device.state();
        [0, 1].map(|queue| {
            let of_queue = device.outstanding.iter().filter(|c| c.queue == queue);
            of_queue.count()
        })
    }

    /// The link is lost and another one comes: the controller is rebuilt on it.
    fn lose_and_regain(&mut self) {
        self.wire.cut();
        self.settle();
        self.connect(Identity::default(), TAGS);
        self.hold();
        self.settle();
        self.check_ready();
    }

    fn drain(&mut self, io: usize) {
        if let Some(peer) = &self.peer {
            let mut device = peer.device.state();
            for _ in 0..TAGS {
                device.complete(0, Status::SUCCESS, 0);
            }
        }
        self.settle();
        assert_eq!(self.under_way(), [0, 0]);
        for index in 0..io {
            let entry = u128::from_le_bytes(self.load_ram(cq_slot(1, index as u32)));
            // Phase 1 and success.
            assert_eq!(entry >> 112, 1, "completion {index} did not come");
        }
    }
}
