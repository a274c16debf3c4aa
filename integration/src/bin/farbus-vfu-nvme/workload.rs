//! Which command comes next.

use farbus_vfio::driver::{NamespaceShape, block_command};
use farbus_vfio::nvme::{SubmissionEntry, nvm};

use crate::cli::Pattern;
use crate::pattern::mix;

/// The commands of one queue.
pub(crate) struct Workload {
    pattern: Pattern,
    mix_read: u64,
    /// Blocks of one command.
    blocks: u64,
    /// Where this queue's part of the namespace begins and how many commands fit there, one
    /// behind the other.
    first: u64,
    places: u64,
    next: u64,
    random: u64,
}

impl Workload {
    /// For queue `queue` of `queues`, counted from 0.
    pub(crate) fn new(
        pattern: Pattern,
        mix_read: u8,
        shape: NamespaceShape,
        len: usize,
        (queue, queues): (u16, u16),
        seed: u64,
    ) -> anyhow::Result<Self> {
        let blocks = len as u64 / u64::from(shape.block_size);
        let whole = shape.blocks / blocks.max(1);
        let (first, places) = match pattern {
            Pattern::Read | Pattern::Write => {
                let share = whole / u64::from(queues);
                (share * u64::from(queue) * blocks, share)
            }
            _ => (0, whole),
        };
        anyhow::ensure!(
            places > 0,
            "a namespace of {} blocks has no room for {queues} queues with {blocks} blocks each",
            shape.blocks
        );
        Ok(Self {
            pattern,
            mix_read: mix_read.into(),
            blocks,
            first,
            places,
            next: 0,
            random: mix(seed ^ u64::from(queue) << 48),
        })
    }

    fn random(&mut self, below: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        // Multiplying instead of dividing: a few numbers are one 2^64th likelier than others.
        ((u128::from(mix(self.random)) * u128::from(below)) >> 64) as u64
    }

    /// The next command, and whether it reads.
    pub(crate) fn next(&mut self) -> (SubmissionEntry, bool) {
        let place = match self.pattern {
            Pattern::Read | Pattern::Write => {
                let place = self.next;
                self.next = if place + 1 == self.places {
                    0
                } else {
                    place + 1
                };
                place
            }
            _ => self.random(self.places),
        };
        let reads = match self.pattern {
            Pattern::Read | Pattern::Randread => true,
            Pattern::Write | Pattern::Randwrite => false,
            Pattern::Randrw => self.random(100) < self.mix_read,
        };
        let opcode = if reads { nvm::READ } else { nvm::WRITE };
        let lba = self.first + place * self.blocks;
        (block_command(opcode, lba, self.blocks as usize, 1), reads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: NamespaceShape = NamespaceShape {
        blocks: 1001,
        block_size: 512,
    };

    #[test]
    fn sequential_queues_share_the_namespace_without_overlap() {
        for queue in 0..2 {
            let mut load = Workload::new(Pattern::Write, 0, SHAPE, 4096, (queue, 2), 1).unwrap();
            let lbas: Vec<u64> = (0..63).map(|_| load.next().0.slba()).collect();
            let first = u64::from(queue) * 62 * 8;
            let expected: Vec<u64> = (0..62).chain([0]).map(|n| first + n * 8).collect();
            assert_eq!(lbas, expected);
        }
    }

    #[test]
    fn random_commands_stay_inside_and_keep_to_the_mix() {
        let mut load = Workload::new(Pattern::Randrw, 70, SHAPE, 4096, (0, 1), 7).unwrap();
        let mut reads = 0;
        for _ in 0..10_000 {
            let (command, read) = load.next();
            assert!(command.slba() + 8 <= SHAPE.blocks && command.slba() % 8 == 0);
            reads += u32::from(read);
        }
        assert!((6700..7300).contains(&reads), "{reads} of 10000");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(Workload::new(Pattern::Read, 0, SHAPE, 1 << 20, (0, 1), 1).is_err());
    }
}
