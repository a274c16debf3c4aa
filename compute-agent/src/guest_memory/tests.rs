use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use farbus_vfio::{DmaAccess, Iova};
use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::*;

fn memory() -> GuestMemory {
    GuestMemory::new(Arc::new(EventFd::new(0).unwrap()))
}

fn memfd(size: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, size).unwrap();
    fd
}

fn request(iova: u64, size: u64, file: Option<(OwnedFd, u64)>) -> MapRequest {
    MapRequest {
        iova: Iova(iova),
        size,
        access: DmaAccess::ReadWrite,
        file,
    }
}

fn map(memory: &mut GuestMemory, iova: u64, file: &OwnedFd) {
    let file = Some((file.try_clone().unwrap(), 0));
    let prepared = memory.prepare(request(iova, PAGE, file), None).unwrap();
    memory.enter(prepared);
}

#[derive(Clone, Debug)]
enum Step {
    Map(u64, u64),
    Unmap(u64, u64),
}

/// Steps of a few pages each, among 32 pages at the bottom or at the top.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = (any::<bool>(), 0u64..32, 1u64..6).prop_map(|(top, page, pages)| {
        let base = if top { u64::MAX - 40 * PAGE + 1 } else { 0 };
        (base + page * PAGE, pages * PAGE)
    });
    let step = (any::<bool>(), range).prop_map(|(map, (iova, size))| {
        if map {
            Step::Map(iova, size)
        } else {
            Step::Unmap(iova, size)
        }
    });
    proptest::collection::vec(step, 0..60)
}

proptest! {
    #[test]
    fn windows_behave_as_a_plain_list_of_ranges(steps in steps()) {
        let file = memfd(8 * PAGE);
        let mut memory = memory();
        let mut model: BTreeMap<u64, u64> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Map(iova, size) => {
                    let overlaps = model.iter().any(|(at, len)| iova < at + len && *at < iova + size);
                    let file = Some((file.try_clone().unwrap(), 0));
                    let prepared = memory.prepare(request(iova, size, file), None);
                    prop_assert_eq!(prepared.is_err(), overlaps);
                    if let Ok(prepared) = prepared {
                        memory.enter(prepared);
                        model.insert(iova, size);
                    }
                }
                Step::Unmap(iova, size) => {
                    let end = iova + size;
                    let cut = model.iter().any(|(at, len)| {
                        let inside = iova <= *at && at + len <= end;
                        iova < at + len && *at < end && !inside
                    });
                    let span = memory.span_within(Iova(iova), size);
                    prop_assert_eq!(span.is_err(), cut);
                    if let Ok(span) = span {
                        let inside: Vec<(u64, u64)> = model
                            .range(iova..end)
                            .map(|(at, len)| (*at, at + len))
                            .collect();
                        let expected = inside.first().zip(inside.last()).map(|(first, last)| {
                            Span { iova: Iova(first.0), len: last.1 - first.0 }
                        });
                        prop_assert_eq!(span, expected);
                        memory.forget(Iova(iova), size);
                        model.retain(|at, _| !(iova..end).contains(at));
                    }
                }
            }
            prop_assert_eq!(memory.windows(), model.len());
        }
    }
}

#[test]
fn the_last_byte_of_the_address_space_cannot_be_mapped() {
    let prepared = memory().prepare(request(u64::MAX - PAGE + 1, PAGE, None), None);
    assert!(matches!(prepared, Err(MapError::BadRange { .. })));
}

#[test]
fn one_file_without_windows_stays_mapped_for_the_next_window() {
    let (a, b) = (memfd(PAGE), memfd(PAGE));
    let mut memory = memory();
    map(&mut memory, 0, &a);
    map(&mut memory, PAGE, &a);
    map(&mut memory, 2 * PAGE, &b);
    assert_eq!(memory.mappings(), 2);
    memory.forget(Iova(0), 2 * PAGE);
    assert_eq!(memory.mappings(), 2, "the first file waits");
    memory.forget(Iova(2 * PAGE), PAGE);
    assert_eq!(memory.mappings(), 1, "now the second one does");
    map(&mut memory, 0, &b);
    assert_eq!(memory.mappings(), 1);
    memory.clear();
    assert_eq!((memory.mappings(), memory.windows()), (0, 0));
}

#[test]
fn a_prepared_window_that_is_not_entered_counts_for_nothing() {
    let file = memfd(PAGE);
    let mut memory = memory();
    let request = |file: &OwnedFd| request(0, PAGE, Some((file.try_clone().unwrap(), 0)));
    drop(memory.prepare(request(&file), None).unwrap());
    assert_eq!(memory.windows(), 0);
    assert!(memory.prepare(request(&file), None).is_ok());
}

#[test]
fn files_without_windows_make_room_for_others() {
    let mut memory = memory();
    for _ in 0..300 {
        let file = Some((memfd(PAGE), 0));
        drop(memory.prepare(request(0, PAGE, file), None).unwrap());
    }
    assert!(memory.mappings() <= 256);
}
