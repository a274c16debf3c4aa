//! What is counted beside, for whoever looks on: plain numbers that only this process changes.

use farbus_fabric::wire::Tag;
use farbus_vfio::nvme::{Status, nvm};
use rustix::time::{ClockId, clock_gettime};

use super::super::transfer::Transfer;
use super::{Record, STARTED, STATISTICS};

/// Steps of the latencies: eight for each doubling, up to more than an hour.
pub const BUCKETS: usize = 320;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Read commands completed.
    Reads,
    /// Write commands completed.
    Writes,
    /// Other I/O commands completed.
    Others,
    /// I/O commands that failed.
    Errors,
    /// Bytes read.
    ReadBytes,
    /// Bytes written.
    WrittenBytes,
    /// How often the link was replaced.
    Reconnects,
    /// The last round trip over the link, in nanoseconds.
    RoundTripNanos,
}

impl Counter {
    /// How many there are.
    pub const COUNT: usize = 8;
}

/// The step that a latency in nanoseconds belongs to.
fn bucket(nanos: u64) -> usize {
    let doublings = nanos.checked_ilog2().unwrap_or(0);
    if doublings < 3 {
        return nanos as usize;
    }
    let eighth = nanos >> (doublings - 3) & 7;
    let bucket = (doublings as usize - 2) * 8 + eighth as usize;
    bucket.min(BUCKETS - 1)
}

/// The largest latency of a step, in nanoseconds.
pub fn bucket_end(bucket: usize) -> u64 {
    match bucket {
        0..8 => bucket as u64,
        _ => {
            let shift = (bucket / 8 - 1).min(60) as u32;
            (((bucket % 8) as u64 + 9) << shift) - 1
        }
    }
}

fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl Record {
    /// A batch begins: its commands are fetched, or completed, now.
    pub(crate) fn set_time(&mut self) {
        self.now = now();
    }

    /// An I/O command has completed.
    pub(crate) fn count(&self, tag: Tag, opcode: u8, transfer: Transfer, status: Status) {
        let len = u64::from(transfer.len());
        let (counter, bytes) = match opcode {
            nvm::READ => (Counter::Reads, Some(Counter::ReadBytes)),
            nvm::WRITE => (Counter::Writes, Some(Counter::WrittenBytes)),
            _ => (Counter::Others, None),
        };
        self.add_to(counter, 1);
        if status.is_success() {
            bytes.into_iter().for_each(|bytes| self.add_to(bytes, len));
        } else {
            self.add_to(Counter::Errors, 1);
        }
        let started = self.load(Self::slot_at(tag) + STARTED);
        let bucket = bucket(self.now.saturating_sub(started));
        self.add(STATISTICS + (Counter::COUNT + bucket) * 8, 1);
    }

    /// Adds to a counter.
    pub(crate) fn add_to(&self, counter: Counter, value: u64) {
        self.add(STATISTICS + counter as usize * 8, value);
    }

    /// The peer is asked for a sign of life.
    pub(crate) fn ping(&mut self) {
        self.pinged = Some(now());
    }

    /// It has given one.
    pub(crate) fn pong(&mut self) {
        if let Some(pinged) = self.pinged.take() {
            let took = now().saturating_sub(pinged);
            self.store(STATISTICS + Counter::RoundTripNanos as usize * 8, took);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_latency_is_within_an_eighth_of_the_end_of_its_step(nanos in 0u64..1 << 41) {
            let end = bucket_end(bucket(nanos));
            prop_assert!(end >= nanos);
            prop_assert!(end - nanos <= nanos / 8 + 1);
        }
    }

    #[test]
    fn steps_follow_each_other_without_a_gap() {
        for step in 1..BUCKETS {
            assert_eq!(bucket(bucket_end(step - 1) + 1), step);
        }
    }

    #[test]
    fn the_longest_latency_has_a_step() {
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }
}
