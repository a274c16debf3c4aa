//! A running QEMU machine: its process, its ports, its end.
//!
//! The [`builder`](crate::builder) starts machines. A machine that is dropped is killed (only its
//! own process, by pidfd); if anything about it failed, the ends of its logs are printed and its
//! directory is kept.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::builder::FIRMWARE_LOG;
use crate::deadline::Deadline;
use crate::error::{Error, Result};
use crate::guest::Guest;
use crate::process::{ORDERLY_END, Process, describe_status, tail};
use crate::qmp::Qmp;
use crate::report;
use crate::scratch::Scratch;
use crate::terminal::{Heard, Terminal, find};

/// What a machine and its guest share.
#[derive(Debug)]
pub(crate) struct Vm {
    name: String,
    process: Mutex<Process>,
    terminal: Terminal,
    stderr: PathBuf,
    scratch: Scratch,
}

impl Vm {
    pub(crate) fn new(
        process: Process,
        terminal: Terminal,
        stderr: PathBuf,
        scratch: Scratch,
    ) -> Self {
        Self {
            name: process.name().to_owned(),
            process: Mutex::new(process),
            terminal,
            stderr,
            scratch,
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn console_tail(&self) -> String {
        self.terminal.heard().console_tail()
    }

    /// Notes that something went wrong, so that the logs are kept.
    pub(crate) fn failed(&self, error: Error) -> Error {
        report::note_failure();
        error
    }

    /// Waits for something to be heard; a panic or the end of QEMU ends the wait.
    pub(crate) fn wait<T>(
        &self,
        what: &str,
        deadline: Deadline,
        seen: impl FnMut(&mut Heard) -> Option<T>,
    ) -> Result<T> {
        if let Some(found) = self.terminal.wait(deadline, seen) {
            return Ok(found);
        }
        let heard = self.terminal.heard();
        let (panicked, closed, console) = (heard.panicked, heard.closed, heard.console_tail());
        drop(heard);
        Err(self.failed(if panicked {
            Error::GuestPanic {
                machine: self.name.clone(),
                console,
            }
        } else if closed {
            self.exited()
        } else {
            deadline.missed_with(format!("{what} in guest '{}'", self.name), &console)
        }))
    }

    /// Waits for a fresh start of the guest's init; returns the boot's id.
    pub(crate) fn wait_boot(&self, deadline: Deadline) -> Result<String> {
        const READY: &[u8] = b"\nfarbus-ready ";
        self.wait("the start of init", deadline, |heard| {
            let start = find(&heard.port, READY)? + READY.len();
            let line = find(&heard.port[start..], b"\n")?;
            let id = String::from_utf8_lossy(&heard.port[start..start + line]).into_owned();
            heard.port.clear();
            Some(id)
        })
    }

    /// The error that says how QEMU ended.
    fn exited(&self) -> Error {
        // Its sockets close a moment before its status is there.
        let status = match self.process().wait(ORDERLY_END.into()) {
            Ok(status) => describe_status(status),
            Err(_) => "still running, its ports closed".into(),
        };
        Error::MachineExited {
            machine: self.name.clone(),
            status,
            stderr: self.stderr_tail(),
            console: self.console_tail(),
        }
    }

    fn process(&self) -> MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stderr_tail(&self) -> String {
        tail(
            &std::fs::read_to_string(&self.stderr).unwrap_or_default(),
            20,
        )
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if report::has_failed() {
            eprintln!(
                "=== machine '{}': end of the console ===\n{}\n=== what QEMU said ===\n{}",
                self.name,
                self.console_tail(),
                self.stderr_tail()
            );
            if let Ok(said) = std::fs::read(self.scratch.join(FIRMWARE_LOG)) {
                let said = tail(&String::from_utf8_lossy(&said), 30);
                eprintln!("=== what the firmware said ===\n{said}");
            }
        }
    }
}

/// A running machine.
#[derive(Debug)]
pub struct Machine {
    vm: Arc<Vm>,
    qmp: Qmp,
    port: UnixStream,
}

impl Machine {
    pub(crate) fn new(vm: Vm, qmp: Qmp, port: UnixStream) -> Self {
        Self {
            vm: Arc::new(vm),
            qmp,
            port,
        }
    }

    /// Waits until the guest's init takes commands.
    ///
    /// # Errors
    /// When the guest panics, QEMU ends, or the deadline passes.
    pub fn wait_guest(&self, deadline: Deadline) -> Result<Guest> {
        self.vm.wait_boot(deadline)?;
        let port = self
            .port
            .try_clone()
            .map_err(Error::io("duplicating the command port"))?;
        Ok(Guest::new(Arc::clone(&self.vm), port))
    }

    /// QEMU's monitor.
    #[must_use]
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Process id of QEMU.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.vm.process().id()
    }

    /// Directory of the machine's logs.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.vm.scratch.path()
    }

    /// The end of the console's output.
    #[must_use]
    pub fn console(&self) -> String {
        self.vm.console_tail()
    }

    /// Waits until the console shows `text`; what it showed earlier counts.
    ///
    /// # Errors
    /// When the guest panics, QEMU ends, or the deadline passes.
    pub fn wait_console(&self, text: &str, deadline: Deadline) -> Result<()> {
        self.vm
            .wait(&format!("'{text}' on the console"), deadline, |heard| {
                find(&heard.console, text.as_bytes()).map(drop)
            })
    }

    /// An error unless QEMU is still running.
    ///
    /// # Errors
    /// [`Error::MachineExited`] with its last words.
    pub fn check_running(&self) -> Result<()> {
        let status = self.vm.process().try_status()?;
        match status {
            None => Ok(()),
            Some(_) => Err(self.vm.failed(self.vm.exited())),
        }
    }

    /// Presses the reset button, and waits until the guest takes commands again.
    ///
    /// # Errors
    /// When it does not come up in time.
    pub fn reset(&self, deadline: Deadline) -> Result<()> {
        self.vm.terminal.heard().port.clear();
        self.qmp.system_reset()?;
        self.vm.wait_boot(deadline).map(drop)
    }

    /// Waits until QEMU has ended by itself, for instance after the guest has powered off.
    ///
    /// # Errors
    /// When it does not end in time, or not with exit status 0.
    pub fn wait_end(&self, deadline: Deadline) -> Result<()> {
        let status = self.vm.process().wait(deadline)?;
        if status.success() {
            Ok(())
        } else {
            Err(self.vm.failed(self.vm.exited()))
        }
    }

    /// Ends QEMU in an orderly way and waits for it.
    ///
    /// # Errors
    /// When it does not end in time, or not with exit status 0.
    pub fn quit(self) -> Result<()> {
        self.qmp.quit()?;
        self.wait_end(ORDERLY_END.into())
    }

    /// Kills QEMU and waits for its end: what a host crash looks like to the others.
    ///
    /// # Errors
    /// When it does not die.
    pub fn kill(&self) -> Result<()> {
        let mut process = self.vm.process();
        process.signal(crate::process::Kill::Kill)?;
        process.wait(ORDERLY_END.into()).map(drop)
    }
}
