//! CPUs that may halt when idle, and CPUs that may not.
//!
//! Waking a halted CPU costs tens of microseconds, more so in a virtual machine, and hides everything else at
//! depth 1. So everything is measured in both states. A CPU is kept awake by a process of the idle
//! scheduling class on it: any other work takes the CPU from it at once.

use std::fmt;
use std::path::Path;
use std::process::Stdio;

use anyhow::Context;
use farbus_integration::process::{Process, mortal_command};
use serde::Serialize;

/// Whether the CPUs may halt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Awake {
    /// `H`: they halt when there is nothing to do.
    Halting,
    /// `S`: a process of the idle class spins on each.
    Spinning,
}

impl Awake {
    pub(crate) const BOTH: [Self; 2] = [Self::Halting, Self::Spinning];

    pub(crate) fn letter(self) -> &'static str {
        match self {
            Self::Halting => "H",
            Self::Spinning => "S",
        }
    }
}

impl fmt::Display for Awake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.letter())
    }
}

/// Keeps the CPUs in a state for as long as it lives.
#[derive(Debug)]
pub(crate) struct Keeper {
    _spinners: Vec<Process>,
}

impl Keeper {
    /// Starts the spinners, if there are to be any.
    pub(crate) fn start(awake: Awake) -> anyhow::Result<Self> {
        let cpus = match awake {
            Awake::Halting => 0,
            Awake::Spinning => std::thread::available_parallelism()?.get(),
        };
        let own = std::env::current_exe().context("finding this program")?;
        let spinners = (0..cpus).map(|cpu| {
            let mut command = mortal_command(Path::new("chrt"));
            command
                .args(["--idle", "0"])
                .arg(&own)
                .args(["spin", "--cpu", &cpu.to_string()])
                .stdin(Stdio::null());
            Process::start("spinner", command)
        });
        Ok(Self {
            _spinners: spinners.collect::<Result<_, _>>()?,
        })
    }
}
