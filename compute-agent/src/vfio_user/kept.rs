//! A connection whose messages and answers survive this process: each is taken out of the kernel,
//! or put into it, in steps of which the kernel knows which were taken.
//!
//! **In**: bytes are read from the socket without taking them out, their descriptors handed to the keeper,
//! the record says that they are in the inbox; then they are taken out. How much was read and not taken out
//! the kernel counts (`SO_PEEK_OFF`). **Out**: an answer goes through a pipe. It is written there,
//! the record says so, and the kernel moves it on to the socket (splice(2)); what is still in the
//! pipe was not sent. Both cost a system call more than the direct way.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use farbus_vfio::user::wire::MAX_MSG_FDS;
use log::warn;
use rustix::io::{Errno, ioctl_fionread, write};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, RecvMsg, ReturnFlags, recv, recvmsg,
};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};

use super::inbox::{Inbox, RECEIVE_SIZE};
use super::outbox::Outbox;
use super::peek;
use super::record::{Progress, SessionRecord};
use super::refusal::End;
use crate::custody::Custody;
use crate::custody::messages::Key;
use crate::custody::worker::{CONNECTION, PIPE_IN, PIPE_OUT, key};

/// Descriptors that came with a message are kept under the place of the message in the stream.
const INCOMING: &str = "incoming";

/// See the module's own description.
pub(super) struct Kept {
    record: SessionRecord,
    custody: Custody,
    /// Where answers go in, and where they come out.
    pipe: (OwnedFd, OwnedFd),
    in_pipe: usize,
    unconsumed: usize,
    writing: bool,
}

impl Kept {
    /// For a connection that begins, which is handed over.
    pub(super) fn begin(
        stream: &UnixStream,
        record: &SessionRecord,
        custody: &Custody,
    ) -> io::Result<Self> {
        peek::peek_from_start(stream)?;
        let (out, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        record.clear();
        custody.keep(vec![
            (key(PIPE_IN), into.as_fd()),
            (key(PIPE_OUT), out.as_fd()),
            (key(CONNECTION), stream.as_fd()),
        ]);
        Ok(Self {
            record: record.clone(),
            custody: custody.clone(),
            pipe: (into, out),
            in_pipe: 0,
            unconsumed: 0,
            writing: false,
        })
    }

    /// For a connection that a predecessor had, with what it left in its boxes.
    pub(super) fn resume(
        stream: &UnixStream,
        record: &SessionRecord,
        custody: &Custody,
        inbox: &mut Inbox,
        outbox: &mut Outbox,
    ) -> Result<(Self, Progress), &'static str> {
        let pipe = custody
            .held(&key(PIPE_IN))
            .zip(custody.held(&key(PIPE_OUT)));
        let pipe = pipe.ok_or("its pipe is not held")?;
        let mut progress = record.progress();
        let incoming = custody.held_all(INCOMING);
        let incoming = incoming
            .into_iter()
            .map(|(number, fd)| (number / MAX_MSG_FDS as u64, fd));
        if !inbox.resume(progress.inbox, incoming) || !outbox.resume(progress.outbox) {
            return Err("its record does not hold together");
        }
        let peeked = peek::peeked(stream).map_err(|_| "its socket does not tell how far it is")?;
        if progress.unconsumed == 0 {
            // What was read was not noted: it is read again.
            peek::peek_from_start(stream).map_err(|_| "its socket cannot be read from")?;
        } else {
            consume(stream, peeked.min(progress.unconsumed)).map_err(|_| "it has ended")?;
        }
        let in_pipe = ioctl_fionread(&pipe.1).map_or(0, |len| len as usize);
        if progress.writing {
            // A pipe is empty before it is written to: what is there is of this writing.
            outbox.sent(in_pipe);
        }
        progress.writing = false;
        progress.unconsumed = 0;
        let kept = Self {
            record: record.clone(),
            custody: custody.clone(),
            pipe,
            in_pipe,
            unconsumed: 0,
            writing: false,
        };
        Ok((kept, progress))
    }

    /// Has the record say how far everything is. `of_session` has what only the session knows.
    pub(super) fn note(&self, inbox: &Inbox, outbox: &Outbox, of_session: Progress) {
        self.record.set_progress(&Progress {
            inbox: inbox.progress(),
            outbox: outbox.progress(),
            unconsumed: self.unconsumed,
            writing: self.writing,
            ..of_session
        });
    }

    /// Whether answers are on their way that the socket has not taken.
    pub(super) fn has_unsent(&self) -> bool {
        self.in_pipe > 0
    }

    /// Receives once. Whether anything came, and whether the client has closed its end.
    pub(super) fn receive(
        &mut self,
        stream: &UnixStream,
        inbox: &mut Inbox,
        outbox: &Outbox,
        of_session: Progress,
    ) -> Result<Received, End> {
        let before = inbox.progress();
        inbox.space();
        if inbox.progress() != before {
            self.note(inbox, outbox, of_session);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MSG_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC | RecvFlags::PEEK;
        let mut buffers = [IoSliceMut::new(inbox.space())];
        let RecvMsg { bytes, flags, .. } =
            match recvmsg(stream, &mut buffers, &mut ancillary, flags) {
                Ok(received) => received,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(Received::Nothing),
                Err(Errno::CONNRESET) => return Ok(Received::End),
                Err(error) => return Err(End::Socket(error.into())),
            };
        let mut fds: Vec<OwnedFd> = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if flags.contains(ReturnFlags::CTRUNC) {
            return Err(End::FdsLost);
        }
        if bytes == 0 {
            return Ok(Received::End);
        }
        let has_fds = !fds.is_empty();
        inbox.received(bytes, fds)?;
        if let (true, Some(at)) = (has_fds, inbox.last_group()) {
            let group = inbox.group(at);
            let keys = incoming(at, group.len());
            let fds = group.iter().map(AsFd::as_fd);
            self.custody.keep(keys.into_iter().zip(fds).collect());
        }
        self.unconsumed = bytes;
        self.note(inbox, outbox, of_session);
        match consume(stream, bytes) {
            Ok(()) => {}
            Err(Errno::CONNRESET) => return Ok(Received::End),
            Err(error) => return Err(End::Socket(error.into())),
        }
        self.unconsumed = 0;
        self.note(inbox, outbox, of_session);
        Ok(Received::Bytes)
    }

    /// Sends what the socket takes.
    pub(super) fn flush(
        &mut self,
        stream: &UnixStream,
        inbox: &Inbox,
        outbox: &mut Outbox,
        of_session: Progress,
    ) -> Result<(), End> {
        loop {
            if self.in_pipe > 0 {
                let flags = SpliceFlags::NONBLOCK;
                match splice(&self.pipe.1, None, stream, None, self.in_pipe, flags) {
                    Ok(0) | Err(Errno::AGAIN) => return Ok(()),
                    Ok(len) => self.in_pipe = self.in_pipe.saturating_sub(len),
                    Err(Errno::INTR) => {}
                    Err(Errno::PIPE | Errno::CONNRESET) => return Err(End::Closed),
                    Err(error) => return Err(End::Socket(error.into())),
                }
                continue;
            }
            if outbox.is_empty() {
                return Ok(());
            }
            self.writing = true;
            self.note(inbox, outbox, of_session);
            let written = write(&self.pipe.0, outbox.first());
            self.writing = false;
            match written {
                Ok(len) => {
                    outbox.sent(len);
                    self.in_pipe = len;
                    self.note(inbox, outbox, of_session);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(End::Socket(error.into())),
            }
        }
    }

    /// A message that had descriptors is handled.
    pub(super) fn forget_incoming(&self, at: u64, count: usize) {
        self.custody.forget(&incoming(at, count));
    }

    /// The conversation is over, and what it had is given back.
    pub(super) fn end(&self) {
        let mut keys = vec![key(CONNECTION), key(PIPE_IN), key(PIPE_OUT)];
        if let Some(client) = self.custody.client() {
            let of_messages = client
                .keys()
                .filter(|key| key.number_of(INCOMING).is_some());
            keys.extend(of_messages.cloned());
        }
        self.custody.forget(&keys);
        self.record.clear();
    }
}

/// What a receive brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    Nothing,
    Bytes,
    /// The client has closed its end.
    End,
}

fn incoming(at: u64, count: usize) -> Vec<Key> {
    let number = |index| at * MAX_MSG_FDS as u64 + index;
    (0..count as u64)
        .map(|index| Key::numbered(INCOMING, number(index)))
        .collect()
}

/// Takes bytes out of the socket that were read from it already. Their descriptors are closed: there
/// are others.
fn consume(stream: &UnixStream, mut bytes: usize) -> Result<(), Errno> {
    let mut scratch = [MaybeUninit::<u8>::uninit(); RECEIVE_SIZE];
    while bytes > 0 {
        let room = scratch.get_mut(..bytes.min(RECEIVE_SIZE));
        match recv(stream, room.unwrap_or_default(), RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Err(Errno::CONNRESET),
            Ok((_, len)) => bytes = bytes.saturating_sub(len),
            Err(Errno::INTR) => {}
            Err(error) => {
                warn!("bytes that were seen on a socket are not there: {error}");
                return Err(error);
            }
        }
    }
    Ok(())
}
