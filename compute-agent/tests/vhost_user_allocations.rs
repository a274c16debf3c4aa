//! The device allocates nothing for a request, whatever buffers its data is in.
#![allow(unsafe_code, reason = "an allocator is unsafe to write")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]
#![allow(dead_code, reason = "the harness has more than is needed here")]

#[path = "vhost_user/harness.rs"]
mod harness;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::{Duration, Instant};

use harness::{Buffer, DATA, Guest, TABLE, options};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Counts the allocations of each thread.
struct Counting;

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps to the contract of this method, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations while the device carries out a request.
fn allocations(guest: &mut Guest, kind: u32, data: &[Buffer]) -> u64 {
    let header = guest.header(0, kind, 8);
    let mut buffers = vec![(header, 16, false)];
    buffers.extend(data);
    buffers.push((header + 32, 1, true));
    guest.chain(TABLE, 0, &buffers);
    guest.offer(0);
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut total = 0;
    while guest.used().is_none() {
        assert!(Instant::now() < deadline, "there was no answer");
        let before = ALLOCATIONS.get();
        guest.device.work(true).unwrap();
        total += ALLOCATIONS.get() - before;
    }
    assert_eq!(guest.get(header + 32, 1), [0]);
    total
}

#[test]
fn requests_are_carried_out_without_an_allocation() {
    let mut guest = Guest::with("", options(), true);
    let whole = (0..5)
        .map(|n| (DATA + n * 0x3000, 0x2000, true))
        .collect::<Vec<_>>();
    let odd = vec![(DATA + 1, 700, true), (DATA + 0x2000, 324, true)];
    let written = |buffers: &[Buffer]| {
        let mut buffers = buffers.to_vec();
        buffers.iter_mut().for_each(|buffer| buffer.2 = false);
        buffers
    };
    let requests = [
        (0, whole.clone()),
        (1, written(&whole)),
        (0, odd.clone()),
        (1, written(&odd)),
        (4, vec![]),
    ];
    let round = |guest: &mut Guest| -> u64 {
        let each = requests
            .iter()
            .map(|(kind, data)| allocations(guest, *kind, data));
        each.sum()
    };
    // What is made once is made by then.
    for _ in 0..20 {
        round(&mut guest);
    }
    for _ in 0..50 {
        assert_eq!(round(&mut guest), 0);
    }
}
