//! The seam between the wire protocol and a provider.
//!
//! A [`Link`] carries [`Frame`]s in order. A frame has a *control part* (an encoded message)
//! and a *payload* that is gathered from this side's memory and lands in the peer's memory
//! without passing through a buffer of ours. The seam asks no more of a provider than RDMA
//! verbs can do: the payload is a list of one-sided writes, the control part is the notify
//! that follows them. `docs/protocol.md` says how each operation maps to verbs and to TCP.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vm_memory::MmapRegion;

use crate::FabricError;
use crate::wire::{Epoch, Header};

/// A range of this side's memory that a payload is gathered from or lands in.
#[derive(Clone)]
pub struct Span {
    /// The mapping; it stays mapped for as long as the span lives.
    pub memory: Arc<MmapRegion>,
    /// First byte of the range within `memory`.
    pub offset: usize,
    /// Length of the range in bytes.
    pub len: usize,
}

impl Span {
    /// The span without its first `n` bytes; empty if there are no more.
    pub(crate) fn after(&self, n: usize) -> Span {
        let mut rest = self.clone();
        rest.skip(n);
        rest
    }

    /// The first `n` bytes of the span, or all of it.
    pub(crate) fn before(&self, n: usize) -> Span {
        let mut head = self.clone();
        head.len = head.len.min(n);
        head
    }

    /// Drops the first `n` bytes, or all there are.
    pub(crate) fn skip(&mut self, n: usize) {
        let n = n.min(self.len);
        self.offset += n;
        self.len -= n;
    }
}

/// A range of the peer's memory, for a provider that writes there itself
/// ([`Link::is_one_sided`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteSpan {
    /// The peer's address: the IOVA of guest memory, or an offset into the buffer shadow.
    pub address: u64,
    /// Length of the range in bytes.
    pub len: u32,
}

/// One message to send.
#[derive(Clone, Copy)]
pub struct Frame<'a> {
    /// Kind, count and lengths. `header.payload_len` is the total of `payload`. The link puts
    /// in its own epoch ([`Link::set_epoch`]).
    pub header: Header,
    /// The encoded message, `header.control_len` bytes.
    pub control: &'a [u8],
    /// Where the payload is gathered from, in order.
    pub payload: &'a [Span],
    /// Where the payload lands, in order and with the same total length. Empty unless the
    /// link is one-sided.
    pub remote: &'a [RemoteSpan],
}

impl<'a> Frame<'a> {
    /// A frame without a payload.
    pub fn plain(header: Header, control: &'a [u8]) -> Self {
        Frame {
            header,
            control,
            payload: &[],
            remote: &[],
        }
    }
}

/// What [`Link::receive`] came back with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// One message was delivered to the sink. More may be waiting within the link, where
    /// the descriptor does not show them: receive again, until nothing comes.
    Message,
    /// Nothing (more) has arrived; wait for the link's descriptor.
    Idle,
}

/// What a link has carried, for tests, metrics and budgets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Messages sent: the network has taken them.
    pub messages_sent: u64,
    /// Messages received.
    pub messages_received: u64,
    /// Payload bytes sent.
    pub payload_sent: u64,
    /// Payload bytes received.
    pub payload_received: u64,
    /// Bytes received, of whole and of unfinished messages: a sign of life.
    pub bytes_received: u64,
    /// Bytes sent, of whole and of unfinished messages.
    pub bytes_sent: u64,
    /// System calls made (or work requests posted) to send.
    pub send_calls: u64,
    /// System calls made (or completions polled) to receive.
    pub receive_calls: u64,
    /// Times that an RDMA device was told of work requests: once for each chain of them.
    pub doorbells: u64,
}

impl Counters {
    /// Both together, as of two links.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            messages_sent: self.messages_sent + other.messages_sent,
            messages_received: self.messages_received + other.messages_received,
            payload_sent: self.payload_sent + other.payload_sent,
            payload_received: self.payload_received + other.payload_received,
            bytes_received: self.bytes_received + other.bytes_received,
            bytes_sent: self.bytes_sent + other.bytes_sent,
            send_calls: self.send_calls + other.send_calls,
            receive_calls: self.receive_calls + other.receive_calls,
            doorbells: self.doorbells + other.doorbells,
        }
    }
}

/// Who receives messages from a [`Link`].
///
/// An error from either method is the peer's fault; the link receives nothing after it. It can
/// still send, so that the owner may say why before it drops the link.
pub trait Sink {
    /// Says where the payload of the message at hand lands: pushes spans whose lengths add
    /// up to `header.payload_len`. Called before [`Self::deliver`], only for messages with a
    /// payload, and not at all on a one-sided link, where the payload is in place already.
    fn land(
        &mut self,
        header: &Header,
        control: &[u8],
        spans: &mut Vec<Span>,
    ) -> Result<(), FabricError>;

    /// Takes one message whose payload has landed.
    fn deliver(&mut self, header: &Header, control: &[u8]) -> Result<(), FabricError>;
}

/// A connection that carries frames in order, both ways, without blocking.
pub trait Link: Send {
    /// What to wait for: readable when [`Self::receive`] may get further, writable when
    /// [`Self::flush`] may.
    fn descriptor(&self) -> BorrowedFd<'_>;

    /// Whether this side writes into the peer's memory itself, so that frames need
    /// [`Frame::remote`].
    fn is_one_sided(&self) -> bool;

    /// The connection is claimed: every frame sent from now on carries this epoch, and a frame
    /// received with any other is an error before its payload lands or the sink hears of it.
    fn set_epoch(&mut self, epoch: Epoch);

    /// Makes a range of memory known before spans of it are used, under the address by which
    /// [`RemoteSpan`]s of the peer name it: an IOVA on the compute side, an offset into the
    /// buffer shadow on the device side. RDMA registers it; TCP has nothing to do.
    fn register(&mut self, span: &Span, address: u64) -> Result<(), FabricError>;

    /// Undoes [`Self::register`].
    fn unregister(&mut self, span: &Span, address: u64);

    /// Guarantees that nothing received from now on lands in `memory[offset .. offset + len]`,
    /// also not the rest of a payload that is arriving: its bytes there are dropped.
    fn revoke(&mut self, memory: &Arc<MmapRegion>, offset: usize, len: usize);

    /// Whether a frame that is queued has payload in `memory[offset .. offset + len]`: then it
    /// will be sent with whatever is there at that time. May wait for a few milliseconds to be sure.
    fn is_sending(&self, memory: &Arc<MmapRegion>, offset: usize, len: usize) -> bool;

    /// Sends a frame, or queues what the network does not take now. Frames are never
    /// dropped and never reordered. The caller heeds [`Self::is_congested`]; a link refuses
    /// frames beyond a fixed backlog, whole, and stays usable.
    ///
    /// The payload's memory must not be put to another use until the frame has left: until the
    /// peer has answered it, or [`Self::is_sending`] says so.
    fn send(&mut self, frame: &Frame<'_>) -> Result<(), FabricError>;

    /// Whether frames are queued. While they are, the caller sends no new commands, and calls
    /// [`Self::flush`] when the descriptor is writable.
    fn is_congested(&self) -> bool;

    /// Sends what is queued, as far as the network takes it.
    fn flush(&mut self) -> Result<(), FabricError>;

    /// Receives at most one message into `sink`.
    fn receive(&mut self, sink: &mut dyn Sink) -> Result<Received, FabricError>;

    /// The owner will go on looking instead of waiting after [`Received::Idle`], and call
    /// [`Self::may_wait`] before it waits after all. Looking may cost less then.
    fn keep_looking(&mut self) {}

    /// Whether the descriptor will tell of what arrives from now on. If not, something has arrived
    /// meanwhile, or there is room again: receive and send again. Only for owners that have called [`Self::keep_looking`].
    fn may_wait(&mut self) -> Result<bool, FabricError> {
        Ok(true)
    }

    /// What was carried so far.
    fn counters(&self) -> Counters;
}

/// Fails unless the span is inside its memory.
pub(crate) fn check_span(span: &Span) -> Result<(), FabricError> {
    let Span { offset, len, .. } = *span;
    let size = span.memory.size();
    if offset.checked_add(len).is_some_and(|end| end <= size) {
        return Ok(());
    }
    Err(FabricError::SpanOutOfBounds { offset, len, size })
}

/// Fails unless the frame's parts are what its header says, and its spans exist.
pub(crate) fn check_frame(frame: &Frame<'_>) -> Result<(), FabricError> {
    frame.header.check()?;
    frame.payload.iter().try_for_each(check_span)?;
    let payload: u64 = frame.payload.iter().map(|span| span.len as u64).sum();
    let Header {
        kind,
        control_len,
        payload_len,
        ..
    } = frame.header;
    if control_len as usize != frame.control.len() || u64::from(payload_len) != payload {
        return Err(FabricError::FrameLengths {
            kind,
            declared_control: control_len as usize,
            control: frame.control.len(),
            declared_payload: payload_len.into(),
            payload,
        });
    }
    Ok(())
}
