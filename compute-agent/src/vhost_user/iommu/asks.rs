//! What was asked of the VMM, and what it refused.
//!
//! A VMM answers in the order in which it is asked. Before its answer it says what is mapped, on
//! the other socket; if it says nothing, nothing is mapped there that the device may use so.

#![forbid(unsafe_code)]

use std::collections::VecDeque;

use vm_memory::Permissions;

use super::tlb::Mapped;

/// Most questions at once, asked or to be asked. What else is missing is asked for later.
pub const MAX_ASKS: usize = 64;
/// The least that an IOMMU maps. Only how much is asked for follows from it.
pub const PAGE: u64 = 4096;

/// A question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// The address that is to be used.
    pub address: u64,
    /// How.
    pub access: Permissions,
}

impl Ask {
    /// Whether an answer to this one is one to `other`.
    fn covers(&self, other: &Self) -> bool {
        self.address / PAGE == other.address / PAGE && self.access.allow(other.access)
    }
}

#[derive(Debug)]
struct Pending {
    ask: Ask,
    /// It was mapped since, so that it is not refused even if it is not mapped any more.
    mapped: bool,
    /// Nobody waits for it any more.
    stale: bool,
}

/// See the module's own description.
#[derive(Debug, Default)]
pub struct Asks {
    pending: VecDeque<Pending>,
    /// How many of them the VMM has been asked.
    asked: usize,
    refused: Vec<Ask>,
}

/// An answer to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAsked;

impl Asks {
    /// Whether there is room for another question.
    pub fn is_full(&self) -> bool {
        self.pending.len() >= MAX_ASKS
    }

    /// Has the VMM asked, unless it is already, or cannot be for now.
    pub fn want(&mut self, ask: Ask) {
        let known = |pending: &Pending| !pending.stale && pending.ask.covers(&ask);
        if !self.is_full() && !self.pending.iter().any(known) {
            self.pending.push_back(Pending {
                ask,
                mapped: false,
                stale: false,
            });
        }
    }

    /// The next question to put.
    pub fn next(&self) -> Option<Ask> {
        self.pending.get(self.asked).map(|pending| pending.ask)
    }

    /// It was put.
    pub fn put(&mut self) {
        self.asked += 1;
    }

    /// Something is mapped from `first` to `last`.
    pub fn mapped(&mut self, first: u64, last: u64, access: Permissions) {
        for pending in &mut self.pending {
            let there = (first..=last).contains(&pending.ask.address);
            pending.mapped |= there && access.allow(pending.ask.access);
        }
    }

    /// The VMM has answered the oldest question.
    pub fn answered(&mut self, refuses: bool, now: Option<Mapped>) -> Result<(), NotAsked> {
        if self.asked == 0 {
            return Err(NotAsked);
        }
        let pending = self.pending.pop_front().ok_or(NotAsked)?;
        self.asked -= 1;
        let there = now.is_some_and(|now| now.access.allow(pending.ask.access));
        // One that says that all is well, and has said nothing, has nothing to say.
        let silent = !pending.mapped && !there;
        if !pending.stale && (silent || (refuses && !there)) {
            self.refused.push(pending.ask);
        }
        Ok(())
    }

    /// The oldest question that was put.
    pub fn oldest(&self) -> Option<Ask> {
        let oldest = self.pending.front().filter(|_| self.asked > 0);
        oldest.map(|pending| pending.ask)
    }

    /// Whether the VMM has refused this.
    pub fn is_refused(&self, ask: Ask) -> bool {
        // Who may not write there may yet read.
        let same = |refused: &&Ask| refused.address / PAGE == ask.address / PAGE;
        let mut refused = self.refused.iter().filter(same);
        refused.any(|refused| ask.access.allow(refused.access))
    }

    /// Whoever waited for what was refused knows by now. It may be mapped later.
    pub fn forget_refused(&mut self) {
        self.refused.clear();
    }

    /// Nobody waits any more, as after a reset. What was asked will still be answered.
    pub fn abandon(&mut self) {
        self.pending.truncate(self.asked);
        for pending in &mut self.pending {
            pending.stale = true;
        }
        self.refused.clear();
    }

    /// There is another VMM, or another way to ask it.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Permissions = Permissions::Read;
    const WRITE: Permissions = Permissions::Write;

    fn ask(address: u64, access: Permissions) -> Ask {
        Ask { address, access }
    }

    fn put_all(asks: &mut Asks) -> Vec<Ask> {
        let mut all = Vec::new();
        while let Some(next) = asks.next() {
            all.push(next);
            asks.put();
        }
        all
    }

    #[test]
    fn page_is_asked_for_once_for_each_access() {
        let mut asks = Asks::default();
        asks.want(ask(0x1000, READ));
        asks.want(ask(0x1800, READ));
        asks.want(ask(0x1000, WRITE));
        asks.want(ask(0x2000, Permissions::ReadWrite));
        asks.want(ask(0x2000, READ));
        assert_eq!(put_all(&mut asks).len(), 3);
    }

    #[test]
    fn silence_and_refusal_are_the_same_until_they_are_forgotten() {
        for refuses in [true, false] {
            let mut asks = Asks::default();
            asks.want(ask(0x1000, WRITE));
            put_all(&mut asks);
            asks.answered(refuses, None).unwrap();
            assert!(asks.is_refused(ask(0x1234, WRITE)));
            assert!(asks.is_refused(ask(0x1234, Permissions::ReadWrite)));
            assert!(!asks.is_refused(ask(0x1234, READ)));
            asks.forget_refused();
            assert!(!asks.is_refused(ask(0x1234, WRITE)));
        }
    }

    /// The mapping is still the guest's, but the VMM wants to be asked again.
    #[test]
    fn what_was_mapped_and_invalidated_before_the_answer_is_not_refused() {
        let mut asks = Asks::default();
        asks.want(ask(0x1000, READ));
        put_all(&mut asks);
        asks.mapped(0x1000, 0x1fff, READ);
        asks.answered(false, None).unwrap();
        assert!(!asks.is_refused(ask(0x1000, READ)));
    }

    #[test]
    fn mapping_that_does_not_allow_what_was_asked_is_a_refusal() {
        let mut asks = Asks::default();
        asks.want(ask(0x1000, WRITE));
        put_all(&mut asks);
        asks.mapped(0x1000, 0x1fff, READ);
        asks.answered(false, None).unwrap();
        assert!(asks.is_refused(ask(0x1000, WRITE)));
    }

    #[test]
    fn answers_to_abandoned_questions_say_nothing() {
        let mut asks = Asks::default();
        asks.want(ask(0x1000, READ));
        put_all(&mut asks);
        asks.want(ask(0x5000, READ));
        asks.abandon();
        asks.want(ask(0x1000, READ));
        assert_eq!(put_all(&mut asks), [ask(0x1000, READ)]);
        asks.answered(true, None).unwrap();
        assert!(!asks.is_refused(ask(0x1000, READ)));
        asks.answered(true, None).unwrap();
        assert!(asks.is_refused(ask(0x1000, READ)));
        assert_eq!(asks.answered(true, None), Err(NotAsked));
    }

    #[test]
    fn questions_are_bounded() {
        let mut asks = Asks::default();
        for n in 0..1000 {
            asks.want(ask(n * PAGE, READ));
        }
        assert_eq!(put_all(&mut asks).len(), MAX_ASKS);
    }
}
