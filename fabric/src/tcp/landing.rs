//! Where the payload at hand lands, and how it is turned away when its memory is revoked.

use std::sync::Arc;

use vm_memory::{MmapRegion, VolatileMemory};

use super::raw::Scatter;
use crate::link::check_span;
use crate::wire::{Header, MAX_ENTRIES, MAX_PAYLOAD};
use crate::{FabricError, Sink, Span};

/// Where bytes go that nobody wants any more: they are read to get past them. Longer pieces
/// land here several times.
const SCRATCH_LEN: usize = 64 * 1024;

/// Spans for which room is set aside: pages of 4 KiB of the largest payload, and one more for each command
/// whose data begin within a page. Smaller spans than that cost storage once.
const MAX_SPANS: usize = (MAX_PAYLOAD as usize >> 12) + MAX_ENTRIES as usize;

/// The payload that is arriving.
pub(super) struct Landing {
    /// Where it lands. Those before `next` are full; that at `next` is cut down to the rest.
    spans: Vec<Span>,
    next: usize,
    left: usize,
    scratch: Arc<MmapRegion>,
}

impl Landing {
    pub(super) fn new() -> Result<Self, FabricError> {
        let scratch = MmapRegion::new(SCRATCH_LEN).map_err(|error| FabricError::Io {
            what: "mapping memory for unwanted data",
            source: std::io::Error::other(error),
        })?;
        Ok(Landing {
            spans: Vec::with_capacity(MAX_SPANS),
            next: 0,
            left: 0,
            scratch: Arc::new(scratch),
        })
    }

    /// Bytes that are still to come.
    pub(super) fn left(&self) -> usize {
        self.left
    }

    /// Asks the sink where the payload lands, and checks the answer.
    pub(super) fn begin(
        &mut self,
        sink: &mut dyn Sink,
        header: &Header,
        control: &[u8],
    ) -> Result<(), FabricError> {
        self.end();
        sink.land(header, control, &mut self.spans)?;
        self.spans.iter().try_for_each(check_span)?;
        let landing: u64 = self.spans.iter().map(|span| span.len as u64).sum();
        if landing != u64::from(header.payload_len) {
            return Err(FabricError::FrameLengths {
                kind: header.kind,
                declared_control: header.control_len as usize,
                control: control.len(),
                declared_payload: header.payload_len.into(),
                payload: landing,
            });
        }
        self.left = header.payload_len as usize;
        Ok(())
    }

    /// Lets go of the spans, and keeps the storage that held them.
    pub(super) fn end(&mut self) {
        self.spans.clear();
        self.next = 0;
        self.left = 0;
    }

    /// Appends the spans that are still to be filled; false if not all found place.
    pub(super) fn scatter<'a>(&'a self, scatter: &mut Scatter<'a>) -> Result<bool, FabricError> {
        for span in self.spans.get(self.next..).unwrap_or_default() {
            if !scatter.push_span(span)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Copies the beginning of the payload, which has been received to elsewhere.
    pub(super) fn fill(&mut self, bytes: &[u8]) -> Result<(), FabricError> {
        let mut rest = bytes;
        for span in self.spans.get(self.next..).unwrap_or_default() {
            let (now, later) = rest.split_at(rest.len().min(span.len));
            let slice = span.memory.get_slice(span.offset, now.len());
            slice
                .map_err(|_| FabricError::SpanOutOfBounds {
                    offset: span.offset,
                    len: span.len,
                    size: span.memory.size(),
                })?
                .copy_from(now);
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        self.advance(bytes.len());
        Ok(())
    }

    /// `bytes` more have arrived. Returns how many of them were beyond the payload.
    pub(super) fn advance(&mut self, bytes: usize) -> usize {
        let mut arrived = bytes.min(self.left);
        let beyond = bytes - arrived;
        self.left -= arrived;
        while let Some(span) = self.spans.get_mut(self.next) {
            let taken = arrived.min(span.len);
            span.skip(taken);
            arrived -= taken;
            if span.len > 0 {
                break;
            }
            self.next += 1;
        }
        beyond
    }

    /// Nothing of the payload lands in this range any more.
    ///
    /// Ranges are compared by address, so that it does not matter which handle of a mapping
    /// the sink used.
    pub(super) fn revoke(&mut self, memory: &MmapRegion, offset: usize, len: usize) {
        let start = (memory.as_ptr() as usize).saturating_add(offset);
        let end = start.saturating_add(len);
        let mut at = self.next;
        while let Some(span) = self.spans.get(at) {
            let first = (span.memory.as_ptr() as usize).saturating_add(span.offset);
            let from = start.saturating_sub(first).min(span.len);
            let to = end.saturating_sub(first).min(span.len);
            if from >= to {
                at += 1;
                continue;
            }
            let whole = span.clone();
            let head = whole.before(from);
            let tail = whole.after(to);
            let scraps = (from..to).step_by(SCRATCH_LEN).map(|done| Span {
                memory: Arc::clone(&self.scratch),
                offset: 0,
                len: (to - done).min(SCRATCH_LEN),
            });
            let pieces = std::iter::once(head)
                .chain(scraps)
                .chain(std::iter::once(tail))
                .filter(|piece| piece.len > 0);
            let pieces: Vec<Span> = pieces.collect();
            let count = pieces.len();
            self.spans.splice(at..=at, pieces);
            at += count;
        }
    }
}
