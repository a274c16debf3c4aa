//! How a data thread waits: it looks again for a while before it sleeps, while that pays.
//!
//! To be woken up costs more than most of what a data thread does, and most of all on a core
//! that has halted meanwhile. So a thread that expects something soon goes on looking for it.
//! It learns from its sleeps: after one that was short enough for looking to have bridged it,
//! it looks for longer the next time; after a long one, for less, and soon not at all, so that
//! an idle attachment costs nothing. And it yields: where another thread waits for this core,
//! looking does not pay whatever the sleeps say.

use std::fmt;
use std::str::FromStr;
use std::thread::yield_now;
use std::time::{Duration, Instant};

/// The longest time to look for something before a sleep: a few times what a wake-up costs.
const MAX_WINDOW: Duration = Duration::from_micros(100);
/// The time to look for when looking begins to pay.
const FIRST_WINDOW: Duration = Duration::from_micros(25);
/// Looks between two yields, which cost about as much as a look.
const LOOKS_PER_YIELD: u32 = 8;
/// What comes before this is looked for without a yield. Who yields may be put aside for some
/// milliseconds even if there is nobody but a task of the idle class.
const YIELD_AFTER: Duration = Duration::from_micros(40);
/// A yield that takes so long has run somebody else.
const LATE: Duration = Duration::from_micros(10);
/// For how long looking is left alone after somebody else needed the core: at first, and at
/// most when that happens again and again.
const FIRST_TRUCE: Duration = Duration::from_millis(1);
const MAX_TRUCE: Duration = Duration::from_millis(64);

/// What an operator can choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Polling {
    /// Look again before sleeping, while it pays.
    #[default]
    Adaptive,
    /// Never sleep; for a host that has a core to spare for each attachment.
    Always,
    /// Sleep at once.
    Never,
}

impl Polling {
    /// The policies' names, as [`FromStr`] takes them.
    pub const NAMES: [&str; 3] = ["adaptive", "always", "never"];
}

impl fmt::Display for Polling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [adaptive, always, never] = Self::NAMES;
        f.write_str(match self {
            Self::Adaptive => adaptive,
            Self::Always => always,
            Self::Never => never,
        })
    }
}

impl FromStr for Polling {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        [Self::Adaptive, Self::Always, Self::Never]
            .into_iter()
            .find(|policy| policy.to_string() == name)
            .ok_or_else(|| format!("{name} is none of {}", Self::NAMES.join(", ")))
    }
}

/// One data thread's waiting. It calls [`Self::found`] when it has found work,
/// [`Self::looks_again`] when it has not, and [`Self::slept`] after a sleep.
pub struct Waiter {
    polling: Polling,
    /// For how long to look.
    window: Duration,
    /// Since when nothing was found.
    since: Option<Instant>,
    looks: u32,
    /// Somebody else has needed the core: no looking before this.
    truce_until: Option<Instant>,
    truce: Duration,
}

impl Waiter {
    /// A thread that has not waited yet.
    pub fn new(polling: Polling) -> Self {
        Self {
            polling,
            window: Duration::ZERO,
            since: None,
            looks: 0,
            truce_until: None,
            truce: FIRST_TRUCE,
        }
    }

    /// There was something to do.
    pub fn found(&mut self) {
        self.since = None;
    }

    /// There was nothing to do: whether to look again at once. If not, the thread is to sleep.
    pub fn looks_again(&mut self) -> bool {
        match self.polling {
            Polling::Never => return false,
            Polling::Adaptive if self.window.is_zero() => return false,
            _ => {}
        }
        let now = Instant::now();
        let since = *self.since.get_or_insert(now);
        let looked = now.duration_since(since);
        if self.polling == Polling::Adaptive && looked >= self.window {
            self.since = None;
            return false;
        }
        self.looks = self.looks.wrapping_add(1);
        if self.looks % LOOKS_PER_YIELD == 0 && looked >= YIELD_AFTER {
            let before = Instant::now();
            yield_now();
            if before.elapsed() > LATE {
                self.others_run(Instant::now());
            }
        } else {
            std::hint::spin_loop();
        }
        true
    }

    /// The thread has slept for this long, until there was something to do.
    pub fn slept(&mut self, sleep: Duration) {
        if self.polling != Polling::Adaptive {
            return;
        }
        if sleep > MAX_WINDOW {
            self.window /= 2;
            if self.window < FIRST_WINDOW {
                self.window = Duration::ZERO;
            }
            return;
        }
        if self.truce_until.is_some_and(|until| Instant::now() < until) {
            return;
        }
        self.window = (self.window * 2).clamp(FIRST_WINDOW, MAX_WINDOW);
    }

    /// Somebody else has run on this core meanwhile.
    fn others_run(&mut self, now: Instant) {
        let since = self
            .truce_until
            .map(|end| now.saturating_duration_since(end));
        self.truce = match since {
            Some(since) if since < self.truce => (self.truce * 2).min(MAX_TRUCE),
            _ => FIRST_TRUCE,
        };
        self.truce_until = Some(now + self.truce);
        self.window = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_micros(5);
    const LONG: Duration = Duration::from_secs(1);

    fn looks(waiter: &mut Waiter) -> u32 {
        (0..10_000_000)
            .take_while(|_| waiter.looks_again())
            .count()
            .try_into()
            .unwrap()
    }

    #[test]
    fn a_policy_is_known_by_its_name() {
        for name in Polling::NAMES {
            assert_eq!(name.parse::<Polling>().unwrap().to_string(), name);
        }
        let error = "allways".parse::<Polling>().unwrap_err();
        assert_eq!(error, "allways is none of adaptive, always, never");
    }

    #[test]
    fn never_sleeps_at_once_and_always_never_sleeps() {
        let mut never = Waiter::new(Polling::Never);
        never.slept(SHORT);
        assert!(!never.looks_again());
        let mut always = Waiter::new(Polling::Always);
        always.slept(LONG);
        assert!((0..1000).all(|_| always.looks_again()));
    }

    #[test]
    fn an_idle_thread_sleeps_at_once() {
        let mut waiter = Waiter::new(Polling::Adaptive);
        assert!(!waiter.looks_again(), "it has seen no short sleep yet");
        waiter.slept(SHORT);
        for _ in 0..4 {
            waiter.slept(LONG);
        }
        assert!(!waiter.looks_again());
    }

    #[test]
    fn after_short_sleeps_it_looks_for_a_while_and_then_sleeps() {
        let mut waiter = Waiter::new(Polling::Adaptive);
        for _ in 0..4 {
            waiter.slept(SHORT);
        }
        let start = Instant::now();
        assert!(looks(&mut waiter) > 0);
        // A thread that is put aside meanwhile looks for longer, but ends.
        assert!(start.elapsed() < LONG);
    }

    #[test]
    fn where_somebody_else_needs_the_core_it_stops_looking_for_longer_each_time() {
        let mut waiter = Waiter::new(Polling::Adaptive);
        waiter.slept(SHORT);
        let now = Instant::now();
        waiter.others_run(now);
        assert_eq!(waiter.truce, FIRST_TRUCE);
        waiter.slept(SHORT);
        assert!(!waiter.looks_again(), "the truce holds");
        for _ in 0..10 {
            waiter.others_run(now);
        }
        assert_eq!(waiter.truce, MAX_TRUCE);
        waiter.others_run(now + LONG);
        assert_eq!(waiter.truce, FIRST_TRUCE, "it was long ago");
    }
}
