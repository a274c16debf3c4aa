//! What a thread has used up: processor time and context switches.

use rustix::time::{ClockId, clock_gettime};

/// Since the thread began.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) cpu_ns: u64,
    pub(crate) voluntary: u64,
    pub(crate) involuntary: u64,
}

impl Usage {
    /// Of the calling thread. Opens a file, so it is not for the path of a command.
    pub(crate) fn now() -> Self {
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

    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            cpu_ns: self.cpu_ns.saturating_sub(before.cpu_ns),
            voluntary: self.voluntary.saturating_sub(before.voluntary),
            involuntary: self.involuntary.saturating_sub(before.involuntary),
        }
    }
}
