//! One client's socket: receives, has the session handle what came, sends what it answers.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use farbus_vfio::user::wire::{Header, MAX_MSG_FDS};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, RecvMsg, ReturnFlags, SendFlags,
    Shutdown, recvmsg, send, shutdown,
};

use super::inbox::Inbox;
use super::kept::{Kept, Received};
use super::msix::Watch;
use super::outbox::Outbox;
use super::record::{Progress, SessionRecord};
use super::refusal::{End, Refusal};
use super::session::{Handled, Session};
use crate::custody::Custody;

/// How many messages, or writes of coalesced ones, one wake-up handles at most. At some
/// microseconds each this is far below a millisecond; a burst of posted doorbells fits.
const BUDGET: u32 = 64;

/// What a wake-up left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// Nothing that was received.
    Nothing,
    /// Messages that were received and not handled. The socket need not become readable for
    /// them, so the endpoint has to come back by itself.
    Messages,
}

pub(super) struct Connection {
    stream: UnixStream,
    inbox: Inbox,
    outbox: Outbox,
    session: Session,
    /// What has the conversation survive this process, if that is wanted.
    kept: Option<Kept>,
}

impl Connection {
    /// `stream` is non-blocking.
    pub(super) fn new(stream: UnixStream, session: Session) -> Self {
        Self {
            stream,
            inbox: Inbox::new(),
            outbox: Outbox::new(),
            session,
            kept: None,
        }
    }

    /// As [`Self::new`], in memory that a successor finds.
    pub(super) fn keep(
        stream: UnixStream,
        session: Session,
        record: &SessionRecord,
        custody: &Custody,
    ) -> std::io::Result<Self> {
        let kept = Kept::begin(&stream, record, custody)?;
        Ok(Self {
            stream,
            inbox: Inbox::with_buffer(record.inbox()),
            outbox: Outbox::with_buffer(record.outbox()),
            session,
            kept: Some(kept),
        })
    }

    /// Goes on where a predecessor was. `make` has the session, from how far it was and the message
    /// that was perhaps being handled.
    pub(super) fn resume(
        stream: UnixStream,
        record: &SessionRecord,
        custody: &Custody,
        make: impl FnOnce(Progress, Option<(Header, &[u8])>) -> Result<Session, Refusal>,
    ) -> Result<Self, String> {
        let mut inbox = Inbox::with_buffer(record.inbox());
        let mut outbox = Outbox::with_buffer(record.outbox());
        let (kept, progress) = Kept::resume(&stream, record, custody, &mut inbox, &mut outbox)?;
        let session = make(progress, inbox.peek()).map_err(|refusal| refusal.to_string())?;
        let connection = Self {
            stream,
            inbox,
            outbox,
            session,
            kept: Some(kept),
        };
        connection.note();
        Ok(connection)
    }

    /// Has the record say how far the conversation is, if there is a record.
    fn note(&self) {
        if let Some(kept) = &self.kept {
            kept.note(&self.inbox, &self.outbox, self.session.progress());
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether there are replies that wait until the socket can be written to.
    pub(super) fn has_unsent(&self) -> bool {
        !self.outbox.is_empty() || self.kept.as_ref().is_some_and(Kept::has_unsent)
    }

    /// Whether the client has closed its end; what it sent before may still be unread.
    pub(super) fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        matches!(poll(&mut fds, Some(&now)), Ok(1..))
            && fds.iter().any(|fd| fd.revents().intersects(gone))
    }

    /// One wake-up: handles what was received before, then receives once and handles that.
    pub(super) fn serve(&mut self) -> Result<Left, End> {
        let mut budget = BUDGET;
        self.flush()?;
        let mut left = self.handle(&mut budget)?;
        if left == Left::Nothing && self.receive()? {
            left = self.handle(&mut budget)?;
        }
        // What a message has unmasked, and what waited for room.
        self.raise()?;
        Ok(left)
    }

    /// The function has signalled a vector of a mediated MSI-X.
    pub(super) fn fire(&mut self, vector: u32) -> Result<(), End> {
        self.session.fire(vector);
        self.raise()
    }

    /// Sends interrupts while the socket takes them. Each waits in its table until the one before has
    /// gone out.
    fn raise(&mut self) -> Result<(), End> {
        while !self.has_unsent() && self.session.raise_one(&mut self.outbox)? {
            if self.kept.is_some() {
                // Raised again by a successor, so nothing need be known of it.
                self.flush_directly()?;
                if !self.outbox.is_empty() {
                    self.note();
                }
            }
            self.flush()?;
        }
        Ok(())
    }

    /// A vector's eventfd that is to be watched from now on.
    pub(super) fn take_watch(&mut self) -> Option<Watch> {
        self.session.take_watch()
    }

    /// Handles received messages, within the budget. Each is answered before the next one is
    /// looked at.
    fn handle(&mut self, budget: &mut u32) -> Result<Left, End> {
        while let Some(message) = self.inbox.next()? {
            if *budget == 0 {
                return Ok(Left::Messages);
            }
            let fds = message.fds.len();
            if self.kept.is_some() {
                self.outbox.make_room();
            }
            let handled = self.session.handle(message, &mut self.outbox, budget);
            if self.session.memory_lost() {
                return Err(End::MemoryLost);
            }
            if handled? == Handled::Unfinished {
                self.note();
                return Ok(Left::Messages);
            }
            let (_, _, at) = self.inbox.progress();
            self.inbox.consume();
            self.note();
            if let (Some(kept), 1..) = (&self.kept, fds) {
                kept.forget_incoming(at, fds);
            }
            self.flush()?;
        }
        Ok(Left::Nothing)
    }

    /// Receives once. Whether anything came.
    fn receive(&mut self) -> Result<bool, End> {
        if let Some(kept) = &mut self.kept {
            let progress = self.session.progress();
            let (inbox, outbox) = (&mut self.inbox, &self.outbox);
            return match kept.receive(&self.stream, inbox, outbox, progress)? {
                Received::Nothing => Ok(false),
                Received::Bytes => Ok(true),
                Received::End => Err(self.closed()),
            };
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MSG_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut buffers = [IoSliceMut::new(self.inbox.space())];
        let RecvMsg { bytes, flags, .. } =
            match recvmsg(&self.stream, &mut buffers, &mut ancillary, flags) {
                Ok(received) => received,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
                Err(Errno::CONNRESET) => return Err(self.closed()),
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
            return Err(self.closed());
        }
        self.inbox.received(bytes, fds)?;
        Ok(true)
    }

    fn closed(&self) -> End {
        if self.inbox.is_partial() {
            End::ClosedInMessage
        } else {
            End::Closed
        }
    }

    /// Sends what the socket takes.
    fn flush(&mut self) -> Result<(), End> {
        if let Some(kept) = &mut self.kept {
            let progress = self.session.progress();
            return kept.flush(&self.stream, &self.inbox, &mut self.outbox, progress);
        }
        self.flush_directly()
    }

    fn flush_directly(&mut self) -> Result<(), End> {
        while !self.outbox.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(&self.stream, self.outbox.first(), flags) {
                Ok(len) => self.outbox.sent(len),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(End::Closed),
                Err(error) => return Err(End::Socket(error.into())),
            }
        }
        Ok(())
    }

    /// Whether the client's memory broke.
    pub(super) fn memory_lost(&self) -> bool {
        self.session.memory_lost()
    }

    /// Ends the conversation. The client still gets what was answered, as far as its socket
    /// takes it, and then the end of the stream. What it sent meanwhile is read and dropped:
    /// closed with unread data the socket would tell it of a reset, and QEMU takes that worse.
    pub(super) fn end(&mut self, why: &End) {
        let _ = self.flush();
        // A socket that the client has closed already cannot be shut down, and need not be.
        let _ = shutdown(&self.stream, Shutdown::Both);
        self.session.end(why);
        if let Some(kept) = &self.kept {
            kept.end();
        }
        let held_at_most = 64;
        for _ in 0..held_at_most {
            if !matches!(self.discard(), Ok(1..)) {
                break;
            }
        }
    }

    /// Receives once, to nowhere; descriptors are closed.
    fn discard(&mut self) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MSG_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut scratch = [0; 8 << 10];
        let mut buffers = [IoSliceMut::new(&mut scratch)];
        recvmsg(&self.stream, &mut buffers, &mut ancillary, flags).map(|received| received.bytes)
    }
}
