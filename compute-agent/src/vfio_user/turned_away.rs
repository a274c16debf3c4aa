//! A client that comes while another one is served.

use std::os::unix::net::UnixStream;

use farbus_vfio::user::wire::{HEADER_LEN, Header};
use rustix::net::{RecvFlags, SendFlags, recv, send};

/// A client that is not served and has to be told.
pub(super) struct TurnedAway {
    stream: UnixStream,
    head: [u8; HEADER_LEN],
    received: usize,
}

impl TurnedAway {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            head: [0; HEADER_LEN],
            received: 0,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Goes on telling it; whether that is done, or cannot be.
    pub(super) fn is_told(&mut self) -> bool {
        let room = self.head.get_mut(self.received..).unwrap_or_default();
        match recv(&self.stream, room, RecvFlags::DONTWAIT) {
            Ok((_, len @ 1..)) => self.received += len,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return false,
            Ok(_) | Err(_) => return true,
        }
        if self.received < HEADER_LEN {
            return false;
        }
        let reply = Header::decode(&self.head).error_reply(libc::EBUSY).encode();
        // A fresh socket has room for 16 bytes; a client that has gone needs none.
        let _ = send(
            &self.stream,
            &reply,
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        );
        true
    }
}
