//! What a machine says on its two serial ports, collected as it comes.
//!
//! Two threads read the ports for as long as the machine lives: the console, which also goes to a
//! file and is watched for a kernel panic, and the command port, whose bytes [`Guest`] takes apart.
//! Whoever waits is woken by every change, so a panic or the end of QEMU ends a wait at once.
//!
//! [`Guest`]: crate::guest::Guest

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::deadline::Deadline;
use crate::error::{IoContext, Result};

/// How much of the console is kept in memory; the file has all of it.
const CONSOLE_KEPT: usize = 256 << 10;

/// Printed at the very end of a panic, after the registers and the call trace.
const PANIC_END: &[u8] = b"end Kernel panic";

/// What the ports have said so far.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    /// The end of the console's output.
    pub(crate) console: Vec<u8>,
    /// What has come on the command port and was not consumed yet.
    pub(crate) port: Vec<u8>,
    /// The kernel has panicked.
    pub(crate) panicked: bool,
    /// A port was closed: QEMU is gone, or going.
    pub(crate) closed: bool,
}

impl Heard {
    /// The console's last lines.
    pub(crate) fn console_tail(&self) -> String {
        crate::process::tail(&String::from_utf8_lossy(&self.console), 60)
    }
}

/// The receiving end of a machine's serial ports.
#[derive(Debug)]
pub(crate) struct Terminal {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    heard: Mutex<Heard>,
    changed: Condvar,
}

impl Terminal {
    /// Starts to listen.
    pub(crate) fn listen(console: UnixStream, port: UnixStream, log: &Path) -> Result<Self> {
        let mut log_file = File::create(log).context(|| format!("creating {}", log.display()))?;
        let shared = Arc::new(Shared::default());
        pump(console, Arc::clone(&shared), move |heard, bytes| {
            // A full disk must not stop the machine; the tail in memory remains.
            let _ = log_file.write_all(bytes);
            heard.console.extend_from_slice(bytes);
            let excess = heard.console.len().saturating_sub(CONSOLE_KEPT);
            heard.console.drain(..excess);
            // The text may be split over two reads.
            let fresh = heard
                .console
                .len()
                .saturating_sub(bytes.len() + PANIC_END.len());
            heard.panicked |= contains(&heard.console[fresh..], PANIC_END);
        });
        pump(port, Arc::clone(&shared), |heard, bytes| {
            heard.port.extend_from_slice(bytes);
        });
        Ok(Self { shared })
    }

    /// What was heard so far.
    pub(crate) fn heard(&self) -> MutexGuard<'_, Heard> {
        self.shared
            .heard
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `seen` finds what it looks for. `None`: the deadline passed, the kernel
    /// panicked or QEMU is gone, and it was not there.
    pub(crate) fn wait<T>(
        &self,
        deadline: Deadline,
        mut seen: impl FnMut(&mut Heard) -> Option<T>,
    ) -> Option<T> {
        let mut heard = self.heard();
        loop {
            if let Some(found) = seen(&mut heard) {
                return Some(found);
            }
            if heard.panicked || heard.closed || deadline.has_passed() {
                return None;
            }
            heard = self
                .shared
                .changed
                .wait_timeout(heard, deadline.remaining())
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

fn pump(
    mut stream: UnixStream,
    shared: Arc<Shared>,
    mut take: impl FnMut(&mut Heard, &[u8]) + Send + 'static,
) {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            let got = match stream.read(&mut buffer) {
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                other => other.unwrap_or(0),
            };
            let mut heard = shared.heard.lock().unwrap_or_else(PoisonError::into_inner);
            if got == 0 {
                heard.closed = true;
            } else {
                take(&mut heard, &buffer[..got]);
            }
            drop(heard);
            shared.changed.notify_all();
            if got == 0 {
                return;
            }
        }
    });
}

/// Whether `needle` occurs in `hay`.
pub(crate) fn contains(hay: &[u8], needle: &[u8]) -> bool {
    find(hay, needle).is_some()
}

/// Where `needle` begins in `hay`.
pub(crate) fn find(hay: &[u8], needle: &[u8]) -> Option<usize> {
    hay.windows(needle.len()).position(|w| w == needle)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;
    use std::time::Duration;

    fn terminal(scratch: &Scratch) -> (Terminal, UnixStream, UnixStream) {
        let (console, guest_console) = UnixStream::pair().unwrap();
        let (port, guest_port) = UnixStream::pair().unwrap();
        let terminal = Terminal::listen(console, port, &scratch.join("log")).unwrap();
        (terminal, guest_console, guest_port)
    }

    #[test]
    fn panic_split_over_two_reads_ends_a_wait() {
        let scratch = Scratch::new("term").unwrap();
        let (terminal, mut console, _port) = terminal(&scratch);
        console.write_all(b"---[ end Kernel pa").unwrap();
        terminal.wait(Deadline::secs(5), |h| (!h.console.is_empty()).then_some(()));
        console.write_all(b"nic - not syncing ]---").unwrap();
        let found: Option<()> = terminal.wait(Deadline::secs(60), |_| None);
        assert!(found.is_none());
        assert!(terminal.heard().panicked);
    }

    #[test]
    fn closed_port_ends_a_wait() {
        let scratch = Scratch::new("term").unwrap();
        let (terminal, _console, port) = terminal(&scratch);
        drop(port);
        let found: Option<()> = terminal.wait(Deadline::secs(60), |_| None);
        assert!(found.is_none());
        assert!(terminal.heard().closed);
    }

    #[test]
    fn passed_deadline_ends_a_wait() {
        let scratch = Scratch::new("term").unwrap();
        let (terminal, _console, _port) = terminal(&scratch);
        let found: Option<()> = terminal.wait(Deadline::after(Duration::from_millis(5)), |_| None);
        assert!(found.is_none());
    }
}
