//! Two hosts on one machine: each side of a network has one half of the CPUs.
//!
//! Left alone, the scheduler of a machine of two CPUs puts both ends of a busy connection on one of them at some
//! times and not at others, which halves the throughput. Two hosts never share a CPU.

use std::fs;

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::usage::Watched;

/// A side of the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// Where the load is, with what offers the device to it.
    Compute,
    /// Where the drive is.
    Device,
}

/// Keeps the two sides on CPUs of their own for as long as it lives. What the calling thread starts meanwhile
/// is on the side of the load.
#[derive(Debug)]
pub(crate) struct Apart {
    before: CpuSet,
    pids: Vec<u32>,
}

impl Apart {
    pub(crate) fn keep(watched: &[Watched]) -> Result<Self> {
        let before = sched_getaffinity(None).context("reading the CPU affinity")?;
        let apart = Self {
            before,
            pids: watched.iter().map(|one| one.pid).collect(),
        };
        for one in watched {
            place(one.pid, &half(&before, one.side))?;
        }
        let own = half(&before, Side::Compute);
        sched_setaffinity(None, &own).context("setting the CPU affinity")?;
        Ok(apart)
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        // All of them had this process' CPUs before; one that has ended needs none.
        let _ = sched_setaffinity(None, &self.before);
        for pid in &self.pids {
            let _ = place(*pid, &self.before);
        }
    }
}

/// The CPUs of a side: the lower or the upper half of `all`; with one CPU, that one.
fn half(all: &CpuSet, side: Side) -> CpuSet {
    let cpus: Vec<usize> = (0..CpuSet::MAX_CPU)
        .filter(|cpu| all.is_set(*cpu))
        .collect();
    let (lower, upper) = cpus.split_at(cpus.len() / 2);
    let own = match side {
        Side::Compute if !lower.is_empty() => lower,
        _ => upper,
    };
    let mut set = CpuSet::new();
    own.iter().for_each(|cpu| set.set(*cpu));
    set
}

/// Puts all threads of a process, and those that they will start, on these CPUs.
fn place(pid: u32, cpus: &CpuSet) -> Result<()> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .with_context(|| format!("looking at process {pid}"))?;
    for thread in threads {
        let id = thread?.file_name().to_string_lossy().parse().ok();
        let Some(id) = id.and_then(Pid::from_raw) else {
            continue;
        };
        match sched_setaffinity(Some(id), cpus) {
            // It has ended meanwhile.
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error).context("setting the CPU affinity"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use farbus_integration::process::Process;

    use super::*;

    fn cpus(set: &CpuSet) -> Vec<usize> {
        (0..CpuSet::MAX_CPU)
            .filter(|cpu| set.is_set(*cpu))
            .collect()
    }

    fn halves(of: &[usize]) -> (Vec<usize>, Vec<usize>) {
        let mut all = CpuSet::new();
        of.iter().for_each(|cpu| all.set(*cpu));
        let [compute, device] = [Side::Compute, Side::Device].map(|side| half(&all, side));
        (cpus(&compute), cpus(&device))
    }

    #[test]
    fn what_is_started_meanwhile_is_on_the_side_of_the_load() {
        let own = sched_getaffinity(None).unwrap();
        let apart = Apart::keep(&[]).unwrap();
        let mut command = std::process::Command::new("sleep");
        command.arg("60");
        let started = Process::start("sleep", command).unwrap();
        drop(apart);
        let pid = Pid::from_raw(started.id() as i32);
        let placed = sched_getaffinity(pid).unwrap();
        assert_eq!(cpus(&placed), cpus(&half(&own, Side::Compute)));
        assert_eq!(cpus(&sched_getaffinity(None).unwrap()), cpus(&own));
    }

    #[test]
    fn sides_share_no_cpu_unless_there_is_but_one() {
        assert_eq!(halves(&[0, 1]), (vec![0], vec![1]));
        assert_eq!(halves(&[1, 4, 6]), (vec![1], vec![4, 6]));
        assert_eq!(halves(&[3]), (vec![3], vec![3]));
    }
}
