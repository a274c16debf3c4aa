//! Processes, told apart from later ones that have the same number.

use serde::{Deserialize, Serialize};

use super::Host;
use super::host::{attribute, read};

/// A process of this boot of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Process {
    pub(super) pid: u32,
    /// When it began, in clock ticks after boot (proc(5), field 22 of `stat`).
    pub(super) began: u64,
    /// Which boot: a random number that the kernel makes.
    pub(super) boot: String,
}

impl Process {
    /// This one, as `host` shows it.
    pub(super) fn this(host: &Host) -> Self {
        Self::with_pid(host, std::process::id())
    }

    pub(super) fn with_pid(host: &Host, pid: u32) -> Self {
        Self {
            pid,
            began: began(host, pid).unwrap_or(0),
            boot: boot(host),
        }
    }

    /// Whether it still runs.
    pub(super) fn lives(&self, host: &Host) -> bool {
        self.is_of_this_boot(host) && began(host, self.pid) == Some(self.began)
    }

    pub(super) fn is_of_this_boot(&self, host: &Host) -> bool {
        self.boot == boot(host)
    }
}

fn boot(host: &Host) -> String {
    attribute(&host.path("proc/sys/kernel/random/boot_id")).unwrap_or_default()
}

fn began(host: &Host, pid: u32) -> Option<u64> {
    let stat = read(&host.path(format!("proc/{pid}/stat")))?;
    // The second field is the program's name in parentheses, and may hold anything.
    let after_name = &stat[stat.rfind(')')? + 1..];
    let mut fields = after_name.split_ascii_whitespace();
    // A process that has ended, and that nobody has waited for yet, holds nothing any more.
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The name of a process's program. The kernel keeps 15 characters of it; where the command
/// line begins with the rest too, it is told in full.
pub(super) fn program(host: &Host, pid: &str) -> String {
    let Some(short) = host.attribute(format!("proc/{pid}/comm")) else {
        return "a process".into();
    };
    let line = host.read(format!("proc/{pid}/cmdline")).unwrap_or_default();
    let path = line.split('\0').next().unwrap_or_default();
    let name = path.rsplit('/').next().unwrap_or_default();
    if name.starts_with(&short) {
        name.to_owned()
    } else {
        short
    }
}
