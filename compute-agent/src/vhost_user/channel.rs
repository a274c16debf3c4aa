//! The socket to the VMM: whole messages, and the channel back to it.
//!
//! The `vhost` crate's handler reads a message with calls that wait for the rest of one, and
//! writes replies with calls that wait for a reader. A VMM could make this process wait for ever
//! that way, so a message is handed to it only when all of it has come, and there is room for
//! the reply. Two kinds of messages are taken here: the crate gives no way to send on the channel that
//! one of them carries ([`super::back`]), and does not know the other, about translations
//! ([`super::iommu`]).

#![forbid(unsafe_code)]

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::debug;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send,
};
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE, VhostUserProtocolFeatures};
use vhost::vhost_user::{BackendReqHandler, Error};

use super::back::{Back, Heard};
use super::device::Device;
use super::iommu::asks::MAX_ASKS;
use super::iommu::message;

/// Request u32, flags u32, size of the body u32, in the host's byte order.
pub(super) const HEADER: usize = 12;
/// Flags: version 1, this is a reply, a reply is wanted.
pub(super) const VERSION: u32 = 1;
pub(super) const REPLY: u32 = 1 << 2;
pub(super) const NEED_REPLY: u32 = 1 << 3;
const VERSION_MASK: u32 = 0b11;
/// `VHOST_USER_IOTLB_MSG`, which the crate lacks.
const IOTLB: u32 = 22;
/// Answers of the VMM that are looked at before other work has its turn.
const ANSWERS: usize = 2 * MAX_ASKS;

/// Why a client is let go.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// It has closed the connection.
    #[error("the VMM has closed the connection")]
    Closed,
    /// It breaks the protocol.
    #[error("the VMM broke the protocol: {0}")]
    Protocol(&'static str),
    /// A message was refused, or could not be answered.
    #[error("a message of the VMM was refused: {0}")]
    Refused(Error),
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Socket(#[from] io::Error),
}

impl From<Errno> for Ended {
    fn from(errno: Errno) -> Self {
        Self::Socket(errno.into())
    }
}

/// What a call of [`Channel::serve`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// A message was handled; there may be another.
    One,
    /// There is no whole message.
    None,
    /// The next message has to wait until a queue has stopped.
    Waits,
}

/// A client's connection.
pub struct Channel {
    stream: UnixStream,
    handler: BackendReqHandler<Mutex<Device>>,
    device: Arc<Mutex<Device>>,
    back: Option<Back>,
    /// Channels back that the event loop has not heard of.
    changes: Vec<BackChange>,
    /// Answers of the VMM's. What it said before them may still be on the way.
    answers: Vec<bool>,
}

/// A channel back that the event loop is to watch, or to forget.
pub enum BackChange {
    /// This one is new.
    New(RawFd),
    /// This one is no longer in use. It is open until the event loop has forgotten it.
    Gone(Back),
}

/// The header of the next message, and the first word of its body.
struct Peeked {
    request: u32,
    flags: u32,
    size: usize,
    first: Option<u32>,
}

impl Channel {
    /// For a connection; it becomes one that waits, see the module's own description.
    pub fn new(stream: UnixStream, device: Arc<Mutex<Device>>) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        let handler = BackendReqHandler::from_stream(stream.try_clone()?, device.clone());
        Ok(Self {
            stream,
            handler,
            device,
            back: None,
            changes: Vec::new(),
            answers: Vec::with_capacity(ANSWERS),
        })
    }

    /// What the event loop is to watch, or to forget, since the last call.
    pub fn back_changes(&mut self) -> Vec<BackChange> {
        std::mem::take(&mut self.changes)
    }

    fn replace_back(&mut self, back: Option<Back>) {
        if let Some(back) = &back {
            self.changes.push(BackChange::New(back.as_raw_fd()));
        }
        let gone = std::mem::replace(&mut self.back, back);
        self.changes.extend(gone.map(BackChange::Gone));
        self.answers.clear();
        let can_ask = self.back.is_some();
        self.device().ask_anew(can_ask);
    }

    fn device(&self) -> MutexGuard<'_, Device> {
        // There is one thread, so a panic under the lock has ended all of it.
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Handles the next message, if all of it is there.
    pub fn serve(&mut self) -> Result<Served, Ended> {
        let Some(next) = self.peek()? else {
            return self.hear();
        };
        // Room for any reply: a client that lets them pile up does not read them.
        if !self.is(PollFlags::OUT)? {
            return Err(Ended::Protocol("it does not read its replies"));
        }
        if next.request == FrontendReq::GET_VRING_BASE as u32 {
            let index = next
                .first
                .ok_or(Ended::Protocol("a message came in pieces"))?;
            if !self.device().quiesce(index) {
                // What has to be waited for can take long; nobody waits for a client that is gone.
                return if self.is(PollFlags::RDHUP | PollFlags::HUP)? {
                    Err(Ended::Closed)
                } else {
                    Ok(Served::Waits)
                };
            }
        }
        if next.request == FrontendReq::SET_BACKEND_REQ_FD as u32 {
            self.take_back_channel(&next)?;
            return Ok(Served::One);
        }
        if next.request == IOTLB {
            self.take_translation(&next)?;
            return Ok(Served::One);
        }
        match self.handler.handle_request() {
            Ok(()) => Ok(Served::One),
            Err(Error::Disconnected) => Err(Ended::Closed),
            Err(error) => Err(Ended::Refused(error)),
        }
    }

    fn peek(&self) -> Result<Option<Peeked>, Ended> {
        let mut bytes = [0; HEADER + 4];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let len = match recv(&self.stream, &mut bytes, flags) {
            Ok((_, 0)) => return Err(Ended::Closed),
            Ok((_, len)) => len,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let there = ioctl_fionread(&self.stream)? as usize;
        if len < HEADER {
            // What follows a descriptor is not seen together with what is before it.
            return if there > len {
                Err(Ended::Protocol("a message came in pieces"))
            } else {
                Ok(None)
            };
        }
        let word = |at: usize| {
            let word = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
            word.map_or(0, u32::from_ne_bytes)
        };
        let size = word(8) as usize;
        if size > MAX_MSG_SIZE {
            return Err(Ended::Protocol("a message is too long"));
        }
        if there < HEADER + size {
            return Ok(None);
        }
        Ok(Some(Peeked {
            request: word(0),
            flags: word(4),
            size,
            first: (len >= HEADER + 4).then(|| word(HEADER)),
        }))
    }

    /// Whether the socket is in one of these states.
    fn is(&self, flags: PollFlags) -> Result<bool, Ended> {
        let mut fds = [PollFd::new(&self.stream, flags)];
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        match poll(&mut fds, Some(&now)) {
            Ok(_) => Ok(fds.iter().any(|fd| fd.revents().intersects(flags))),
            Err(Errno::INTR) => Ok(flags == PollFlags::OUT),
            Err(error) => Err(error.into()),
        }
    }

    /// `VHOST_USER_SET_BACKEND_REQ_FD`: the socket for messages to the VMM.
    fn take_back_channel(&mut self, next: &Peeked) -> Result<(), Ended> {
        if !self
            .device()
            .has_protocol(VhostUserProtocolFeatures::BACKEND_REQ)
        {
            return Err(Ended::Protocol("a channel back was not agreed on"));
        }
        let mut fds = self.take(&mut vec![0; next.size])?;
        let (Some(fd), true) = (fds.pop(), fds.is_empty()) else {
            return Err(Ended::Protocol("a channel back is one socket"));
        };
        let back = Back::new(fd).map_err(|_| Ended::Protocol("a channel back is one socket"))?;
        self.replace_back(Some(back));
        let acks = self
            .device()
            .has_protocol(VhostUserProtocolFeatures::REPLY_ACK);
        if acks && next.flags & NEED_REPLY != 0 {
            self.reply(next.request, 0)?;
        }
        Ok(())
    }

    /// `VHOST_USER_IOTLB_MSG`: what the VMM's IOMMU maps, or does not map any more.
    fn take_translation(&mut self, next: &Peeked) -> Result<(), Ended> {
        if next.flags & (VERSION_MASK | REPLY) != VERSION {
            return Err(Ended::Protocol("a message about translations is a request"));
        }
        let mut body = [0; message::LEN];
        if next.size != body.len() {
            return Err(Ended::Protocol("a translation has another length"));
        }
        let fds = self.take(&mut body)?;
        if !fds.is_empty() {
            return Err(Ended::Protocol("a translation comes without descriptors"));
        }
        let done = match message::decode(&body) {
            Ok(said) => self.device().hear(said),
            Err(error) => {
                debug!("the VMM is told no: {error}");
                false
            }
        };
        // Acknowledged always, whether other messages are or not: so it says in the description
        // of this one.
        self.reply(next.request, u64::from(!done))
    }

    /// Takes the next message whole; returns the descriptors that came with it.
    fn take(&self, body: &mut [u8]) -> Result<Vec<OwnedFd>, Ended> {
        let mut header = [0; HEADER];
        let whole = HEADER + body.len();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut header), IoSliceMut::new(body)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        )?;
        if received.bytes != whole {
            return Err(Ended::Protocol("a message came in pieces"));
        }
        let mut fds: Vec<OwnedFd> = Vec::new();
        for part in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                fds.extend(rights);
            }
        }
        Ok(fds)
    }

    fn reply(&self, request: u32, value: u64) -> Result<(), Ended> {
        let mut reply = [0; HEADER + 8];
        let (low, high) = reply.split_at_mut(HEADER);
        let words = [request, VERSION | REPLY, 8];
        for (to, from) in low
            .iter_mut()
            .zip(words.iter().flat_map(|w| w.to_ne_bytes()))
        {
            *to = from;
        }
        high.copy_from_slice(&value.to_ne_bytes());
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        send(&self.stream, &reply, flags)?;
        Ok(())
    }

    /// Hears the VMM's answers. There is no message of it now.
    ///
    /// An answer counts when all that the VMM has said before it has been heard. It says that on
    /// the other socket, so an answer is read, and that socket looked at once more.
    fn hear(&mut self) -> Result<Served, Ended> {
        let answers = std::mem::take(&mut self.answers);
        for refuses in &answers {
            let answered = self.device().answered(*refuses);
            answered.map_err(|_| Ended::Protocol("it answers what it was not asked"))?;
        }
        self.answers = answers;
        self.answers.clear();
        let Some(back) = &mut self.back else {
            return Ok(Served::None);
        };
        while self.answers.len() < ANSWERS {
            match back.hear()? {
                Heard::Answer { refuses } => self.answers.push(refuses),
                Heard::Nothing => break,
                // A guest's addresses mean nothing when nobody can be asked for them.
                Heard::Closed if self.device().is_behind_iommu() => return Err(Ended::Closed),
                Heard::Closed => {
                    self.replace_back(None);
                    return Ok(Served::None);
                }
                Heard::Nonsense => return Err(Ended::Protocol("its answer makes no sense")),
            }
        }
        Ok(if self.answers.is_empty() {
            Served::None
        } else {
            Served::One
        })
    }

    /// Puts to the VMM what the device has to know.
    pub fn ask(&mut self) {
        let Some(back) = &self.back else {
            return;
        };
        let mut device = self.device();
        while let Some(ask) = device.next_ask() {
            match back.ask(ask) {
                Ok(true) => device.asked(),
                // When it has answered some there will be room.
                Ok(false) => return,
                Err(error) => {
                    debug!("the VMM could not be asked: {error}");
                    return;
                }
            }
        }
    }

    /// Tells the VMM that the configuration space has changed.
    pub fn config_changed(&mut self) {
        let Some(back) = &self.back else {
            debug!("the VMM has no channel to be told of a change");
            return;
        };
        match back.config_changed() {
            Ok(true) => {}
            Ok(false) => debug!("the VMM has no room to be told of a change"),
            Err(error) => debug!("the VMM could not be told of a change: {error}"),
        }
    }

    /// The channel back, at the end.
    pub fn into_back(self) -> Option<Back> {
        self.back
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}
