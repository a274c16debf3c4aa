//! What machine a table was made on.

use std::fs;

use farbus_integration::process::run_tool;
use serde::Serialize;
use std::process::Command;

/// A description of this machine and of what was measured on it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Host {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory_mib: u64,
    pub(crate) kernel: String,
    pub(crate) system: String,
    /// Under which hypervisor it runs, if any is announced.
    pub(crate) virtual_machine: bool,
    /// UTC.
    pub(crate) date: String,
    /// The commit that was built, where git can tell.
    pub(crate) commit: Option<String>,
    pub(crate) peers: Vec<String>,
}

impl Host {
    pub(crate) fn look(peers: Vec<String>) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let memory_kib: u64 = after(&memory, "MemTotal:")
            .and_then(|value| value.split_whitespace().next()?.parse().ok())
            .unwrap_or_default();
        let flags = after(&cpuinfo, "flags").unwrap_or_default();
        Self {
            cpu: after(&cpuinfo, "model name")
                .map(|name| name.trim_start_matches([':', ' ']).to_owned())
                .unwrap_or_else(|| std::env::consts::ARCH.into()),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: memory_kib / 1024,
            kernel: said("uname", &["-r"]).unwrap_or_default(),
            system: after(&release, "PRETTY_NAME=")
                .unwrap_or_default()
                .trim_matches('"')
                .to_owned(),
            virtual_machine: flags.split_whitespace().any(|flag| flag == "hypervisor"),
            date: said("date", &["-u", "+%Y-%m-%d %H:%M UTC"]).unwrap_or_default(),
            commit: said("git", &["describe", "--always", "--dirty"]),
            peers,
        }
    }

    /// Two lines for a person.
    pub(crate) fn describe(&self) -> String {
        let virtual_machine = if self.virtual_machine {
            " (virtual)"
        } else {
            ""
        };
        let commit = self.commit.as_deref().unwrap_or("unknown");
        format!(
            "{}, {} cores{virtual_machine}, {} MiB, kernel {}, {}\n{}, commit {commit}; {}",
            self.cpu,
            self.cores,
            self.memory_mib,
            self.kernel,
            self.system,
            self.date,
            self.peers.join("; ")
        )
    }
}

/// What follows `key` in the first line that begins with it.
fn after<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.strip_prefix(key))
        .map(str::trim)
}

fn said(program: &str, arguments: &[&str]) -> Option<String> {
    let said = run_tool(Command::new(program).args(arguments)).ok()?;
    Some(String::from_utf8_lossy(&said).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_described() {
        let host = Host::look(Vec::new());
        assert!(host.cores >= 1 && host.memory_mib > 0);
        assert!(!host.kernel.is_empty() && !host.cpu.is_empty());
        assert!(host.describe().contains(&host.kernel));
    }
}
