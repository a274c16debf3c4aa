//! Shadow doorbells (NVMe 1.4 §5.7, §7.13): the host stores a doorbell's value in memory, and
//! writes the register only if the controller has said that it wants to hear of it.
//!
//! The controller says so with an event index beside each doorbell: it wants to hear of the move
//! past that value. What the controller writes there is a hint and nothing more; whatever it
//! is, the worst that comes of it is a register write too many, or one that the controller then
//! has itself to blame for.

#![forbid(unsafe_code)]

use std::sync::atomic::{Ordering, fence};

use super::DriverError;
use super::memory::{DmaBuffer, DmaMemory};
use crate::nvme::PAGE_SIZE;

/// The two pages that Doorbell Buffer Config gives to the controller.
#[derive(Debug)]
pub(super) struct ShadowDoorbells {
    values: DmaBuffer,
    events: DmaBuffer,
}

impl ShadowDoorbells {
    pub(super) fn new(memory: &mut DmaMemory) -> Result<Self, DriverError> {
        let values = memory.allocate(PAGE_SIZE)?;
        match memory.allocate(PAGE_SIZE) {
            Ok(events) => Ok(Self { values, events }),
            Err(error) => {
                memory.free(values);
                Err(error)
            }
        }
    }

    pub(super) fn free(self, memory: &mut DmaMemory) {
        memory.free(self.values);
        memory.free(self.events);
    }

    /// The addresses of both pages, in the order of the command's PRPs.
    pub(super) fn iovas(&self) -> (u64, u64) {
        (self.values.iova().0, self.events.iova().0)
    }

    /// A doorbell begins anew at 0; `at` is its offset in the doorbell array (bytes).
    pub(super) fn clear(&self, memory: &DmaMemory, at: usize) -> Result<(), DriverError> {
        memory.store32(self.values, at, 0)?;
        memory.store32(self.events, at, 0)
    }

    /// Moves a doorbell; returns whether the register is to be written.
    pub(super) fn advance(
        &self,
        memory: &DmaMemory,
        at: usize,
        old: u16,
        new: u16,
    ) -> Result<bool, DriverError> {
        memory.store32(self.values, at, u32::from(new))?;
        // The controller stores its event index and then looks at the value; this is the other
        // half: without it both could read what was there before.
        fence(Ordering::SeqCst);
        let event = memory.load32(self.events, at)? as u16;
        Ok(is_due(event, old, new))
    }
}

/// Whether the move from `old` to `new` passes `event`: whether that is one of the values that
/// the move leaves behind.
fn is_due(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::function::Iova;

    proptest! {
        #[test]
        fn a_register_write_is_due_when_the_event_is_left_behind(
            event: u16, old: u16, moves in 0u16..200,
        ) {
            let new = old.wrapping_add(moves);
            let mut left = (0..moves).map(|n| old.wrapping_add(n));
            prop_assert_eq!(is_due(event, old, new), left.any(|value| value == event));
        }
    }

    #[test]
    fn around_the_end_of_a_ring_the_event_is_found_too() {
        // A ring of 64 entries, from 62 over 63 and 0 to 1.
        assert!(is_due(62, 62, 1) && is_due(63, 62, 1) && is_due(0, 62, 1));
        assert!(!is_due(1, 62, 1) && !is_due(61, 62, 1));
    }

    #[test]
    fn the_value_is_stored_whether_or_not_the_register_is_written() {
        let mut memory = DmaMemory::new(Iova(0), 2 * PAGE_SIZE).unwrap();
        let shadow = ShadowDoorbells::new(&mut memory).unwrap();
        assert!(shadow.advance(&memory, 8, 0, 1).unwrap(), "the event is 0");
        assert!(!shadow.advance(&memory, 8, 1, 5).unwrap());
        assert_eq!(memory.load32(shadow.values, 8).unwrap(), 5);
        memory.store32(shadow.events, 8, 6).unwrap();
        assert!(!shadow.advance(&memory, 8, 5, 6).unwrap());
        assert!(shadow.advance(&memory, 8, 6, 7).unwrap());
        shadow.clear(&memory, 8).unwrap();
        assert_eq!(memory.load32(shadow.values, 8).unwrap(), 0);
        assert_eq!(memory.load32(shadow.events, 8).unwrap(), 0);
        assert!(matches!(
            shadow.advance(&memory, PAGE_SIZE, 0, 1),
            Err(DriverError::OutOfBounds { .. })
        ));
    }
}
