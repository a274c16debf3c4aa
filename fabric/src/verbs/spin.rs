//! Adaptive polling: how long to look for a completion before asking the kernel to tell of it.
//!
//! Being told costs two system calls and a wake-up, which is more than a round trip of a fast network;
//! looking costs a CPU. So looking goes on longer while it pays, and not at all while it does not.

use std::time::{Duration, Instant};

/// What is tried when waking up came soon after going to sleep.
const LEAST: Duration = Duration::from_micros(4);
/// The longest that anything else in the event loop waits for it.
const MOST: Duration = Duration::from_micros(32);

pub(super) struct Spin {
    budget: Duration,
    /// When looking ended without success.
    slept: Option<Instant>,
    /// Whoever is to answer needs a CPU as well.
    alone: bool,
}

impl Spin {
    pub(super) fn new() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Spin {
            budget: LEAST,
            slept: None,
            alone: cpus > 1,
        }
    }

    /// Until when to look, if at all.
    pub(super) fn begin(&mut self) -> Option<Instant> {
        let now = Instant::now();
        if !self.alone || self.budget.is_zero() {
            self.slept = Some(now);
            return None;
        }
        Some(now + self.budget)
    }

    /// Looking has ended, with or without something to show.
    pub(super) fn ended(&mut self, found: bool) {
        if found {
            self.budget = (self.budget * 2).min(MOST);
        } else {
            self.budget /= 2;
            if self.budget < LEAST {
                self.budget = Duration::ZERO;
            }
            self.slept = Some(Instant::now());
        }
    }

    /// The kernel has told of a completion: had it come a little earlier, looking would have paid.
    pub(super) fn woken(&mut self) {
        if self
            .slept
            .take()
            .is_some_and(|since| since.elapsed() < MOST)
        {
            self.budget = (self.budget * 2).clamp(LEAST, MOST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_goes_on_longer_while_it_pays_and_ends_when_it_does_not() {
        let mut spin = Spin {
            budget: LEAST,
            slept: None,
            alone: true,
        };
        for _ in 0..10 {
            spin.ended(true);
        }
        assert_eq!(spin.budget, MOST);
        for _ in 0..10 {
            spin.ended(false);
        }
        assert!(spin.begin().is_none());
        spin.woken();
        assert_eq!(spin.budget, LEAST, "woken at once");
        assert!(spin.begin().is_some());
    }
}
