//! Physical region pages: where a command's data is (NVMe 1.4 §4.3).

#![forbid(unsafe_code)]

use super::dma::Unreachable;
use crate::nvme::{PAGE_SIZE, Status};

/// Entries of a full page of a PRP list.
pub(crate) const LIST_ENTRIES: usize = PAGE_SIZE / 8;

/// Finds the memory of `len` bytes of data and hands it to `emit` as (address, length in
/// bytes), in order. `read_list` copies entries of a PRP list out of memory; `list` is space
/// for one page of them.
///
/// The walk is bounded whatever the lists say: each entry that is used stands for a page of
/// the data, but for the last one of a full page, and only the first page can have room for
/// less than 512.
pub(crate) fn walk(
    prps: (u64, u64),
    len: usize,
    list: &mut [u64; LIST_ENTRIES],
    mut read_list: impl FnMut(u64, &mut [u64]) -> Result<(), Unreachable>,
    mut emit: impl FnMut(u64, usize) -> Result<(), Unreachable>,
) -> Result<(), Status> {
    let page = PAGE_SIZE as u64;
    let (prp1, prp2) = prps;
    let mut emit =
        |address, len| emit(address, len).map_err(|Unreachable| Status::DATA_TRANSFER_ERROR);
    if prp1 % 4 != 0 {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    let first = len.min(PAGE_SIZE - (prp1 % page) as usize);
    emit(prp1, first)?;
    let mut rest = len - first;
    if rest == 0 {
        return Ok(());
    }
    if rest <= PAGE_SIZE {
        if prp2 % page != 0 {
            return Err(Status::INVALID_PRP_OFFSET);
        }
        return emit(prp2, rest);
    }
    // The first list may begin anywhere in a page; later ones are page aligned.
    let mut next = prp2;
    if next % 8 != 0 {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    loop {
        let pages = rest.div_ceil(PAGE_SIZE);
        let room = LIST_ENTRIES - (next % page) as usize / 8;
        let entries = list.get_mut(..pages.min(room)).unwrap_or_default();
        read_list(next, entries).map_err(|Unreachable| Status::DATA_TRANSFER_ERROR)?;
        let (data, chain) = match entries.split_last() {
            Some((last, data)) if pages > room => (data, Some(*last)),
            _ => (&*entries, None),
        };
        for &entry in data {
            if entry % page != 0 {
                return Err(Status::INVALID_PRP_OFFSET);
            }
            let now = rest.min(PAGE_SIZE);
            emit(entry, now)?;
            rest -= now;
        }
        match chain {
            None => return Ok(()),
            Some(address) if address % page == 0 => next = address,
            Some(_) => return Err(Status::INVALID_PRP_OFFSET),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const BASE: u64 = 0x10_0000;

    fn collect(
        prps: (u64, u64),
        len: usize,
        memory: &HashMap<u64, u64>,
    ) -> Result<(Vec<(u64, usize)>, usize), Status> {
        let mut list = [0; LIST_ENTRIES];
        let mut found = Vec::new();
        let mut reads = 0;
        walk(
            prps,
            len,
            &mut list,
            |address, entries| {
                reads += 1;
                for (n, entry) in entries.iter_mut().enumerate() {
                    *entry = *memory.get(&(address + 8 * n as u64)).ok_or(Unreachable)?;
                }
                Ok(())
            },
            |address, len| {
                found.push((address, len));
                Ok(())
            },
        )?;
        Ok((found, reads))
    }

    /// Lays out lists for pages at made-up addresses; returns PRP 1 and 2, the memory of the
    /// lists and what a walk must find.
    #[expect(clippy::type_complexity, reason = "test helper")]
    fn lay_out(
        offset: usize,
        list_offset: usize,
        len: usize,
    ) -> ((u64, u64), HashMap<u64, u64>, Vec<(u64, usize)>) {
        let page = PAGE_SIZE as u64;
        let mut expected = vec![(BASE + offset as u64, len.min(PAGE_SIZE - offset))];
        let mut rest = len - expected[0].1;
        let mut n = 0;
        while rest > 0 {
            // Descending, so that no two entries are adjacent.
            expected.push((BASE + 0x1000_0000 - 2 * n * page, rest.min(PAGE_SIZE)));
            rest -= rest.min(PAGE_SIZE);
            n += 1;
        }
        let mut memory = HashMap::new();
        let prp2 = match expected.len() {
            1 => 0,
            2 => expected[1].0,
            _ => {
                let mut at = 0x4000_0000 + list_offset as u64;
                for (n, (address, _)) in expected[1..].iter().enumerate() {
                    let last_slot = at % page == page - 8;
                    if last_slot && n + 2 < expected.len() {
                        let next = (at & !(page - 1)) + 2 * page;
                        memory.insert(at, next);
                        at = next;
                    }
                    memory.insert(at, *address);
                    at += 8;
                }
                0x4000_0000 + list_offset as u64
            }
        };
        ((expected[0].0, prp2), memory, expected)
    }

    proptest! {
        #[test]
        fn a_walk_finds_every_byte_in_order(
            offset in (0usize..1024).prop_map(|n| n * 4),
            list_offset in (0usize..512).prop_map(|n| n * 8),
            len in 1usize..(4 << 20),
        ) {
            let (prps, memory, expected) = lay_out(offset, list_offset, len);
            let (found, _) = collect(prps, len, &memory).unwrap();
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn a_hostile_list_ends_and_never_exceeds_the_length(
            prp1: u64, prp2: u64, len in 1usize..(2 << 20),
            // Few distinct values, so that entries point at lists, and at themselves.
            entries in proptest::collection::vec(
                prop_oneof![
                    4 => (0u64..4).prop_map(|n| n * 4096),
                    1 => any::<u64>(),
                ],
                512,
            ),
        ) {
            let mut list = [0; LIST_ENTRIES];
            let (mut total, mut reads) = (0, 0);
            let outcome = walk(
                (prp1, prp2 & !7),
                len,
                &mut list,
                |address, into| {
                    reads += 1;
                    for (n, entry) in into.iter_mut().enumerate() {
                        *entry = entries[(address as usize / 8 + n) % 512];
                    }
                    Ok(())
                },
                |_, len| {
                    total += len;
                    Ok(())
                },
            );
            prop_assert!(reads <= len / (511 * 4096) + 2);
            prop_assert!(total <= len);
            if outcome.is_ok() {
                prop_assert_eq!(total, len);
            }
        }
    }

    #[test]
    fn a_list_that_chains_to_itself_ends() {
        let page = PAGE_SIZE as u64;
        // The one slot at the end of a page points at a page whose last slot points at itself.
        let mut memory: HashMap<_, _> = (0..512).map(|n| (0x8000 + n * 8, 0x8000)).collect();
        memory.insert(0x7ff8, 0x8000);
        let (found, reads) = collect((0, 0x7ff8), 4 << 20, &memory).unwrap();
        assert_eq!(found.iter().map(|(_, len)| len).sum::<usize>(), 4 << 20);
        assert!(
            found
                .iter()
                .skip(1)
                .all(|(address, _)| *address == 8 * page)
        );
        assert_eq!(reads, 3);
    }

    #[test]
    fn offsets_that_the_specification_forbids_are_refused() {
        let none = HashMap::new();
        let refused = Err(Status::INVALID_PRP_OFFSET);
        assert_eq!(collect((2, 0), 512, &none), refused);
        assert_eq!(collect((0, 8), 8192, &none), refused);
        assert_eq!(collect((0, 4), 16384, &none), refused);
        let list = HashMap::from([(0x1000, 0x2000), (0x1008, 0x3008), (0x1010, 0x4000)]);
        assert_eq!(collect((0, 0x1000), 16384, &list), refused);
        // A chain to the middle of a page, where a first list could begin.
        let chain = HashMap::from([(0x1ff8, 0x3008)]);
        assert_eq!(collect((0, 0x1ff8), 16384, &chain), refused);
    }

    #[test]
    fn a_list_out_of_reach_is_a_transfer_error() {
        assert_eq!(
            collect((0, 0x1000), 16384, &HashMap::new()),
            Err(Status::DATA_TRANSFER_ERROR)
        );
    }
}
