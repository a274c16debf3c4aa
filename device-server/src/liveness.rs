//! Signs of life of a connection, both ways.

use std::time::{Duration, Instant};

use farbus_fabric::{Counters, FabricError};

/// Silence after which the claimant is taken for dead. A live one says something every second.
const SILENCE: Duration = Duration::from_secs(5);
/// A second without a word from this side is followed by one.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// See the module's own description.
pub(crate) struct Liveness {
    /// Bytes received by the last look, and when there last were more than before.
    received: u64,
    heard: Instant,
    /// Bytes sent by the last look for that, and when it was.
    sent: u64,
    spoke: Instant,
}

impl Liveness {
    /// Of a connection that has just been made.
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            received: 0,
            heard: now,
            sent: 0,
            spoke: now,
        }
    }

    /// Looks at what was carried. Whether this side is to say something; an error is the
    /// claimant's silence.
    pub(crate) fn look(&mut self, now: Instant, counters: &Counters) -> Result<bool, FabricError> {
        let received = counters.bytes_received;
        if received != self.received {
            self.received = received;
            self.heard = now;
        }
        let mut speak = false;
        if now >= self.spoke + SIGN_OF_LIFE {
            self.spoke = now;
            speak = std::mem::replace(&mut self.sent, counters.bytes_sent) == counters.bytes_sent;
        }
        if now > self.heard + SILENCE {
            return Err(FabricError::Timeout {
                what: "a sign of life of the compute agent",
                after: SILENCE,
            });
        }
        Ok(speak)
    }

    /// When to look again at the latest.
    pub(crate) fn due(&self) -> Instant {
        (self.heard + SILENCE).min(self.spoke + SIGN_OF_LIFE)
    }
}
