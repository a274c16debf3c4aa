//! A bound on the time spent waiting for the peer.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::FabricError;

/// Time that may be spent waiting. Work of this side between two waits does not count, so a
/// device server may take the time that a reset needs.
#[derive(Debug)]
pub(super) struct Budget {
    total: Duration,
    left: Duration,
}

impl Budget {
    pub(super) fn new(total: Duration) -> Self {
        Budget { total, left: total }
    }

    pub(super) fn left(&self) -> Duration {
        self.left
    }

    /// The error for time that is used up.
    pub(super) fn timeout(&self, what: &'static str) -> FabricError {
        FabricError::Timeout {
            what,
            after: self.total,
        }
    }

    /// Runs something that waits for the peer, and takes the time it took off the budget.
    pub(super) fn charge<T>(&mut self, wait: impl FnOnce(Duration) -> T) -> T {
        let started = Instant::now();
        let result = wait(self.left);
        self.left = self.left.saturating_sub(started.elapsed());
        result
    }

    /// Waits until the descriptor is ready. `what` is what is awaited, for the error.
    pub(super) fn wait(
        &mut self,
        descriptor: BorrowedFd<'_>,
        ready: PollFlags,
        what: &'static str,
    ) -> Result<(), FabricError> {
        while !self.left.is_zero() {
            let polled = self.charge(|left| {
                let timeout = Timespec::try_from(left).ok();
                poll(
                    &mut [PollFd::from_borrowed_fd(descriptor, ready)],
                    timeout.as_ref(),
                )
            });
            match polled {
                Ok(0) | Err(Errno::INTR) => {}
                // Errors of the connection count as ready: the next call on it reports them.
                Ok(_) => return Ok(()),
                Err(errno) => {
                    return Err(FabricError::Io {
                        what: "waiting for the peer",
                        source: errno.into(),
                    });
                }
            }
        }
        Err(self.timeout(what))
    }
}
