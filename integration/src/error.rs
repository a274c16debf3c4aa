//! What can go wrong in the test bed.
//!
//! Every variant carries what a person needs who reads only the failed test's output: the
//! command, the status, and the tail of the log that explains it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Result of a test-bed operation.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure of the test bed, or of what it watches.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call or a file operation failed.
    #[error("{what} failed")]
    Io {
        /// The operation, with the path it touched.
        what: String,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },

    /// A helper program could not be started, or ended with a failure.
    #[error("'{command}' failed with {status}: {output}")]
    Tool {
        /// The program and its arguments.
        command: String,
        /// Exit status, or the reason why it never ran.
        status: String,
        /// The end of what it wrote.
        output: String,
    },

    /// Nothing in this machine's package sources can provide something.
    #[error("no source of Debian packages: {reason} (FARBUS_DEBIAN_MIRROR can name one)")]
    NoPackageSource {
        /// What was looked for.
        reason: String,
    },

    /// A package came, but what it was fetched for is not in it.
    #[error("{what} was not found in {place}")]
    Missing {
        /// The file or program that is missing.
        what: String,
        /// Where it should have been.
        place: PathBuf,
    },

    /// An awaited event did not come in time.
    #[error("{what} did not happen within {after:?}{detail}")]
    Deadline {
        /// The awaited event.
        what: String,
        /// How long was waited for it.
        after: Duration,
        /// What was seen instead; empty, or begins with a colon or a line break.
        detail: String,
    },

    /// The guest's kernel has panicked.
    #[error("the kernel of guest '{machine}' panicked; its console ends:\n{console}")]
    GuestPanic {
        /// Name of the machine.
        machine: String,
        /// The end of the console log.
        console: String,
    },

    /// QEMU has ended although it was still needed.
    #[error(
        "QEMU of machine '{machine}' ended ({status}); it said:\n{stderr}\nthe console ends:\n{console}"
    )]
    MachineExited {
        /// Name of the machine.
        machine: String,
        /// How QEMU ended.
        status: String,
        /// The end of QEMU's own messages.
        stderr: String,
        /// The end of the console log.
        console: String,
    },

    /// A command in the guest ended with an unexpected status.
    #[error("'{command}' in guest '{machine}' ended with status {status}:\n{output}")]
    GuestCommand {
        /// Name of the machine.
        machine: String,
        /// The shell command.
        command: String,
        /// Its exit status.
        status: i32,
        /// What it wrote, stdout and stderr together.
        output: String,
    },

    /// A guest command is longer than the guest's terminal can take in one line.
    #[error("a guest command of {length} bytes exceeds the limit of {limit}")]
    CommandTooLong {
        /// Length of the command as sent.
        length: usize,
        /// The limit.
        limit: usize,
    },

    /// QEMU refused a QMP command.
    #[error("QMP command '{command}' was refused: {class}: {description}")]
    Qmp {
        /// The command.
        command: String,
        /// QEMU's error class.
        class: String,
        /// QEMU's explanation.
        description: String,
    },

    /// A peer spoke, but not the protocol that was expected.
    #[error("unexpected answer from {peer}: {answer}")]
    Protocol {
        /// Who answered.
        peer: String,
        /// What it said.
        answer: String,
    },

    /// A daemon ended although it was still needed, or with another status than promised.
    #[error("{daemon} ended with {status}{expected}; it said:\n{stderr}")]
    DaemonExited {
        /// Name of the program.
        daemon: String,
        /// How it ended.
        status: String,
        /// The promise it broke; empty, or begins with a comma.
        expected: String,
        /// The end of its messages.
        stderr: String,
    },

    /// What was verified about a disk does not hold.
    #[error("verification of {what}: {finding}")]
    Verification {
        /// What was verified.
        what: String,
        /// What was found instead.
        finding: String,
    },
}

impl Error {
    /// Makes the closure that dresses an [`io::Error`] with the operation it belongs to.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// Dresses results of `io` operations.
pub trait IoContext<T> {
    /// Adds the operation (and the path it touched) to the error.
    ///
    /// # Errors
    /// The error of `self`, dressed.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::Io {
            what: what(),
            source: e.into(),
        })
    }
}
