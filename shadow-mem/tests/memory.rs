//! Guest memory, PRP lists and the buffer shadow's allocator.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::HashSet;

use farbus_shadow_mem::guest::{GuestMemory, Segment};
use farbus_shadow_mem::nvme::prp;
use farbus_shadow_mem::shadow::{ShadowAllocator, shared_memory};
use farbus_vfio::nvme::{PAGE_SIZE, Status};
use farbus_vfio::{DmaAccess, DmaWindow, Iova};
use proptest::prelude::*;

const PAGE: u64 = PAGE_SIZE as u64;

fn window(iova: u64, len: usize, access: DmaAccess) -> DmaWindow {
    DmaWindow {
        iova: Iova(iova),
        memory: shared_memory("test", len).unwrap(),
        offset: 0,
        len,
        access,
    }
}

/// `pages` pages of guest memory from address 0.
fn guest(pages: u64) -> GuestMemory {
    let mut memory = GuestMemory::default();
    let len = (pages * PAGE) as usize;
    memory.map(&window(0, len, DmaAccess::ReadWrite)).unwrap();
    memory
}

fn put(memory: &GuestMemory, iova: u64, value: u64) {
    memory
        .slice(Iova(iova), 8, true)
        .unwrap()
        .copy_from(&value.to_le_bytes()[..]);
}

/// Writes PRPs for a buffer of these pages and an offset into the first; lists are chained
/// from `list` on, one page each. Returns PRP1 and PRP2.
fn write_prps(memory: &GuestMemory, pages: &[u64], offset: u64, list: u64) -> (u64, u64) {
    let prp1 = pages[0] * PAGE + offset;
    match pages.len() {
        1 => return (prp1, 0),
        2 => return (prp1, pages[1] * PAGE),
        _ => {}
    }
    let entries = PAGE as usize / 8;
    let mut at = list;
    let mut rest = &pages[1..];
    while rest.len() > entries {
        let (now, later) = rest.split_at(entries - 1);
        for (index, page) in now.iter().enumerate() {
            put(memory, at + index as u64 * 8, page * PAGE);
        }
        put(memory, at + PAGE - 8, at + PAGE);
        at += PAGE;
        rest = later;
    }
    for (index, page) in rest.iter().enumerate() {
        put(memory, at + index as u64 * 8, page * PAGE);
    }
    (prp1, list)
}

fn flatten(segments: &[Segment]) -> Vec<(u64, u32)> {
    let mut pages = Vec::new();
    for segment in segments {
        let (mut at, mut left) = (segment.iova.0, segment.len);
        while left > 0 {
            let len = left.min((PAGE - at % PAGE) as u32);
            pages.push((at, len));
            at += u64::from(len);
            left -= len;
        }
    }
    pages
}

proptest! {
    #[test]
    fn walk_finds_the_pages_that_the_driver_named(
        pages in prop::collection::vec(0u64..4096, 1..600),
        offset in (0u64..1024).prop_map(|words| words * 4),
        cut in 0u32..4096,
    ) {
        let memory = guest(8);
        let (prp1, prp2) = write_prps(&memory, &pages, offset, 2 * PAGE);
        let whole = pages.len() as u32 * PAGE as u32 - offset as u32;
        let last = if pages.len() == 1 { whole } else { PAGE as u32 };
        let len = whole - cut.min(last - 1);
        let mut segments = Vec::new();
        prp::walk(&memory, prp1, prp2, len, &mut segments).unwrap();
        let mut expected = Vec::new();
        let mut left = len;
        for (index, page) in pages.iter().enumerate() {
            let offset = if index == 0 { offset } else { 0 };
            let take = left.min((PAGE - offset) as u32);
            expected.push((page * PAGE + offset, take));
            left -= take;
        }
        prop_assert_eq!(flatten(&segments), expected);
        prop_assert_eq!(segments.iter().map(|s| s.len).sum::<u32>(), len);
    }

    #[test]
    fn walk_of_anything_ends_without_panic_and_never_exceeds_the_length(
        prp1 in any::<u64>(),
        prp2 in prop_oneof![any::<u64>(), 0u64..8 * PAGE],
        len in 0u32..3 << 20,
        junk in prop::collection::vec(prop_oneof![any::<u64>(), (0u64..8).prop_map(|p| p * PAGE)], 512),
    ) {
        let memory = guest(8);
        for page in 0..8 {
            for (index, value) in junk.iter().enumerate() {
                put(&memory, page * PAGE + index as u64 * 8, *value);
            }
        }
        let mut segments = Vec::new();
        if prp::walk(&memory, prp1, prp2, len, &mut segments).is_ok() {
            prop_assert_eq!(segments.iter().map(|s| u64::from(s.len)).sum::<u64>(), u64::from(len));
        }
        prop_assert!(segments.len() <= len as usize / PAGE_SIZE + 2);
    }

    #[test]
    fn what_is_built_walks_back_to_the_same_range(page in 1u64..1000, len in 1u32..(512 * PAGE_SIZE as u32)) {
        let memory = guest(4);
        let data = Iova(page * PAGE);
        let (prp1, prp2) = prp::build(data, len, Iova(PAGE), |index, address| {
            put(&memory, PAGE + index as u64 * 8, address);
        });
        let mut segments = Vec::new();
        prp::walk(&memory, prp1, prp2, len, &mut segments).unwrap();
        prop_assert_eq!(segments, vec![Segment { iova: data, len }]);
    }

    #[test]
    fn allocator_never_gives_a_page_twice_and_loses_none(
        pages in 1u32..300,
        steps in prop::collection::vec((any::<bool>(), 0u32..40 * 4096), 1..200),
    ) {
        let mut allocator = ShadowAllocator::new(pages * PAGE as u32 + 17);
        let mut held = Vec::new();
        let mut used = HashSet::new();
        for (take, len) in steps {
            if take || held.is_empty() {
                let Some(range) = allocator.allocate(len, 0) else { continue };
                prop_assert_eq!(range.pages, len.div_ceil(PAGE as u32));
                let first = range.offset / PAGE as u32;
                prop_assert!(first + range.pages <= pages);
                for page in first..first + range.pages {
                    prop_assert!(used.insert(page));
                }
                held.push(range);
            } else {
                let range = held.swap_remove(len as usize % held.len());
                let first = range.offset / PAGE as u32;
                for page in first..first + range.pages {
                    used.remove(&page);
                }
                allocator.release(range);
            }
            prop_assert_eq!(allocator.used_pages(), used.len() as u32);
        }
        held.drain(..).for_each(|range| allocator.release(range));
        prop_assert!(allocator.allocate(pages * PAGE as u32, 0).is_some());
    }

    #[test]
    fn windows_never_overlap_and_lookups_agree_with_them(
        maps in prop::collection::vec((0u64..64, 1u64..8), 1..30),
        probes in prop::collection::vec((0u64..72 * PAGE, 1u64..3 * PAGE), 30),
    ) {
        let mut memory = GuestMemory::default();
        let mut mapped = HashSet::new();
        for (page, count) in maps {
            let range: Vec<_> = (page..page + count).collect();
            let free = range.iter().all(|page| !mapped.contains(page));
            let window = window(page * PAGE, (count * PAGE) as usize, DmaAccess::ReadWrite);
            prop_assert_eq!(memory.map(&window).is_ok(), free);
            if free {
                mapped.extend(range);
            }
        }
        for (iova, len) in probes {
            let all = (iova / PAGE..=(iova + len - 1) / PAGE).all(|page| mapped.contains(&page));
            prop_assert_eq!(memory.covers(Iova(iova), len, true), all);
            let mut spans = Vec::new();
            let segment = Segment { iova: Iova(iova), len: len as u32 };
            prop_assert_eq!(memory.spans(segment, true, &mut spans).is_ok(), all);
            if all {
                prop_assert_eq!(spans.iter().map(|s| s.len as u64).sum::<u64>(), len);
            }
        }
    }
}

#[test]
fn a_list_that_points_to_itself_is_refused() {
    let memory = guest(4);
    // The last entry of a page, which chains, names itself.
    put(&memory, 2 * PAGE - 8, 2 * PAGE - 8);
    let walked = prp::walk(&memory, 0, 2 * PAGE - 8, 64 * PAGE as u32, &mut Vec::new());
    assert_eq!(walked, Err(Status::DATA_TRANSFER_ERROR));
}

#[test]
fn pages_behind_the_first_must_be_aligned() {
    let memory = guest(4);
    let walked = prp::walk(&memory, 0, PAGE + 8, 2 * PAGE as u32, &mut Vec::new());
    assert_eq!(walked, Err(Status::INVALID_PRP_OFFSET));
}

#[test]
fn read_only_memory_is_not_written() {
    let mut memory = GuestMemory::default();
    memory.map(&window(0, PAGE_SIZE, DmaAccess::Read)).unwrap();
    assert!(memory.slice(Iova(0), 8, false).is_ok());
    assert!(memory.slice(Iova(0), 8, true).is_err());
    assert!(!memory.covers(Iova(0), 8, true));
}

#[test]
fn unmap_that_cuts_a_window_removes_nothing() {
    let mut memory = guest(4);
    assert!(memory.unmap(Iova(PAGE), PAGE).is_err());
    assert_eq!(memory.windows().len(), 1);
    assert_eq!(memory.unmap(Iova(0), u64::MAX).unwrap().len(), 1);
    assert!(memory.windows().is_empty());
}
