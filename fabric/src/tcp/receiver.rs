//! Takes frames out of the byte stream.
//!
//! Headers and control parts go through a staging buffer, payloads do not: as soon as a
//! control part is complete, the sink says where the payload lands and the kernel puts it
//! there. The same call also takes the beginning of the next frame ([`LOOK_AHEAD`] bytes,
//! among which no payload can be), so that under load a message costs one call.
//!
//! The staging buffer always begins with a frame. Its bounds are the protocol's limits, so no
//! length that a peer declares makes it grow.

use std::os::fd::BorrowedFd;

use vm_memory::MmapRegion;

use super::landing::Landing;
use super::raw::Scatter;
use crate::wire::{Admission, HEADER_LEN, Header, LOOK_AHEAD, MAX_CONTROL};
use crate::{Counters, FabricError, Received, Sink};

const STAGING_LEN: usize = HEADER_LEN + MAX_CONTROL + LOOK_AHEAD;

/// Where the frame at the beginning of the staging buffer stands.
#[derive(Clone, Copy)]
enum Stage {
    /// Its header is not complete.
    Header,
    /// Its header is admitted, its control part is not complete.
    Control(Header),
    /// Its payload is landing, or has landed.
    Payload(Header),
}

pub(super) struct Receiver {
    staging: Box<[u8]>,
    filled: usize,
    stage: Stage,
    landing: Landing,
    /// The last call got less than it asked for: the socket is empty, and asking again
    /// before the descriptor is ready would be a call for nothing.
    drained: bool,
}

impl Receiver {
    pub(super) fn new() -> Result<Self, FabricError> {
        Ok(Receiver {
            staging: vec![0; STAGING_LEN].into_boxed_slice(),
            filled: 0,
            stage: Stage::Header,
            landing: Landing::new()?,
            drained: false,
        })
    }

    pub(super) fn revoke(&mut self, memory: &MmapRegion, offset: usize, len: usize) {
        self.landing.revoke(memory, offset, len);
    }

    /// Receives at most one message.
    pub(super) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        admission: &Admission,
        sink: &mut dyn Sink,
        counters: &mut Counters,
    ) -> Result<Received, FabricError> {
        loop {
            let limit = match self.stage {
                Stage::Header => {
                    if let Some(bytes) = self.staged().first_chunk() {
                        let header = Header::decode(bytes)?;
                        admission.admit(&header)?;
                        self.stage = Stage::Control(header);
                        continue;
                    }
                    LOOK_AHEAD
                }
                Stage::Control(header) => {
                    let end = header.prefix_len();
                    if self.filled >= end {
                        self.begin_payload(header, sink)?;
                        continue;
                    }
                    // What follows the control part is the next frame, or the payload, of
                    // which nothing may be read before its place is known.
                    if header.payload_len == 0 {
                        end + LOOK_AHEAD
                    } else {
                        end
                    }
                }
                Stage::Payload(header) => {
                    if self.landing.left() == 0 {
                        self.deliver(header, sink, counters)?;
                        return Ok(Received::Message);
                    }
                    header.prefix_len() + LOOK_AHEAD
                }
            };
            if std::mem::take(&mut self.drained) || !self.read(socket, limit, counters)? {
                return Ok(Received::Idle);
            }
        }
    }

    fn staged(&self) -> &[u8] {
        self.staging.get(..self.filled).unwrap_or_default()
    }

    fn control(&self, header: &Header) -> &[u8] {
        self.staging
            .get(HEADER_LEN..header.prefix_len())
            .unwrap_or_default()
    }

    fn begin_payload(&mut self, header: Header, sink: &mut dyn Sink) -> Result<(), FabricError> {
        if header.payload_len > 0 {
            let control = self
                .staging
                .get(HEADER_LEN..header.prefix_len())
                .unwrap_or_default();
            self.landing.begin(sink, &header, control)?;
        }
        self.stage = Stage::Payload(header);
        Ok(())
    }

    fn deliver(
        &mut self,
        header: Header,
        sink: &mut dyn Sink,
        counters: &mut Counters,
    ) -> Result<(), FabricError> {
        self.landing.end();
        counters.messages_received += 1;
        counters.payload_received += u64::from(header.payload_len);
        sink.deliver(&header, self.control(&header))?;
        let end = header.prefix_len();
        self.staging.copy_within(end..self.filled, 0);
        self.filled -= end;
        self.stage = Stage::Header;
        Ok(())
    }

    /// Reads the rest of the payload at hand, then staging up to `limit`. False if nothing
    /// has arrived.
    fn read(
        &mut self,
        socket: BorrowedFd<'_>,
        limit: usize,
        counters: &mut Counters,
    ) -> Result<bool, FabricError> {
        let mut scatter = Scatter::new();
        if self.landing.scatter(&mut scatter)? {
            let room = self.staging.get_mut(self.filled..limit).unwrap_or_default();
            scatter.push(room);
        }
        let asked = scatter.bytes();
        counters.receive_calls += 1;
        let got = scatter.receive(socket).map_err(|source| FabricError::Io {
            what: "receiving from the peer",
            source,
        })?;
        match got {
            None => Ok(false),
            Some(0) => Err(self.ended()),
            Some(got) => {
                counters.bytes_received += got as u64;
                self.drained = got < asked;
                self.filled += self.landing.advance(got);
                Ok(true)
            }
        }
    }

    fn ended(&self) -> FabricError {
        let payload = match self.stage {
            Stage::Payload(header) => header.payload_len as usize - self.landing.left(),
            Stage::Header | Stage::Control(_) => 0,
        };
        match self.filled + payload {
            0 => FabricError::Closed,
            received => FabricError::Truncated { received },
        }
    }
}
