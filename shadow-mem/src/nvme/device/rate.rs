//! Limits of a claim: commands beyond them wait in the device's queue, where they were placed, and
//! the doorbell tells the device of no more than it may begin.
//!
//! What may come at once after a while without is the burst. A command may go when the limit is not
//! overdrawn, and may overdraw it: so large commands get through small limits, and on the average the
//! limit holds.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use farbus_fabric::wire::RateLimits;

/// The burst where none is given, as time's worth of the rate.
const BURST: Duration = Duration::from_millis(100);
/// The least burst: less could not be made up for by a thread that sleeps in milliseconds.
const LEAST_BURST: Duration = Duration::from_millis(10);

/// One limit. Its state is the moment at which all that was let through is paid for.
#[derive(Debug)]
struct Bucket {
    per_second: u64,
    /// How far that moment may lie ahead for the next command to go, in nanoseconds.
    burst: u64,
    /// The moment, in nanoseconds since the limits began. Threads of one claim share it: two that
    /// look at the same time may let one command too many through, which is paid for as well.
    paid: AtomicU64,
}

impl Bucket {
    fn new(per_second: u64, burst: u64) -> Option<Self> {
        let burst = match burst {
            0 => BURST,
            burst => time_of(burst, per_second).max(LEAST_BURST),
        };
        (per_second > 0).then(|| Self {
            per_second,
            burst: burst.as_nanos() as u64,
            paid: AtomicU64::new(0),
        })
    }

    /// When the next command may go.
    fn ready(&self) -> u64 {
        self.paid.load(Ordering::Relaxed).saturating_sub(self.burst)
    }

    fn pay(&self, amount: u64, now: u64) {
        let price = time_of(amount, self.per_second).as_nanos() as u64;
        let pay = |paid: u64| Some(paid.max(now).saturating_add(price));
        // It never says no.
        let _ = self
            .paid
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, pay);
    }
}

/// A claim's limits.
#[derive(Debug)]
struct Buckets {
    begin: Instant,
    commands: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Buckets {
    fn new(limits: RateLimits, begin: Instant) -> Arc<Self> {
        Arc::new(Self {
            begin,
            commands: Bucket::new(limits.iops, limits.iops_burst),
            bytes: Bucket::new(limits.bytes_per_second, limits.bytes_burst),
        })
    }

    /// When the next command may go.
    fn ready(&self) -> u64 {
        let buckets = [&self.commands, &self.bytes].into_iter().flatten();
        buckets.map(Bucket::ready).max().unwrap_or(0)
    }
}

/// How long a rate takes to bring an amount; never so long that the sum of a few overflows.
fn time_of(amount: u64, per_second: u64) -> Duration {
    const LONGEST: u128 = 3600 * 1_000_000_000;
    let nanoseconds = u128::from(amount) * 1_000_000_000 / u128::from(per_second.max(1));
    Duration::from_nanos(nanoseconds.min(LONGEST) as u64)
}

/// A claim's limits, and the commands that wait for them.
pub(super) struct Rate {
    buckets: Arc<Buckets>,
    /// Queue and bytes of each, the oldest first.
    held: VecDeque<(u16, u32)>,
}

impl Rate {
    /// Without limits; room for as many commands as there can be.
    pub(super) fn unlimited(tags: u16) -> Self {
        Self {
            buckets: Buckets::new(RateLimits::NONE, Instant::now()),
            held: VecDeque::with_capacity(tags.into()),
        }
    }

    pub(super) fn limit(&mut self, limits: RateLimits, now: Instant) {
        self.buckets = Buckets::new(limits, now);
    }

    pub(super) fn is_limited(&self) -> bool {
        self.buckets.commands.is_some() || self.buckets.bytes.is_some()
    }

    /// A command of an I/O queue was placed behind all others.
    pub(super) fn hold(&mut self, queue: u16, bytes: u32) {
        self.held.push_back((queue, bytes));
    }

    /// Takes the queue of the oldest command, if it may go now.
    pub(super) fn next(&mut self, now: Instant) -> Option<u16> {
        let &(queue, bytes) = self.held.front()?;
        let buckets = &self.buckets;
        let now = now.saturating_duration_since(buckets.begin).as_nanos() as u64;
        if buckets.ready() > now {
            return None;
        }
        for (bucket, amount) in [(&buckets.commands, 1), (&buckets.bytes, u64::from(bytes))] {
            if let Some(bucket) = bucket {
                bucket.pay(amount, now);
            }
        }
        self.held.pop_front();
        Some(queue)
    }

    /// Whether commands wait.
    pub(super) fn holds(&self) -> bool {
        !self.held.is_empty()
    }

    /// When the oldest may go, if one waits.
    pub(super) fn due(&self) -> Option<Instant> {
        let ready = Duration::from_nanos(self.buckets.ready());
        self.holds().then(|| self.buckets.begin + ready)
    }

    /// A queue is no more, and with it what it held.
    pub(super) fn forget_queue(&mut self, queue: u16) {
        self.held.retain(|(of, _)| *of != queue);
    }

    /// No queue is there any more.
    pub(super) fn forget_all(&mut self) {
        self.held.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// How many of endless commands of one size go within a time, looked for each millisecond.
    fn passed(limits: RateLimits, bytes: u32, ms: u64) -> u64 {
        let begin = Instant::now();
        let mut rate = Rate::unlimited(4);
        rate.limit(limits, begin);
        let mut count = 0;
        for now in 0..ms {
            let now = begin + Duration::from_millis(now);
            loop {
                if !rate.holds() {
                    rate.hold(1, bytes);
                }
                match rate.next(now) {
                    Some(_) => count += 1,
                    None => break,
                }
            }
        }
        count
    }

    fn limits(iops: u64, bytes_per_second: u64) -> RateLimits {
        RateLimits {
            iops,
            bytes_per_second,
            ..RateLimits::NONE
        }
    }

    proptest! {
        #[test]
        fn a_limit_holds_for_commands_and_bytes_of_any_size(
            iops in 20u64..100_000,
            blocks in 1u32..256,
            bytes in (1u64 << 20)..(10 << 30),
        ) {
            let size = blocks * 4096;
            let wanted = (iops as f64).min(bytes as f64 / f64::from(size));
            // Three seconds, and the burst of a tenth of one; one command more at each end.
            let count = passed(limits(iops, bytes), size, 3_000) as f64;
            prop_assert!(count <= wanted * 3.11 + 2.0, "{count} of {wanted} a second");
            prop_assert!(count >= wanted * 2.99 - 2.0, "{count} of {wanted} a second");
        }
    }

    #[test]
    fn a_burst_is_what_may_come_at_once() {
        let burst = RateLimits {
            iops: 1000,
            iops_burst: 50,
            ..RateLimits::NONE
        };
        assert!((50..=52).contains(&passed(burst, 4096, 1)));
        assert!((100..=102).contains(&passed(limits(1000, 0), 4096, 1)));
        // A burst that no timer could serve is as large as one can.
        let tiny = RateLimits {
            iops_burst: 1,
            iops: 10_000,
            ..RateLimits::NONE
        };
        assert!((9_900..10_200).contains(&passed(tiny, 4096, 1000)));
    }

    #[test]
    fn commands_larger_than_the_burst_get_through() {
        let count = passed(limits(0, 1 << 20), 1 << 20, 5_000);
        assert!((5..=6).contains(&count), "{count}");
    }

    #[test]
    fn what_waits_goes_in_order_and_not_before_it_is_due() {
        let begin = Instant::now();
        let mut rate = Rate::unlimited(8);
        assert!(!rate.is_limited());
        rate.limit(limits(10, 0), begin);
        for queue in [1, 2, 1, 3] {
            rate.hold(queue, 512);
        }
        assert_eq!(rate.next(begin), Some(1));
        assert_eq!(rate.next(begin), Some(2), "the burst");
        assert_eq!(rate.next(begin), None);
        let due = rate.due().unwrap();
        assert_eq!(due - begin, Duration::from_millis(100));
        assert_eq!(rate.next(due - Duration::from_millis(1)), None);
        rate.forget_queue(1);
        assert_eq!(rate.next(due), Some(3));
        assert!(!rate.holds() && rate.due().is_none());
    }
}
