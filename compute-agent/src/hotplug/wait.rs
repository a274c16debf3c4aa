//! Deadlines, and UNIX sockets that keep to them.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::HotplugError;

/// How often a server whose queue of connections is full is asked again: such a socket cannot be waited
/// for (connect(2), EAGAIN).
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// A VMM answers within milliseconds, unless it hangs.
const QUESTION: Duration = Duration::from_secs(2);

/// A point in time, and the length of the wait that leads to it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Until {
    at: Instant,
    pub(super) after: Duration,
}

impl Until {
    pub(super) fn after(after: Duration) -> Self {
        // A wait that no clock can express is as good as a day's.
        let after = after.min(Duration::from_secs(24 * 3600));
        Self {
            at: Instant::now() + after,
            after,
        }
    }

    pub(super) fn left(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    pub(super) fn has_passed(&self) -> bool {
        self.left().is_zero()
    }

    /// For one question to the VMM while the guest is waited for: this one, or a little later, so that it
    /// is the guest who is late at the end of a wait, not the VMM.
    pub(super) fn for_a_question(&self) -> Self {
        if self.left() >= QUESTION {
            *self
        } else {
            Self::after(QUESTION)
        }
    }

    /// This one, or an earlier one.
    pub(super) fn at_most(&self, after: Duration) -> Self {
        if self.left() <= after {
            *self
        } else {
            Self::after(after)
        }
    }
}

/// A connected socket, with what is needed to say what went wrong on it.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    what: &'static str,
    socket: String,
}

impl Connection {
    /// Connects. A server that accepts nobody would let a blocking connect wait for ever.
    pub(super) fn open(
        what: &'static str,
        path: &Path,
        until: Until,
    ) -> Result<Self, HotplugError> {
        let socket = path.display().to_string();
        let failed = |source: io::Error| HotplugError::Connect {
            what,
            socket: path.display().to_string(),
            source,
        };
        let address = SocketAddrUnix::new(path).map_err(|e| failed(e.into()))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|e| failed(e.into()))?;
        loop {
            match connect(&fd, &address) {
                Ok(()) => break,
                Err(rustix::io::Errno::AGAIN) if until.has_passed() => {
                    return Err(HotplugError::Busy {
                        socket,
                        after: until.after,
                    });
                }
                Err(rustix::io::Errno::AGAIN) => std::thread::sleep(ASK_AGAIN.min(until.left())),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed(error.into())),
            }
        }
        let stream = UnixStream::from(fd);
        stream.set_nonblocking(false).map_err(failed)?;
        Ok(Self {
            stream,
            what,
            socket,
        })
    }

    pub(super) fn socket(&self) -> &str {
        &self.socket
    }

    pub(super) fn timeout(&self, doing: &str, until: Until) -> HotplugError {
        HotplugError::Timeout {
            socket: self.socket.clone(),
            after: until.after,
            doing: doing.to_owned(),
        }
    }

    pub(super) fn closed(&self, doing: &str) -> HotplugError {
        HotplugError::Closed {
            socket: self.socket.clone(),
            doing: doing.to_owned(),
        }
    }

    fn failed(&self, doing: &str, source: io::Error) -> HotplugError {
        match source.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => self.closed(doing),
            _ => HotplugError::Socket {
                what: self.what,
                socket: self.socket.clone(),
                doing: doing.to_owned(),
                source,
            },
        }
    }

    /// Sends all of `bytes`.
    pub(super) fn send(
        &mut self,
        mut bytes: &[u8],
        doing: &str,
        until: Until,
    ) -> Result<(), HotplugError> {
        while !bytes.is_empty() {
            let left = self.left(doing, until)?;
            let set = self.stream.set_write_timeout(Some(left));
            match set.and_then(|()| self.stream.write(bytes)) {
                Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
                Err(error) if is_no_news(&error) => {}
                Err(error) => return Err(self.failed(doing, error)),
            }
        }
        Ok(())
    }

    /// Receives to `buffer`; 0 bytes are the end of the stream.
    pub(super) fn receive(
        &mut self,
        buffer: &mut [u8],
        doing: &str,
        until: Until,
    ) -> Result<usize, HotplugError> {
        loop {
            let left = self.left(doing, until)?;
            let set = self.stream.set_read_timeout(Some(left));
            match set.and_then(|()| self.stream.read(buffer)) {
                Ok(received) => return Ok(received),
                Err(error) if is_no_news(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(0),
                Err(error) => return Err(self.failed(doing, error)),
            }
        }
    }

    fn left(&self, doing: &str, until: Until) -> Result<Duration, HotplugError> {
        let left = until.left();
        if left.is_zero() {
            return Err(self.timeout(doing, until));
        }
        // The kernel takes less than a microsecond for no limit at all.
        Ok(left.max(Duration::from_millis(1)))
    }
}

fn is_no_news(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

/// The beginning of what a peer said, for people.
pub(super) fn excerpt(said: &[u8]) -> String {
    const SHOWN: usize = 120;
    let shown = said.get(..SHOWN).unwrap_or(said);
    let text: String = String::from_utf8_lossy(shown)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    match (text.trim(), said.len() > SHOWN) {
        ("", _) => "nothing".to_owned(),
        (text, true) => format!("{text} ..."),
        (text, false) => text.to_owned(),
    }
}
