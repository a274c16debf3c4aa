//! Finds the messages in what a client's socket delivers.
//!
//! Bytes are received into one buffer and messages are looked at in place. File descriptors
//! come beside the bytes: the kernel ends a receive at the piece of data that descriptors
//! came with, and clients send one message per sendmsg(2), so the descriptors of a receive
//! belong to the last message, complete or partial, of the bytes that it returned.

use std::os::fd::OwnedFd;

use farbus_vfio::user::wire::{HEADER_LEN, Header, MAX_MESSAGE, MAX_MSG_FDS, WireError};

use super::memory::Buffer;

/// How much is received at once, in bytes: some two thousand posted doorbells.
pub(super) const RECEIVE_SIZE: usize = 64 << 10;

/// Room for the longest message and for one receive behind it. Untouched pages of it cost
/// nothing.
///
/// Twice, so that what is moved to the front never overlaps with where it is: a process that is
/// killed meanwhile leaves it whole where it was.
pub(super) const CAPACITY: usize = 2 * (MAX_MESSAGE + RECEIVE_SIZE);

/// Fewer bytes than this are moved to the front rather than left where they are.
const CHEAP_TO_MOVE: usize = 4 << 10;

/// A client sent more descriptors with one message than anyone may.
#[derive(Debug, thiserror::Error)]
#[error("more than {MAX_MSG_FDS} file descriptors came with one message")]
pub(super) struct TooManyFds;

/// A complete message.
#[derive(Debug)]
pub(super) struct Message<'a> {
    pub(super) header: Header,
    pub(super) body: &'a [u8],
    /// The descriptors that came with it. Those that nobody takes are closed.
    pub(super) fds: Vec<OwnedFd>,
}

/// Descriptors, and where in the stream the message begins that they belong to.
struct FdGroup {
    at: u64,
    fds: Vec<OwnedFd>,
}

pub(super) struct Inbox {
    buffer: Buffer,
    start: usize,
    end: usize,
    /// Where in the stream `start` is.
    stream_position: u64,
    /// At most two: of the message that was partial before the last receive, and of the
    /// last message of that receive.
    groups: Vec<FdGroup>,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self::with_buffer(Buffer::private(CAPACITY))
    }

    /// In memory of this length or more.
    pub(super) fn with_buffer(buffer: Buffer) -> Self {
        Self {
            buffer,
            start: 0,
            end: 0,
            stream_position: 0,
            groups: Vec::new(),
        }
    }

    /// Where to receive to. Every complete message has been consumed before, so that
    /// there is at most a partial one, and always room.
    pub(super) fn space(&mut self) -> &mut [u8] {
        let held = self.end - self.start;
        let moves = held < CHEAP_TO_MOVE || CAPACITY - self.end < RECEIVE_SIZE;
        if self.start > held && moves {
            self.buffer.copy_within(self.start..self.end, 0);
            self.start = 0;
            self.end = held;
        }
        let to = self.end.saturating_add(RECEIVE_SIZE).min(CAPACITY);
        self.buffer.get_mut(self.end..to).unwrap_or_default()
    }

    /// Takes note of `len` bytes received to [`Self::space`], and of what came with them.
    pub(super) fn received(&mut self, len: usize, fds: Vec<OwnedFd>) -> Result<(), TooManyFds> {
        self.end = self.end.saturating_add(len).min(CAPACITY);
        if fds.is_empty() {
            return Ok(());
        }
        let at = self.stream_position + (self.last_message() - self.start) as u64;
        let group = match self.groups.iter_mut().position(|group| group.at == at) {
            Some(index) => self.groups.get_mut(index),
            None if self.groups.len() < 2 => {
                self.groups.push(FdGroup {
                    at,
                    fds: Vec::new(),
                });
                self.groups.last_mut()
            }
            None => None,
        };
        let group = group.ok_or(TooManyFds)?;
        group.fds.extend(fds);
        if group.fds.len() > MAX_MSG_FDS {
            return Err(TooManyFds);
        }
        Ok(())
    }

    /// What it holds, and where in the stream that begins.
    pub(super) fn progress(&self) -> (usize, usize, u64) {
        (self.start, self.end, self.stream_position)
    }

    /// Goes on where a predecessor was, with the descriptors that belong to what it had received;
    /// whether that can be.
    pub(super) fn resume(
        &mut self,
        (start, end, position): (usize, usize, u64),
        fds: impl IntoIterator<Item = (u64, OwnedFd)>,
    ) -> bool {
        if start > end || end > self.buffer.len() {
            return false;
        }
        (self.start, self.end, self.stream_position) = (start, end, position);
        for (at, fd) in fds {
            // Those of messages that were handled are of no use.
            if at < position {
                continue;
            }
            match self.groups.iter_mut().find(|group| group.at == at) {
                Some(group) => group.fds.push(fd),
                None => self.groups.push(FdGroup { at, fds: vec![fd] }),
            }
        }
        self.groups.sort_by_key(|group| group.at);
        self.groups.len() <= 2
    }

    /// Where in the stream the message begins that the last descriptors belong to.
    pub(super) fn last_group(&self) -> Option<u64> {
        self.groups.last().map(|group| group.at)
    }

    /// The descriptors that belong to the message that begins there.
    pub(super) fn group(&self, at: u64) -> &[OwnedFd] {
        let group = self.groups.iter().find(|group| group.at == at);
        group.map_or(&[], |group| &group.fds)
    }

    /// Where in the buffer the last message begins.
    fn last_message(&self) -> usize {
        let mut at = self.start;
        loop {
            let next = self
                .header_at(at)
                .and_then(|h| h.body_len().ok())
                .map(|len| at + HEADER_LEN + len);
            match next {
                Some(next) if next < self.end => at = next,
                _ => return at,
            }
        }
    }

    fn header_at(&self, at: usize) -> Option<Header> {
        self.buffer
            .get(at..self.end)?
            .first_chunk::<HEADER_LEN>()
            .map(Header::decode)
    }

    /// The next message, once it is complete. It stays the next one until
    /// [`Self::consume`]; its descriptors are handed out only once.
    pub(super) fn next(&mut self) -> Result<Option<Message<'_>>, WireError> {
        let Some(header) = self.header_at(self.start) else {
            return Ok(None);
        };
        let body_at = self.start + HEADER_LEN;
        let body_end = body_at + header.body_len()?;
        if body_end > self.end {
            return Ok(None);
        }
        let fds = match self.groups.first() {
            Some(group) if group.at == self.stream_position => self.groups.remove(0).fds,
            _ => Vec::new(),
        };
        let body = self.buffer.get(body_at..body_end).unwrap_or_default();
        Ok(Some(Message { header, body, fds }))
    }

    /// The header and body of the next message, once it is complete.
    pub(super) fn peek(&self) -> Option<(Header, &[u8])> {
        let header = self.header_at(self.start)?;
        let body_at = self.start + HEADER_LEN;
        let body_end = body_at + header.body_len().ok()?;
        let body = self.buffer.get(body_at..body_end)?;
        (body_end <= self.end).then_some((header, body))
    }

    /// Done with the message that [`Self::next`] returned.
    pub(super) fn consume(&mut self) {
        let Some(len) = self.header_at(self.start).and_then(|h| h.body_len().ok()) else {
            return;
        };
        let len = len + HEADER_LEN;
        self.stream_position += len as u64;
        self.start += len;
        if self.start >= self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Whether the client stopped in the middle of a message.
    pub(super) fn is_partial(&self) -> bool {
        self.end > self.start
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use farbus_vfio::user::Command;
    use proptest::prelude::*;

    use super::*;

    fn message(id: u16, body: &[u8]) -> Vec<u8> {
        let header = Header::command(id, Command::RegionWrite, 0, body.len());
        [&header.encode()[..], body].concat()
    }

    fn push(inbox: &mut Inbox, bytes: &[u8], fds: Vec<OwnedFd>) {
        inbox.space()[..bytes.len()].copy_from_slice(bytes);
        inbox.received(bytes.len(), fds).unwrap();
    }

    fn pop(inbox: &mut Inbox) -> Option<(u16, Vec<u8>, Vec<OwnedFd>)> {
        let message = inbox.next().unwrap()?;
        let popped = (message.header.id, message.body.to_vec(), message.fds);
        inbox.consume();
        Some(popped)
    }

    fn some_fd() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    proptest! {
        #[test]
        fn messages_come_out_as_they_went_in_however_the_stream_is_cut(
            bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..5000), 1..8),
            cuts in proptest::collection::vec(1usize..7000, 1..50),
        ) {
            let stream: Vec<u8> =
                bodies.iter().enumerate().flat_map(|(id, body)| message(id as u16, body)).collect();
            let mut inbox = Inbox::new();
            let mut got = Vec::new();
            let mut rest = &stream[..];
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                push(&mut inbox, now, Vec::new());
                while let Some((id, body, _)) = pop(&mut inbox) {
                    prop_assert_eq!(id as usize, got.len());
                    got.push(body);
                }
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(got, bodies);
            prop_assert!(!inbox.is_partial());
        }
    }

    #[test]
    fn descriptors_belong_to_the_last_message_of_a_receive() {
        let mut inbox = Inbox::new();
        let fd = some_fd();
        let raw = fd.as_raw_fd();
        let bytes = [message(1, b"a"), message(2, b"b"), message(3, b"c")].concat();
        push(&mut inbox, &bytes, vec![fd]);
        assert!(pop(&mut inbox).unwrap().2.is_empty());
        assert!(pop(&mut inbox).unwrap().2.is_empty());
        assert_eq!(pop(&mut inbox).unwrap().2[0].as_raw_fd(), raw);
    }

    #[test]
    fn descriptors_of_a_partial_message_wait_for_its_rest() {
        let mut inbox = Inbox::new();
        let (first, second) = (some_fd(), some_fd());
        let (first_raw, second_raw) = (first.as_raw_fd(), second.as_raw_fd());
        let bytes = [message(1, b"one"), message(2, b"two")].concat();
        push(&mut inbox, &bytes[..7], vec![first]);
        assert!(pop(&mut inbox).is_none());
        push(&mut inbox, &bytes[7..30], vec![second]);
        assert_eq!(pop(&mut inbox).unwrap().2[0].as_raw_fd(), first_raw);
        assert!(pop(&mut inbox).is_none());
        push(&mut inbox, &bytes[30..], Vec::new());
        assert_eq!(pop(&mut inbox).unwrap().2[0].as_raw_fd(), second_raw);
    }

    #[test]
    fn more_descriptors_than_a_message_may_have_are_an_error() {
        let mut inbox = Inbox::new();
        let bytes = message(1, b"one");
        push(
            &mut inbox,
            &bytes[..4],
            (0..MAX_MSG_FDS).map(|_| some_fd()).collect(),
        );
        assert!(inbox.received(1, vec![some_fd()]).is_err());
    }

    #[test]
    fn the_longest_message_fits() {
        let mut inbox = Inbox::new();
        let body = vec![7; MAX_MESSAGE - HEADER_LEN];
        let stream = [message(0, b"small"), message(1, &body)].concat();
        let mut popped = Vec::new();
        for piece in stream.chunks(RECEIVE_SIZE - 13) {
            push(&mut inbox, piece, Vec::new());
            popped.extend(std::iter::from_fn(|| pop(&mut inbox)).map(|(_, body, _)| body.len()));
        }
        assert_eq!(popped, [5, body.len()]);
    }
}
