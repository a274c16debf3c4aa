//! Child processes that can be waited for with a deadline and that never outlive the tests.
//!
//! A [`Process`] is addressed through its pidfd alone, so a signal can never reach a stranger that
//! inherited the pid. When a `Process` is dropped, its process is killed and reaped.

use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::deadline::Deadline;
use crate::error::{Error, IoContext, Result};

/// Signals that the test bed sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kill {
    /// SIGTERM: end in order.
    Term,
    /// SIGKILL: vanish.
    Kill,
    /// SIGSTOP: freeze.
    Stop,
    /// SIGCONT: thaw.
    Continue,
    /// SIGHUP: read the configuration again.
    HangUp,
}

/// A running (or ended, not yet dropped) child process.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pidfd: OwnedFd,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command`; `name` is used in messages.
    ///
    /// The kernel kills the process when the whole test process dies, even by SIGKILL
    /// (`setpriv --pdeathsig`; without that program the process merely loses this protection).
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(name: &str, command: Command) -> Result<Self> {
        let child = spawn_on_immortal_thread(command).context(|| format!("starting '{name}'"))?;
        let pid = pid_of(&child)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())
            .context(|| format!("opening a pidfd of '{name}'"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            pidfd,
            status: None,
        })
    }

    /// Name used in messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child's pipes, for taking them.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Exit status, when the process has ended.
    ///
    /// # Errors
    /// When the process cannot be waited for.
    pub fn try_status(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self
                .child
                .try_wait()
                .context(|| format!("waiting for '{}'", self.name))?;
        }
        Ok(self.status)
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// [`Error::Deadline`] when it does not end in time.
    pub fn wait(&mut self, deadline: Deadline) -> Result<ExitStatus> {
        loop {
            if let Some(status) = self.try_status()? {
                return Ok(status);
            }
            if deadline.has_passed() {
                return Err(deadline.missed(format!("the end of '{}'", self.name)));
            }
            wait_readable(&[self.pidfd.as_fd()], deadline)?;
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the process has already ended.
    pub fn signal(&self, signal: Kill) -> Result<()> {
        let signal = match signal {
            Kill::Term => Signal::TERM,
            Kill::Kill => Signal::KILL,
            Kill::Stop => Signal::STOP,
            Kill::Continue => Signal::CONT,
            Kill::HangUp => Signal::HUP,
        };
        pidfd_send_signal(&self.pidfd, signal)
            .context(|| format!("signalling '{}' ({})", self.name, self.id()))
    }
}

impl AsFd for Process {
    /// The pidfd: readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status.is_none() && self.signal(Kill::Kill).is_ok() {
            // A killed process ends at once, except in an uninterruptible system call.
            if self.wait(Deadline::secs(10)).is_err() {
                eprintln!("'{}' ({}) does not die", self.name, self.id());
            }
        }
    }
}

/// Waits until one of `fds` is readable (or hung up); tells for each whether it is.
///
/// # Errors
/// When `poll` fails. A passed deadline is not an error here: nothing is readable then.
pub fn wait_readable(fds: &[BorrowedFd<'_>], deadline: Deadline) -> Result<Vec<bool>> {
    let mut polled: Vec<PollFd<'_>> = fds
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    loop {
        let left = deadline.remaining();
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(&mut polled, Some(&timeout)) {
            Ok(_) => return Ok(polled.iter().map(|p| !p.revents().is_empty()).collect()),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::io("poll")(e.into())),
        }
    }
}

/// Runs a helper program to its end and returns its standard output.
///
/// # Errors
/// [`Error::Tool`] with the end of its messages, when it cannot be started or fails.
pub fn run_tool(command: &mut Command) -> Result<Vec<u8>> {
    let shown = describe(command);
    let output = command
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(|e| Error::Tool {
            command: shown.clone(),
            status: e.to_string(),
            output: String::new(),
        })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said.push_str(&String::from_utf8_lossy(&output.stderr));
    Err(Error::Tool {
        command: shown,
        status: describe_status(output.status),
        output: tail(&said, 20),
    })
}

/// A command line as a person would write it.
#[must_use]
pub fn describe(command: &Command) -> String {
    let mut shown = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        // Writing to a String cannot fail.
        let _ = write!(shown, " {}", arg.to_string_lossy());
    }
    shown
}

/// An exit status in words.
#[must_use]
pub fn describe_status(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// The last `lines` lines of a text.
#[must_use]
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn pid_of(child: &Child) -> Result<Pid> {
    i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| Error::Protocol {
            peer: "the kernel".into(),
            answer: format!("process id {}", child.id()),
        })
}

/// Spawns through one thread that lives as long as the process.
///
/// The parent-death signal fires when the *thread* that forked ends, and a test's thread ends
/// before a machine that several tests share. The child gets the CPUs of the calling thread all the same.
fn spawn_on_immortal_thread(command: Command) -> io::Result<Child> {
    type Request = (Command, CpuSet, Sender<io::Result<Child>>);
    static SPAWNER: OnceLock<Sender<Request>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (tx, rx) = channel::<Request>();
        std::thread::spawn(move || {
            for (mut command, cpus, reply) in rx {
                let placed = sched_setaffinity(None, &cpus).map_err(io::Error::from);
                // Nobody waits any more when the reply cannot be sent; the child dies with `Child`'s
                // pipes, or with this process.
                let _ = reply.send(placed.and_then(|()| command.spawn()));
            }
        });
        tx
    });
    let (tx, rx) = channel();
    let gone = |_| io::Error::other("the spawning thread has ended");
    spawner
        .send((command, sched_getaffinity(None)?, tx))
        .map_err(|_| io::Error::other("the spawning thread has ended"))?;
    rx.recv().map_err(gone)?
}

/// A command that runs `program` so that it dies with this process.
///
/// `setpriv` executes the program in place, so the process id is the program's own.
#[must_use]
pub fn mortal_command(program: &Path) -> Command {
    static HAS_SETPRIV: OnceLock<bool> = OnceLock::new();
    let has_setpriv = *HAS_SETPRIV.get_or_init(|| {
        Command::new("setpriv")
            .args(["--pdeathsig", "keep", "true"])
            .output()
            .is_ok_and(|o| o.status.success())
    });
    if has_setpriv {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program);
        command
    } else {
        Command::new(program)
    }
}

/// How long an orderly end may take before it counts as a hang.
pub const ORDERLY_END: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_end_is_seen_with_its_status() {
        let mut command = mortal_command(Path::new("sh"));
        command.args(["-c", "exit 7"]);
        let mut process = Process::start("sh", command).unwrap();
        let status = process.wait(Deadline::secs(10)).unwrap();
        assert_eq!(status.code(), Some(7));
    }

    #[test]
    fn wait_past_the_deadline_is_an_error_and_drop_kills() {
        let mut command = mortal_command(Path::new("sleep"));
        command.arg("1000");
        let mut process = Process::start("sleep", command).unwrap();
        let missed = process.wait(Deadline::after(Duration::from_millis(20)));
        assert!(matches!(missed, Err(Error::Deadline { .. })));
        let proc_entry = format!("/proc/{}", process.id());
        drop(process);
        assert!(!Path::new(&proc_entry).exists());
    }

    #[test]
    fn failing_tool_is_reported_with_its_words() {
        let failed = run_tool(Command::new("sh").args(["-c", "echo no such luck >&2; exit 3"]));
        let text = failed.unwrap_err().to_string();
        assert!(
            text.contains("exit status 3") && text.contains("no such luck"),
            "{text}"
        );
    }
}
