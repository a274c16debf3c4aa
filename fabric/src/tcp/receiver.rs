//! Takes frames out of the byte stream.
//!
//! Headers and control parts go through a staging buffer, payloads do not: as soon as a
//! control part is complete, the sink says where the payload lands and the kernel puts it
//! there. The exception is a payload's first bytes, when they came along with the beginning of
//! a frame that was not known yet. They are copied: to read [`EAGER`] bytes more than needed
//! costs less than another call, so a small message costs one call, and so do many of them.
//!
//! The staging buffer's bounds are the protocol's limits, so no length that a peer declares
//! makes it grow.

use std::os::fd::BorrowedFd;

use vm_memory::MmapRegion;

use super::landing::Landing;
use super::raw::Scatter;
use crate::wire::{Admission, HEADER_LEN, Header, MAX_CONTROL};
use crate::{Counters, FabricError, Received, Sink};

/// How much of what comes next is read along: a message with one page of data.
const EAGER: usize = 5 << 10;
const STAGING_LEN: usize = HEADER_LEN + MAX_CONTROL + EAGER;

/// Where the frame at the beginning of what is staged stands.
#[derive(Clone, Copy)]
enum Stage {
    /// Its header is not complete.
    Header,
    /// Its header is admitted, its control part is not complete.
    Control(Header),
    /// Its payload is landing, or has landed. So many bytes of it are staged behind the
    /// control part, and have been copied.
    Payload(Header, usize),
}

pub(super) struct Receiver {
    staging: Box<[u8]>,
    /// What is staged: the frame at hand, and what came behind it.
    start: usize,
    end: usize,
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
            start: 0,
            end: 0,
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
            let known = match self.stage {
                Stage::Header => {
                    if let Some(bytes) = self.staged().first_chunk() {
                        let header = Header::decode(bytes)?;
                        admission.admit(&header)?;
                        self.stage = Stage::Control(header);
                        continue;
                    }
                    0
                }
                Stage::Control(header) => {
                    if self.staged().len() >= header.prefix_len() {
                        self.begin_payload(header, sink)?;
                        continue;
                    }
                    header.prefix_len()
                }
                Stage::Payload(header, staged) => {
                    if self.landing.left() == 0 {
                        self.deliver(header, staged, sink, counters)?;
                        return Ok(Received::Message);
                    }
                    header.prefix_len()
                }
            };
            let is_drained = std::mem::take(&mut self.drained);
            if is_drained || !self.read(socket, known + EAGER, counters)? {
                return Ok(Received::Idle);
            }
        }
    }

    fn staged(&self) -> &[u8] {
        self.staging.get(self.start..self.end).unwrap_or_default()
    }

    fn control(&self, header: &Header) -> &[u8] {
        let control = self.start + HEADER_LEN..self.start + header.prefix_len();
        self.staging.get(control).unwrap_or_default()
    }

    fn begin_payload(&mut self, header: Header, sink: &mut dyn Sink) -> Result<(), FabricError> {
        let mut copied = 0;
        if header.payload_len > 0 {
            let control = self.start + HEADER_LEN..self.start + header.prefix_len();
            let control = self.staging.get(control).unwrap_or_default();
            self.landing.begin(sink, &header, control)?;
            let payload = self.start + header.prefix_len();
            copied = (self.end - payload).min(header.payload_len as usize);
            let staged = self.staging.get(payload..payload + copied);
            self.landing.fill(staged.unwrap_or_default())?;
            if self.landing.left() > 0 {
                // Nothing is behind it yet.
                self.end = payload;
                copied = 0;
            }
        }
        self.stage = Stage::Payload(header, copied);
        Ok(())
    }

    fn deliver(
        &mut self,
        header: Header,
        staged: usize,
        sink: &mut dyn Sink,
        counters: &mut Counters,
    ) -> Result<(), FabricError> {
        self.landing.end();
        counters.messages_received += 1;
        counters.payload_received += u64::from(header.payload_len);
        sink.deliver(&header, self.control(&header))?;
        self.start += header.prefix_len() + staged;
        self.stage = Stage::Header;
        Ok(())
    }

    /// Reads the rest of the payload at hand, then staging until `limit` bytes are there. False
    /// if nothing has arrived.
    fn read(
        &mut self,
        socket: BorrowedFd<'_>,
        limit: usize,
        counters: &mut Counters,
    ) -> Result<bool, FabricError> {
        if self.start > 0 {
            self.staging.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let mut scatter = Scatter::new();
        if self.landing.scatter(&mut scatter)? {
            let room = self.staging.get_mut(self.end..limit).unwrap_or_default();
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
                self.end += self.landing.advance(got);
                Ok(true)
            }
        }
    }

    fn ended(&self) -> FabricError {
        let payload = match self.stage {
            Stage::Payload(header, _) => header.payload_len as usize - self.landing.left(),
            Stage::Header | Stage::Control(_) => 0,
        };
        match self.staged().len() + payload {
            0 => FabricError::Closed,
            received => FabricError::Truncated { received },
        }
    }
}
