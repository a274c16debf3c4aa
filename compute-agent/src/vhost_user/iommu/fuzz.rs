//! Messages about translations, any of them, for fuzzing.

#![forbid(unsafe_code)]

use super::message::{LEN, Said, decode};
use super::tlb::{Iotlb, MAX_ENTRIES};

/// Addresses that are looked at one by one.
const LOOKED_AT: u64 = 256;

/// Takes messages of [`LEN`] bytes, and compares what they map with a table that has a row for
/// each of the first addresses.
///
/// # Panics
/// When they differ.
#[allow(clippy::panic, reason = "that is how a fuzzer is told")]
pub fn fuzz_iotlb(bytes: &[u8]) {
    let mut tlb = Iotlb::default();
    let mut table = [None; LOOKED_AT as usize];
    for body in bytes.chunks(LEN) {
        let (first, last, mapped) = match decode(body) {
            Ok(Said::Update {
                first,
                last,
                user,
                access,
            }) => {
                tlb.insert(first, last, user, access);
                (first, last, Some((user, access)))
            }
            Ok(Said::Invalidate { first, last }) => {
                tlb.remove(first, last);
                (first, last, None)
            }
            Err(_) => continue,
        };
        assert!(first <= last, "a range that ends before it begins");
        for address in first..=last.min(LOOKED_AT - 1) {
            if let Some(row) = table.get_mut(address as usize) {
                *row = mapped.map(|(user, access)| (user + (address - first), access));
            }
        }
    }
    assert!(tlb.len() <= MAX_ENTRIES, "more than there is room for");
    for (address, row) in (0u64..).zip(table) {
        let found = tlb.find(address);
        assert!(found.map(|f| (f.user, f.access)) == row, "at {address}");
        assert!(found.is_none_or(|f| address.checked_add(f.more).is_some()));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_messages_leave_what_a_table_has(
            said in prop::collection::vec((0u64..300, 0u64..300, any::<u32>(), 0u8..5, 1u8..5), 0..40),
        ) {
            let mut bytes = Vec::new();
            for (first, size, user, access, kind) in said {
                let words = [first, size, u64::from(user)].map(u64::to_ne_bytes).concat();
                bytes.extend([words, vec![access, kind], vec![0; 6]].concat());
            }
            fuzz_iotlb(&bytes);
        }
    }
}
