//! The sending half: a frame as a chain of work requests, the payload first and the message last.

use super::super::prepare::MAX_PIECES;
use super::super::raw::Piece;
use super::VerbsLink;
use crate::ring::{PREFIX, Prefix, immediate};
use crate::wire::{Header, Kind, Message, RdmaKey, Submit};
use crate::{FabricError, Frame, RemoteSpan};

impl VerbsLink {
    /// Tells the peer about keys, in as many messages as it takes.
    pub(super) fn send_news(&mut self) -> Result<(), FabricError> {
        if self.news.is_empty() {
            return Ok(());
        }
        let news = std::mem::take(&mut self.news);
        for keys in news.chunks(RdmaKey::MAX) {
            let mut control = Vec::new();
            let header = Message::RdmaKeys(keys.to_vec()).encode(&mut control)?;
            self.put(&header, &control)?;
        }
        Ok(())
    }

    /// That keys are dead, the peer hears with the next frame: the device refuses them already. Only
    /// when there are many it hears at once.
    pub(super) fn bound_news(&mut self) {
        if self.news.len() < RdmaKey::MAX || !self.outgoing.has_room() {
            return;
        }
        if self.send_news().is_err() {
            self.fail("the peer cannot be told of keys that are dead");
        }
        self.sends.get_mut().ring();
    }

    /// Appends a message to the chain at hand.
    pub(super) fn put(&mut self, header: &Header, control: &[u8]) -> Result<(), FabricError> {
        let header = Header {
            epoch: self.admission.epoch(),
            ..*header
        };
        let bytes = header.encode();
        self.put_frame([&bytes, control])?;
        self.counters.messages_sent += 1;
        self.counters.payload_sent += u64::from(header.payload_len);
        self.counters.bytes_sent += u64::from(header.payload_len);
        Ok(())
    }

    /// As [`Self::put`], or without a frame: then the message says what was consumed.
    pub(super) fn put_frame(&mut self, frame: [&[u8]; 2]) -> Result<(), FabricError> {
        let len = frame[0].len() + frame[1].len();
        let sends = self.sends.get_mut();
        let place = self.outgoing.place(len).filter(|_| sends.has_room(1));
        let Some(place) = place else {
            return Err(FabricError::Backlog {
                frames: 1,
                control: len,
                spans: 0,
            });
        };
        let prefix = Prefix {
            consumed: self.incoming.tell(),
            len: len as u32,
        };
        let (piece, inline) = sends.compose(place.offset, &prefix, frame)?;
        let target = (self.peer.ring_address + place.offset, self.peer.ring_key);
        sends.push(&[piece], target, Some(immediate(place.offset)), inline);
        self.outgoing.fill(place);
        self.counters.bytes_sent += (PREFIX + len) as u64;
        Ok(())
    }

    /// Makes the peer able to write where the commands of a message want their data.
    pub(super) fn expose(&mut self, header: &Header, control: &[u8]) -> Result<(), FabricError> {
        for entry in Submit::decode(header, control)?.entries() {
            for segment in entry.segments {
                self.windows.expose(&segment, &mut self.news)?;
            }
        }
        Ok(())
    }

    /// Appends the writes of a payload to the chain at hand.
    pub(super) fn put_payload(&mut self, frame: &Frame<'_>) -> Result<(), FabricError> {
        let sends = self.sends.get_mut();
        let mut pieces = self.pieces.drain(..);
        let mut piece = pieces.next();
        let mut list = [Piece::default(); MAX_PIECES];
        for span in frame.remote {
            let mut span = *span;
            while span.len > 0 {
                let (key, good) = self.keys.resolve(&span)?;
                let (mut count, mut len) = (0, 0);
                while count < sends.max_pieces() && len < good {
                    let Some(next) = piece else {
                        return Err(lengths_differ(frame));
                    };
                    let (head, tail) = next.split_at(good - len);
                    list[count] = head;
                    count += 1;
                    len += head.len();
                    piece = if tail.is_empty() {
                        pieces.next()
                    } else {
                        Some(tail)
                    };
                }
                let list = list.get(..count).unwrap_or_default();
                sends.push(list, (span.address, key), None, false);
                span = RemoteSpan {
                    address: span.address + u64::from(len),
                    len: span.len - len,
                };
            }
        }
        match piece {
            None => Ok(()),
            Some(_) => Err(lengths_differ(frame)),
        }
    }

    pub(super) fn post(&mut self, frame: &Frame<'_>) -> Result<(), FabricError> {
        if frame.header.kind == Kind::Submit {
            self.expose(&frame.header, frame.control)?;
        }
        self.pieces.clear();
        let user = self.sends.get_mut().next_id()
            + (frame.payload.len() + frame.remote.len() + self.news.len()) as u64;
        for span in frame.payload {
            self.windows
                .gather(span, user, &mut self.pieces, &mut self.news)?;
        }
        // Each span ends at most one request early, and each key cuts at most one in two.
        let requests = self.pieces.len() + 2 * frame.remote.len() + 16;
        if !self.sends.get_mut().has_room(requests) {
            return Err(FabricError::Backlog {
                frames: 1,
                control: frame.control.len(),
                spans: requests,
            });
        }
        self.send_news()?;
        self.put_payload(frame)?;
        self.put(&frame.header, frame.control)
    }

    /// Nothing may reach the other's memory any more.
    pub(super) fn fail(&mut self, why: &str) {
        self.sends.get_mut().fail(why);
    }

    /// Where a write of nothing goes.
    pub(super) fn nowhere(&self) -> (u64, u32) {
        (self.peer.ring_address, self.peer.ring_key)
    }
}

fn lengths_differ(frame: &Frame<'_>) -> FabricError {
    FabricError::FrameLengths {
        kind: frame.header.kind,
        declared_control: frame.header.control_len as usize,
        control: frame.control.len(),
        declared_payload: frame.header.payload_len.into(),
        payload: frame.remote.iter().map(|span| u64::from(span.len)).sum(),
    }
}
