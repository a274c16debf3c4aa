//! What the network has not taken yet.
//!
//! Control bytes are copied into a ring, payloads stay where they are: a queued span keeps
//! its memory mapped and is sent from there later. All storage is set aside at the start and
//! its size is the bound, so a peer that reads slowly costs no memory.

use std::collections::VecDeque;
use std::sync::Arc;

use vm_memory::MmapRegion;

use super::raw::Gather;
use crate::wire::HEADER_LEN;
use crate::{FabricError, Span};

/// Frames that may wait. Each outstanding command brings at most one.
const MAX_FRAMES: usize = 1024;
/// Bytes of headers and control parts that may wait: a few of the longest, or one ordinary
/// message for each of [`MAX_FRAMES`].
const MAX_CONTROL: usize = 256 * 1024;
/// Spans that may wait: four of the longest payloads in pages of 4 KiB.
const MAX_SPANS: usize = 16 * 1024;

/// A frame in the pieces it is sent in.
#[derive(Clone, Copy)]
pub(super) struct Parts<'a> {
    pub(super) header: &'a [u8; HEADER_LEN],
    pub(super) control: &'a [u8],
    pub(super) payload: &'a [Span],
    pub(super) payload_len: u32,
}

impl<'a> Parts<'a> {
    pub(super) fn len(&self) -> usize {
        HEADER_LEN + self.control.len() + self.payload_len as usize
    }

    /// Appends what follows the first `skip` bytes, as far as there is place for it.
    pub(super) fn gather(
        &self,
        mut skip: usize,
        gather: &mut Gather<'a>,
    ) -> Result<(), FabricError> {
        for bytes in [self.header.as_slice(), self.control] {
            gather.push(bytes.get(skip..).unwrap_or_default());
            skip = skip.saturating_sub(bytes.len());
        }
        for span in self.payload {
            if skip >= span.len {
                skip -= span.len;
                continue;
            }
            if !gather.push_span(span, skip)? {
                break;
            }
            skip = 0;
        }
        Ok(())
    }
}

/// A piece of a waiting frame.
enum Piece {
    /// As many of the next bytes in the ring.
    Control(usize),
    /// Payload, where it is.
    Memory(Span),
}

/// What is left of a waiting frame.
struct Waiting {
    bytes: usize,
    payload_len: u32,
}

/// Frames, of which the first may be sent in part, in the order they were given.
pub(super) struct Backlog {
    pieces: VecDeque<Piece>,
    control: VecDeque<u8>,
    frames: VecDeque<Waiting>,
}

impl Backlog {
    pub(super) fn new() -> Self {
        Backlog {
            pieces: VecDeque::with_capacity(MAX_SPANS + MAX_FRAMES),
            control: VecDeque::with_capacity(MAX_CONTROL),
            frames: VecDeque::with_capacity(MAX_FRAMES),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Whether payload waits in `memory[offset .. offset + len]`.
    pub(super) fn has_payload_in(
        &self,
        memory: &Arc<MmapRegion>,
        offset: usize,
        len: usize,
    ) -> bool {
        let end = offset.saturating_add(len);
        self.pieces.iter().any(|piece| match piece {
            Piece::Control(_) => false,
            Piece::Memory(span) => {
                Arc::ptr_eq(&span.memory, memory)
                    && span.offset < end
                    && span.offset + span.len > offset
            }
        })
    }

    /// Spans that wait, or more: the pieces of control are counted too.
    fn spans(&self) -> usize {
        self.pieces.len()
    }

    /// Fails unless the frame could wait here whole.
    pub(super) fn check_room(&self, parts: &Parts<'_>) -> Result<(), FabricError> {
        let control = self.control.len() + HEADER_LEN + parts.control.len();
        let spans = self.spans().saturating_add(parts.payload.len());
        if self.frames.len() < MAX_FRAMES && control <= MAX_CONTROL && spans <= MAX_SPANS {
            return Ok(());
        }
        Err(FabricError::Backlog {
            frames: self.frames.len(),
            control: self.control.len(),
            spans: self.spans(),
        })
    }

    /// Appends what follows the first `skip` bytes of a frame.
    pub(super) fn push(&mut self, parts: &Parts<'_>, mut skip: usize) {
        self.frames.push_back(Waiting {
            bytes: parts.len() - skip,
            payload_len: parts.payload_len,
        });
        let before = self.control.len();
        for bytes in [parts.header.as_slice(), parts.control] {
            self.control.extend(bytes.get(skip..).unwrap_or_default());
            skip = skip.saturating_sub(bytes.len());
        }
        let control = self.control.len() - before;
        if control > 0 {
            self.pieces.push_back(Piece::Control(control));
        }
        for span in parts.payload {
            if skip < span.len {
                self.pieces.push_back(Piece::Memory(span.after(skip)));
            }
            skip = skip.saturating_sub(span.len);
        }
    }

    /// Appends the pieces from the front on, as far as there is place for them.
    pub(super) fn gather<'a>(&'a self, gather: &mut Gather<'a>) -> Result<(), FabricError> {
        let (first, second) = self.control.as_slices();
        let mut at = 0;
        for piece in &self.pieces {
            let placed = match piece {
                Piece::Control(len) => {
                    // The ring's end may divide the piece.
                    let end = at + len;
                    let head = first.get(at..end.min(first.len())).unwrap_or_default();
                    let tail = second
                        .get(at.saturating_sub(first.len())..end.saturating_sub(first.len()))
                        .unwrap_or_default();
                    at = end;
                    gather.push(head) && gather.push(tail)
                }
                Piece::Memory(span) => gather.push_span(span, 0)?,
            };
            if !placed {
                break;
            }
        }
        Ok(())
    }

    /// Removes the first `sent` bytes and reports the payload length of each frame that has
    /// thereby left whole.
    pub(super) fn consume(&mut self, sent: usize, mut left: impl FnMut(u32)) {
        let mut bytes = sent;
        while let Some(piece) = self.pieces.front_mut() {
            let len = match piece {
                Piece::Control(len) => *len,
                Piece::Memory(span) => span.len,
            };
            let taken = len.min(bytes);
            bytes -= taken;
            match piece {
                Piece::Control(len) => {
                    *len -= taken;
                    self.control.drain(..taken);
                }
                Piece::Memory(span) => span.skip(taken),
            }
            if taken < len {
                break;
            }
            self.pieces.pop_front();
        }
        let mut bytes = sent;
        while let Some(frame) = self.frames.front_mut() {
            let taken = frame.bytes.min(bytes);
            bytes -= taken;
            frame.bytes -= taken;
            if frame.bytes > 0 {
                break;
            }
            left(frame.payload_len);
            self.frames.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_piece_that_the_end_of_the_ring_divides_is_sent_whole() {
        const LEN: usize = HEADER_LEN + 30_000;
        let bytes = |frame: u8| [vec![frame; HEADER_LEN], vec![frame ^ 0x80; 30_000]].concat();
        let push = |backlog: &mut Backlog, frame: u8| {
            let bytes = bytes(frame);
            let parts = Parts {
                header: bytes.first_chunk().unwrap(),
                control: &bytes[HEADER_LEN..],
                payload: &[],
                payload_len: 0,
            };
            backlog.check_room(&parts).unwrap();
            backlog.push(&parts, 0);
        };
        let mut backlog = Backlog::new();
        (0..8).for_each(|frame| push(&mut backlog, frame));
        backlog.consume(8 * LEN - 1000, |_| {});
        push(&mut backlog, 8);
        push(&mut backlog, 9);
        let before_end = backlog.control.as_slices().0.len();
        assert!(
            (1001..1000 + LEN).contains(&before_end),
            "frame 8 is divided"
        );

        let (one, mut other) = UnixStream::pair().unwrap();
        let mut gather = Gather::new();
        backlog.gather(&mut gather).unwrap();
        let sent = gather.send(one.as_fd()).unwrap().unwrap();
        let mut left = 0;
        backlog.consume(sent, |_| left += 1);

        assert_eq!((sent, left), (1000 + 2 * LEN, 3));
        assert!(backlog.is_empty());
        let mut arrived = vec![0; sent];
        other.read_exact(&mut arrived).unwrap();
        let expected = [&bytes(7)[LEN - 1000..], &bytes(8), &bytes(9)].concat();
        assert!(arrived == expected);
    }
}
