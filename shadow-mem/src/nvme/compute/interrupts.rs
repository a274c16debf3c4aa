//! The guest's interrupt vectors: which eventfd each signals, what waits while masked, and what
//! is held back for the guest that asked for fewer interrupts (`coalescing`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_vfio::FunctionError;
use vmm_sys_util::eventfd::EventFd;

#[derive(Default)]
struct Vector {
    event: Option<Arc<EventFd>>,
    masked: bool,
    /// Raised while masked or without an eventfd.
    pending: bool,
    /// Completions that were posted since the last signal.
    raised: u32,
    /// When the first of them was held back.
    held_since: Option<Instant>,
    /// Coalescing does not apply to it (NVMe 1.4 §5.21.1.9).
    exempt: bool,
}

/// How far interrupts are held back (NVMe 1.4 §5.21.1.8): until there are so many completions,
/// or the first of them has waited for so long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Coalescing {
    pub(super) completions: u32,
    pub(super) time: Duration,
}

impl Coalescing {
    fn is_on(self) -> bool {
        self.completions > 1 && !self.time.is_zero()
    }
}

/// The MSI-X vectors of the function.
pub(super) struct Interrupts {
    vectors: Vec<Vector>,
    /// The vectors whose `raised` is not 0, so that a batch signals each once.
    raised: Vec<u16>,
    coalescing: Coalescing,
}

impl Interrupts {
    pub(super) fn new(count: u32) -> Self {
        Self {
            vectors: (0..count).map(|_| Vector::default()).collect(),
            raised: Vec::with_capacity(count as usize),
            coalescing: Coalescing::default(),
        }
    }

    pub(super) fn len(&self) -> u32 {
        self.vectors.len() as u32
    }

    pub(super) fn set(
        &mut self,
        first: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        let count = self.vectors.len();
        let vectors = (first as usize)
            .checked_add(events.len())
            .and_then(|end| self.vectors.get_mut(first as usize..end))
            .ok_or_else(|| {
                FunctionError::Unsupported(format!(
                    "interrupt vectors {first} to {} of {count} do not exist",
                    first as usize + events.len()
                ))
            })?;
        for (vector, event) in vectors.iter_mut().zip(events) {
            vector.event.clone_from(event);
            signal_pending(vector);
        }
        Ok(())
    }

    pub(super) fn mask(&mut self, vector: u32, masked: bool) -> Result<(), FunctionError> {
        let count = self.vectors.len();
        let entry = self.vectors.get_mut(vector as usize).ok_or_else(|| {
            FunctionError::Unsupported(format!(
                "interrupt vector {vector} of {count} does not exist"
            ))
        })?;
        entry.masked = masked;
        signal_pending(entry);
        Ok(())
    }

    /// Notes that a vector is to be signalled at the end of the batch.
    pub(super) fn raise(&mut self, vector: u16) {
        if let Some(entry) = self.vectors.get_mut(usize::from(vector)) {
            if entry.raised == 0 {
                self.raised.push(vector);
            }
            entry.raised += 1;
        }
    }

    /// Signals what the batch has raised, after all of its completions are in guest memory.
    pub(super) fn signal(&mut self) {
        if self.raised.is_empty() {
            return;
        }
        let coalescing = self.coalescing;
        let now = coalescing.is_on().then(Instant::now);
        self.raised.retain(|&vector| {
            let Some(entry) = self.vectors.get_mut(usize::from(vector)) else {
                return false;
            };
            if now.is_some_and(|now| holds_back(coalescing, vector, entry, now)) {
                return true;
            }
            entry.raised = 0;
            entry.held_since = None;
            if entry.masked || entry.event.is_none() {
                entry.pending = true;
            } else {
                signal(entry);
            }
            false
        });
    }

    /// When [`Self::signal`] must be called at the latest, if anything is held back.
    pub(super) fn due(&self) -> Option<Instant> {
        let held = self.raised.iter().filter_map(|&vector| {
            let since = self.vectors.get(usize::from(vector))?.held_since?;
            Some(since + self.coalescing.time)
        });
        held.min()
    }

    /// What the guest has asked for.
    pub(super) fn coalescing(&self) -> Coalescing {
        self.coalescing
    }

    /// Takes what the guest asks for.
    pub(super) fn set_coalescing(&mut self, coalescing: Coalescing) {
        self.coalescing = coalescing;
    }

    /// Whether coalescing does not apply to a vector; `None` if there is no such vector.
    pub(super) fn is_exempt(&self, vector: u32) -> Option<bool> {
        Some(self.vectors.get(vector as usize)?.exempt)
    }

    /// Exempts a vector from coalescing, or not.
    pub(super) fn set_exempt(&mut self, vector: u32, exempt: bool) {
        if let Some(entry) = self.vectors.get_mut(vector as usize) {
            entry.exempt = exempt;
        }
    }

    /// Which vectors are masked (bit 0) or exempt from coalescing (bit 1).
    pub(super) fn dump(&self) -> Vec<u8> {
        let flags = |vector: &Vector| u8::from(vector.masked) | u8::from(vector.exempt) << 1;
        self.vectors.iter().map(flags).collect()
    }

    /// As [`Self::dump`] had it.
    pub(super) fn restore(&mut self, flags: &[u8]) {
        for (vector, flags) in self.vectors.iter_mut().zip(flags) {
            vector.masked = flags & 1 != 0;
            vector.exempt = flags & 2 != 0;
        }
    }

    /// Forgets what is pending and how it is coalesced; the eventfds stay.
    pub(super) fn reset(&mut self) {
        self.forget_coalescing();
        for vector in &mut self.vectors {
            vector.pending = false;
        }
    }

    /// As a controller reset does: nothing is held back any more.
    pub(super) fn forget_coalescing(&mut self) {
        self.raised.clear();
        self.coalescing = Coalescing::default();
        for vector in &mut self.vectors {
            vector.raised = 0;
            vector.held_since = None;
            vector.exempt = false;
        }
    }
}

/// Whether a vector's signal waits for more. Vector 0 is the admin queue's: its completions
/// are never held back (NVMe 1.4 §7.5.1).
fn holds_back(coalescing: Coalescing, vector: u16, entry: &mut Vector, now: Instant) -> bool {
    if vector == 0 || entry.exempt || entry.raised >= coalescing.completions {
        return false;
    }
    let since = *entry.held_since.get_or_insert(now);
    now.duration_since(since) < coalescing.time
}

/// Makes up for what was raised while it could not be signalled. A VMM that adds vectors
/// takes all eventfds away for a moment, masked or not.
fn signal_pending(vector: &mut Vector) {
    if !vector.masked && vector.event.is_some() && std::mem::take(&mut vector.pending) {
        signal(vector);
    }
}

fn signal(vector: &Vector) {
    if let Some(event) = &vector.event {
        // An eventfd whose counter is full has a signal waiting already.
        let _ = event.write(1);
    }
}
