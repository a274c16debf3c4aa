//! What an attachment has done, as its worker counts it in the memory that the keeper holds. The
//! daemon reads it whenever it likes, from a worker that runs, hangs or is dead.

use std::os::fd::BorrowedFd;

use farbus_shadow_mem::nvme::record::{self, BUCKETS, Counter};
use rustix::io::pread;

use crate::api;

/// Counters of one moment. All rise from the attachment's first worker on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statistics {
    counters: [u64; Counter::COUNT],
    latencies: [u64; BUCKETS],
    in_flight: u32,
}

impl Statistics {
    /// Reads them out of the memory of a controller's state. It is read like a file, never
    /// mapped: whatever a worker does to it, this process is safe.
    pub fn read(memory: BorrowedFd<'_>) -> Option<Self> {
        let mut bytes = [0; record::STATISTICS_LEN];
        let len = pread(memory, &mut bytes[..], record::STATISTICS_AT).ok()?;
        if len < bytes.len() {
            return None;
        }
        let mut words = bytes
            .chunks_exact(8)
            .map(|word| word.try_into().map_or(0, u64::from_le_bytes));
        let mut next = || words.next().unwrap_or_default();
        let counters = std::array::from_fn(|_| next());
        let latencies = std::array::from_fn(|_| next());
        Some(Self {
            counters,
            latencies,
            in_flight: next().try_into().unwrap_or(u32::MAX),
        })
    }

    /// One of the counters.
    pub fn counter(&self, counter: Counter) -> u64 {
        self.counters.get(counter as usize).copied().unwrap_or(0)
    }

    /// As the REST interface tells them; the percentiles are of what came after `earlier`.
    pub fn to_api(&self, earlier: Option<&Self>) -> api::Statistics {
        let rtt = self.counter(Counter::RoundTripNanos);
        api::Statistics {
            reads: self.counter(Counter::Reads),
            writes: self.counter(Counter::Writes),
            others: self.counter(Counter::Others),
            errors: self.counter(Counter::Errors),
            read_bytes: self.counter(Counter::ReadBytes),
            written_bytes: self.counter(Counter::WrittenBytes),
            in_flight: self.in_flight,
            latency_p50_us: self.latency(earlier, 0.5),
            latency_p99_us: self.latency(earlier, 0.99),
            fabric_rtt_us: (rtt > 0).then_some(rtt as f64 / 1e3),
            reconnects: self
                .counter(Counter::Reconnects)
                .try_into()
                .unwrap_or(u32::MAX),
        }
    }

    /// The latency in microseconds that so many of the I/Os after `earlier` did not exceed, to
    /// within an eighth; `None` if there were none.
    pub fn latency(&self, earlier: Option<&Self>, quantile: f64) -> Option<f64> {
        let before =
            |bucket: usize| earlier.map_or(0, |e| e.latencies.get(bucket).copied().unwrap_or(0));
        let since = |(bucket, count): (usize, &u64)| count.saturating_sub(before(bucket));
        let total: u64 = self.latencies.iter().enumerate().map(since).sum();
        if total == 0 {
            return None;
        }
        let wanted = ((total as f64 * quantile).ceil() as u64).clamp(1, total);
        let mut seen = 0;
        for (bucket, count) in self.latencies.iter().enumerate() {
            seen += since((bucket, count));
            if seen >= wanted {
                return Some(record::bucket_end(bucket) as f64 / 1e3);
            }
        }
        None
    }
}
