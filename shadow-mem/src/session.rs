//! One claim as an engine uses it: a link, and the buffers to send from.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use farbus_fabric::wire::{self, CompleteBatch, Message};
use farbus_fabric::{Counters, FabricError, Frame, Link, Received, RemoteSpan, Sink, Span};
use farbus_vfio::DmaWindow;
use farbus_vfio::nvme::PAGE_SIZE;

/// Spans that one message gathers at most: what one `sendmsg` or one chain of work requests
/// takes, less the control part.
const MAX_SPANS: usize = 1000;
/// Data that one message asks to be moved, in bytes, beyond which no command is added: so that
/// the first completion need not wait for the whole of a deep queue.
const MAX_BATCH: u64 = 64 << 10;

/// Messages received before other work has its turn.
const RECEIVE_BURST: usize = 64;
/// Silence, in ticks of a second, after which the peer is taken for dead.
const SILENT_TICKS: u32 = 5;

/// What an event loop must wait for on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkInterest {
    /// The link's descriptor.
    pub descriptor: RawFd,
    /// Whether to wait until it is writable, too.
    pub writable: bool,
}

/// For how long a device server has said nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Silence {
    /// Bytes that had been received at the last tick.
    heard: u64,
    /// Ticks since then without another one.
    ticks: u32,
}

impl Silence {
    /// Once a second: gives the peer a sign of life and asks for one, and gives up on a peer that
    /// has been silent for too long. Whether anything was asked.
    pub(crate) fn tick(&mut self, session: &mut Session) -> Result<bool, FabricError> {
        let heard = session.counters().bytes_received;
        let news = std::mem::replace(&mut self.heard, heard) != heard;
        self.ticks = if news { 0 } else { self.ticks + 1 };
        match self.ticks {
            SILENT_TICKS.. => Err(FabricError::Timeout {
                what: "a sign of life of the device server",
                after: Duration::from_secs(self.ticks.into()),
            }),
            _ if session.is_congested() => Ok(false),
            _ => session.send(&Message::Ping { nonce: 0 }).map(|()| true),
        }
    }
}

/// Commands to send in one message, with the guest memory that their data is gathered from.
pub struct SubmitBatch {
    entries: wire::SubmitBatch,
    pub(crate) payload: Vec<Span>,
    bytes: u64,
    /// Where in the buffer shadow the payload goes, on a one-sided link.
    remote: Vec<RemoteSpan>,
    /// Where in guest memory the data of the command at hand is to go, on a one-sided link.
    segments: Vec<RemoteSpan>,
    /// Whether the link at hand is one-sided.
    pub(crate) one_sided: bool,
}

impl SubmitBatch {
    pub(crate) fn new() -> Self {
        Self {
            entries: wire::SubmitBatch::new(),
            payload: Vec::with_capacity(MAX_SPANS),
            bytes: 0,
            remote: Vec::with_capacity(wire::MAX_ENTRIES.into()),
            segments: Vec::with_capacity(MAX_SPANS),
            one_sided: false,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether a command with the largest transfer, in as many segments as it may have, might
    /// not fit any more.
    pub(crate) fn is_full(&self, max_transfer: u32) -> bool {
        let segments = max_transfer as usize / PAGE_SIZE + 1;
        let named = if self.one_sided { segments } else { 0 };
        !self.entries.has_room(max_transfer, named)
            || self.bytes >= MAX_BATCH
            || self.payload.len() + segments > MAX_SPANS
    }

    /// Says where in guest memory a part of the data of the next command goes. Only a one-sided
    /// link wants to know.
    pub(crate) fn push_segment(&mut self, address: u64, len: u32) {
        if !self.one_sided {
            return;
        }
        if let Some(last) = self.segments.last_mut() {
            let behind = last.address + u64::from(last.len) == address;
            if let (true, Some(len)) = (behind, last.len.checked_add(len)) {
                last.len = len;
                return;
            }
        }
        self.segments.push(RemoteSpan { address, len });
    }

    pub(crate) fn push(
        &mut self,
        placement: &wire::Placement,
        command: &[u8; 64],
    ) -> Result<(), wire::WireError> {
        let pushed = self.entries.push(placement, command, &self.segments);
        self.segments.clear();
        pushed?;
        if self.one_sided && placement.direction == wire::Direction::ToDevice {
            self.remote.push(RemoteSpan {
                address: placement.shadow_offset.into(),
                len: placement.data_len,
            });
        }
        self.bytes += u64::from(placement.data_len);
        Ok(())
    }

    /// Forgets what was said of a command that is not pushed after all.
    pub(crate) fn truncate(&mut self, payload: usize) {
        self.payload.truncate(payload);
        self.segments.clear();
    }

    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.payload.clear();
        self.remote.clear();
        self.segments.clear();
        self.bytes = 0;
    }
}

/// A claimed link.
pub struct Session {
    link: Box<dyn Link>,
    control: Vec<u8>,
}

impl Session {
    /// Over a link that is claimed already.
    pub fn new(link: Box<dyn Link>) -> Self {
        Self {
            link,
            control: Vec::with_capacity(wire::MAX_CONTROL),
        }
    }

    /// See [`Link::descriptor`].
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.link.descriptor()
    }

    /// See [`Link::is_one_sided`].
    pub fn is_one_sided(&self) -> bool {
        self.link.is_one_sided()
    }

    /// See [`Link::keep_looking`].
    pub fn keep_looking(&mut self) {
        self.link.keep_looking();
    }

    /// See [`Link::may_wait`].
    pub fn may_wait(&mut self) -> Result<bool, FabricError> {
        self.link.may_wait()
    }

    /// Whether the network takes no more now.
    pub fn is_congested(&self) -> bool {
        self.link.is_congested()
    }

    /// Sends what is queued.
    pub fn flush(&mut self) -> Result<(), FabricError> {
        self.link.flush()
    }

    /// What the link has carried.
    pub fn counters(&self) -> Counters {
        self.link.counters()
    }

    /// Sends one message that has no payload.
    pub fn send(&mut self, message: &Message) -> Result<(), FabricError> {
        self.control.clear();
        let header = message.encode(&mut self.control)?;
        self.link.send(&Frame {
            header,
            control: &self.control,
            payload: &[],
            remote: &[],
        })
    }

    /// Sends a batch of commands, if it has any, and empties it.
    pub(crate) fn submit(&mut self, batch: &mut SubmitBatch) -> Result<(), FabricError> {
        if batch.is_empty() {
            return Ok(());
        }
        let sent = self.link.send(&Frame {
            header: batch.entries.header(),
            control: batch.entries.control(),
            payload: &batch.payload,
            remote: &batch.remote,
        });
        batch.clear();
        sent
    }

    /// Sends a batch of completions with their data, if it has any, and empties it. `remote` is
    /// where the data goes, on a one-sided link.
    pub(crate) fn complete(
        &mut self,
        batch: &mut CompleteBatch,
        payload: &mut Vec<Span>,
        remote: &mut Vec<RemoteSpan>,
    ) -> Result<(), FabricError> {
        if batch.is_empty() {
            return Ok(());
        }
        let sent = self.link.send(&Frame {
            header: batch.header(),
            control: batch.control(),
            payload,
            remote,
        });
        batch.clear();
        payload.clear();
        remote.clear();
        sent
    }

    /// What to wait for.
    pub fn interest(&self) -> LinkInterest {
        LinkInterest {
            descriptor: self.descriptor().as_raw_fd(),
            writable: self.is_congested(),
        }
    }

    /// Rises with every byte that moves.
    pub fn progress(&self) -> u64 {
        let counters = self.counters();
        counters.bytes_sent + counters.bytes_received
    }

    /// Sends what waited, and receives what has arrived, or much of it; whether there may be more.
    pub(crate) fn receive_all(&mut self, sink: &mut dyn Sink) -> Result<bool, FabricError> {
        if self.is_congested() {
            self.flush()?;
        }
        for _ in 0..RECEIVE_BURST {
            if self.receive(sink)? == Received::Idle {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The guest's memory is its own again, at once. What is still to be sent would go out with
    /// whatever the guest puts there now; a frame that is cut off is never acted on, and the next
    /// claim begins with a reset.
    pub(crate) fn revoke_all(&mut self, windows: &[DmaWindow]) -> Result<(), FabricError> {
        if self.is_congested() {
            return Err(FabricError::Closed);
        }
        for window in windows {
            self.revoke(window);
        }
        Ok(())
    }

    /// Guest memory has gone. What is still to be sent would go out with whatever is there by
    /// then; a frame that is cut off is never acted on, and is sent again on the next link.
    pub(crate) fn let_go(&mut self, gone: &[DmaWindow]) -> Result<(), FabricError> {
        if gone.iter().any(|window| self.is_sending(window)) {
            return Err(FabricError::Closed);
        }
        for window in gone {
            self.revoke(window);
            self.unregister(window, window.iova.0);
        }
        Ok(())
    }

    /// Receives at most one message.
    pub fn receive(&mut self, sink: &mut dyn Sink) -> Result<Received, FabricError> {
        self.link.receive(sink)
    }

    /// See [`Link::register`].
    pub fn register(&mut self, window: &DmaWindow, address: u64) -> Result<(), FabricError> {
        self.link.register(&span_of(window), address)
    }

    /// See [`Link::unregister`].
    pub fn unregister(&mut self, window: &DmaWindow, address: u64) {
        self.link.unregister(&span_of(window), address);
    }

    /// See [`Link::is_sending`].
    pub fn is_sending(&self, window: &DmaWindow) -> bool {
        self.link
            .is_sending(&window.memory, window.offset, window.len)
    }

    /// See [`Link::revoke`].
    pub fn revoke(&mut self, window: &DmaWindow) {
        self.link.revoke(&window.memory, window.offset, window.len);
    }
}

fn span_of(window: &DmaWindow) -> Span {
    Span {
        memory: window.memory.clone(),
        offset: window.offset,
        len: window.len,
    }
}
