//! What the kernel knows about a process: memory, threads, open files.

use std::fs;
use std::path::PathBuf;

use crate::error::{Error, IoContext, Result};

/// A process, seen through `/proc`.
#[derive(Debug, Clone)]
pub struct Proc {
    dir: PathBuf,
}

impl Proc {
    /// The process with this id.
    #[must_use]
    pub fn of(pid: u32) -> Self {
        Self {
            dir: PathBuf::from(format!("/proc/{pid}")),
        }
    }

    /// Private (anonymous) resident memory in bytes: heap and stacks, but neither program text nor
    /// memory that is shared with a guest.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn anonymous_bytes(&self) -> Result<u64> {
        self.kilobytes("status", "RssAnon")
    }

    /// The most resident memory of any kind that it ever had, in bytes.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn peak_bytes(&self) -> Result<u64> {
        self.kilobytes("status", "VmHWM")
    }

    /// Proportional share of resident memory in bytes, what is shared divided by its users.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn proportional_bytes(&self) -> Result<u64> {
        self.kilobytes("smaps_rollup", "Pss")
    }

    /// Number of threads.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn threads(&self) -> Result<u64> {
        self.number("status", "Threads")
    }

    /// Resident memory of any kind in bytes, what is shared counted in full.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn resident_bytes(&self) -> Result<u64> {
        self.kilobytes("status", "VmRSS")
    }

    /// CPU time of the threads that it has now, in nanoseconds (`/proc/PID/task/*/schedstat`, which is
    /// exact where `/proc/PID/stat` counts ticks). What threads used that have ended is not in it.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn cpu_ns(&self) -> Result<u64> {
        self.sum_over_threads("schedstat", |text| {
            text.split_whitespace().next()?.parse().ok()
        })
    }

    /// Context switches of the threads that it has now, voluntary and other.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn context_switches(&self) -> Result<u64> {
        self.sum_over_threads("status", |text| {
            let counts = text
                .lines()
                .filter(|line| line.contains("ctxt_switches"))
                .filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok());
            Some(counts.sum())
        })
    }

    fn sum_over_threads(&self, file: &str, value: impl Fn(&str) -> Option<u64>) -> Result<u64> {
        let dir = self.dir.join("task");
        let threads = fs::read_dir(&dir).context(|| format!("reading {}", dir.display()))?;
        // A thread that ends meanwhile is not counted.
        Ok(threads
            .flatten()
            .filter_map(|thread| fs::read_to_string(thread.path().join(file)).ok())
            .filter_map(|text| value(&text))
            .sum())
    }

    /// What each open file descriptor leads to, such as `socket:[4711]` or a path.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn open_files(&self) -> Result<Vec<String>> {
        let dir = self.dir.join("fd");
        let listing = fs::read_dir(&dir).context(|| format!("reading {}", dir.display()))?;
        // A descriptor that is closed meanwhile is not open.
        Ok(listing
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .map(|target| target.display().to_string())
            .collect())
    }

    fn kilobytes(&self, file: &str, field: &str) -> Result<u64> {
        Ok(self.number(file, field)? * 1024)
    }

    /// The number behind `field:` in a file of lines.
    fn number(&self, file: &str, field: &str) -> Result<u64> {
        let path = self.dir.join(file);
        let text = fs::read_to_string(&path).context(|| format!("reading {}", path.display()))?;
        text.lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
            .and_then(|value| value.split_whitespace().next()?.parse().ok())
            .ok_or_else(|| Error::Missing {
                what: field.to_owned(),
                place: path,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_process_has_memory_threads_and_files() {
        let own = Proc::of(std::process::id());
        assert!(own.anonymous_bytes().unwrap() > 0);
        assert!(own.peak_bytes().unwrap() >= own.anonymous_bytes().unwrap());
        assert!(own.proportional_bytes().unwrap() > 0);
        assert!(own.threads().unwrap() >= 1);
        assert!(own.resident_bytes().unwrap() >= own.anonymous_bytes().unwrap());
        assert!(own.cpu_ns().unwrap() > 0);
        assert!(own.context_switches().unwrap() > 0);
        assert!(own.open_files().unwrap().len() >= 3);
    }

    #[test]
    fn vanished_process_is_an_error() {
        assert!(Proc::of(u32::MAX).threads().is_err());
    }
}
