//! For tests: a process that is killed at a certain step. A step is a store to the record or to a
//! completion queue; the one that is killed, and all after it, do not happen.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

struct Killed;

/// The process dies after so many steps, or not at all.
pub(crate) fn after(steps: Option<u32>) {
    LEFT.set(steps);
}

/// Whether the process that is to die lives yet.
pub(crate) fn is_pending() -> bool {
    LEFT.get().is_some()
}

/// One step.
pub(crate) fn step() {
    match LEFT.get() {
        Some(0) => {
            LEFT.set(None);
            resume_unwind(Box::new(Killed));
        }
        Some(left) => LEFT.set(Some(left - 1)),
        None => {}
    }
}

/// What it returns, unless it is killed meanwhile.
pub(crate) fn survives<T>(act: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(act)) {
        Ok(done) => Some(done),
        Err(why) if why.is::<Killed>() => None,
        Err(why) => resume_unwind(why),
    }
}
