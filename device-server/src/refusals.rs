//! Keeps the log readable while peers are turned away: agents ask again every few seconds for
//! as long as an export has failed, and strangers knock as often as they like.
//!
//! What is said of a peer is said once, and then at most once a minute with a count. What is
//! remembered for that, and how much is said of peers that always have something new, is
//! bounded.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long the same is not said again.
const QUIET: Duration = Duration::from_secs(60);
/// How many different things are remembered, and so said within [`QUIET`].
const MAX_KINDS: usize = 256;

/// What was said lately.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    said: Mutex<Said>,
    /// Keyed at random, so that no peer can choose texts that count as the same.
    hasher: RandomState,
}

#[derive(Debug, Default)]
struct Said {
    kinds: HashMap<u64, Kind>,
    /// Refusals of kinds for which there was no room, since the last line.
    untold: u64,
}

#[derive(Debug)]
struct Kind {
    at: Instant,
    /// How many were not said since then.
    repeats: u64,
}

/// What a line of the log tells of those that were left out before it; empty if none were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LeftOut {
    repeats: u64,
    others: u64,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.repeats {
            0 => {}
            1 => f.write_str(" (once more since that was said last)")?,
            n => write!(f, " ({n} times more since that was said last)")?,
        }
        match self.others {
            0 => Ok(()),
            n => write!(f, " (and {n} others, of which nothing was said)"),
        }
    }
}

impl Refusals {
    /// Whether to say at `now` that a peer was refused an export, or anything, for a reason;
    /// and what to add to it.
    pub(crate) fn note(
        &self,
        now: Instant,
        peer: IpAddr,
        export: Option<&str>,
        reason: &str,
    ) -> Option<LeftOut> {
        let kind = self.hasher.hash_one((peer, export, reason));
        // Counts are whole whenever the lock is free.
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let repeats = match said.kinds.get_mut(&kind) {
            Some(kind) if now.saturating_duration_since(kind.at) < QUIET => {
                kind.repeats += 1;
                return None;
            }
            Some(kind) => kind.repeats,
            None => {
                if said.kinds.len() >= MAX_KINDS {
                    said.kinds
                        .retain(|_, kind| now.saturating_duration_since(kind.at) < QUIET);
                }
                if said.kinds.len() >= MAX_KINDS {
                    said.untold += 1;
                    return None;
                }
                0
            }
        };
        said.kinds.insert(
            kind,
            Kind {
                at: now,
                repeats: 0,
            },
        );
        let others = std::mem::take(&mut said.untold);
        Some(LeftOut { repeats, others })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7));
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn retries_are_said_once_and_then_once_a_minute_with_their_number() {
        let refusals = Refusals::default();
        let begin = Instant::now();
        let lines: Vec<(u32, String)> = (0..100)
            .filter_map(|n| {
                let said = refusals.note(begin + 2 * n * SECOND, PEER, Some("disk0"), "gone")?;
                Some((2 * n, said.to_string()))
            })
            .collect();
        let more = " (29 times more since that was said last)".to_owned();
        assert_eq!(
            lines,
            [
                (0, String::new()),
                (60, more.clone()),
                (120, more.clone()),
                (180, more)
            ]
        );
    }

    #[test]
    fn other_peers_exports_and_reasons_are_said_of_their_own() {
        let refusals = Refusals::default();
        let now = Instant::now();
        let other = "2001:db8::7".parse().unwrap();
        for (peer, export, reason) in [
            (PEER, Some("disk0"), "gone"),
            (other, Some("disk0"), "gone"),
            (PEER, Some("disk1"), "gone"),
            (PEER, Some("disk0"), "busy"),
            (PEER, None, "gone"),
        ] {
            let said = |now| refusals.note(now, peer, export, reason);
            assert_eq!(said(now), Some(LeftOut::default()));
            assert_eq!(said(now), None);
        }
    }

    #[test]
    fn peer_with_ever_new_reasons_takes_no_more_memory_or_lines_than_allowed() {
        let refusals = Refusals::default();
        let now = Instant::now();
        let note = |n: u64, now| refusals.note(now, PEER, None, &n.to_string());
        let lines = (0..10_000).filter_map(|n| note(n, now)).count();
        assert_eq!(lines, MAX_KINDS);
        let later = note(20_000, now + QUIET).unwrap().to_string();
        assert_eq!(later, " (and 9744 others, of which nothing was said)");
        assert_eq!(refusals.said.lock().unwrap().kinds.len(), 1);
    }
}
