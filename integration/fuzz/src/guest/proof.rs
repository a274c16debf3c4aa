//! What must be true after anything that a script can do.

use farbus_vfio::nvme::{Status, SubmissionEntry, admin, cns, csts, nvm, reg};
use farbus_vfio::Function;

use super::bench::{ACQ, ASQ, Bench, DATA, SHADOW_PAGES, TAGS};
use super::cq_slot;
use crate::nvme::Identity;

/// Tags, and pages of the buffer shadow, that the engine keeps from I/O.
const ADMIN_RESERVE: u32 = 16;
const RING: u32 = 256;
/// Turns in which everything that waits gets done.
const TURNS: usize = 64;
/// Turns in a row in which nothing was sent, after which nothing waits.
const QUIET: usize = 3;

impl Bench {
    /// A guest that behaves brings the controller up after a reset, and has all of its tags
    /// and all of the buffer shadow in use at once; every command completes.
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
        self.enable(ASQ, RING, ACQ, RING);
        self.settle();
        assert_eq!(
            self.read(reg::CSTS) & (csts::RDY | csts::CFS),
            csts::RDY,
            "the controller does not come up after a reset"
        );
        self.create_cq(1, RING, Some(1));
        self.settle();
        self.create_sq(1, RING, 1);
        self.settle();
        self.fill();
        self.drain();
    }

    fn settle(&mut self) {
        let mut quiet = 0;
        for _ in 0..TURNS {
            let before = self.frames();
            self.serve(64);
            quiet = if self.frames() == before { quiet + 1 } else { 0 };
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

    fn in_flight(&self, queue: u16) -> usize {
        let peer = self.peer.as_ref().expect("a connection");
        let device = peer.device.state();
        device
            .outstanding
            .iter()
            .filter(|c| c.queue == queue)
            .count()
    }

    fn fill(&mut self) {
        let mut read = SubmissionEntry::new(nvm::READ);
        read.set_nsid(2);
        read.set_prps(DATA, 0);
        let reads = SHADOW_PAGES - ADMIN_RESERVE;
        for _ in 0..reads {
            self.place(1, read);
        }
        let io = u32::from(TAGS) - ADMIN_RESERVE;
        let mut flush = SubmissionEntry::new(nvm::FLUSH);
        flush.set_nsid(1);
        for _ in reads..io {
            self.place(1, flush);
        }
        self.ring_tail(1);
        self.settle();
        assert_eq!(self.in_flight(1), io as usize, "tags or pages were lost");
        if let Some(peer) = &self.peer {
            peer.device.state().prompt = false;
        }
        let mut identify = SubmissionEntry::new(admin::IDENTIFY);
        identify.set_prps(DATA, 0);
        identify.set_dword(10, cns::CONTROLLER.into());
        for _ in 0..ADMIN_RESERVE {
            self.place(0, identify);
        }
        self.ring_tail(0);
        self.settle();
        assert_eq!(self.in_flight(0), ADMIN_RESERVE as usize, "tags or pages were lost");
    }

    fn drain(&mut self) {
        let io = u32::from(TAGS) - ADMIN_RESERVE;
        if let Some(peer) = &self.peer {
            let mut device = peer.device.state();
            for _ in 0..TAGS {
                device.complete(0, Status::SUCCESS, 0);
            }
        }
        self.settle();
        assert_eq!(self.in_flight(0) + self.in_flight(1), 0);
        for index in 0..io {
            let entry = u128::from_le_bytes(self.load(cq_slot(1, index)));
            // Phase 1 and success.
            assert_eq!(entry >> 112, 1, "completion {index} did not come");
        }
    }
}
