//! The socket for messages to the VMM, which it hands over: changes of the configuration space, and
//! questions for translations with their answers.
//!
//! Nothing here waits. A message is sent as a whole or not at all.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::channel::{HEADER, NEED_REPLY, REPLY, VERSION};
use super::iommu::asks::Ask;
use super::iommu::message;

/// `VHOST_USER_BACKEND_IOTLB_MSG`.
const IOTLB: u32 = 1;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE: u32 = 2;
/// Bytes of an answer: a header, and a word that is zero when all is well.
const ANSWER: usize = HEADER + 8;
/// What of the flags of an answer counts: the version, and that it is one.
const FLAGS: u32 = 0b111;

/// What the VMM has said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// It has done what it was asked to, or refuses to.
    Answer {
        /// It refuses.
        refuses: bool,
    },
    /// Nothing yet.
    Nothing,
    /// It has closed the socket.
    Closed,
    /// Something that is no answer.
    Nonsense,
}

/// See the module's own description.
#[derive(Debug)]
pub struct Back {
    socket: OwnedFd,
    /// As much of the next answer as has come.
    answer: [u8; ANSWER],
    len: usize,
}

impl Back {
    /// Takes the VMM's socket.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        if FileType::from_raw_mode(fstat(&fd)?.st_mode) != FileType::Socket {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self {
            socket: fd,
            answer: [0; ANSWER],
            len: 0,
        })
    }

    /// Tells of a change of the configuration space; whether there was room for that.
    pub fn config_changed(&self) -> io::Result<bool> {
        self.say(CONFIG_CHANGE, 0, &[])
    }

    /// Asks for a translation; whether there was room for that.
    pub fn ask(&self, ask: Ask) -> io::Result<bool> {
        let body = message::miss(ask.address, ask.access);
        self.say(IOTLB, NEED_REPLY, &body)
    }

    fn say(&self, request: u32, flags: u32, body: &[u8]) -> io::Result<bool> {
        let mut bytes = [0; HEADER + message::LEN];
        let words = [request, VERSION | flags, body.len() as u32];
        let words = words.iter().flat_map(|word| word.to_ne_bytes());
        for (to, from) in bytes.iter_mut().zip(words.chain(body.iter().copied())) {
            *to = from;
        }
        let whole = bytes.get(..HEADER + body.len()).unwrap_or_default();
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match send(&self.socket, whole, flags) {
            Ok(sent) if sent == whole.len() => Ok(true),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The next answer, if all of it is there.
    pub fn hear(&mut self) -> io::Result<Heard> {
        while let Some(room @ [_, ..]) = self.answer.get_mut(self.len..) {
            match recv(&self.socket, room, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Ok(Heard::Closed),
                Ok((_, len)) => self.len += len,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(Heard::Nothing),
                Err(Errno::CONNRESET) => return Ok(Heard::Closed),
                Err(error) => return Err(error.into()),
            }
        }
        self.len = 0;
        let word = |at: usize| {
            let word = self.answer.get(at..at + 4).and_then(|b| b.try_into().ok());
            word.map_or(0, u32::from_ne_bytes)
        };
        let is_answer = word(0) == IOTLB && word(4) & FLAGS == VERSION | REPLY && word(8) == 8;
        if !is_answer {
            return Ok(Heard::Nonsense);
        }
        Ok(Heard::Answer {
            refuses: word(HEADER) != 0 || word(HEADER + 4) != 0,
        })
    }
}

impl AsRawFd for Back {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
