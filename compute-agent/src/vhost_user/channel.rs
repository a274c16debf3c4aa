//! The socket to the VMM: whole messages, and the channel back to it.
//!
//! The `vhost` crate's handler reads a message with calls that wait for the rest of one, and
//! writes replies with calls that wait for a reader. A VMM could make this process wait for ever
//! that way, so a message is handed to it only when all of it has come, and there is room for
//! the reply. One kind of message is taken here: the crate gives no way to send on the channel that
//! it carries.

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

use super::device::Device;

/// Request u32, flags u32, size of the body u32, in the host's byte order.
const HEADER: usize = 12;
/// Flags: version 1, this is a reply, a reply is wanted.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE: u32 = 2;

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
    back: Option<UnixStream>,
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
        })
    }

    fn device(&self) -> MutexGuard<'_, Device> {
        // There is one thread, so a panic under the lock has ended all of it.
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Handles the next message, if all of it is there.
    pub fn serve(&mut self) -> Result<Served, Ended> {
        let Some(next) = self.peek()? else {
            return Ok(Served::None);
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
        let mut message = vec![0; HEADER + next.size];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut message)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        )?;
        if received.bytes != message.len() {
            return Err(Ended::Protocol("a message came in pieces"));
        }
        let mut fds: Vec<OwnedFd> = Vec::new();
        for part in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                fds.extend(rights);
            }
        }
        let (Some(fd), true) = (fds.pop(), fds.is_empty()) else {
            return Err(Ended::Protocol("a channel back is one socket"));
        };
        self.back = Some(UnixStream::from(fd));
        let acks = self
            .device()
            .has_protocol(VhostUserProtocolFeatures::REPLY_ACK);
        if acks && next.flags & NEED_REPLY != 0 {
            let mut reply = Vec::with_capacity(HEADER + 8);
            for word in [next.request, VERSION | REPLY, 8, 0, 0] {
                reply.extend(word.to_ne_bytes());
            }
            send(
                &self.stream,
                &reply,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            )?;
        }
        Ok(())
    }

    /// Tells the VMM that the configuration space has changed.
    pub fn config_changed(&mut self) {
        let Some(back) = &self.back else {
            debug!("the VMM has no channel to be told of a change");
            return;
        };
        let mut message = Vec::with_capacity(HEADER);
        for word in [CONFIG_CHANGE, VERSION, 0] {
            message.extend(word.to_ne_bytes());
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        if let Err(error) = send(back, &message, flags) {
            debug!("the VMM could not be told of a change: {error}");
            self.back = None;
        }
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}
