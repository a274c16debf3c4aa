//! The books of the RDMA provider's message rings, kept against a peer that says anything.

use farbus_fabric::ring::{Arrived, Consumed, Incoming, Outgoing, PREFIX, Prefix, immediate};

use crate::input::Input;

const LEN: u64 = 64 * 1024;
const SLOTS: u16 = 64;
const ALIGN: u64 = 64;
/// The longest frame that is taken.
const MAX: usize = 16 * 1024;

/// Runs one input: what the peer announces and claims to have consumed, and what this side sends
/// and consumes meanwhile. The first thing that cannot be ends the connection.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut books = Books::new();
    while !input.is_empty() {
        let done = match input.byte() & 3 {
            0 => books.hear(&mut input),
            1 => books.acknowledge(&mut input),
            2 => books.consume(),
            _ => books.send(usize::from(input.take::<u16>()) % MAX),
        };
        if done.is_none() {
            return;
        }
    }
}

struct Books {
    incoming: Incoming,
    /// Where the next message begins that keeps to the rules.
    next: u64,
    /// Messages of the peer that are not consumed.
    arrived: Vec<Arrived>,
    outgoing: Outgoing,
    /// Where this side has come in the peer's ring; positions never wrap.
    head: u64,
    sent: u32,
    /// Offset, length and last position of each message that the peer has not consumed.
    waiting: Vec<(u64, u64, u64)>,
}

impl Books {
    fn new() -> Self {
        Books {
            incoming: Incoming::new(LEN as u32, SLOTS),
            next: 0,
            arrived: Vec::new(),
            outgoing: Outgoing::new(LEN as u32, SLOTS),
            head: 0,
            sent: 0,
            waiting: Vec::new(),
        }
    }

    /// The peer announces a message: anywhere, or where one is expected.
    fn hear(&mut self, input: &mut Input<'_>) -> Option<()> {
        let announced = match input.flag() {
            true => immediate(self.next % LEN),
            false => input.take(),
        };
        let offset = self.incoming.offset(announced).ok()?;
        assert!((offset + PREFIX) as u64 <= LEN, "a prefix outside the ring");
        let mut bytes = [0; PREFIX];
        bytes.fill_with(|| input.byte());
        let prefix = Prefix::decode(&bytes);
        assert_eq!(prefix.encode(), bytes);
        let message = self.incoming.arrive(offset, &prefix, MAX).ok()?;
        let end = (message.offset + message.len) as u64;
        assert!(message.len <= MAX && end <= LEN, "{message:?}");
        for other in &self.arrived {
            let before = end <= (other.offset - PREFIX) as u64;
            let behind = other.offset + other.len <= message.offset - PREFIX;
            assert!(before || behind, "{message:?} lies over {other:?}");
        }
        self.arrived.push(message);
        self.next = end.next_multiple_of(ALIGN);
        Some(())
    }

    /// The peer claims to have consumed so much: anything, or what it got.
    fn acknowledge(&mut self, input: &mut Input<'_>) -> Option<()> {
        let consumed = match input.flag() {
            true => Consumed {
                position: self.head,
                messages: self.sent,
            },
            false => Consumed {
                position: input.take(),
                messages: input.take(),
            },
        };
        self.outgoing.acknowledge(consumed).ok()?;
        assert!(consumed.position <= self.head, "{consumed:?} was taken");
        self.waiting.retain(|(.., end)| *end > consumed.position);
        // A peer that has consumed half a message has given back the room of that half.
        if let Some((offset, size, end)) = self.waiting.first_mut() {
            let given_back = consumed.position.saturating_sub(*end - *size);
            *offset += given_back;
            *size -= given_back;
        }
        Some(())
    }

    fn consume(&mut self) -> Option<()> {
        if !self.arrived.is_empty() {
            self.incoming.consume(&self.arrived.remove(0));
        }
        if self.incoming.owes() {
            self.incoming.tell();
        }
        Some(())
    }

    fn send(&mut self, len: usize) -> Option<()> {
        let Some(place) = self.outgoing.place(len) else {
            return Some(());
        };
        self.outgoing.fill(place);
        let size = ((PREFIX + len) as u64).next_multiple_of(ALIGN);
        let at = self.head % LEN;
        if place.offset != at {
            self.head += LEN - at;
        }
        self.head += size;
        self.sent = self.sent.wrapping_add(1);
        assert!(place.offset + size <= LEN, "{place:?}");
        for (offset, other, _) in &self.waiting {
            let apart = place.offset + size <= *offset || offset + other <= place.offset;
            assert!(apart, "{place:?} lies over {other} bytes at {offset}");
        }
        self.waiting.push((place.offset, size, self.head));
        Some(())
    }
}
