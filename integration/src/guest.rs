//! Runs shell commands in a guest and returns their status and output.
//!
//! The guest's init (`guest/init`) reads commands from a serial port of their own and frames each
//! answer with a token that is used once, so neither kernel messages nor the leftovers of an earlier
//! command can be taken for output.

use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::deadline::Deadline;
use crate::error::{Error, IoContext, Result};
use crate::machine::Vm;
use crate::terminal::{Heard, find};

/// The guest's terminal buffers this much while its shell is busy.
const LINE_LIMIT: usize = 4000;

/// Emulated guests need hundreds of milliseconds for what a person would call instant.
const COMMAND_SECS: u64 = 60;

/// What a command in the guest came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit status of the shell.
    pub status: i32,
    /// What it wrote, stdout and stderr together, byte by byte.
    pub bytes: Vec<u8>,
}

impl Output {
    /// The output as text, without the line break at its end.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).trim_end().to_owned()
    }

    /// Whether the status is 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.status == 0
    }
}

/// The running system of a [`Machine`](crate::machine::Machine).
///
/// Commands run one at a time, in the order in which they were given. After a missed deadline the guest is still busy with
/// the command, so later commands will miss theirs as well.
#[derive(Debug, Clone)]
pub struct Guest {
    vm: Arc<Vm>,
    port: Arc<Mutex<UnixStream>>,
}

impl Guest {
    pub(crate) fn new(vm: Arc<Vm>, port: UnixStream) -> Self {
        Self {
            vm,
            port: Arc::new(Mutex::new(port)),
        }
    }

    /// Runs a shell command, for at most a minute.
    ///
    /// # Errors
    /// When the guest panics, QEMU ends, or the deadline passes; the status is the caller's to judge.
    pub fn run(&self, command: &str) -> Result<Output> {
        self.run_within(command, Deadline::secs(COMMAND_SECS))
    }

    /// Runs a shell command.
    ///
    /// # Errors
    /// As [`Guest::run`].
    pub fn run_within(&self, command: &str, deadline: Deadline) -> Result<Output> {
        let port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        let token = send(&port, command)?;
        let begin = format!("\nfarbus-begin {token}\n");
        let end = format!("\nfarbus-end {token} ");
        self.vm
            .wait(&format!("the end of '{command}'"), deadline, |heard| {
                take_answer(heard, &begin, &end)
            })
    }

    /// Runs a shell command that must succeed, for at most a minute; returns its output as text.
    ///
    /// # Errors
    /// As [`Guest::run`], and [`Error::GuestCommand`] when the status is not 0.
    pub fn check(&self, command: &str) -> Result<String> {
        self.check_within(command, Deadline::secs(COMMAND_SECS))
    }

    /// Runs a shell command that must succeed; returns its output as text.
    ///
    /// # Errors
    /// As [`Guest::check`].
    pub fn check_within(&self, command: &str, deadline: Deadline) -> Result<String> {
        let output = self.run_within(command, deadline)?;
        if output.success() {
            return Ok(output.text());
        }
        Err(self.vm.failed(Error::GuestCommand {
            machine: self.vm.name().to_owned(),
            command: command.to_owned(),
            status: output.status,
            output: output.text(),
        }))
    }

    /// Starts a shell command that runs while others do.
    ///
    /// # Errors
    /// As [`Guest::check`].
    pub fn spawn(&self, command: &str) -> Result<Job> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = format!("/run/job{}", NEXT.fetch_add(1, Ordering::Relaxed));
        // The named pipe makes waiting an event: the job's end blocks in it until it is asked for.
        self.check(&format!(
            "mkfifo {path}.done; \
             (({command}) >{path}.out 2>&1 </dev/null; echo $? >{path}.done) \
             >/dev/null 2>&1 & echo $! >{path}.pid"
        ))?;
        Ok(Job {
            guest: self.clone(),
            path,
            command: command.to_owned(),
        })
    }

    /// Writes a file in the guest.
    ///
    /// # Errors
    /// As [`Guest::check`].
    pub fn write_file(&self, path: &str, content: &[u8]) -> Result<()> {
        self.check(&format!(": >{path}"))?;
        for chunk in content.chunks(1500) {
            self.check(&format!("echo {} | base64 -d >>{path}", base64(chunk)))?;
        }
        Ok(())
    }

    /// Waits until `path` is there, such as the node of a device that was plugged in.
    ///
    /// # Errors
    /// As [`Guest::run`].
    pub fn wait_file(&self, path: &str, deadline: Deadline) -> Result<()> {
        self.wait_until(&format!("[ -e {path} ]"), deadline)
    }

    /// Waits until a shell command succeeds in the guest.
    ///
    /// # Errors
    /// As [`Guest::run`].
    pub fn wait_until(&self, condition: &str, deadline: Deadline) -> Result<()> {
        // The guest has no inotify tool; its own clock is the one that counts here.
        let look = format!("until {condition}; do sleep 0.05; done");
        self.run_within(&look, deadline).map(drop)
    }

    /// Starts a reboot from inside and waits until the guest is up again.
    ///
    /// # Errors
    /// When it does not come up in time.
    pub fn reboot(&self, deadline: Deadline) -> Result<()> {
        self.reboot_by("sync; reboot -f", deadline)
    }

    /// Starts a reboot by a command of the guest's own system, and waits until the guest is up again.
    ///
    /// # Errors
    /// When it does not come up in time.
    pub fn reboot_by(&self, command: &str, deadline: Deadline) -> Result<()> {
        let port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        send(&port, command)?;
        drop(port);
        self.vm.wait_boot(deadline).map(drop)
    }

    /// Tells the guest to power off and does not wait for it.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn power_off(&self) -> Result<()> {
        let port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        send(&port, "sync; poweroff -f").map(drop)
    }

    /// Waits until the console shows `text`; what it showed earlier counts.
    ///
    /// # Errors
    /// As [`Guest::run`].
    pub fn wait_console(&self, text: &str, deadline: Deadline) -> Result<()> {
        self.vm
            .wait(&format!("'{text}' on the console"), deadline, |heard| {
                find(&heard.console, text.as_bytes()).map(drop)
            })
    }

    /// The end of the console's output.
    #[must_use]
    pub fn console(&self) -> String {
        self.vm.console_tail()
    }
}

/// A command that runs in the background of a guest.
#[derive(Debug)]
pub struct Job {
    guest: Guest,
    path: String,
    command: String,
}

impl Job {
    /// Waits for its end. The guest takes no other command meanwhile.
    ///
    /// # Errors
    /// As [`Guest::run`].
    pub fn wait(self, deadline: Deadline) -> Result<Output> {
        let path = &self.path;
        let answer = self.guest.run_within(
            &format!("read status <{path}.done; cat {path}.out; exit $status"),
            deadline,
        )?;
        Ok(answer)
    }

    /// Waits for its end, which must be a success; returns its output as text.
    ///
    /// # Errors
    /// As [`Guest::check`].
    pub fn check(self, deadline: Deadline) -> Result<String> {
        let vm = Arc::clone(&self.guest.vm);
        let command = self.command.clone();
        let output = self.wait(deadline)?;
        if output.success() {
            return Ok(output.text());
        }
        Err(vm.failed(Error::GuestCommand {
            machine: vm.name().to_owned(),
            command,
            status: output.status,
            output: output.text(),
        }))
    }

    /// What it has written so far.
    ///
    /// # Errors
    /// As [`Guest::check`].
    pub fn output(&self) -> Result<String> {
        self.guest.check(&format!("cat {}.out", self.path))
    }
}

/// Sends a command; returns the token of its answer.
fn send(mut port: &UnixStream, command: &str) -> Result<u64> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let token = NEXT.fetch_add(1, Ordering::Relaxed);
    let line = format!("run {token} {}\n", base64(command.as_bytes()));
    if line.len() > LINE_LIMIT {
        return Err(Error::CommandTooLong {
            length: line.len(),
            limit: LINE_LIMIT,
        });
    }
    port.write_all(line.as_bytes())
        .context(|| "writing to the guest's command port".into())?;
    Ok(token)
}

/// Takes a complete answer out of what was heard.
fn take_answer(heard: &mut Heard, begin: &str, end: &str) -> Option<Output> {
    let start = find(&heard.port, begin.as_bytes())? + begin.len();
    // The output may be empty: its end marker then begins with the line break of the begin marker.
    let rest = &heard.port[start - 1..];
    let stop = find(rest, end.as_bytes())?;
    let after = &rest[stop + end.len()..];
    let line = find(after, b"\n")?;
    let status = String::from_utf8_lossy(&after[..line])
        .trim()
        .parse()
        .ok()?;
    let bytes = rest.get(1..stop).unwrap_or_default().to_vec();
    heard.port.clear();
    Some(Output { status, bytes })
}

/// Base64 (RFC 4648, section 4).
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk
            .iter()
            .chain([&0, &0])
            .take(3)
            .fold(0_usize, |word, byte| word << 8 | usize::from(*byte));
        for digit in 0..4 {
            let used = digit <= chunk.len();
            let letter = if used {
                ALPHABET[word >> (18 - 6 * digit) & 63]
            } else {
                b'='
            };
            // Writing to a String cannot fail.
            let _ = text.write_char(char::from(letter));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(port: &str) -> Heard {
        Heard {
            port: port.as_bytes().to_vec(),
            ..Heard::default()
        }
    }

    fn answer(port: &str) -> Option<(i32, String)> {
        let output = take_answer(&mut heard(port), "\nfarbus-begin 7\n", "\nfarbus-end 7 ")?;
        Some((
            output.status,
            String::from_utf8_lossy(&output.bytes).into_owned(),
        ))
    }

    #[test]
    fn base64_matches_the_vectors_of_rfc_4648() {
        let plain = ["", "f", "fo", "foo", "foob", "fooba", "foobar"];
        let coded = [
            "", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy",
        ];
        assert_eq!(plain.map(|p| base64(p.as_bytes())), coded);
    }

    proptest::proptest! {
        #[test]
        fn any_output_is_returned_as_it_came(output: Vec<u8>, before: Vec<u8>, status in 0..=255) {
            let mut port = before;
            port.extend_from_slice(b"\nfarbus-begin 7\n");
            port.extend_from_slice(&output);
            port.extend_from_slice(format!("\nfarbus-end 7 {status}\n").as_bytes());
            let mut heard = Heard { port, ..Heard::default() };
            let answer = take_answer(&mut heard, "\nfarbus-begin 7\n", "\nfarbus-end 7 ");
            proptest::prop_assert_eq!(answer, Some(Output { status, bytes: output }));
            proptest::prop_assert!(heard.port.is_empty());
        }
    }

    #[test]
    fn answer_is_cut_out_byte_by_byte() {
        let got = answer("junk\nfarbus-begin 7\na\n\nb\n\nfarbus-end 7 3\n");
        assert_eq!(got, Some((3, "a\n\nb\n".into())));
    }

    #[test]
    fn empty_answer_is_complete() {
        let got = answer("\nfarbus-begin 7\n\nfarbus-end 7 0\n");
        assert_eq!(got, Some((0, String::new())));
    }

    #[test]
    fn answer_without_end_or_with_another_token_is_awaited() {
        assert_eq!(answer("\nfarbus-begin 7\nabc\nfarbus-end 7 "), None);
        assert_eq!(answer("\nfarbus-begin 7\nabc\nfarbus-end 8 0\n"), None);
        assert_eq!(answer("\nfarbus-begin 6\n\nfarbus-end 7 0\n"), None);
    }
}
