//! A client of QEMU's machine protocol (QMP).
//!
//! Commands are answered in order; events that come in between are kept for
//! [`Qmp::wait_event`]. The whole conversation goes to a log file.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

use crate::deadline::Deadline;
use crate::error::{Error, IoContext, Result};

/// QEMU's main loop answers within milliseconds unless a device blocks it.
const ANSWER_SECS: u64 = 30;

/// A QMP connection, past its greeting.
#[derive(Debug)]
pub struct Qmp {
    wire: Mutex<Wire>,
}

#[derive(Debug)]
struct Wire {
    stream: UnixStream,
    log: File,
    unread: Vec<u8>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Takes the greeting and enters command mode.
    ///
    /// # Errors
    /// When QEMU does not greet in time or closes the connection.
    pub fn negotiate(stream: UnixStream, log: &Path) -> Result<Self> {
        let log = File::create(log).context(|| format!("creating {}", log.display()))?;
        let mut wire = Wire {
            stream,
            log,
            unread: Vec::new(),
            events: VecDeque::new(),
        };
        let deadline = Deadline::secs(ANSWER_SECS);
        let greeting = wire.receive("QMP's greeting", deadline)?;
        if greeting.get("QMP").is_none() {
            return Err(Error::Protocol {
                peer: "QMP".into(),
                answer: greeting.to_string(),
            });
        }
        let qmp = Self {
            wire: Mutex::new(wire),
        };
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Executes a command; returns the value of its `return`.
    ///
    /// # Errors
    /// [`Error::Qmp`] when QEMU refuses the command.
    pub fn execute(&self, command: &str, arguments: &Value) -> Result<Value> {
        let mut wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        let request = json!({"execute": command, "arguments": arguments});
        wire.send(&request)?;
        let deadline = Deadline::secs(ANSWER_SECS);
        loop {
            let mut message = wire.receive(&format!("an answer to QMP '{command}'"), deadline)?;
            if message.get("event").is_some() {
                wire.events.push_back(message);
            } else if let Some(error) = message.get("error") {
                let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
                return Err(Error::Qmp {
                    command: command.to_owned(),
                    class: text("class"),
                    description: text("desc"),
                });
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// Waits for an event; earlier ones of that name count. Returns its whole message.
    ///
    /// # Errors
    /// [`Error::Deadline`] when it does not come.
    pub fn wait_event(&self, name: &str, deadline: Deadline) -> Result<Value> {
        self.wait_event_where(name, deadline, |_| true)
    }

    /// Waits for an event whose `data` satisfies `matches`.
    ///
    /// # Errors
    /// [`Error::Deadline`] when it does not come.
    pub fn wait_event_where(
        &self,
        name: &str,
        deadline: Deadline,
        matches: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let mut wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = |event: &Value| event["event"] == name && matches(&event["data"]);
        if let Some(at) = wire.events.iter().position(&wanted) {
            return Ok(wire.events.remove(at).unwrap_or_default());
        }
        loop {
            let message = wire.receive(&format!("QEMU's event {name}"), deadline)?;
            if wanted(&message) {
                return Ok(message);
            }
            wire.events.push_back(message);
        }
    }

    /// Forgets the events seen so far, so that [`Qmp::wait_event`] waits for a new one.
    pub fn forget_events(&self) {
        let mut wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        wire.events.clear();
    }

    /// Plugs a device; `device` holds `driver`, `id`, `bus` and the driver's properties.
    ///
    /// # Errors
    /// [`Error::Qmp`] when QEMU refuses it.
    pub fn device_add(&self, device: &Value) -> Result<()> {
        self.execute("device_add", device).map(drop)
    }

    /// Asks the guest to release a device, and waits until QEMU has removed it.
    ///
    /// # Errors
    /// When QEMU refuses, or the guest does not let go in time.
    pub fn device_del(&self, id: &str, deadline: Deadline) -> Result<()> {
        self.execute("device_del", &json!({ "id": id }))?;
        self.wait_event_where("DEVICE_DELETED", deadline, |data| data["device"] == id)
            .map(drop)
    }

    /// Presses the reset button.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn system_reset(&self) -> Result<()> {
        self.execute("system_reset", &json!({})).map(drop)
    }

    /// Ends QEMU in an orderly way.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn quit(&self) -> Result<()> {
        self.execute("quit", &json!({})).map(drop)
    }

    /// Runs a command of the human monitor, for what QMP lacks.
    ///
    /// # Errors
    /// When QEMU does not answer. A refused monitor command is text, not an error.
    pub fn human(&self, command: &str) -> Result<String> {
        let said = self.execute("human-monitor-command", &json!({ "command-line": command }))?;
        Ok(said.as_str().unwrap_or_default().to_owned())
    }
}

impl Wire {
    fn send(&mut self, message: &Value) -> Result<()> {
        let line = format!("{message}\n");
        // The log is a help, not a condition.
        let _ = write!(self.log, "> {line}");
        self.stream
            .write_all(line.as_bytes())
            .context(|| "writing to QMP".into())
    }

    fn receive(&mut self, what: &str, deadline: Deadline) -> Result<Value> {
        loop {
            if let Some(end) = self.unread.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                let text = String::from_utf8_lossy(&line);
                let _ = write!(self.log, "< {text}");
                return serde_json::from_slice(&line).map_err(|_| Error::Protocol {
                    peer: "QMP".into(),
                    answer: text.trim().to_owned(),
                });
            }
            if deadline.has_passed() {
                return Err(deadline.missed(what));
            }
            self.stream
                .set_read_timeout(Some(
                    deadline
                        .remaining()
                        .max(std::time::Duration::from_millis(1)),
                ))
                .context(|| "setting a time limit on QMP".into())?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    return Err(Error::Protocol {
                        peer: "QMP".into(),
                        answer: format!("end of the connection instead of {what}"),
                    });
                }
                Ok(got) => self.unread.extend_from_slice(&buffer[..got]),
                Err(e) => match e.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => {}
                    _ => return Err(Error::io("reading from QMP")(e)),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;
    use std::io::BufRead;

    /// A peer that answers each line it gets with the next of `answers`.
    fn connect(scratch: &Scratch, answers: &'static [&'static str]) -> Result<Qmp> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut writer = theirs.try_clone().unwrap();
            let mut lines = std::io::BufReader::new(theirs).lines();
            writer.write_all(b"{\"QMP\": {}}\n").unwrap();
            for answer in answers {
                if lines.next().is_none() {
                    return;
                }
                writer.write_all(answer.as_bytes()).unwrap();
            }
        });
        Qmp::negotiate(ours, &scratch.join("qmp"))
    }

    #[test]
    fn events_between_command_and_answer_are_kept() {
        let scratch = Scratch::new("qmp").unwrap();
        let answers = &[
            "{\"return\": {}}\n",
            "{\"event\": \"RESET\", \"data\": {}}\n{\"return\": {\"a\": 1}}\n",
        ];
        let qmp = connect(&scratch, answers).unwrap();
        assert_eq!(qmp.execute("x", &json!({})).unwrap()["a"], 1);
        assert!(qmp.wait_event("RESET", Deadline::secs(1)).is_ok());
    }

    #[test]
    fn refusal_carries_class_and_description() {
        let scratch = Scratch::new("qmp").unwrap();
        let answers = &[
            "{\"return\": {}}\n",
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such bus\"}}\n",
        ];
        let qmp = connect(&scratch, answers).unwrap();
        let refused = qmp.device_add(&json!({})).unwrap_err().to_string();
        assert!(refused.contains("GenericError: no such bus"), "{refused}");
    }

    #[test]
    fn closed_connection_is_an_error_not_a_hang() {
        let scratch = Scratch::new("qmp").unwrap();
        assert!(matches!(
            connect(&scratch, &[]),
            Err(Error::Protocol { .. } | Error::Io { .. })
        ));
    }
}
