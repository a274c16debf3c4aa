//! One queue of a device: what its I/Os are, and waiting for it beside others.

use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use anyhow::{Context, Result};
use blkio::{Blkioq, Completion, ReqFlags};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, read};

use crate::workload::{MIX_READS, Pattern};

/// Chooses where each I/O goes, and which way.
pub(super) struct Source {
    pattern: Pattern,
    block: u64,
    /// The part of the disk that is this queue's, in blocks.
    first: u64,
    blocks: u64,
    next: u64,
    random: u64,
}

impl Source {
    /// For queue `n` of `count`; `seed` tells devices apart.
    pub(super) fn new(
        pattern: Pattern,
        block: u32,
        capacity: u64,
        (n, count): (usize, usize),
        seed: usize,
    ) -> Self {
        let block = u64::from(block);
        let blocks = (capacity / block / count as u64).max(1);
        let number = (seed * count + n) as u64;
        Self {
            pattern,
            block,
            first: n as u64 * blocks,
            blocks,
            next: 0,
            random: 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(2 * number + 1),
        }
    }

    /// Where the next I/O begins, in bytes, and whether it reads.
    pub(super) fn draw(&mut self) -> (u64, bool) {
        let at = if self.pattern.is_random() {
            self.number() % self.blocks
        } else {
            self.next += 1;
            self.next % self.blocks
        };
        let reads = match self.pattern {
            Pattern::RandRead | Pattern::Read => true,
            Pattern::RandWrite | Pattern::Write => false,
            Pattern::RandRw => self.number() % 100 < u64::from(MIX_READS),
        };
        ((self.first + at) * self.block, reads)
    }

    /// Marsaglia's xorshift64.
    fn number(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

/// A queue that is kept filled.
pub(super) struct Lane {
    pub(super) queue: Blkioq,
    /// Address of its buffers.
    memory: usize,
    /// When the I/O of each slot began.
    pub(super) begun: Vec<Instant>,
    pub(super) in_flight: usize,
    source: Source,
}

impl Lane {
    pub(super) fn new(queue: Blkioq, memory: usize, depth: usize, source: Source) -> Self {
        Self {
            queue,
            memory,
            begun: vec![Instant::now(); depth],
            in_flight: 0,
            source,
        }
    }

    /// Begins an I/O.
    pub(super) fn submit(&mut self, slot: usize) {
        let (start, reads) = self.source.draw();
        let len = self.source.block as usize;
        let buffer = self.memory + slot * len;
        let flags = ReqFlags::empty();
        self.begun[slot] = Instant::now();
        self.in_flight += 1;
        if reads {
            self.queue.read(start, buffer as *mut u8, len, slot, flags);
        } else {
            self.queue
                .write(start, buffer as *const u8, len, slot, flags);
        }
    }
}

/// Sleeps until one of several queues has completions, in libblkio's own order: ask for signals, look again
/// with `take`, sleep, and ask for none any more.
pub(super) fn wait(
    lanes: &mut [Lane],
    mut take: impl FnMut(&mut Lane) -> Result<usize>,
) -> Result<()> {
    let mut found = 0;
    for lane in &mut *lanes {
        lane.queue.set_completion_fd_enabled(true);
        found += take(lane)?;
    }
    if found == 0 {
        sleep(lanes)?;
    }
    for lane in lanes {
        lane.queue.set_completion_fd_enabled(false);
    }
    Ok(())
}

fn sleep(lanes: &[Lane]) -> Result<()> {
    let events: Vec<BorrowedFd<'_>> = lanes.iter().map(completion_fd).collect::<Result<_>>()?;
    let mut polled: Vec<PollFd<'_>> = events
        .iter()
        .map(|event| PollFd::new(event, PollFlags::IN))
        .collect();
    poll(&mut polled, None).context("waiting for completions")?;
    let signalled = polled.iter().map(|one| !one.revents().is_empty());
    for (event, _) in events
        .iter()
        .zip(signalled)
        .filter(|(_, signalled)| *signalled)
    {
        match read(event, &mut [0_u8; 8]) {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => return Err(error).context("taking a signal"),
        }
    }
    Ok(())
}

#[allow(unsafe_code, reason = "libblkio hands out a number")]
fn completion_fd(lane: &Lane) -> Result<BorrowedFd<'_>> {
    let fd = lane.queue.get_completion_fd();
    let fd = fd.context("a queue that cannot be waited for")?;
    // SAFETY: the descriptor is the queue's, and open for as long as the queue is borrowed.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// Slot and result of a completion that `do_io` has filled in.
#[allow(unsafe_code, reason = "libblkio hands out completions this way")]
pub(super) fn outcome(completion: &MaybeUninit<Completion>) -> (usize, i32) {
    // SAFETY: `do_io` initialises as many completions as it returns, and the caller looks at no others.
    let completion = unsafe { completion.assume_init_ref() };
    (completion.user_data, completion.ret)
}

pub(super) fn said(error: blkio::Error) -> anyhow::Error {
    anyhow::Error::new(error).context("libblkio")
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u32 = 4096;
    const CAPACITY: u64 = 64 * BLOCK as u64;

    #[test]
    fn queues_share_the_disk_without_overlap() {
        for (n, range) in [(0, 0..32), (1, 32..64)] {
            for pattern in [Pattern::RandRead, Pattern::Write, Pattern::RandRw] {
                let mut source = Source::new(pattern, BLOCK, CAPACITY, (n, 2), 3);
                let blocks = (0..1000).map(|_| source.draw().0 / u64::from(BLOCK));
                assert!(blocks.into_iter().all(|block| range.contains(&block)));
            }
        }
    }

    #[test]
    fn mix_reads_seven_of_ten() {
        let mut source = Source::new(Pattern::RandRw, BLOCK, CAPACITY, (0, 1), 0);
        let reads = (0..10_000).filter(|_| source.draw().1).count();
        assert!((6800..7200).contains(&reads), "{reads}");
    }
}
