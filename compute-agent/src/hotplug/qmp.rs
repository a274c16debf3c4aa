//! One conversation over QEMU's machine protocol (QEMU's `docs/interop/qmp-spec`): a greeting, then
//! commands and answers, one JSON object a line, with events in between.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::HotplugError;
use super::wait::{Connection, Until, excerpt};

const WHAT: &str = "QMP";

/// QEMU greets at once, unless it serves somebody else.
const GREETING: Duration = Duration::from_secs(5);

/// The longest line that is read, in bytes. What is asked for here is answered with some kilobytes.
const MAX_LINE: usize = 1 << 20;

/// Events that nobody has asked for yet; older ones are forgotten.
const MAX_EVENTS: usize = 256;

/// A command that QEMU has refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) class: String,
    pub(super) reason: String,
}

impl Refusal {
    /// Whether the reason has this in it. QEMU's classes say hardly more than that it failed.
    pub(super) fn says(&self, words: &str) -> bool {
        self.reason.contains(words)
    }

    pub(super) fn into_error(self, request: &str, remedy: &'static str) -> HotplugError {
        HotplugError::Refused {
            request: request.to_owned(),
            reason: self.reason,
            remedy,
        }
    }
}

/// What QEMU says of a device unasked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeviceEvent {
    Deleted,
    GuestRefused,
}

/// A connection past its greeting.
#[derive(Debug)]
pub(super) struct Qmp {
    connection: Connection,
    lines: Lines,
    events: VecDeque<(DeviceEvent, String)>,
    next_id: u64,
}

impl Qmp {
    pub(super) fn open(socket: &Path, until: Until) -> Result<Self, HotplugError> {
        let mut qmp = Self {
            connection: Connection::open(WHAT, socket, until)?,
            lines: Lines::default(),
            events: VecDeque::new(),
            next_id: 0,
        };
        let soon = until.at_most(GREETING);
        let greeting = match qmp.message("waiting for its greeting", soon) {
            Err(HotplugError::Timeout { socket, after, .. }) if qmp.lines.unread.is_empty() => {
                return Err(HotplugError::Busy { socket, after });
            }
            Err(HotplugError::Timeout { .. }) => return Err(qmp.not_qmp(&qmp.lines.unread)),
            greeting => greeting?,
        };
        if !greeting.get("QMP").is_some_and(Value::is_object) {
            return Err(qmp.not_qmp(greeting.to_string().as_bytes()));
        }
        qmp.execute("qmp_capabilities", &json!({}), until)?;
        Ok(qmp)
    }

    fn not_qmp(&self, said: &[u8]) -> HotplugError {
        HotplugError::WrongProtocol {
            socket: self.connection.socket().to_owned(),
            protocol: WHAT,
            said: excerpt(said),
        }
    }

    /// Executes a command; what it returns. A refusal is an error.
    pub(super) fn execute(
        &mut self,
        command: &str,
        arguments: &Value,
        until: Until,
    ) -> Result<Value, HotplugError> {
        self.ask(command, arguments, until)?
            .map_err(|refusal| refusal.into_error(command, ""))
    }

    /// Executes a command; what it returns, or why QEMU refuses it.
    pub(super) fn ask(
        &mut self,
        command: &str,
        arguments: &Value,
        until: Until,
    ) -> Result<Result<Value, Refusal>, HotplugError> {
        self.next_id += 1;
        let id = self.next_id;
        let request = json!({"execute": command, "arguments": arguments, "id": id});
        let doing = format!("executing {command}");
        self.connection
            .send(format!("{request}\n").as_bytes(), &doing, until)?;
        loop {
            let mut message = self.message(&doing, until)?;
            if self.take_event(&message) || message.get("id") != Some(&json!(id)) {
                continue;
            }
            if let Some(error) = message.get("error") {
                let text = |key| error.get(key).and_then(Value::as_str);
                return Ok(Err(Refusal {
                    class: text("class").unwrap_or("GenericError").to_owned(),
                    reason: text("desc").unwrap_or("it does not say why").to_owned(),
                }));
            }
            return match message.get_mut("return") {
                Some(value) => Ok(Ok(value.take())),
                None => Err(self.not_qmp(message.to_string().as_bytes())),
            };
        }
    }

    /// The next event about the device `name`; `None` if none has come until then.
    pub(super) fn device_event(
        &mut self,
        name: &str,
        until: Until,
    ) -> Result<Option<DeviceEvent>, HotplugError> {
        loop {
            while let Some((event, device)) = self.events.pop_front() {
                if device == name {
                    return Ok(Some(event));
                }
            }
            match self.message("waiting for the guest", until) {
                Ok(message) => {
                    self.take_event(&message);
                }
                Err(HotplugError::Timeout { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether a message is an event. Those about devices are kept.
    fn take_event(&mut self, message: &Value) -> bool {
        let Some(name) = message.get("event") else {
            return false;
        };
        let event = match name.as_str() {
            Some("DEVICE_DELETED") => DeviceEvent::Deleted,
            Some("DEVICE_UNPLUG_GUEST_ERROR") => DeviceEvent::GuestRefused,
            _ => return true,
        };
        let data = message.get("data");
        if let Some(device) = data.and_then(|d| d.get("device")?.as_str()) {
            if self.events.len() >= MAX_EVENTS {
                self.events.pop_front();
            }
            self.events.push_back((event, device.to_owned()));
        }
        true
    }

    /// The next line, which is an object.
    fn message(&mut self, doing: &str, until: Until) -> Result<Value, HotplugError> {
        let line = self.line(doing, until)?;
        match serde_json::from_slice(&line) {
            Ok(message @ Value::Object(_)) => Ok(message),
            _ => Err(self.not_qmp(&line)),
        }
    }

    fn line(&mut self, doing: &str, until: Until) -> Result<Vec<u8>, HotplugError> {
        loop {
            if let Some(line) = self.lines.next() {
                return Ok(line);
            }
            if self.lines.unread.len() > MAX_LINE {
                return Err(self.not_qmp(&self.lines.unread));
            }
            let mut buffer = [0; 4096];
            match self.connection.receive(&mut buffer, doing, until)? {
                0 if self.lines.unread.is_empty() => return Err(self.connection.closed(doing)),
                0 => return Err(self.not_qmp(&self.lines.unread)),
                len => self.lines.push(buffer.get(..len).unwrap_or_default()),
            }
        }
    }
}

/// Received bytes, as lines.
#[derive(Debug, Default)]
struct Lines {
    /// What is not a whole line yet, or was not looked at.
    unread: Vec<u8>,
    /// How much of that has no line's end.
    searched: usize,
}

impl Lines {
    fn push(&mut self, received: &[u8]) {
        self.unread.extend_from_slice(received);
    }

    fn next(&mut self) -> Option<Vec<u8>> {
        let fresh = self.unread.get(self.searched..).unwrap_or_default();
        let Some(at) = fresh.iter().position(|byte| *byte == b'\n') else {
            self.searched = self.unread.len();
            return None;
        };
        let rest = self.unread.split_off(self.searched + at + 1);
        self.searched = 0;
        Some(std::mem::replace(&mut self.unread, rest))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn lines_come_out_as_they_went_in_however_they_are_cut(
            lines in proptest::collection::vec("[a-z]{0,20}", 0..10),
            cuts in proptest::collection::vec(1usize..30, 1..10),
        ) {
            let stream: String = lines.iter().map(|line| format!("{line}\n")).collect();
            let mut reader = Lines::default();
            let mut got = Vec::new();
            let mut rest = stream.as_bytes();
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                reader.push(now);
                got.extend(std::iter::from_fn(|| reader.next()));
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            let expected: Vec<_> = lines.iter().map(|line| format!("{line}\n").into_bytes()).collect();
            prop_assert_eq!(got, expected);
        }
    }
}
