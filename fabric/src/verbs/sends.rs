//! The sending half of a connection: work requests, in chains of one doorbell each.
//!
//! Work requests that the queue has no room for wait in a list of fixed size. Only every so many asks
//! for a completion, which stands for all before it; a failure always brings one.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::VolatileMemory;

use super::prepare::{MAX_PIECES, SENDS};
use super::raw::{Chain, CompletionQueue, Piece, QueuePair, Region, Write};
use crate::FabricError;
use crate::ring::{PREFIX, Prefix};

/// Work requests that may wait.
const MAX_STAGED: usize = 8192;
/// Every so many work requests, one asks for a completion.
const SIGNAL_EVERY: u64 = SENDS as u64 / 8;

/// A work request that waits for room.
struct Staged {
    pieces: [Piece; MAX_PIECES],
    count: usize,
    address: u64,
    key: u32,
    immediate: Option<u32>,
    inline: bool,
}

/// What was posted, for counters.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Posted {
    pub(super) requests: u64,
    pub(super) doorbells: u64,
}

pub(super) struct Sends {
    pair: QueuePair,
    completed: Arc<CompletionQueue>,
    /// Where messages are put together, at the offsets that they have in the peer's ring: what is
    /// there may be used again when it may be there.
    mirror: Region,
    max_pieces: usize,
    chain: Chain,
    staged: VecDeque<Staged>,
    /// Work requests are numbered from 1 in the order of their posting.
    posted: u64,
    /// All up to this one have completed.
    done: u64,
    signalled: u64,
    counts: Posted,
    failure: Option<String>,
}

impl Sends {
    pub(super) fn new(
        pair: QueuePair,
        completed: Arc<CompletionQueue>,
        mirror: Region,
        max_pieces: usize,
    ) -> Self {
        Sends {
            pair,
            completed,
            mirror,
            max_pieces,
            chain: Chain::with_capacity(SENDS as usize, SENDS as usize * 2),
            staged: VecDeque::with_capacity(MAX_STAGED),
            posted: 0,
            done: 0,
            signalled: 0,
            counts: Posted::default(),
            failure: None,
        }
    }

    pub(super) fn pair(&self) -> &QueuePair {
        &self.pair
    }

    pub(super) fn completions(&self) -> &CompletionQueue {
        &self.completed
    }

    pub(super) fn counts(&self) -> Posted {
        self.counts
    }

    pub(super) fn max_pieces(&self) -> usize {
        self.max_pieces
    }

    /// Why nothing more can be sent.
    pub(super) fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Ends the connection: the device neither sends nor receives any more.
    pub(super) fn fail(&mut self, why: &str) {
        if self.failure.is_none() {
            self.failure = Some(why.to_owned());
        }
        // A device that is gone has nothing to stop.
        let _ = self.pair.fail();
    }

    /// The number that the next work request gets, staged or not.
    pub(super) fn next_id(&self) -> u64 {
        self.posted + self.staged.len() as u64 + 1
    }

    /// Whether so many more work requests can wait.
    pub(super) fn has_room(&self, requests: usize) -> bool {
        self.staged.len() + requests <= MAX_STAGED
    }

    pub(super) fn is_waiting(&self) -> bool {
        !self.staged.is_empty()
    }

    /// Whether everything up to a work request has completed, as far as is known without looking.
    /// A number that is not given yet stands for the last one that is.
    pub(super) fn is_done(&self, id: u64) -> bool {
        self.done >= id.min(self.next_id() - 1)
    }

    /// Whether everything that was posted has completed.
    pub(super) fn is_quiet(&mut self) -> bool {
        self.reap();
        self.staged.is_empty() && self.done == self.posted
    }

    /// Appends a write. It goes out with [`Self::ring`].
    pub(super) fn push(
        &mut self,
        pieces: &[Piece],
        (address, key): (u64, u32),
        immediate: Option<u32>,
        inline: bool,
    ) {
        if self.staged.is_empty() && self.posted - self.done < u64::from(SENDS) {
            return self.append(pieces, (address, key), immediate, inline, false);
        }
        let mut kept = [Piece::default(); MAX_PIECES];
        let count = pieces.len().min(MAX_PIECES);
        kept[..count].copy_from_slice(&pieces[..count]);
        self.staged.push_back(Staged {
            pieces: kept,
            count,
            address,
            key,
            immediate,
            inline,
        });
    }

    fn append(
        &mut self,
        pieces: &[Piece],
        (address, key): (u64, u32),
        immediate: Option<u32>,
        inline: bool,
        signal: bool,
    ) {
        self.posted += 1;
        let signalled = signal || self.posted - self.signalled >= SIGNAL_EVERY;
        if signalled {
            self.signalled = self.posted;
        }
        self.chain.push(&Write {
            id: self.posted,
            pieces,
            address,
            key,
            immediate,
            signalled,
            inline,
        });
    }

    /// Posts what was appended, with one doorbell.
    pub(super) fn ring(&mut self) {
        if self.chain.is_empty() || self.failure.is_some() {
            return;
        }
        self.counts.requests += self.chain.len() as u64;
        self.counts.doorbells += 1;
        if let Err(error) = self.pair.post(&mut self.chain, &self.mirror) {
            self.fail(&format!("work requests cannot be posted: {error}"));
        }
    }

    /// Takes note of what has completed, and posts what waited for room.
    pub(super) fn reap(&mut self) {
        loop {
            let (done, failure) = (&mut self.done, &mut self.failure);
            let polled = self.completed.poll(|completion| match completion.failure {
                None => *done = completion.id.max(*done),
                // The first failure is the cause; the rest is flushed.
                Some(status) => {
                    failure.get_or_insert_with(|| status.to_string());
                }
            });
            match polled {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => {
                    self.fail(&error.to_string());
                    break;
                }
            }
        }
        while self.posted - self.done < u64::from(SENDS) {
            let Some(next) = self.staged.pop_front() else {
                break;
            };
            let pieces = next.pieces.get(..next.count).unwrap_or_default();
            self.append(
                pieces,
                (next.address, next.key),
                next.immediate,
                next.inline,
                false,
            );
        }
        self.ring();
    }

    /// Whether half of the queue is in use: time to look what has completed.
    pub(super) fn is_half_full(&self) -> bool {
        self.posted - self.done > u64::from(SENDS) / 2
    }

    /// Puts a message together; the piece that it is, and whether it travels in its request.
    pub(super) fn compose(
        &mut self,
        offset: u64,
        prefix: &Prefix,
        frame: [&[u8]; 2],
    ) -> Result<(Piece, bool), FabricError> {
        let mut at = offset as usize;
        let (memory, base) = self.mirror.memory();
        let mut len = 0;
        for part in [&prefix.encode()[..], frame[0], frame[1]] {
            let place = memory.get_slice(base + at, part.len());
            place.map_err(|_| FabricError::Closed)?.copy_from(part);
            at += part.len();
            len += part.len();
        }
        debug_assert!(len >= PREFIX);
        let piece = self.mirror.piece(offset as usize, len);
        let piece = piece.ok_or(FabricError::Closed)?;
        Ok((piece, len <= self.pair.max_inline() as usize))
    }

    /// Writes a few zeroes there, and asks for a completion.
    pub(super) fn prove(&mut self, address: u64, key: u32) {
        if let Some(piece) = self.mirror.piece(0, 8) {
            self.append(&[piece], (address, key), None, false, true);
            self.ring();
        }
    }

    /// Waits a while for everything up to a work request to complete; whether it has. A write of
    /// nothing asks for the completion.
    pub(super) fn settle(&mut self, id: u64, address: u64, key: u32, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let id = id.min(self.next_id() - 1);
        self.reap();
        if self.done >= id {
            return true;
        }
        let room = self.posted - self.done < u64::from(SENDS);
        if room && self.staged.is_empty() && self.signalled < self.posted {
            self.append(&[], (address, key), None, false, true);
            self.ring();
        }
        while self.done < id && self.failure.is_none() && Instant::now() < until {
            std::thread::yield_now();
            self.reap();
        }
        self.done >= id
    }
}
