//! What is counted for operators: of each export, and of the peers that were sent away.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// What has come of an export's claims so far. Attachments add to it now and then, not at each
/// command.
#[derive(Debug, Default)]
pub struct Tally {
    /// Claims that were granted.
    pub claims: AtomicU64,
    /// Commands received from claimants.
    pub commands: AtomicU64,
    /// Bytes received from claimants, as far as a stream carries them.
    pub bytes_received: AtomicU64,
    /// Bytes sent to claimants.
    pub bytes_sent: AtomicU64,
}

/// A moment of an attachment's own counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Commands received.
    pub commands: u64,
    /// Bytes received.
    pub bytes_received: u64,
    /// Bytes sent.
    pub bytes_sent: u64,
}

impl Tally {
    /// Adds what an attachment has done between two moments.
    pub fn add(&self, before: Counts, now: Counts) {
        for (total, before, now) in [
            (&self.commands, before.commands, now.commands),
            (
                &self.bytes_received,
                before.bytes_received,
                now.bytes_received,
            ),
            (&self.bytes_sent, before.bytes_sent, now.bytes_sent),
        ] {
            total.fetch_add(now.saturating_sub(before), Ordering::Relaxed);
        }
    }
}

/// Peers that were sent away, by reason.
#[derive(Debug, Default)]
pub struct Refused(Mutex<BTreeMap<&'static str, u64>>);

impl Refused {
    /// Counts one.
    pub fn count(&self, reason: &'static str) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(reason).or_default() += 1;
    }

    /// All counts so far.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}
