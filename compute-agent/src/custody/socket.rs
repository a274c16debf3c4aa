//! A SEQPACKET socket of custody: whole datagrams with descriptors, non-blocking.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    connect, recvmsg, sendmsg, socket_with,
};

use super::messages::{Datagram, MAX_DATAGRAM, MAX_FDS, MessageError};

/// Why nothing came.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The other side has gone.
    #[error("the other side of custody has gone")]
    Closed,
    /// It says what it must not.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The operating system refused.
    #[error("the custody socket failed")]
    Io(#[from] Errno),
}

/// One side of a connection.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Of a descriptor that is such a socket.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// A socket that is connected to a keeper's path.
    pub fn connect(path: &Path) -> Result<Self, Errno> {
        let socket = unconnected()?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Self(socket))
    }

    /// Sends one datagram. Whether it was taken; otherwise the socket is full.
    pub fn send(
        &self,
        message: &impl Datagram,
        fds: &[BorrowedFd<'_>],
    ) -> Result<bool, SocketError> {
        let bytes = message.encode();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            let (keys, fds) = (fds.len(), fds.len());
            return Err(MessageError::Descriptors { keys, fds }.into());
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut ancillary, flags) {
            Ok(_) => Ok(true),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(Errno::PIPE | Errno::CONNRESET) => Err(SocketError::Closed),
            Err(error) => Err(error.into()),
        }
    }

    /// Receives one datagram, if there is one.
    pub fn receive<M: Datagram>(&self) -> Result<Option<(M, Vec<OwnedFd>)>, SocketError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; MAX_DATAGRAM];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let received = match recvmsg(&self.0, &mut buffers, &mut ancillary, flags) {
            Ok(received) => received,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(Errno::CONNRESET) => return Err(SocketError::Closed),
            Err(error) => return Err(error.into()),
        };
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        let cut = ReturnFlags::CTRUNC | ReturnFlags::TRUNC;
        if received.flags.intersects(cut) {
            return Err(MessageError::TooLong.into());
        }
        // Nobody sends empty datagrams: this is the end of the stream.
        if received.bytes == 0 {
            return Err(SocketError::Closed);
        }
        let bytes = bytes.get(..received.bytes).unwrap_or_default();
        Ok(Some((M::decode(bytes, fds.len())?, fds)))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A SEQPACKET socket without an address.
pub(super) fn unconnected() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}
