//! An allocator that counts for each thread: what shows that nothing is allocated per I/O.
//!
//! A program that wants to know makes [`Counting`] its global allocator. This is the only unsafe
//! code of the test bed; its one rule is that every call goes to the system's allocator as it came.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};

use rustix::process::Pid;
use rustix::thread::gettid;

/// The most threads that are told apart; later ones count as one.
const MAX_THREADS: usize = 256;

/// The system's allocator, with a count for each thread.
#[derive(Debug)]
pub struct Counting;

/// A thread that has allocated, and how often.
struct Thread {
    id: AtomicI32,
    allocations: AtomicU64,
}

static THREADS: [Thread; MAX_THREADS] = [const {
    Thread {
        id: AtomicI32::new(0),
        allocations: AtomicU64::new(0),
    }
}; MAX_THREADS];
static NEXT_THREAD: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// This thread's place in the list, once it has one.
    static PLACE: Cell<Option<usize>> = const { Cell::new(None) };
}

fn count() {
    let counted = PLACE.try_with(|place| {
        let at = place.get().unwrap_or_else(|| {
            let at = NEXT_THREAD
                .fetch_add(1, Ordering::Relaxed)
                .min(MAX_THREADS - 1);
            let id = gettid().as_raw_nonzero().get();
            THREADS[at].id.store(id, Ordering::Relaxed);
            place.set(Some(at));
            at
        });
        THREADS[at].allocations.fetch_add(1, Ordering::Relaxed);
    });
    // A thread that has given up its locals is at its end.
    let _ = counted;
}

// SAFETY: every call goes to `System` unchanged, which keeps the contract. A global allocator
// is the one place that sees all allocations, and the trait is unsafe.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}

/// How often each of the `wanted` threads has allocated so far, by its name and id. Empty unless
/// [`Counting`] is the global allocator.
pub fn allocations(wanted: impl Fn(Pid) -> bool) -> BTreeMap<String, u64> {
    let counted = THREADS.iter().filter_map(|thread| {
        let id = Pid::from_raw(thread.id.load(Ordering::Relaxed))?;
        wanted(id).then(|| (name_of(id), thread.allocations.load(Ordering::Relaxed)))
    });
    counted.collect()
}

/// What came since `before`, of threads that have allocated since then.
#[must_use]
pub fn since(before: &BTreeMap<String, u64>, now: BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let mut more = now;
    for (name, count) in &mut more {
        *count -= before.get(name).unwrap_or(&0);
    }
    more.retain(|_, count| *count > 0);
    more
}

/// A name for people: what the thread calls itself, and its id.
fn name_of(id: Pid) -> String {
    let id = id.as_raw_nonzero();
    let name = std::fs::read_to_string(format!("/proc/self/task/{id}/comm"));
    format!("{} {id}", name.as_deref().unwrap_or("ended").trim())
}
