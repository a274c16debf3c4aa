//! Who may put how much into a message ring of the RDMA provider, and where: arithmetic only.
//!
//! Each side has a ring in its memory into which the other writes messages, one behind the other,
//! each in one piece: one that would reach past the end begins at the start instead. Positions
//! count bytes since the connection began and never wrap; each message says how far the sender has
//! come with the ring of its own (`Consumed`), and that is the room that the receiver has there.

use crate::FabricError;

/// Messages begin at multiples of this.
const ALIGN: u64 = 64;
/// What precedes the frame of each message.
pub const PREFIX: usize = 16;
/// Messages that only say what was consumed may use this many slots more than others.
const RESERVE: u64 = 8;

/// How far the owner of a ring has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Consumed {
    /// Everything before this position.
    pub position: u64,
    /// So many messages, modulo 2³².
    pub messages: u32,
}

/// What precedes a frame: how far the sender has come with its own ring, and the length of the
/// frame. 0 when there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// How far the sender has come with its own ring.
    pub consumed: Consumed,
    /// Length of the frame in bytes.
    pub len: u32,
}

impl Prefix {
    /// Its bytes.
    pub fn encode(&self) -> [u8; PREFIX] {
        let mut bytes = [0; PREFIX];
        bytes[..8].copy_from_slice(&self.consumed.position.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.consumed.messages.to_le_bytes());
        bytes[12..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    /// From its bytes, all of which are possible.
    pub fn decode(bytes: &[u8; PREFIX]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *bytes;
        Prefix {
            consumed: Consumed {
                position: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
                messages: u32::from_le_bytes([i, j, k, l]),
            },
            len: u32::from_le_bytes([m, n, o, p]),
        }
    }
}

/// Bytes of ring that a frame of `len` bytes takes.
fn footprint(len: usize) -> u64 {
    ((PREFIX + len) as u64).next_multiple_of(ALIGN)
}

/// The immediate data that names an offset in the ring.
pub fn immediate(offset: u64) -> u32 {
    (offset / ALIGN) as u32
}

/// The peer's ring, as this side fills it.
#[derive(Clone, Debug)]
pub struct Outgoing {
    len: u64,
    slots: u64,
    head: u64,
    messages: u64,
    consumed: u64,
    consumed_messages: u64,
}

/// Where a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Offset in the ring.
    pub offset: u64,
    end: u64,
}

impl Outgoing {
    /// A ring of `len` bytes for `slots` messages, in which nothing is yet.
    pub fn new(len: u32, slots: u16) -> Self {
        Outgoing {
            len: len.into(),
            slots: slots.into(),
            head: 0,
            messages: 0,
            consumed: 0,
            consumed_messages: 0,
        }
    }

    /// Messages that wait in the ring, or are on their way there.
    fn waiting(&self) -> u64 {
        self.messages - self.consumed_messages
    }

    /// Whether a good part of the ring is free: room for a burst of messages, which need not
    /// ask one by one.
    pub fn has_room(&self) -> bool {
        let used = self.head - self.consumed;
        used <= self.len / 2 && self.waiting() <= self.slots / 2
    }

    /// The place of a message with a frame of `len` bytes, if there is room. Messages without one
    /// find room when others do not.
    pub fn place(&self, len: usize) -> Option<Place> {
        let reserve = if len == 0 { 0 } else { RESERVE };
        let size = footprint(len);
        let at = self.head % self.len;
        let start = if at + size > self.len {
            self.head + (self.len - at)
        } else {
            self.head
        };
        let end = start + size;
        let fits = end + reserve * ALIGN <= self.consumed + self.len;
        (fits && self.waiting() + reserve < self.slots).then_some(Place {
            offset: start % self.len,
            end,
        })
    }

    /// A message has been put there.
    pub fn fill(&mut self, place: Place) {
        self.head = place.end;
        self.messages += 1;
    }

    /// The peer says how far it has come.
    pub fn acknowledge(&mut self, consumed: Consumed) -> Result<(), FabricError> {
        let more = consumed
            .messages
            .wrapping_sub(self.consumed_messages as u32);
        let messages = self.consumed_messages + u64::from(more);
        let possible =
            (self.consumed..=self.head).contains(&consumed.position) && messages <= self.messages;
        if !possible {
            return Err(FabricError::violation(format!(
                "it has consumed {} bytes and {} messages more than it got",
                consumed.position.saturating_sub(self.head),
                messages.saturating_sub(self.messages)
            )));
        }
        self.consumed = consumed.position;
        self.consumed_messages = messages;
        Ok(())
    }
}

/// This side's ring, as the peer fills it.
#[derive(Clone, Debug)]
pub struct Incoming {
    len: u64,
    slots: u32,
    /// Where the next message is expected.
    head: u64,
    consumed: Consumed,
    /// What the peer was last told.
    told: Consumed,
}

/// A message in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrived {
    /// Offset of its frame in the ring.
    pub offset: usize,
    /// Length of its frame.
    pub len: usize,
    end: u64,
}

impl Incoming {
    /// A ring of `len` bytes for `slots` messages, in which nothing is yet.
    pub fn new(len: u32, slots: u16) -> Self {
        Incoming {
            len: len.into(),
            slots: slots.into(),
            head: 0,
            consumed: Consumed::default(),
            told: Consumed::default(),
        }
    }

    /// The offset of the prefix of the message that this immediate data announces.
    pub fn offset(&self, immediate: u32) -> Result<usize, FabricError> {
        let offset = u64::from(immediate) * ALIGN;
        let expected = self.head % self.len;
        if offset == expected || offset == 0 {
            return Ok(offset as usize);
        }
        Err(FabricError::violation(format!(
            "a message at {offset:#x} of the ring, where {expected:#x} is next"
        )))
    }

    /// A message with this prefix has arrived there, with a frame of at most `max` bytes.
    pub fn arrive(
        &mut self,
        offset: usize,
        prefix: &Prefix,
        max: usize,
    ) -> Result<Arrived, FabricError> {
        let len = prefix.len as usize;
        let size = footprint(len.min(max));
        let at = self.head % self.len;
        let skipped = if offset as u64 == at {
            0
        } else {
            self.len - at
        };
        let end = self.head + skipped + size;
        let used = end - self.consumed.position;
        if len > max || offset as u64 + size > self.len || used > self.len {
            return Err(FabricError::violation(format!(
                "a message of {len} bytes at {offset:#x} does not fit the ring"
            )));
        }
        self.head = end;
        Ok(Arrived {
            offset: offset + PREFIX,
            len,
            end,
        })
    }

    /// The message, and so all before it, is not needed any more.
    pub fn consume(&mut self, message: &Arrived) {
        self.consumed.position = message.end;
        self.consumed.messages = self.consumed.messages.wrapping_add(1);
    }

    /// Whether the peer should hear how far this side has come, although there is nothing else
    /// to say.
    pub fn owes(&self) -> bool {
        let bytes = self.consumed.position - self.told.position;
        let messages = self.consumed.messages.wrapping_sub(self.told.messages);
        bytes >= self.len / 4 || messages >= self.slots / 4
    }

    /// What to tell the peer; it counts as told.
    pub fn tell(&mut self) -> Consumed {
        self.told = self.consumed;
        self.consumed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEN: u32 = 64 * 1024;
    const SLOTS: u16 = 64;
    const MAX: usize = 16 * 1024;

    proptest! {
        /// Two sides that keep the rules, with deliveries as late as they like: no message lies over
        /// one that is not consumed, and the receiver finds each where it is.
        #[test]
        fn messages_never_overlap_and_are_found(
            steps in prop::collection::vec((any::<bool>(), 0..MAX, 0..4_usize), 1..400),
        ) {
            let mut out = Outgoing::new(LEN, SLOTS);
            let mut inc = Incoming::new(LEN, SLOTS);
            let mut ring: Vec<(u64, u64, u32, usize)> = Vec::new();
            for (send, len, consume) in steps {
                if send {
                    if let Some(place) = out.place(len) {
                        let end = place.offset + footprint(len);
                        prop_assert!(end <= u64::from(LEN));
                        prop_assert!(ring.iter().all(|(a, b, ..)| end <= *a || place.offset >= *b));
                        ring.push((place.offset, end, immediate(place.offset), len));
                        out.fill(place);
                        prop_assert!(ring.len() <= SLOTS.into());
                    }
                }
                for (_, _, imm, len) in ring.drain(..consume.min(ring.len())) {
                    let offset = inc.offset(imm).unwrap();
                    let prefix = Prefix { consumed: Consumed::default(), len: len as u32 };
                    let message = inc.arrive(offset, &prefix, MAX).unwrap();
                    prop_assert_eq!(message.len, len);
                    inc.consume(&message);
                    out.acknowledge(inc.tell()).unwrap();
                }
            }
            for (_, _, imm, len) in ring.drain(..) {
                let offset = inc.offset(imm).unwrap();
                let prefix = Prefix { consumed: Consumed::default(), len: len as u32 };
                let message = inc.arrive(offset, &prefix, MAX).unwrap();
                inc.consume(&message);
            }
            out.acknowledge(inc.tell()).unwrap();
            prop_assert!(out.has_room());
        }

        /// A peer that says anything gets an error or leaves the books in order.
        #[test]
        fn hostile_arrivals_stay_within_the_ring(
            said in prop::collection::vec((any::<u32>(), any::<u32>(), any::<bool>()), 1..100),
        ) {
            let mut inc = Incoming::new(LEN, SLOTS);
            for (imm, len, near) in said {
                let imm = if near { immediate(inc.head % inc.len) } else { imm };
                let len = if near { len % (MAX as u32 + 9) } else { len };
                let Ok(offset) = inc.offset(imm) else { continue };
                let prefix = Prefix { consumed: Consumed::default(), len };
                if let Ok(message) = inc.arrive(offset, &prefix, MAX) {
                    prop_assert!(message.offset + message.len <= LEN as usize);
                    inc.consume(&message);
                }
            }
        }

        #[test]
        fn hostile_acknowledgements_give_no_room_that_is_not_there(
            said in prop::collection::vec((any::<u64>(), any::<u32>()), 1..100),
        ) {
            let mut out = Outgoing::new(LEN, SLOTS);
            for (position, messages) in said {
                if let Some(place) = out.place(100) {
                    out.fill(place);
                }
                let consumed = Consumed { position: position % (4 * u64::from(LEN)), messages };
                let _ = out.acknowledge(consumed);
                prop_assert!(out.consumed <= out.head && out.waiting() <= out.messages);
                prop_assert!(out.head - out.consumed <= u64::from(LEN));
            }
        }

        #[test]
        fn prefixes_survive_the_wire(position: u64, messages: u32, len: u32) {
            let prefix = Prefix { consumed: Consumed { position, messages }, len };
            prop_assert_eq!(Prefix::decode(&prefix.encode()), prefix);
        }
    }

    #[test]
    fn a_full_ring_still_has_room_to_say_what_was_consumed() {
        let mut out = Outgoing::new(LEN, SLOTS);
        while let Some(place) = out.place(24) {
            out.fill(place);
        }
        assert!(!out.has_room());
        let spare = std::iter::from_fn(|| {
            let place = out.place(0)?;
            out.fill(place);
            Some(())
        });
        assert_eq!(spare.count() as u64, RESERVE);
    }

    #[test]
    fn owner_speaks_up_when_a_quarter_is_consumed() {
        let mut inc = Incoming::new(LEN, SLOTS);
        for message in 1..=u32::from(SLOTS) / 4 {
            let offset = inc.offset(immediate(inc.head)).unwrap();
            let prefix = Prefix {
                consumed: Consumed::default(),
                len: 24,
            };
            let arrived = inc.arrive(offset, &prefix, MAX).unwrap();
            inc.consume(&arrived);
            assert_eq!(inc.owes(), message == u32::from(SLOTS) / 4);
        }
        inc.tell();
        assert!(!inc.owes());
    }
}
