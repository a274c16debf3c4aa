//! Which I/O submission queues may have commands, shared by the worker threads.

#![forbid(unsafe_code)]

use std::sync::{Condvar, Mutex, PoisonError};

use super::lock;

/// A set of queue ids, 0 to 63, from which workers take turns.
#[derive(Default)]
pub(super) struct WorkQueue {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    ready: u64,
    /// Where the search for the next one starts: round robin (NVMe 1.4 §4.13.1).
    next: u32,
    sleeping: u32,
    stop: bool,
}

impl WorkQueue {
    /// This queue may have a command.
    pub(super) fn push(&self, queue: u16) {
        let mut state = lock(&self.state);
        state.ready |= 1u64.checked_shl(u32::from(queue)).unwrap_or(0);
        if state.sleeping > 0 {
            self.wake.notify_one();
        }
    }

    /// The next queue to look into; waits for one. `None` when it is time to end.
    pub(super) fn pop(&self) -> Option<u16> {
        let mut state = lock(&self.state);
        loop {
            if state.stop {
                return None;
            }
            if state.ready != 0 {
                let turn = state.ready.rotate_right(state.next).trailing_zeros();
                let queue = (state.next + turn) % u64::BITS;
                state.ready &= !(1 << queue);
                state.next = (queue + 1) % u64::BITS;
                return Some(queue as u16);
            }
            state.sleeping += 1;
            state = self
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.sleeping -= 1;
        }
    }

    /// Ends the workers, each after the command that it is at.
    pub(super) fn stop(&self) {
        lock(&self.state).stop = true;
        self.wake.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_take_turns() {
        let work = WorkQueue::default();
        for queue in [1, 3, 63] {
            work.push(queue);
        }
        assert_eq!(work.pop(), Some(1));
        work.push(1);
        assert_eq!(
            [work.pop(), work.pop(), work.pop()],
            [Some(3), Some(63), Some(1)]
        );
    }

    #[test]
    fn a_stopped_queue_gives_nothing() {
        let work = WorkQueue::default();
        work.push(1);
        work.stop();
        assert_eq!(work.pop(), None);
    }
}
