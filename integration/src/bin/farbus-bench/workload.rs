//! What a subject is asked to do.

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;

/// Order and direction of the I/Os.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub(crate) enum Pattern {
    RandRead,
    RandWrite,
    Read,
    Write,
    /// Random, 70 % reads.
    RandRw,
}

impl Pattern {
    /// As fio and the load generators call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::RandRead => "randread",
            Self::RandWrite => "randwrite",
            Self::Read => "read",
            Self::Write => "write",
            Self::RandRw => "randrw",
        }
    }

    pub(crate) fn is_random(self) -> bool {
        !matches!(self, Self::Read | Self::Write)
    }
}

/// For how long, or how much.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Extent {
    For { warmup: Duration, time: Duration },
    Count(u64),
}

/// Share of reads of the mixed pattern, in per cent.
pub(crate) const MIX_READS: u32 = 70;

/// A workload. `depth` is the number of I/Os in flight, over all queues and attachments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Workload {
    pub(crate) pattern: Pattern,
    pub(crate) block: u32,
    pub(crate) depth: u32,
    /// I/O queues of each attachment.
    pub(crate) queues: u32,
    pub(crate) attachments: u32,
}

impl Workload {
    const fn new(pattern: Pattern, block: u32, depth: u32) -> Self {
        Self {
            pattern,
            block,
            depth,
            queues: 1,
            attachments: 1,
        }
    }

    const fn over(mut self, queues: u32, attachments: u32) -> Self {
        self.queues = queues;
        self.attachments = attachments;
        self
    }

    /// I/Os in flight per queue, at least one.
    pub(crate) fn depth_per_queue(&self) -> u32 {
        (self.depth / (self.queues * self.attachments)).max(1)
    }

    /// Whether it has several queues or attachments. There are many of these, and they are measured for a
    /// shorter time.
    pub(crate) fn is_wide(&self) -> bool {
        self.queues > 1 || self.attachments > 1
    }

    /// Whether it is judged by the throughput of a connection.
    pub(crate) fn is_big(&self) -> bool {
        self.block == BIG
    }

    /// One of the few that say most.
    fn is_essential(&self) -> bool {
        [
            READ_1, READ_32, WRITE_32, BIG_READ, BIG_WRITE, READ_32_Q4, READ_32_A2, READ_32_A8,
        ]
        .contains(self)
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kib = self.block / 1024;
        write!(f, "{kib}k {} x{}", self.pattern.name(), self.depth)?;
        if self.queues > 1 {
            write!(f, " q{}", self.queues)?;
        }
        if self.attachments > 1 {
            write!(f, " a{}", self.attachments)?;
        }
        Ok(())
    }
}

const SMALL: u32 = 4 << 10;
const BIG: u32 = 128 << 10;

pub(crate) const READ_1: Workload = Workload::new(Pattern::RandRead, SMALL, 1);
pub(crate) const WRITE_1: Workload = Workload::new(Pattern::RandWrite, SMALL, 1);
pub(crate) const READ_32: Workload = Workload::new(Pattern::RandRead, SMALL, 32);
pub(crate) const WRITE_32: Workload = Workload::new(Pattern::RandWrite, SMALL, 32);
pub(crate) const MIXED_32: Workload = Workload::new(Pattern::RandRw, SMALL, 32);
pub(crate) const BIG_READ: Workload = Workload::new(Pattern::Read, BIG, 8);
pub(crate) const BIG_WRITE: Workload = Workload::new(Pattern::Write, BIG, 8);
pub(crate) const READ_32_Q4: Workload = READ_32.over(4, 1);
pub(crate) const READ_32_A2: Workload = READ_32.over(1, 2);
pub(crate) const READ_32_A8: Workload = READ_32.over(1, 8);
/// As much for each of eight as [`READ_32`] is for one.
pub(crate) const READ_256_A8: Workload = Workload::new(Pattern::RandRead, SMALL, 256).over(1, 8);

/// What every subject that is a disk is given.
const COMMON: [Workload; 7] = [
    READ_1, WRITE_1, READ_32, WRITE_32, MIXED_32, BIG_READ, BIG_WRITE,
];

/// Those of [`COMMON`], or the essential ones of them.
pub(crate) fn common(quick: bool) -> Vec<Workload> {
    select(&COMMON, quick)
}

/// Those of [`COMMON`] whose I/Os in flight can be shared out.
const SHARED: [Workload; 5] = [READ_32, WRITE_32, MIXED_32, BIG_READ, BIG_WRITE];

/// The same with four queues.
pub(crate) fn of_four_queues(quick: bool) -> Vec<Workload> {
    select(&SHARED.map(|workload| workload.over(4, 1)), quick)
}

/// The same with eight attachments.
pub(crate) fn of_eight_attachments(quick: bool) -> Vec<Workload> {
    select(&SHARED.map(|workload| workload.over(1, 8)), quick)
}

/// What tells how attachments get on with one another, beside those with eight.
const CROWDED: [Workload; 2] = [READ_32_A2, READ_256_A8];

/// Those of [`CROWDED`], or the essential one of them.
pub(crate) fn crowded(quick: bool) -> Vec<Workload> {
    select(&CROWDED, quick)
}

/// All but [`CROWDED`]: with one and four queues, one and eight attachments.
pub(crate) fn all(quick: bool) -> Vec<Workload> {
    let mut all = common(quick);
    all.extend(of_four_queues(quick));
    all.extend(of_eight_attachments(quick));
    all
}

fn select(all: &[Workload], quick: bool) -> Vec<Workload> {
    all.iter()
        .filter(|workload| !quick || workload.is_essential())
        .copied()
        .collect()
}

/// Whether a workload of this label is judged by its latency (one I/O at a time) and not by its rate.
pub(crate) fn is_judged_by_latency(label: &str) -> bool {
    label.ends_with(" x1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_tells_what_differs_from_one_queue_of_one_attachment() {
        assert_eq!(READ_1.to_string(), "4k randread x1");
        assert_eq!(BIG_WRITE.to_string(), "128k write x8");
        assert_eq!(READ_32_A8.to_string(), "4k randread x32 a8");
    }

    #[test]
    fn depth_is_shared_by_queues_and_attachments() {
        assert_eq!(READ_32_A8.depth_per_queue(), 4);
        assert_eq!(READ_32_Q4.depth_per_queue(), 8);
        assert_eq!(READ_256_A8.depth_per_queue(), READ_32.depth_per_queue());
        assert_eq!(READ_1.over(4, 1).depth_per_queue(), 1);
    }

    #[test]
    fn everything_that_can_be_shared_out_has_four_queues_and_eight_attachments() {
        let labels: Vec<String> = all(false).iter().map(ToString::to_string).collect();
        assert_eq!(labels.len(), 17);
        for plain in labels.iter().filter(|label| label.split(' ').count() == 3) {
            let shared = !is_judged_by_latency(plain);
            for wide in [format!("{plain} q4"), format!("{plain} a8")] {
                assert_eq!(labels.contains(&wide), shared, "{wide}");
            }
        }
    }

    #[test]
    fn quick_run_has_several_queues_and_attachments_too() {
        assert!(
            [READ_32_Q4, READ_32_A8]
                .iter()
                .all(|wide| all(true).contains(wide))
        );
        assert!(all(true).len() < all(false).len());
    }
}
