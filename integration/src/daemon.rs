//! Runs Farbus' own programs the way an operator does.
//!
//! A daemon is started in the foreground, is ready when it has printed its `ready` line on stdout,
//! and ends with exit status 0 on SIGTERM. Its stderr is kept, and its end is part of every error.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};

use crate::deadline::Deadline;
use crate::error::{Error, IoContext, Result};
use crate::process::{Kill, ORDERLY_END, Process, describe_status, mortal_command, tail};
use crate::procfs::Proc;
use crate::report;
use crate::scratch::Scratch;

/// Environment variable that names the directory of the built programs.
pub const BIN_DIR_ENV: &str = "FARBUS_BIN_DIR";

/// A daemon is ready within this; it has nothing slow to do before.
const READY_SECS: u64 = 20;

/// The path of one of the workspace's programs.
///
/// It is looked for in `$FARBUS_BIN_DIR`, or else where cargo has put the running test: the
/// programs must have been built (`cargo build --workspace`) with the same profile.
///
/// # Errors
/// [`Error::Missing`] when it has not been built.
pub fn program(name: &str) -> Result<PathBuf> {
    let dirs: Vec<PathBuf> = match std::env::var_os(BIN_DIR_ENV) {
        Some(dir) => vec![dir.into()],
        None => {
            let own = std::env::current_exe().context(|| "finding the running program".into())?;
            // The test is target/PROFILE/deps/test-HASH, a program target/PROFILE/program.
            own.ancestors()
                .skip(1)
                .take(2)
                .map(Path::to_owned)
                .collect()
        }
    };
    dirs.iter()
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| Error::Missing {
            what: format!("program {name} (cargo build --workspace makes it)"),
            place: dirs.first().cloned().unwrap_or_default(),
        })
}

/// What a program that was run to its end has left.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// All of its stdout.
    pub stdout: String,
    /// All of its stderr.
    pub stderr: String,
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    lines: Receiver<String>,
    ready: String,
    scratch: Scratch,
}

impl Daemon {
    /// Starts one of the workspace's programs and waits for its `ready` line.
    ///
    /// # Errors
    /// When it is not built, ends, or is not ready in time; the error has the end of its stderr.
    pub fn start(name: &str, arguments: &[&str]) -> Result<Self> {
        Self::launch(name, arguments)?.await_ready()
    }

    /// As [`Daemon::start`], without waiting; [`Daemon::await_ready`] does.
    pub(crate) fn launch(name: &str, arguments: &[&str]) -> Result<Self> {
        Self::launch_as(name, mortal_command(&program(name)?), arguments)
    }

    /// As [`Daemon::start`], run by another program, such as `valgrind` with its options, that
    /// executes it in place.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub fn start_under(wrapper: &[&str], name: &str, arguments: &[&str]) -> Result<Self> {
        let (first, options) = wrapper.split_first().unwrap_or((&"env", &[]));
        let mut command = mortal_command(Path::new(first));
        command.args(options).arg(program(name)?);
        Self::launch_as(name, command, arguments)?.await_ready()
    }

    /// It, when it has said that it is ready.
    pub(crate) fn await_ready(mut self) -> Result<Self> {
        let deadline = Deadline::secs(READY_SECS);
        self.ready = loop {
            let line = self.line(deadline)?;
            if line.split_whitespace().next() == Some("ready") {
                break line;
            }
        };
        Ok(self)
    }

    /// Runs one of the workspace's programs to its end, for commands that are refused.
    ///
    /// # Errors
    /// When it is not built, or does not end in time.
    pub fn run(name: &str, arguments: &[&str], deadline: Deadline) -> Result<Ended> {
        let mut daemon = Self::launch(name, arguments)?;
        let status = daemon.process.wait(deadline)?;
        // The reader's end closes the channel once the pipe is drained.
        let stdout: Vec<String> = daemon.lines.iter().collect();
        Ok(Ended {
            status,
            stdout: stdout.join("\n"),
            stderr: daemon.stderr(),
        })
    }

    fn launch_as(name: &str, mut command: Command, arguments: &[&str]) -> Result<Self> {
        let scratch = Scratch::new(name)?;
        let log =
            File::create(scratch.join("stderr.log")).context(|| "creating stderr.log".into())?;
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log);
        let mut process = Process::start(name, command)?;
        let (tx, lines) = channel();
        let stdout = process.child().stdout.take();
        std::thread::spawn(move || {
            let lines = stdout
                .into_iter()
                .flat_map(|pipe| BufReader::new(pipe).lines());
            // When nobody listens any more, keep the pipe flowing all the same.
            for line in lines.map_while(std::io::Result::ok) {
                let _ = tx.send(line);
            }
        });
        Ok(Self {
            process,
            lines,
            ready: String::new(),
            scratch,
        })
    }

    /// Its `ready` line.
    #[must_use]
    pub fn ready(&self) -> &str {
        &self.ready
    }

    /// The value of `key=value` in its `ready` line, such as the port that it listens on.
    #[must_use]
    pub fn ready_value(&self, key: &str) -> Option<&str> {
        self.ready
            .split_whitespace()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    /// The next line of its stdout.
    ///
    /// # Errors
    /// When it ends, or says nothing in time.
    pub fn line(&mut self, deadline: Deadline) -> Result<String> {
        match self.lines.recv_timeout(deadline.remaining()) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => {
                report::note_failure();
                let what = format!("a line from {}", self.process.name());
                Err(deadline.missed_with(what, &self.stderr_tail()))
            }
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.process.wait(ORDERLY_END.into())?;
                Err(self.ended(status, ""))
            }
        }
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What the kernel knows about it.
    #[must_use]
    pub fn proc(&self) -> Proc {
        Proc::of(self.pid())
    }

    /// All of its stderr so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.scratch.join("stderr.log")).unwrap_or_default()
    }

    /// An error unless it is still running.
    ///
    /// # Errors
    /// [`Error::DaemonExited`] with its last words.
    pub fn check_running(&mut self) -> Result<()> {
        match self.process.try_status()? {
            None => Ok(()),
            Some(status) => Err(self.ended(status, "")),
        }
    }

    /// Waits until it has ended by itself.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn wait_end(&mut self, deadline: Deadline) -> Result<ExitStatus> {
        self.process.wait(deadline)
    }

    /// Sends SIGTERM; the daemon must end with exit status 0.
    ///
    /// # Errors
    /// When it does not end in time, or with another status.
    pub fn terminate(mut self) -> Result<()> {
        // One that has already ended is judged by its status below.
        let _ = self.process.signal(Kill::Term);
        let status = self
            .process
            .wait(ORDERLY_END.into())
            .inspect_err(|_| report::note_failure())?;
        if status.code() == Some(0) {
            Ok(())
        } else {
            Err(self.ended(status, ", not with exit status 0, after SIGTERM"))
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it has already ended.
    pub fn signal(&self, signal: Kill) -> Result<()> {
        self.process.signal(signal)
    }

    /// Kills it and waits for its end: what a crash looks like to the others.
    ///
    /// # Errors
    /// When it does not die.
    pub fn kill(mut self) -> Result<()> {
        self.process.signal(Kill::Kill)?;
        self.process.wait(ORDERLY_END.into()).map(drop)
    }

    fn stderr_tail(&self) -> String {
        tail(&self.stderr(), 30)
    }

    fn ended(&self, status: ExitStatus, expected: &str) -> Error {
        report::note_failure();
        Error::DaemonExited {
            daemon: self.process.name().to_owned(),
            status: describe_status(status),
            expected: expected.to_owned(),
            stderr: self.stderr_tail(),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if report::has_failed() {
            eprintln!(
                "=== end of {}'s stderr ===\n{}",
                self.process.name(),
                self.stderr_tail()
            );
        }
    }
}
