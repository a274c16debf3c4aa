//! The guest's interrupt vectors: which eventfd each signals, and what waits while masked.

use std::sync::Arc;

use farbus_vfio::FunctionError;
use vmm_sys_util::eventfd::EventFd;

#[derive(Default)]
struct Vector {
    event: Option<Arc<EventFd>>,
    masked: bool,
    /// Raised while masked or without an eventfd.
    pending: bool,
    /// Raised in the batch at hand, not signalled yet.
    raised: bool,
}

/// The MSI-X vectors of the function.
pub(super) struct Interrupts {
    vectors: Vec<Vector>,
    /// The vectors whose `raised` is set, so that a batch signals each once.
    raised: Vec<u16>,
}

impl Interrupts {
    pub(super) fn new(count: u32) -> Self {
        Self {
            vectors: (0..count).map(|_| Vector::default()).collect(),
            raised: Vec::with_capacity(count as usize),
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
            if !std::mem::replace(&mut entry.raised, true) {
                self.raised.push(vector);
            }
        }
    }

    /// Signals what the batch has raised, after all of its completions are in guest memory.
    pub(super) fn signal(&mut self) {
        for vector in self.raised.drain(..) {
            if let Some(entry) = self.vectors.get_mut(usize::from(vector)) {
                entry.raised = false;
                if entry.masked || entry.event.is_none() {
                    entry.pending = true;
                } else {
                    signal(entry);
                }
            }
        }
    }

    /// Forgets what is pending; the eventfds stay.
    pub(super) fn reset(&mut self) {
        self.raised.clear();
        for vector in &mut self.vectors {
            vector.pending = false;
            vector.raised = false;
        }
    }
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
