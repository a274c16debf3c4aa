//! MSI-X vectors as eventfds, the way VFIO has them: which vector reaches whom is set through
//! [`crate::Function::set_interrupts`], and the table in the BAR is memory without meaning,
//! for it belongs to whoever translates these events into a guest's interrupts.

#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::{lock, sys};

/// Bytes of one MSI-X table entry (PCI 3.0 §6.8.2).
const ENTRY_SIZE: usize = 16;

/// All vectors of the function.
pub(super) struct Interrupts {
    vectors: Vec<Mutex<Vector>>,
    table: Mutex<Vec<u8>>,
}

#[derive(Default)]
struct Vector {
    event: Option<Arc<EventFd>>,
    masked: bool,
    pending: bool,
}

impl Vector {
    /// Signals what is pending, if somebody listens.
    fn deliver(&mut self) {
        if !self.pending || self.masked {
            return;
        }
        let Some(event) = &self.event else { return };
        // It does not block (`set` sees to that), and the one failure left is a counter at its
        // limit, which means that the listener has this interrupt to come anyway.
        if let Err(error) = event.write(1) {
            log::debug!("an interrupt eventfd took no more events: {error}");
        }
        self.pending = false;
    }
}

impl Interrupts {
    pub(super) fn new(vectors: u16) -> Self {
        let vectors = usize::from(vectors);
        Self {
            vectors: (0..vectors).map(|_| Mutex::default()).collect(),
            table: Mutex::new(blank_table(vectors)),
        }
    }

    pub(super) fn count(&self) -> u32 {
        self.vectors.len() as u32
    }

    /// Raises a vector. Without a listener, or masked, it stays pending.
    pub(super) fn signal(&self, vector: u16) {
        if let Some(vector) = self.vectors.get(usize::from(vector)) {
            let mut vector = lock(vector);
            vector.pending = true;
            vector.deliver();
        }
    }

    /// Sets who listens to `first` and on. The caller has checked the range.
    pub(super) fn set(&self, first: u32, events: &[Option<Arc<EventFd>>]) -> std::io::Result<()> {
        // A worker must never wait in a write to a counter that somebody else filled up.
        for event in events.iter().flatten() {
            sys::set_nonblocking(event)?;
        }
        for (vector, event) in self.vectors.iter().skip(first as usize).zip(events) {
            let mut vector = lock(vector);
            vector.event.clone_from(event);
            vector.deliver();
        }
        Ok(())
    }

    /// Masks or unmasks one vector.
    pub(super) fn mask(&self, vector: u32, masked: bool) {
        if let Some(vector) = self.vectors.get(vector as usize) {
            let mut vector = lock(vector);
            vector.masked = masked;
            vector.deliver();
        }
    }

    /// Forgets masks, what is pending, and the table; listeners stay.
    pub(super) fn reset(&self) {
        for vector in &self.vectors {
            let mut vector = lock(vector);
            vector.masked = false;
            vector.pending = false;
        }
        *lock(&self.table) = blank_table(self.vectors.len());
    }

    /// Reads the table from `at` on (bytes); zeroes behind its end.
    pub(super) fn read_table(&self, at: usize, data: &mut [u8]) {
        let table = lock(&self.table);
        data.fill(0);
        for (to, from) in data.iter_mut().zip(table.iter().skip(at)) {
            *to = *from;
        }
    }

    /// Writes the table; what is behind its end goes nowhere.
    pub(super) fn write_table(&self, at: usize, data: &[u8]) {
        let mut table = lock(&self.table);
        for (to, from) in table.iter_mut().skip(at).zip(data) {
            *to = *from;
        }
    }

    /// Reads the pending bits from `at` on (bytes).
    pub(super) fn read_pending(&self, at: usize, data: &mut [u8]) {
        for (n, byte) in data.iter_mut().enumerate() {
            let first = (at + n) * 8;
            *byte = (0..8)
                .filter(|bit| {
                    self.vectors
                        .get(first + bit)
                        .is_some_and(|vector| lock(vector).pending)
                })
                .fold(0, |bits, bit| bits | 1 << bit);
        }
    }
}

/// All entries zero but for the mask bit, which is set after a reset (PCI 3.0 §6.8.2.9).
fn blank_table(vectors: usize) -> Vec<u8> {
    let mut entry = [0; ENTRY_SIZE];
    entry[12] = 1;
    entry.repeat(vectors)
}
