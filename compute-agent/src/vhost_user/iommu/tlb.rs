//! Which of the guest's I/O virtual addresses are mapped, as far as the VMM has said.
//!
//! A cache: whatever is not in it can be asked for, so that dropping entries is always right, and
//! that is what happens when a VMM says more than there is room for.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use vm_memory::Permissions;

/// Most entries. A guest that maps single pages has a quarter of a GiB mapped at once with so many.
pub const MAX_ENTRIES: usize = 1 << 16;

/// A range of addresses that are mapped to consecutive ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    /// Its last address. An end would not fit when it is the last one there is.
    last: u64,
    /// What the first address is mapped to, in the VMM's own memory.
    user: u64,
    access: Permissions,
}

/// What an address is mapped to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Where in the VMM's own memory.
    pub user: u64,
    /// How many addresses follow that belong to the same entry.
    pub more: u64,
    /// What the device may do there.
    pub access: Permissions,
}

/// See the module's own description.
#[derive(Debug, Default)]
pub struct Iotlb {
    /// By first address. No two overlap.
    entries: BTreeMap<u64, Entry>,
}

impl Iotlb {
    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.entries.clear();
    }

    /// Maps `first..=last` to `user` and what follows, in place of what was there.
    pub fn insert(&mut self, first: u64, last: u64, user: u64, access: Permissions) {
        if last < first {
            return;
        }
        self.remove(first, last);
        if self.entries.len() >= MAX_ENTRIES {
            self.entries.clear();
        }
        self.entries.insert(first, Entry { last, user, access });
    }

    /// Unmaps `first..=last`; entries that reach beyond are cut.
    pub fn remove(&mut self, first: u64, last: u64) {
        if last < first {
            return;
        }
        // What begins before the range and reaches into it, or beyond it.
        let before = self.entries.range_mut(..first).next_back();
        let mut beyond = None;
        if let Some((start, entry)) = before.filter(|(_, entry)| entry.last >= first) {
            if entry.last > last {
                beyond = Some((*start, *entry));
            }
            entry.last = first - 1;
        }
        // What begins within it.
        while let Some((&start, &entry)) = self.entries.range(first..=last).next() {
            self.entries.remove(&start);
            if entry.last > last {
                beyond = Some((start, entry));
            }
        }
        if let Some((start, entry)) = beyond {
            // A VMM could cut one entry into as many as it likes.
            if self.entries.len() >= MAX_ENTRIES {
                return self.entries.clear();
            }
            let user = entry.user.wrapping_add(last + 1 - start);
            self.entries.insert(last + 1, Entry { user, ..entry });
        }
    }

    /// What an address is mapped to.
    pub fn find(&self, address: u64) -> Option<Mapped> {
        let (start, entry) = self.entries.range(..=address).next_back()?;
        let more = entry.last.checked_sub(address)?;
        Some(Mapped {
            user: entry.user.wrapping_add(address - start),
            more,
            access: entry.access,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const R: Permissions = Permissions::Read;
    const RW: Permissions = Permissions::ReadWrite;

    fn at(tlb: &Iotlb, address: u64) -> Option<(u64, u64)> {
        tlb.find(address).map(|found| (found.user, found.more))
    }

    #[test]
    fn range_within_an_entry_leaves_both_ends() {
        let mut tlb = Iotlb::default();
        tlb.insert(0x1000, 0x4fff, 0x9_1000, RW);
        tlb.remove(0x2000, 0x2fff);
        assert_eq!(at(&tlb, 0x1fff), Some((0x9_1fff, 0)));
        assert_eq!(at(&tlb, 0x2000), None);
        assert_eq!(at(&tlb, 0x2fff), None);
        assert_eq!(at(&tlb, 0x3000), Some((0x9_3000, 0x1fff)));
        assert_eq!(tlb.len(), 2);
    }

    #[test]
    fn range_over_the_ends_of_two_entries_cuts_both() {
        let mut tlb = Iotlb::default();
        tlb.insert(0x1000, 0x1fff, 0xa000, R);
        tlb.insert(0x3000, 0x3fff, 0xc000, R);
        tlb.remove(0x1800, 0x37ff);
        assert_eq!(at(&tlb, 0x17ff), Some((0xa7ff, 0)));
        assert_eq!(at(&tlb, 0x1800), None);
        assert_eq!(at(&tlb, 0x3800), Some((0xc800, 0x7ff)));
    }

    #[test]
    fn last_addresses_that_there_are_can_be_mapped_and_unmapped() {
        let mut tlb = Iotlb::default();
        tlb.insert(u64::MAX - 0xfff, u64::MAX, 0x1000, RW);
        assert_eq!(at(&tlb, u64::MAX), Some((0x1fff, 0)));
        tlb.insert(0, u64::MAX, 0, R);
        assert_eq!((tlb.len(), at(&tlb, 7)), (1, Some((7, u64::MAX - 7))));
        tlb.remove(5, u64::MAX);
        assert_eq!((at(&tlb, 4), at(&tlb, 5)), (Some((4, 0)), None));
    }

    #[test]
    fn neither_many_mappings_nor_many_cuts_take_more_room_than_there_is() {
        let mut tlb = Iotlb::default();
        for n in 0..3 * MAX_ENTRIES as u64 {
            tlb.insert(n * 2, n * 2, n, RW);
            assert!(tlb.len() <= MAX_ENTRIES);
        }
        let mut tlb = Iotlb::default();
        tlb.insert(0, u64::MAX, 0, RW);
        for n in 0..3 * MAX_ENTRIES as u64 {
            tlb.remove(n * 2, n * 2);
            assert!(tlb.len() <= MAX_ENTRIES);
        }
    }

    proptest! {
        /// As a table with a row for each address has it.
        #[test]
        fn every_address_is_mapped_as_was_said_last(
            said in prop::collection::vec((any::<bool>(), 0u64..64, 0u64..64, 0u64..9999), 1..60),
        ) {
            let mut tlb = Iotlb::default();
            let mut table = [None; 64];
            for (maps, one, other, user) in said {
                let (first, last) = (one.min(other), one.max(other));
                if maps {
                    tlb.insert(first, last, user, RW);
                } else {
                    tlb.remove(first, last);
                }
                for address in first..=last {
                    table[address as usize] = maps.then_some(user + address - first);
                }
            }
            for (address, user) in (0u64..).zip(table) {
                prop_assert_eq!(tlb.find(address).map(|found| found.user), user);
                if let Some(found) = tlb.find(address) {
                    let last = address + found.more;
                    prop_assert!(last < 64 && table[last as usize] == user.map(|u| u + found.more));
                }
            }
        }
    }
}
