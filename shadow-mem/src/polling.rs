//! How a data thread waits: it looks again for a while before it sleeps, while that pays.
//!
//! To be woken up costs more than most of what a data thread does, and most of all on a core
//! that has halted meanwhile. So a thread that expects something soon goes on looking for it.
//! It learns from its sleeps: after one that was short enough for looking to have bridged it,
//! it looks for longer the next time; after a long one, for less, and soon not at all, so that
//! an idle attachment costs nothing. And it gives way: it yields, and where it does not get the core
//! while it is awake, because other threads have it, looking does not pay whatever the sleeps say.

use std::fmt;
use std::str::FromStr;
use std::thread::yield_now;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// The longest time to look for something before a sleep: a few times what a wake-up costs.
const MAX_WINDOW: Duration = Duration::from_micros(100);
/// The time to look for when looking begins to pay.
const FIRST_WINDOW: Duration = Duration::from_micros(25);
/// Looks between two yields, which cost about as much as a look.
const LOOKS_PER_YIELD: u32 = 8;
/// What comes before this is looked for without a yield. Who yields may be put aside for some
/// milliseconds even if there is nobody but a task of the idle class.
const YIELD_AFTER: Duration = Duration::from_micros(40);
/// How long a thread has to be awake before it is asked how much of that time it had the core.
const AWAKE: Duration = Duration::from_millis(8);
/// For how long looking is left alone when others need the core: twice as long each time, from the first to the
/// last of these, and a twentieth shorter after each time that nobody did. The threads of a crowd try again at
/// different times, and who tries while the others give way is not crowded; so truces have to be long beside tries,
/// or one of them would look at any time.
const FIRST_TRUCE: Duration = Duration::from_millis(16);
const MAX_TRUCE: Duration = Duration::from_secs(1);

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
    /// From the first look on, which tells the thread; not in a truce.
    crowd: Option<Crowd>,
    /// Others need the core: no looking before this.
    truce_until: Option<Instant>,
    /// How long the next truce lasts.
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
            crowd: None,
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
        if self.polling == Polling::Adaptive {
            let crowd = self
                .crowd
                .get_or_insert_with(|| Crowd::new(now, thread_time()));
            match crowd.takes_the_core(now, thread_time) {
                Some(true) => {
                    self.give_way(now);
                    return false;
                }
                Some(false) => self.went_well(),
                None => {}
            }
        }
        self.looks = self.looks.wrapping_add(1);
        if self.looks % LOOKS_PER_YIELD == 0 && looked >= YIELD_AFTER {
            yield_now();
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
        if let Some(crowd) = &mut self.crowd {
            crowd.slept += sleep;
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

    /// Nobody else needed this core.
    fn went_well(&mut self) {
        self.truce = (self.truce * 19 / 20).max(FIRST_TRUCE);
    }

    /// Others need this core more.
    fn give_way(&mut self, now: Instant) {
        self.truce_until = Some(now + self.truce);
        self.truce = (self.truce * 2).min(MAX_TRUCE);
        self.window = Duration::ZERO;
        self.crowd = None;
    }
}

/// How crowded the thread's core is: how much of the time that it was awake it did not have the core.
struct Crowd {
    /// Since when, and what the thread had used of the core by then.
    since: Instant,
    used: Duration,
    /// What it has slept since then. That includes the time from being woken up to being run, which nothing
    /// tells apart. What a hypervisor or an interrupt takes of the core counts as taken by others.
    slept: Duration,
}

impl Crowd {
    fn new(now: Instant, used: Duration) -> Self {
        Self {
            since: now,
            used,
            slept: Duration::ZERO,
        }
    }

    /// Whether the thread had the core for less than 55 % of the time that it was awake, once that was long enough to
    /// tell. Who shares it with one that works between its looks and sleeps, as a load or a vCPU does, has more. Two
    /// that look have half each, and the wake-up of the one that gives way puts it on a core that is idle, if there
    /// is one.
    fn takes_the_core(&mut self, now: Instant, used: impl FnOnce() -> Duration) -> Option<bool> {
        let awake = now.duration_since(self.since).saturating_sub(self.slept);
        if awake < AWAKE {
            return None;
        }
        let before = std::mem::replace(self, Self::new(now, used()));
        let had = self.used.saturating_sub(before.used);
        Some(had < awake * 11 / 20)
    }
}

/// What the calling thread has used of its cores.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
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
    fn truces_are_longer_each_time_and_shorter_again_when_nobody_needs_the_core() {
        let mut waiter = Waiter::new(Polling::Adaptive);
        waiter.slept(SHORT);
        waiter.give_way(Instant::now() + LONG);
        waiter.slept(SHORT);
        assert!(!waiter.looks_again(), "the truce holds");
        for _ in 0..10 {
            waiter.give_way(Instant::now());
        }
        assert_eq!(waiter.truce, MAX_TRUCE);
        waiter.truce_until = None;
        waiter.slept(SHORT);
        assert!(waiter.looks_again());
        waiter.went_well();
        assert_eq!(waiter.truce, MAX_TRUCE * 19 / 20);
        for _ in 0..1000 {
            waiter.went_well();
        }
        assert_eq!(waiter.truce, FIRST_TRUCE);
    }

    #[test]
    fn a_thread_that_had_most_of_the_core_while_it_was_awake_is_not_crowded() {
        let begun = Instant::now();
        let crowded = |had: Duration, awake: Duration| {
            let mut crowd = Crowd::new(begun, LONG);
            crowd.slept = LONG;
            crowd.takes_the_core(begun + LONG + awake, || LONG + had)
        };
        assert_eq!(crowded(Duration::ZERO, AWAKE / 2), None, "too soon to tell");
        assert_eq!(crowded(AWAKE * 56 / 100, AWAKE), Some(false));
        assert_eq!(crowded(AWAKE * 54 / 100, AWAKE), Some(true));
    }

    #[test]
    fn each_time_is_judged_by_itself() {
        let begun = Instant::now();
        let mut crowd = Crowd::new(begun, Duration::ZERO);
        assert_eq!(crowd.takes_the_core(begun + LONG, || SHORT), Some(true));
        assert_eq!(crowd.takes_the_core(begun + LONG, || SHORT), None);
    }
}
