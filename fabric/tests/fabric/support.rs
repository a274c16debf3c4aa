//! Memory, links and sinks for the tests.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use farbus_fabric::wire::{
    CompleteBatch, CompleteEntry, Epoch, Header, Message, QueueId, Side, Tag,
};
use farbus_fabric::{FabricError, Frame, Link, Received, Sink, Span, TcpLink};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{MmapRegion, VolatileMemory};

pub(crate) const EPOCH: Epoch = Epoch(7);
/// Longer than any test should take to get one message; a test that waits so long fails.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn memory(len: usize) -> Arc<MmapRegion> {
    Arc::new(MmapRegion::new(len).unwrap())
}

pub(crate) fn store(memory: &MmapRegion, offset: usize, bytes: &[u8]) {
    memory
        .get_slice(offset, bytes.len())
        .unwrap()
        .copy_from(bytes);
}

pub(crate) fn load(memory: &MmapRegion, offset: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.get_slice(offset, len).unwrap().copy_to(&mut bytes);
    bytes
}

pub(crate) fn span(memory: &Arc<MmapRegion>, offset: usize, len: usize) -> Span {
    Span {
        memory: Arc::clone(memory),
        offset,
        len,
    }
}

/// Bytes that differ from place to place and from seed to seed.
pub(crate) fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at.wrapping_mul(31) ^ (at >> 8) ^ seed.wrapping_mul(97)) as u8)
        .collect()
}

pub(crate) fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (other, _) = listener.accept().unwrap();
    (one, other)
}

/// A claimed link of the compute side, and one of the device side.
pub(crate) fn links() -> (TcpLink, TcpLink) {
    let (one, other) = sockets();
    (claimed(one, Side::Compute), claimed(other, Side::Device))
}

/// A claimed link of the compute side, and the bare socket of its peer.
pub(crate) fn link_and_socket() -> (TcpLink, TcpStream) {
    let (one, other) = sockets();
    other.set_nodelay(true).unwrap();
    (claimed(one, Side::Compute), other)
}

pub(crate) fn claimed(stream: TcpStream, side: Side) -> TcpLink {
    let mut link = TcpLink::new(stream, side).unwrap();
    link.set_epoch(EPOCH);
    link
}

/// A sink that lands payloads one after the other in `memory`, in spans of `span_len`, and
/// remembers what it got.
pub(crate) struct Recorder {
    pub(crate) memory: Arc<MmapRegion>,
    pub(crate) span_len: usize,
    pub(crate) next: usize,
    pub(crate) landed: usize,
    pub(crate) frames: Vec<(Header, Vec<u8>)>,
}

impl Recorder {
    pub(crate) fn new(memory_len: usize, span_len: usize) -> Self {
        Recorder {
            memory: memory(memory_len),
            span_len,
            next: 0,
            landed: 0,
            frames: Vec::new(),
        }
    }

    /// The payloads of all frames so far, in order.
    pub(crate) fn payloads(&self) -> Vec<u8> {
        load(&self.memory, 0, self.next)
    }
}

impl Sink for Recorder {
    fn land(
        &mut self,
        header: &Header,
        _control: &[u8],
        spans: &mut Vec<Span>,
    ) -> Result<(), FabricError> {
        self.landed += 1;
        let end = self.next + header.payload_len as usize;
        while self.next < end {
            let len = self.span_len.min(end - self.next);
            spans.push(span(&self.memory, self.next, len));
            self.next += len;
        }
        Ok(())
    }

    fn deliver(&mut self, header: &Header, control: &[u8]) -> Result<(), FabricError> {
        self.frames.push((*header, control.to_vec()));
        Ok(())
    }
}

pub(crate) fn wait(link: &dyn Link, ready: PollFlags) {
    let timeout = Timespec::try_from(PATIENCE).unwrap();
    let mut fds = [PollFd::from_borrowed_fd(link.descriptor(), ready)];
    let events = poll(&mut fds, Some(&timeout)).unwrap();
    assert_eq!(events, 1, "nothing happened on the link");
}

/// Receives until one message was delivered, or the link fails.
pub(crate) fn receive(link: &mut dyn Link, sink: &mut dyn Sink) -> Result<(), FabricError> {
    while link.receive(sink)? == Received::Idle {
        wait(link, PollFlags::IN);
    }
    Ok(())
}

/// Receives until the link fails, and returns why it does.
pub(crate) fn receive_to_end(link: &mut dyn Link, sink: &mut dyn Sink) -> FabricError {
    loop {
        if let Err(error) = receive(link, sink) {
            return error;
        }
    }
}

pub(crate) fn send_message(link: &mut dyn Link, message: &Message) -> Result<(), FabricError> {
    let mut control = Vec::new();
    let header = message.encode(&mut control)?;
    link.send(&Frame::plain(header, &control))
}

/// A batch of one completion with that much data.
pub(crate) fn completion(tag: u16, data_len: usize) -> CompleteBatch {
    let mut batch = CompleteBatch::new();
    batch
        .push(&CompleteEntry {
            tag: Tag(tag),
            queue: QueueId(1),
            status: 0,
            data_len: data_len.try_into().unwrap(),
            result: u64::from(tag),
        })
        .unwrap();
    batch
}

/// The bytes of a message on a connection of [`EPOCH`].
pub(crate) fn message_bytes(message: &Message) -> Vec<u8> {
    message_bytes_of(message, EPOCH)
}

pub(crate) fn message_bytes_of(message: &Message, epoch: Epoch) -> Vec<u8> {
    let mut control = Vec::new();
    let header = message.encode(&mut control).unwrap();
    [header_bytes(header, epoch).as_slice(), &control].concat()
}

/// The bytes of a completion with data, on a connection of [`EPOCH`].
pub(crate) fn completion_bytes(tag: u16, data: &[u8]) -> Vec<u8> {
    let batch = completion(tag, data.len());
    [
        header_bytes(batch.header(), EPOCH).as_slice(),
        batch.control(),
        data,
    ]
    .concat()
}

pub(crate) fn header_bytes(header: Header, epoch: Epoch) -> [u8; 24] {
    Header { epoch, ..header }.encode()
}

/// Writes all of `bytes` and ends the stream, on a thread, since the reader may be slow.
pub(crate) fn write_and_close(mut socket: TcpStream, bytes: Vec<u8>) {
    std::thread::spawn(move || {
        // A reader that has seen enough closes first.
        socket.write_all(&bytes).unwrap_or_default();
    });
}

/// Sends a completion with this data.
pub(crate) fn send_completion(
    link: &mut dyn Link,
    tag: u16,
    payload: &[Span],
) -> Result<(), FabricError> {
    let batch = completion(tag, payload.iter().map(|span| span.len).sum());
    link.send(&Frame {
        header: batch.header(),
        control: batch.control(),
        payload,
        remote: &[],
    })
}

/// A sink that lands payloads where it is told to, and may object.
pub(crate) struct Target {
    pub(crate) spans: Vec<Span>,
    pub(crate) objection: bool,
    pub(crate) delivered: usize,
}

impl Sink for Target {
    fn land(
        &mut self,
        _header: &Header,
        _control: &[u8],
        spans: &mut Vec<Span>,
    ) -> Result<(), FabricError> {
        spans.extend(self.spans.iter().cloned());
        Ok(())
    }

    fn deliver(&mut self, _header: &Header, _control: &[u8]) -> Result<(), FabricError> {
        self.delivered += 1;
        if self.objection {
            return Err(FabricError::violation("tag 1 is not outstanding"));
        }
        Ok(())
    }
}

pub(crate) fn target(spans: Vec<Span>) -> Target {
    Target {
        spans,
        objection: false,
        delivered: 0,
    }
}
