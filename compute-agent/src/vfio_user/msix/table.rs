//! An MSI-X table and its pending bits (PCI Local Bus 3.0 §6.8.2), as the function's own hardware
//! has them.

/// Bytes of an entry.
pub(super) const ENTRY_LEN: u64 = 16;

/// Vector Control, bit 0.
const MASKED: u32 = 1;

/// What a vector sends: a write of four bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::vfio_user) struct Message {
    pub(in crate::vfio_user) address: u64,
    pub(in crate::vfio_user) data: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    message: Message,
    masked: bool,
}

impl Entry {
    /// As after a reset: masked, the rest undefined.
    const RESET: Self = Self {
        message: Message {
            address: 0,
            data: 0,
        },
        masked: true,
    };

    fn dword(&self, index: u64) -> u32 {
        match index {
            0 => self.message.address as u32,
            1 => (self.message.address >> 32) as u32,
            2 => self.message.data,
            _ => u32::from(self.masked) * MASKED,
        }
    }

    fn set_dword(&mut self, index: u64, value: u32) {
        let Message { address, data } = &mut self.message;
        match index {
            // The address is that of a dword; its lowest bits are zero.
            0 => *address = *address & !0xffff_ffff | u64::from(value & !3),
            1 => *address = *address & 0xffff_ffff | u64::from(value) << 32,
            2 => *data = value,
            // The other bits are reserved.
            _ => self.masked = value & MASKED != 0,
        }
    }
}

/// Which vectors may send, as configuration space has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Control {
    /// Message Control, MSI-X Enable.
    pub(super) enabled: bool,
    /// Message Control, Function Mask.
    pub(super) masked: bool,
    /// Command, Bus Master Enable: without it a function writes nothing, not even messages.
    pub(super) bus_master: bool,
}

#[derive(Debug)]
pub(super) struct Table {
    entries: Vec<Entry>,
    /// One bit for each vector.
    pending: Vec<u64>,
    control: Control,
}

impl Table {
    pub(super) fn new(vectors: u16) -> Self {
        let vectors = usize::from(vectors);
        Self {
            entries: vec![Entry::RESET; vectors],
            pending: vec![0; vectors.div_ceil(64)],
            control: Control::default(),
        }
    }

    /// Bytes that the entries have.
    pub(super) fn len(&self) -> u64 {
        self.entries.len() as u64 * ENTRY_LEN
    }

    /// Bytes that the pending bits have: whole quadwords.
    pub(super) fn pending_len(&self) -> u64 {
        self.pending.len() as u64 * 8
    }

    /// As a reset of the function does.
    pub(super) fn reset(&mut self) {
        self.entries.fill(Entry::RESET);
        self.pending.fill(0);
        self.control = Control::default();
    }

    /// Takes over what configuration space says now. What was pending is forgotten with MSI-X.
    pub(super) fn set_control(&mut self, control: Control) {
        if !control.enabled {
            self.pending.fill(0);
        }
        self.control = control;
    }

    /// A vector has something to say. It is said by [`Self::next_message`], as soon as it may; until
    /// then more of the same adds nothing.
    pub(super) fn fire(&mut self, vector: u32) {
        let (word, bit) = place(vector);
        let is_vector = (vector as usize) < self.entries.len();
        if let Some(word) = self.pending.get_mut(word) {
            if is_vector && self.control.enabled {
                *word |= bit;
            }
        }
    }

    /// The next message of a vector that is pending and may send, which it is no more then.
    pub(super) fn next_message(&mut self) -> Option<Message> {
        let Control {
            enabled,
            masked,
            bus_master,
        } = self.control;
        if !enabled || masked || !bus_master {
            return None;
        }
        for (first, word) in (0usize..).step_by(64).zip(&mut self.pending) {
            let mut left = *word;
            while left != 0 {
                let bit = left.trailing_zeros();
                left &= left - 1;
                let entry = self.entries.get(first + bit as usize);
                if let Some(entry) = entry.filter(|entry| !entry.masked) {
                    *word &= !(1 << bit);
                    return Some(entry.message);
                }
            }
        }
        None
    }

    /// An entry: what it sends, and whether it is masked.
    pub(super) fn entry(&self, vector: u32) -> Option<(Message, bool)> {
        let entry = self.entries.get(vector as usize)?;
        Some((entry.message, entry.masked))
    }

    /// As [`Self::entry`] had it.
    pub(super) fn set_entry(&mut self, vector: u32, message: Message, masked: bool) {
        if let Some(entry) = self.entries.get_mut(vector as usize) {
            *entry = Entry { message, masked };
        }
    }

    /// One byte of the table.
    pub(super) fn byte(&self, offset: u64) -> u8 {
        let entry = self.entries.get((offset / ENTRY_LEN) as usize);
        let dword = entry.map_or(0, |entry| entry.dword(offset % ENTRY_LEN / 4));
        (dword >> (offset % 4 * 8)) as u8
    }

    /// One byte of the pending bits.
    pub(super) fn pending_byte(&self, offset: u64) -> u8 {
        let word = self.pending.get((offset / 8) as usize).copied();
        (word.unwrap_or(0) >> (offset % 8 * 8)) as u8
    }

    /// Writes to the table. Only whole aligned dwords and quadwords have an effect: others are
    /// undefined, and here they are lost. Returns the vectors, if any, that were unmasked.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Option<u32> {
        let len = data.len() as u64;
        if !(len == 4 || len == 8) || offset % len != 0 {
            return None;
        }
        let mut unmasked = None;
        for (at, dword) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            let vector = at / ENTRY_LEN;
            let (Some(entry), Ok(dword)) =
                (self.entries.get_mut(vector as usize), dword.try_into())
            else {
                continue;
            };
            let was_masked = entry.masked;
            entry.set_dword(at % ENTRY_LEN / 4, u32::from_le_bytes(dword));
            if was_masked && !entry.masked {
                unmasked = Some(vector as u32);
            }
        }
        unmasked
    }
}

/// Which word of the pending bits, and which bit of it, is a vector's.
fn place(vector: u32) -> (usize, u64) {
    (vector as usize / 64, 1 << (vector % 64))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ON: Control = Control {
        enabled: true,
        masked: false,
        bus_master: true,
    };

    /// A table in which vector 1 is set up, and everything is on.
    fn table() -> Table {
        let mut table = Table::new(70);
        table.set_control(ON);
        table.write(16, &0xfee0_1000_u64.to_le_bytes());
        table.write(24, &0x41_u64.to_le_bytes());
        table
    }

    const OF_VECTOR_1: Message = Message {
        address: 0xfee0_1000,
        data: 0x41,
    };

    fn read(table: &Table, offset: u64) -> u32 {
        let byte = |at: u64| table.byte(offset + at);
        u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
    }

    #[test]
    fn vector_sends_what_its_entry_says_once() {
        let mut table = table();
        table.fire(1);
        table.fire(1);
        assert_eq!(table.next_message(), Some(OF_VECTOR_1));
        assert_eq!(table.next_message(), None);
    }

    #[test]
    fn masked_vector_is_pending_until_it_is_unmasked() {
        let mut table = table();
        table.write(28, &1_u32.to_le_bytes());
        table.fire(1);
        assert_eq!(table.next_message(), None);
        assert_eq!(table.pending_byte(0), 2);
        assert_eq!(table.write(28, &0_u32.to_le_bytes()), Some(1));
        assert_eq!(table.next_message(), Some(OF_VECTOR_1));
        assert_eq!(table.pending_byte(0), 0);
    }

    #[test]
    fn function_mask_and_bus_master_hold_vectors_back() {
        for held in [
            Control { masked: true, ..ON },
            Control {
                bus_master: false,
                ..ON
            },
        ] {
            let mut table = table();
            table.set_control(held);
            table.fire(1);
            assert_eq!(table.next_message(), None);
            table.set_control(ON);
            assert_eq!(table.next_message(), Some(OF_VECTOR_1));
        }
    }

    #[test]
    fn disabled_function_neither_sends_nor_remembers() {
        let mut table = table();
        table.fire(1);
        table.set_control(Control {
            enabled: false,
            ..ON
        });
        table.fire(1);
        table.set_control(ON);
        assert_eq!(table.next_message(), None);
    }

    #[test]
    fn reset_masks_every_vector_and_forgets() {
        let mut table = table();
        table.fire(1);
        table.reset();
        assert_eq!((read(&table, 16), read(&table, 28)), (0, 1));
        table.set_control(ON);
        table.fire(1);
        assert_eq!(table.next_message(), None);
        assert_eq!(table.pending_byte(0), 2);
    }

    #[test]
    fn writes_that_are_no_aligned_dwords_are_lost() {
        let mut table = table();
        for (offset, len) in [
            (16, 1),
            (16, 2),
            (18, 4),
            (20, 8),
            (16, 3),
            (16, 16),
            (16, 0),
        ] {
            assert_eq!(table.write(offset, &vec![0xff; len]), None);
        }
        assert_eq!(read(&table, 16), 0xfee0_1000);
        assert_eq!(read(&table, 20), 0);
    }

    #[test]
    fn reserved_bits_read_as_zero() {
        let mut table = table();
        table.write(16, &[0xff; 8]);
        table.write(24, &[0xff; 8]);
        assert_eq!(read(&table, 16), 0xffff_fffc);
        assert_eq!(read(&table, 28), 1);
    }

    #[test]
    fn vectors_that_do_not_exist_are_silent() {
        let mut table = table();
        table.fire(70);
        table.fire(u32::MAX);
        assert_eq!(table.write(70 * 16, &[0; 8]), None);
        assert_eq!((table.byte(70 * 16), table.pending_byte(16)), (0, 0));
        assert!((0..16).all(|at| table.pending_byte(at) == 0));
    }

    proptest! {
        /// However the guest masks and unmasks: every vector that fired is pending, or was sent.
        #[test]
        fn nothing_that_fires_is_lost_or_sent_twice(
            steps in proptest::collection::vec((0u32..70, 0u8..3), 0..200),
        ) {
            let mut table = Table::new(70);
            table.set_control(ON);
            for vector in 0..70u64 {
                table.write(vector * 16, &(0xfee0_0000 + vector * 4).to_le_bytes());
            }
            let mut owed = std::collections::BTreeSet::new();
            let mut masked = [true; 70];
            for (vector, action) in steps {
                match action {
                    0 => {
                        table.fire(vector);
                        owed.insert(vector);
                    }
                    _ => {
                        masked[vector as usize] = action == 1;
                        let control = u32::from(action == 1).to_le_bytes();
                        table.write(u64::from(vector) * 16 + 12, &control);
                    }
                }
                while let Some(Message { address, .. }) = table.next_message() {
                    let sent = ((address - 0xfee0_0000) / 4) as u32;
                    prop_assert!(owed.remove(&sent) && !masked[sent as usize]);
                }
                prop_assert!(owed.iter().all(|vector| masked[*vector as usize]));
            }
            for vector in 0..70u32 {
                let bit = table.pending_byte(u64::from(vector / 8)) >> (vector % 8) & 1;
                prop_assert_eq!(bit == 1, owed.contains(&vector));
            }
        }
    }
}
