//! Which process a worker is, as it is written down: so that the next daemon knows it again, and takes
//! nothing else for it. A process id alone is another process's sooner or later, and anybody may write
//! what he likes into his command line.

use std::fs;
use std::io;

use log::warn;
use serde::{Deserialize, Serialize};

/// One process, among all that there ever are on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pid: u32,
    /// When it started, in clock ticks after the host did (`starttime`, proc_pid_stat(5)).
    started: u64,
    /// Names the time between two starts of the host.
    boot: String,
}

impl Identity {
    /// Of a process that there is.
    ///
    /// # Errors
    /// When there is none of this number, or `/proc` does not show it.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let started = started(&stat)
            .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat cannot be understood")))?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let boot = boot.trim().to_owned();
        Ok(Self { pid, started, boot })
    }

    /// As [`Self::of`]. Without it, the next daemon has a worker's command line to know it by.
    #[must_use]
    pub fn of_worker(pid: u32) -> Option<Self> {
        Self::of(pid)
            .inspect_err(|error| warn!("worker {pid} cannot be told from others later: {error}"))
            .ok()
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it is there yet, dead and not waited for perhaps.
    #[must_use]
    pub fn is_there(&self) -> bool {
        Self::of(self.pid).is_ok_and(|now| now == *self)
    }
}

/// The 22nd field. The second one is a name in brackets, which may contain anything.
fn started(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    #[test]
    fn process_is_itself_and_no_other_of_its_number() {
        let own = Identity::of(std::process::id()).unwrap();
        let before = Identity {
            started: own.started - 1,
            ..own.clone()
        };
        let boot = String::new();

        assert!(own.is_there());
        assert!(!before.is_there());
        assert!(!Identity { boot, ..own }.is_there());
    }

    #[test]
    fn name_with_brackets_and_numbers_is_no_obstacle() {
        let stat = "7 (a) 1 2 (b)) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 1 2 3";

        assert_eq!(started(stat), Some(4711));
        assert_eq!(started("7 (a) S 1"), None);
        assert_eq!(started(""), None);
    }
}
