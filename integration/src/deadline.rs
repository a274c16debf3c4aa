//! Points in time after which waiting is an error.
//!
//! Every wait of the test bed takes a [`Deadline`], so that a test ends with a sentence about what
//! did not happen, never with a hang.

use std::time::{Duration, Instant};

use crate::error::Error;

/// A point in time, and the length of the wait that led to it.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    at: Instant,
    after: Duration,
}

impl Deadline {
    /// A deadline this far in the future.
    ///
    /// `FARBUS_TIMEOUT_SCALE` (a number, 1 unless set) multiplies every deadline: emulated machines
    /// on a busy host are slow, not wrong.
    #[must_use]
    pub fn after(duration: Duration) -> Self {
        let scale = std::env::var("FARBUS_TIMEOUT_SCALE")
            .ok()
            .and_then(|v| v.parse::<f64>().ok())
            .filter(|s| (0.01..=1000.0).contains(s))
            .unwrap_or(1.0);
        let after = duration.mul_f64(scale);
        Self {
            at: Instant::now() + after,
            after,
        }
    }

    /// A deadline this many seconds in the future.
    #[must_use]
    pub fn secs(seconds: u64) -> Self {
        Self::after(Duration::from_secs(seconds))
    }

    /// What is left of the wait; zero once it has passed.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// Whether the time is up.
    #[must_use]
    pub fn has_passed(&self) -> bool {
        self.remaining().is_zero()
    }

    /// The error that says that `what` did not happen in time.
    pub fn missed(&self, what: impl Into<String>) -> Error {
        self.missed_with(what, "")
    }

    /// Like [`Deadline::missed`], with what was seen instead.
    pub fn missed_with(&self, what: impl Into<String>, seen: &str) -> Error {
        let detail = if seen.is_empty() {
            String::new()
        } else {
            format!("; seen last:\n{seen}")
        };
        Error::Deadline {
            what: what.into(),
            after: self.after,
            detail,
        }
    }
}

impl From<Duration> for Deadline {
    fn from(duration: Duration) -> Self {
        Self::after(duration)
    }
}
