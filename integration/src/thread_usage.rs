//! What a thread has used up: processor time and context switches.

use rustix::time::{ClockId, clock_gettime};

/// Since the thread began, or between two moments.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Processor time in nanoseconds.
    pub cpu_ns: u64,
    /// How often the thread has gone to sleep.
    pub voluntary: u64,
    /// How often it has lost its processor to another.
    pub involuntary: u64,
}

impl Usage {
    /// Of the calling thread. Opens a file, so it is not for the path of a command.
    #[must_use]
    pub fn now() -> Self {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
        let number = |key: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(key)?.trim().parse().ok())
                .unwrap_or(0)
        };
        Self {
            cpu_ns: time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64,
            voluntary: number("voluntary_ctxt_switches:"),
            involuntary: number("nonvoluntary_ctxt_switches:"),
        }
    }

    /// What came after `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            cpu_ns: self.cpu_ns.saturating_sub(before.cpu_ns),
            voluntary: self.voluntary.saturating_sub(before.voluntary),
            involuntary: self.involuntary.saturating_sub(before.involuntary),
        }
    }

    /// What two threads have used.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            cpu_ns: self.cpu_ns + other.cpu_ns,
            voluntary: self.voluntary + other.voluntary,
            involuntary: self.involuntary + other.involuntary,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_shows_as_processor_time() {
        let before = Usage::now();
        let mut used = Usage::default();
        while used.cpu_ns < 1_000_000 {
            std::hint::spin_loop();
            used = Usage::now().since(before);
        }
        assert_eq!(used.and(used).cpu_ns, 2 * used.cpu_ns);
    }
}
