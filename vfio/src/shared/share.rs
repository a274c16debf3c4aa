//! How much of the drive each portion may keep busy.
//!
//! A drive works on what it was given, whoever gave it: who keeps more commands outstanding gets
//! more of it, and everybody else waits behind them. So while several portions want the drive, each
//! may have no more than an equal part of a bounded whole outstanding. Who is alone may have as many
//! as there is room for, but not about more bytes than a drive ends in moments.
//!
//! A portion counts as wanting the drive for a little while after it last did: one that asks for one
//! block at a time must not find a long queue of others each time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Commands that all portions together have outstanding while there are several.
const COMMANDS: u32 = 256;
/// Bytes that the commands of all portions together transfer while there are several.
const BYTES: u64 = 4 << 20;
/// Bytes of the medium that who is alone may have commands for at the drive. What is there has to end
/// before its queues do, and others may come meanwhile.
const ALONE: u64 = 256 << 20;
/// For how long a portion counts after it last wanted something.
const MEMORY: Duration = Duration::from_millis(20);

/// What a portion may have outstanding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Allowance {
    commands: u32,
    bytes: u64,
}

impl Allowance {
    /// Whether a command for `next` bytes may be added to `commands` that transfer `bytes`. One is
    /// always allowed.
    pub(super) fn admits(self, commands: u32, bytes: u64, next: u32) -> bool {
        commands == 0 || (commands < self.commands && bytes + u64::from(next) <= self.bytes)
    }
}

/// Who wants the drive. Written by each portion's own thread, read by all.
pub(super) struct Share {
    begin: Instant,
    /// For each portion, when it last wanted something: microseconds since the beginning, plus
    /// one, or 0 for never.
    wanted: Box<[AtomicU64]>,
}

impl Share {
    pub(super) fn new(portions: usize) -> Self {
        Self {
            begin: Instant::now(),
            wanted: (0..portions).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// What a portion that wants something now may have outstanding.
    pub(super) fn claim(&self, portion: usize) -> Allowance {
        self.claim_at(portion, self.begin.elapsed())
    }

    fn claim_at(&self, portion: usize, now: Duration) -> Allowance {
        let now = now.as_micros() as u64 + 1;
        if let Some(mine) = self.wanted.get(portion) {
            mine.store(now, Ordering::Relaxed);
        }
        let memory = MEMORY.as_micros() as u64;
        let recent = |wanted: &&AtomicU64| match wanted.load(Ordering::Relaxed) {
            0 => false,
            then => now.saturating_sub(then) < memory,
        };
        match self.wanted.iter().filter(recent).count() as u32 {
            0 | 1 => Allowance {
                commands: u32::MAX,
                bytes: ALONE,
            },
            several => Allowance {
                commands: (COMMANDS / several).max(1),
                bytes: BYTES / u64::from(several),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_alone_may_have_everything_and_who_is_not_an_equal_part() {
        let share = Share::new(3);
        let ms = Duration::from_millis;
        assert!(share.claim_at(0, ms(0)).admits(10_000, 200 << 20, 1 << 20));
        let half = share.claim_at(1, ms(1));
        assert!(half.admits(127, 0, 4096) && !half.admits(128, 0, 4096));
        assert!(half.admits(1, 1 << 20, 1 << 20) && !half.admits(2, 2 << 20, 4096));
        assert_eq!(share.claim_at(0, ms(2)), half);
        assert!(!share.claim_at(2, ms(3)).admits(85, 0, 4096));
    }

    #[test]
    fn one_that_wants_nothing_for_a_while_no_longer_counts() {
        let share = Share::new(2);
        share.claim_at(0, Duration::ZERO);
        assert!(
            !share
                .claim_at(1, Duration::from_millis(19))
                .admits(200, 0, 1)
        );
        assert!(
            share
                .claim_at(1, Duration::from_millis(25))
                .admits(200, 0, 1)
        );
    }

    #[test]
    fn one_command_is_always_allowed() {
        let share = Share::new(600);
        let mut tightest = (0..600).map(|portion| share.claim_at(portion, Duration::ZERO));
        assert!(tightest.next_back().unwrap().admits(0, 0, 1 << 20));
    }
}
