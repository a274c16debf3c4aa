//! A timer that an event loop waits for, finer than its own timeouts.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// See the module's own description. Nobody needs to read it who takes each time that it goes off
/// for an event (edge-triggered).
pub(crate) struct Timer {
    timer: OwnedFd,
    /// When it goes off.
    set: Option<Instant>,
}

impl Timer {
    /// One that does not go off.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, flags).context("a timer cannot be made")?;
        Ok(Self { timer, set: None })
    }

    /// Has it go off then, or never.
    pub(crate) fn set(&mut self, due: Option<Instant>) -> anyhow::Result<()> {
        if due == self.set {
            return Ok(());
        }
        self.set = due;
        // No time at all would stop the timer.
        let soon = Duration::from_nanos(1);
        let left = due.map(|due| due.saturating_duration_since(Instant::now()).max(soon));
        let left = left.unwrap_or_default();
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            },
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)
            .context("the timer cannot be set")?;
        Ok(())
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}
