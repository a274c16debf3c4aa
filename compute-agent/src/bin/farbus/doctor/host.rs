//! What this host gives to attachments: locked memory, RDMA, the kernel.

use std::fs;

use farbus_fabric::provider::doctor::{self, Level as Found};

use super::{Finding, Level};

/// Guest memory that takes part in RDMA is locked in pieces of 16 MiB; a few attachments need this.
const FEW: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// The kernel's first version with Landlock, which workers lock themselves in with.
const LANDLOCK: (u32, u32) = (5, 13);

/// How much memory the agent and its workers may lock.
pub(super) fn memlock(agent: Option<u32>) -> Finding {
    const CHECK: &str = "memlock";
    let remedy =
        "set LimitMEMLOCK=infinity in the agent's unit (systemctl edit farbus-compute-agent)";
    let (whose, place) = match agent {
        Some(pid) => ("the agent", format!("/proc/{pid}/limits")),
        None => ("a process of this user", "/proc/self/limits".into()),
    };
    let Ok(limits) = fs::read_to_string(&place) else {
        let what = format!("{place} cannot be read: whether RDMA can lock memory is not known");
        return Finding::new(CHECK, Level::Note, what, "run farbus doctor as root");
    };
    match soft_limit(&limits) {
        Some(limit) if limit < FEW => Finding::new(
            CHECK,
            Level::Warning,
            format!(
                "{whose} may lock {} MiB: RDMA locks the memory that it transfers",
                limit / MIB
            ),
            remedy,
        ),
        Some(limit) => Finding::ok(CHECK, format!("{whose} may lock {} MiB", limit / MIB)),
        None => Finding::ok(CHECK, format!("{whose} may lock any amount of memory")),
    }
}

/// In bytes; `None` when there is no limit.
fn soft_limit(limits: &str) -> Option<u64> {
    let mut lines = limits.lines();
    let line = lines.find_map(|line| line.strip_prefix("Max locked memory"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// What libibverbs sees.
pub(super) fn rdma() -> Vec<Finding> {
    let findings = doctor::examine().into_iter();
    findings
        .map(|found| Finding {
            check: "rdma",
            level: match found.level {
                Found::Usable => Level::Ok,
                Found::None => Level::Note,
                Found::Broken => Level::Warning,
            },
            finding: found.what,
            remedy: found.remedy.map(str::to_owned),
        })
        .collect()
}

/// Whether the kernel has what the agent's workers use.
pub(super) fn kernel() -> Finding {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    judge_kernel(release.trim())
}

fn judge_kernel(release: &str) -> Finding {
    const CHECK: &str = "kernel";
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|part| part.parse().ok());
    let version = (numbers.next(), numbers.next());
    match version {
        (Some(major), Some(minor)) if (major, minor) >= LANDLOCK => {
            Finding::ok(CHECK, format!("Linux {release}"))
        }
        _ => Finding::new(
            CHECK,
            Level::Warning,
            format!(
                "Linux {release} is older than {}.{}: workers cannot be kept from files",
                LANDLOCK.0, LANDLOCK.1
            ),
            "use a newer kernel",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_of_locked_memory_is_read_from_the_kernels_table() {
        let limited = "Limit  Soft Limit  Hard Limit  Units\nMax locked memory         8388608              8388608              bytes\n";
        let unlimited =
            "Max locked memory         unlimited            unlimited            bytes\n";

        assert_eq!(soft_limit(limited), Some(8_388_608));
        assert_eq!(soft_limit(unlimited), None);
    }

    #[test]
    fn kernel_without_landlock_is_a_warning() {
        assert_eq!(judge_kernel("5.10.0-9-amd64").level, Level::Warning);
        assert_eq!(judge_kernel("6.12.107+deb13-amd64").level, Level::Ok);
        assert_eq!(judge_kernel("").level, Level::Warning);
    }
}
