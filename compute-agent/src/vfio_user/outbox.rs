//! Messages on their way to a client's socket: replies, and interrupts that are mediated.
//!
//! A reply is written where it is sent from, so that data read from the function is not
//! copied again. What the socket does not take stays here, up to a bound.

use farbus_vfio::user::wire::{HEADER_LEN, Header, MAX_MESSAGE};

use super::memory::Buffer;

/// How many bytes of unsent replies a client may leave, beyond what its socket holds: three
/// of the longest reads, asked for without reading any answer.
pub(super) const CAPACITY: usize = 4 * MAX_MESSAGE;

/// The client leaves its replies unread.
#[derive(Debug, thiserror::Error)]
#[error("it leaves more than {CAPACITY} bytes of replies unread")]
pub(super) struct Full;

pub(super) struct Outbox {
    buffer: Buffer,
    start: usize,
    end: usize,
    /// What is unsent of the first message.
    front: usize,
}

impl Outbox {
    pub(super) fn new() -> Self {
        Self::with_buffer(Buffer::private(CAPACITY))
    }

    /// In memory of this length.
    pub(super) fn with_buffer(buffer: Buffer) -> Self {
        Self {
            buffer,
            start: 0,
            end: 0,
            front: 0,
        }
    }

    /// Room for the body of a reply, filled with zeros. The reply is not sent before
    /// [`Self::commit`].
    pub(super) fn reserve(&mut self, body_len: usize) -> Result<&mut [u8], Full> {
        let need = HEADER_LEN.saturating_add(body_len);
        let is_private = matches!(self.buffer, Buffer::Private(_));
        if CAPACITY - self.end < need && self.start > 0 && is_private {
            self.move_to_front();
        }
        let body_at = self.end + HEADER_LEN;
        let body = self
            .buffer
            .get_mut(body_at..body_at.saturating_add(body_len))
            .ok_or(Full)?;
        body.fill(0);
        Ok(body)
    }

    fn move_to_front(&mut self) {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
    }

    /// Makes room where [`Self::reserve`] may not: in memory that a successor would find half
    /// moved. What is moved stays whole where it was, until something is put there.
    pub(super) fn make_room(&mut self) {
        let held = self.end - self.start;
        if CAPACITY - self.end < MAX_MESSAGE && self.start > held {
            self.move_to_front();
        }
    }

    /// Sends the header, and the body that was reserved for it.
    pub(super) fn commit(&mut self, header: &Header) -> Result<(), Full> {
        let room = self.buffer.get_mut(self.end..).unwrap_or_default();
        let (head, body) = room.split_first_chunk_mut::<HEADER_LEN>().ok_or(Full)?;
        let body_len = header.body_len().unwrap_or(0);
        if body_len > body.len() {
            return Err(Full);
        }
        *head = header.encode();
        if self.is_empty() {
            self.front = HEADER_LEN + body_len;
        }
        self.end += HEADER_LEN + body_len;
        Ok(())
    }

    /// Queues a message with this body.
    pub(super) fn put(&mut self, header: &Header, body: &[u8]) -> Result<(), Full> {
        self.reserve(body.len())?.copy_from_slice(body);
        self.commit(header)
    }

    /// What it holds, and how much of that is of the first message.
    pub(super) fn progress(&self) -> (usize, usize, usize) {
        (self.start, self.end, self.front)
    }

    /// Goes on where a predecessor was; whether that can be.
    pub(super) fn resume(&mut self, (start, end, front): (usize, usize, usize)) -> bool {
        if start > end || end > self.buffer.len() || front > end - start {
            return false;
        }
        (self.start, self.end, self.front) = (start, end, front);
        true
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// What is unsent of the first reply. Replies are sent one by one: QEMU gives up on a
    /// connection when it receives part of a header, and the kernel does not cut what is
    /// sent on a UNIX socket that early.
    pub(super) fn first(&self) -> &[u8] {
        self.buffer
            .get(self.start..self.start + self.front)
            .unwrap_or_default()
    }

    /// The socket took `len` bytes of [`Self::first`].
    pub(super) fn sent(&mut self, len: usize) {
        let len = len.min(self.front);
        self.start += len;
        self.front -= len;
        if self.is_empty() {
            self.start = 0;
            self.end = 0;
        } else if self.front == 0 {
            let rest = self.buffer.get(self.start..self.end).unwrap_or_default();
            let next = rest.first_chunk::<HEADER_LEN>().map(Header::decode);
            self.front = next
                .map_or(0, |header| header.size as usize)
                .min(rest.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use farbus_vfio::user::Command;
    use proptest::prelude::*;

    use super::*;

    fn header(id: u16, len: usize) -> Header {
        Header::command(id, Command::RegionRead, 0, 0).reply(len)
    }

    proptest! {
        #[test]
        fn replies_leave_in_order_and_never_together(
            lens in proptest::collection::vec(0usize..3000, 1..30),
            takes in proptest::collection::vec(1usize..5000, 1..30),
        ) {
            let mut outbox = Outbox::new();
            for (id, len) in lens.iter().enumerate() {
                outbox.put(&header(id as u16, *len), &vec![id as u8; *len]).unwrap();
            }
            let mut sent = Vec::new();
            let mut takes = takes.iter().cycle();
            while !outbox.is_empty() {
                let take = outbox.first().len().min(*takes.next().unwrap());
                sent.extend_from_slice(&outbox.first()[..take]);
                outbox.sent(take);
            }
            let expected: Vec<u8> = lens
                .iter()
                .enumerate()
                .flat_map(|(id, len)| {
                    [&header(id as u16, *len).encode()[..], &vec![id as u8; *len]].concat()
                })
                .collect();
            prop_assert_eq!(sent, expected);
        }
    }

    #[test]
    fn a_client_that_reads_nothing_reaches_the_bound() {
        let mut outbox = Outbox::new();
        let body_len = MAX_MESSAGE - HEADER_LEN;
        for id in 0..4 {
            outbox.reserve(body_len).unwrap();
            outbox.commit(&header(id, body_len)).unwrap();
        }
        assert!(outbox.put(&header(4, 0), &[]).is_err());
        outbox.sent(usize::MAX);
        assert!(outbox.reserve(body_len).is_ok());
    }

    #[test]
    fn a_reservation_that_is_not_committed_is_not_sent() {
        let mut outbox = Outbox::new();
        outbox.reserve(100).unwrap().fill(1);
        outbox.put(&header(5, 1), &[2]).unwrap();
        assert_eq!(outbox.first(), [&header(5, 1).encode()[..], &[2]].concat());
    }
}
