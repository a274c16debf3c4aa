//! The fabric's decoder, alone and behind a TCP connection.

use std::io::Write;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use farbus_fabric::wire::{
    Admission, Body, Complete, CompleteBatch, Epoch, Header, Side, Submit, SubmitBatch,
    decode_frame,
};
use farbus_fabric::{FabricError, Link, Received, Sink, Span, TcpLink};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::set_socket_linger;
use vm_memory::{MmapRegion, VolatileMemory};

use crate::input::Input;

const EPOCH: Epoch = Epoch(7);
/// Where payloads land; longer ones land in it several times.
const GROUND: usize = 4096;
/// How long loopback may take, at most.
const PATIENCE: Timespec = Timespec {
    tv_sec: 4,
    tv_nsec: 0,
};

/// Runs one input: a byte of options, then a stream.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let options = input.byte();
    let stream = input.rest();
    let side = match options & 1 {
        0 => Side::Compute,
        _ => Side::Device,
    };
    let mut admission = Admission::new(side);
    if options & 2 == 0 {
        admission.set_epoch(EPOCH);
    }
    let expected = decode_all(stream, &admission);
    // A connection costs far more than a decode: one in four.
    if options & 0b1100 == 0 {
        let piece = 1 << (options >> 4);
        receive_all(stream, piece, &admission, &expected);
    }
}

/// The frames that a link has to deliver.
struct Expected<'a> {
    frames: Vec<(Header, &'a [u8], &'a [u8])>,
    /// The stream ends behind a whole frame.
    whole: bool,
}

fn decode_all<'a>(mut rest: &'a [u8], admission: &Admission) -> Expected<'a> {
    let mut frames = Vec::new();
    while let Ok((header, body, payload)) = decode_frame(rest) {
        let control = &rest[header.prefix_len() - header.control_len as usize..header.prefix_len()];
        round_trip(&header, &body, control);
        if admission.admit(&header).is_err() {
            break;
        }
        frames.push((header, control, payload));
        rest = &rest[header.frame_len()..];
    }
    Expected {
        frames,
        whole: rest.is_empty(),
    }
}

/// There is one way to write a message, so what decodes encodes to the same bytes.
fn round_trip(header: &Header, body: &Body<'_>, control: &[u8]) {
    let (again, bytes) = match body {
        Body::Message(message) => {
            let mut bytes = Vec::new();
            let header = message.encode(&mut bytes);
            (header.expect("what decodes encodes"), bytes)
        }
        Body::Submit(submit) => submit_again(submit),
        Body::Complete(complete) => complete_again(complete),
    };
    assert_eq!(bytes, control);
    let epoch = header.epoch;
    assert_eq!(Header { epoch, ..again }, *header);
    assert_eq!(Header::decode(&header.encode()).as_ref(), Ok(header));
}

fn submit_again(submit: &Submit<'_>) -> (Header, Vec<u8>) {
    let mut batch = SubmitBatch::new();
    for entry in submit.entries() {
        let segments: Vec<_> = entry.segments.collect();
        batch
            .push(&entry.placement, entry.command, &segments)
            .expect("what decodes encodes");
    }
    (batch.header(), batch.control().to_vec())
}

fn complete_again(complete: &Complete<'_>) -> (Header, Vec<u8>) {
    let mut batch = CompleteBatch::new();
    for entry in complete.entries() {
        batch.push(&entry).expect("what decodes encodes");
    }
    (batch.header(), batch.control().to_vec())
}

/// Sends the stream over TCP in pieces: just what was expected is delivered, then an error.
fn receive_all(stream: &[u8], piece: usize, admission: &Admission, expected: &Expected<'_>) {
    let (mut sender, receiver) = sockets();
    let mut link = TcpLink::new(receiver, admission.side()).expect("a link");
    link.set_epoch(admission.epoch());
    let mut check = Check {
        expected: expected.frames.as_slice(),
        ground: ground(),
    };
    for piece in stream.chunks(piece) {
        if sender.write_all(piece).is_err() || receive_idle(&mut link, &mut check).is_err() {
            break;
        }
    }
    let _ = sender.shutdown(Shutdown::Write);
    let error = loop {
        match receive_idle(&mut link, &mut check) {
            Ok(()) => wait(&link),
            Err(error) => break error,
        }
    };
    assert!(check.expected.is_empty(), "frames were lost before {error}");
    if expected.whole {
        assert!(matches!(error, FabricError::Closed), "{error}");
    }
    // Reset before the other end closes, so that no port waits for stragglers.
    set_socket_linger(&sender, Some(Duration::ZERO)).expect("a socket option");
    drop(sender);
}

fn receive_idle(link: &mut TcpLink, sink: &mut Check<'_>) -> Result<(), FabricError> {
    while link.receive(sink)? == Received::Message {}
    Ok(())
}

fn wait(link: &TcpLink) {
    let mut fds = [PollFd::from_borrowed_fd(link.descriptor(), PollFlags::IN)];
    let ready = poll(&mut fds, Some(&PATIENCE)).expect("poll");
    assert_eq!(ready, 1, "the end of the stream never came");
}

fn sockets() -> (TcpStream, TcpStream) {
    static LISTENER: OnceLock<TcpListener> = OnceLock::new();
    let listener =
        LISTENER.get_or_init(|| TcpListener::bind("127.0.0.1:0").expect("a listening socket"));
    let sender = TcpStream::connect(listener.local_addr().expect("an address"));
    let sender = sender.expect("a connection");
    sender.set_nodelay(true).expect("a socket option");
    (sender, listener.accept().expect("a connection").0)
}

fn ground() -> Arc<MmapRegion> {
    static MEMORY: OnceLock<Arc<MmapRegion>> = OnceLock::new();
    MEMORY
        .get_or_init(|| Arc::new(MmapRegion::new(GROUND).expect("memory")))
        .clone()
}

/// Compares what is delivered with what is expected.
struct Check<'a> {
    expected: &'a [(Header, &'a [u8], &'a [u8])],
    ground: Arc<MmapRegion>,
}

impl Sink for Check<'_> {
    fn land(
        &mut self,
        header: &Header,
        control: &[u8],
        spans: &mut Vec<Span>,
    ) -> Result<(), FabricError> {
        // A link leaves the message to its sink; this one refuses what does not decode.
        farbus_fabric::wire::decode_body(header, control)?;
        let mut left = header.payload_len as usize;
        while left > 0 {
            let len = left.min(GROUND);
            spans.push(Span {
                memory: self.ground.clone(),
                offset: 0,
                len,
            });
            left -= len;
        }
        Ok(())
    }

    fn deliver(&mut self, header: &Header, control: &[u8]) -> Result<(), FabricError> {
        farbus_fabric::wire::decode_body(header, control)?;
        let ((wanted, wanted_control, payload), rest) = self
            .expected
            .split_first()
            .expect("a frame that nobody sent");
        assert_eq!((header, control), (wanted, *wanted_control));
        if payload.len() <= GROUND {
            let mut landed = vec![0; payload.len()];
            self.ground
                .get_slice(0, landed.len())
                .expect("a slice")
                .copy_to(&mut landed);
            assert_eq!(landed, *payload);
        }
        self.expected = rest;
        Ok(())
    }
}
