//! What a TCP link promises to a well-behaved peer and to its own caller.

use std::os::fd::AsFd;
use std::sync::Arc;

use farbus_fabric::wire::*;
use farbus_fabric::{FabricError, Frame, Link, Received, Sink, Span};
use proptest::prelude::*;
use rustix::event::PollFlags;
use rustix::net::sockopt;

use super::support::*;

fn send_completion(link: &mut dyn Link, tag: u16, payload: &[Span]) -> Result<(), FabricError> {
    let batch = completion(tag, payload.iter().map(|span| span.len).sum());
    link.send(&Frame {
        header: batch.header(),
        control: batch.control(),
        payload,
        remote: &[],
    })
}

#[test]
fn payload_is_gathered_and_lands_in_the_memory_that_the_sink_names() {
    let (mut compute, mut device) = links();
    let source = memory(0x10000);
    let data = pattern(1, 0x5000);
    store(&source, 0x100, &data[..0x1000]);
    store(&source, 0x8000, &data[0x1000..]);
    let mut sink = Recorder::new(0x10000, 0x777);

    send_completion(
        &mut device,
        3,
        &[span(&source, 0x100, 0x1000), span(&source, 0x8000, 0x4000)],
    )
    .unwrap();
    receive(&mut compute, &mut sink).unwrap();

    assert_eq!(sink.payloads(), data);
    assert_eq!(sink.frames[0].0.epoch, EPOCH);
    assert_eq!(sink.frames[0].1, completion(3, 0x5000).control());
    assert_eq!(device.counters().payload_sent, 0x5000);
    assert_eq!(compute.counters().payload_received, 0x5000);
}

#[test]
fn more_pieces_than_one_call_takes_arrive_whole() {
    let (mut compute, mut device) = links();
    let source = memory(0x10000);
    let data = pattern(2, 0x4000);
    store(&source, 0, &data);
    let pieces: Vec<Span> = (0..0x4000 / 4)
        .map(|piece| span(&source, piece * 4, 4))
        .collect();
    let mut sink = Recorder::new(0x10000, 3);

    send_completion(&mut device, 1, &pieces).unwrap();
    receive(&mut compute, &mut sink).unwrap();

    assert_eq!(sink.payloads(), data);
    assert_eq!(device.counters().messages_sent, 1);
}

#[test]
fn empty_spans_are_no_obstacle() {
    let (mut compute, mut device) = links();
    let source = memory(0x1000);
    store(&source, 0, b"abcdef");
    let mut sink = Recorder::new(0x1000, 4);

    let payload = [
        span(&source, 0, 0),
        span(&source, 0, 3),
        span(&source, 0x1000, 0),
        span(&source, 3, 3),
        span(&source, 9, 0),
    ];
    send_completion(&mut device, 1, &payload).unwrap();
    receive(&mut compute, &mut sink).unwrap();

    assert_eq!(sink.payloads(), b"abcdef");
}

#[test]
fn a_message_costs_one_call_to_send_and_under_load_one_to_receive() {
    const MESSAGES: u64 = 100;
    let (mut compute, mut device) = links();
    let source = memory(0x1000);
    let mut sink = Recorder::new(0x100000, 0x1000);
    for tag in 0..MESSAGES {
        send_completion(&mut device, tag as u16, &[span(&source, 0, 0x1000)]).unwrap();
    }
    assert!(!device.is_congested());

    for _ in 0..MESSAGES {
        receive(&mut compute, &mut sink).unwrap();
    }

    assert_eq!(device.counters().send_calls, MESSAGES);
    assert_eq!(compute.counters().messages_received, MESSAGES);
    // Two to begin with; and loopback may hand over a payload in two parts now and then.
    let calls = compute.counters().receive_calls;
    assert!(calls <= MESSAGES + MESSAGES / 4, "{calls} calls");
}

#[test]
fn an_idle_link_says_so() {
    let (mut compute, _device) = links();
    let mut sink = Recorder::new(0x1000, 0x1000);
    assert_eq!(compute.receive(&mut sink).unwrap(), Received::Idle);
    assert_eq!(compute.receive(&mut sink).unwrap(), Received::Idle);
}

/// Sends to a peer that does not read until the link refuses, and returns how many frames
/// it took.
fn fill(device: &mut dyn Link, payload: &[Span]) -> u16 {
    for tag in 0..u16::MAX {
        match send_completion(device, tag, payload) {
            Ok(()) => {}
            Err(FabricError::Backlog { .. }) => return tag,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the backlog has no bound");
}

/// Receives `count` messages while the peer flushes.
fn drain(compute: &mut dyn Link, device: &mut dyn Link, sink: &mut Recorder, count: usize) {
    while sink.frames.len() < count {
        if compute.receive(sink).unwrap() == Received::Idle {
            if device.is_congested() {
                device.flush().unwrap();
            } else {
                wait(compute, PollFlags::IN);
            }
        }
    }
}

#[test]
fn a_slow_reader_gets_everything_in_order_and_the_backlog_is_bounded() {
    let (mut compute, mut device) = links();
    sockopt::set_socket_send_buffer_size(device.descriptor(), 0x4000).unwrap();
    let source = memory(0x10000);
    let data = pattern(3, 0x2000);
    store(&source, 0, &data);
    let payload = [span(&source, 0, 0x1800), span(&source, 0x1800, 0x800)];

    let taken = usize::from(fill(&mut device, &payload));
    assert!(device.is_congested());
    assert!(device.counters().messages_sent < taken as u64);
    // What waits keeps its memory.
    drop(payload);
    assert!(Arc::strong_count(&source) > 1000);

    let mut sink = Recorder::new(taken * 0x2000, 0x2000);
    drain(&mut compute, &mut device, &mut sink, taken);

    assert!(!device.is_congested());
    assert_eq!(device.counters().messages_sent, taken as u64);
    assert_eq!(device.counters().payload_sent, taken as u64 * 0x2000);
    assert_eq!(Arc::strong_count(&source), 1);
    for (tag, (_, control)) in sink.frames.iter().enumerate() {
        assert_eq!(control, completion(tag as u16, 0x2000).control());
    }
    assert!(sink.payloads().chunks(0x2000).all(|chunk| chunk == data));
    // A refusal for lack of room leaves the link as it was.
    send_completion(&mut device, 9, &[]).unwrap();
    receive(&mut compute, &mut sink).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn frames_stay_whole_and_in_order_whatever_the_network_takes(
        sizes in proptest::collection::vec((0..3_usize, 0..40_000_usize), 1..200),
        buffer in 0x1000..0x10000_usize,
    ) {
        let (mut compute, mut device) = links();
        sockopt::set_socket_send_buffer_size(device.descriptor(), buffer).unwrap();
        let source = memory(0x10000);
        store(&source, 0, &pattern(4, 0x10000));
        let mut sink = Recorder::new(sizes.len() * 40_000 + 1, 0x1000);
        let mut expected = Vec::new();
        for (number, (spans, size)) in sizes.iter().enumerate() {
            let payload: Vec<Span> = (0..*spans)
                .map(|part| span(&source, number * 7 + part * 11, size / (part + 1)))
                .collect();
            for span in &payload {
                expected.extend(load(&source, span.offset, span.len));
            }
            send_completion(&mut device, number as u16, &payload).unwrap();
            send_message(&mut device, &Message::Ping { nonce: number as u64 }).unwrap();
        }

        drain(&mut compute, &mut device, &mut sink, 2 * sizes.len());

        prop_assert_eq!(sink.payloads(), expected);
        for (number, pair) in sink.frames.chunks(2).enumerate() {
            prop_assert_eq!(&pair[0].1[..2], &(number as u16).to_le_bytes());
            prop_assert_eq!(&pair[1].1[..], &(number as u64).to_le_bytes());
        }
    }
}

#[test]
fn spans_beyond_their_memory_are_refused_and_nothing_is_sent() {
    let (mut compute, mut device) = links();
    let source = memory(0x1000);
    for (offset, len) in [(0, 0x1001), (0x1000, 1), (usize::MAX, 2), (2, usize::MAX)] {
        let bad = span(&source, offset, len);
        let batch = completion(1, 1);
        let error = device
            .send(&Frame {
                header: batch.header(),
                control: batch.control(),
                payload: &[bad],
                remote: &[],
            })
            .unwrap_err();
        assert!(matches!(
            error,
            FabricError::SpanOutOfBounds { size: 0x1000, .. }
        ));
    }

    send_message(&mut device, &Message::Ping { nonce: 1 }).unwrap();
    let mut sink = Recorder::new(0x1000, 0x1000);
    receive(&mut compute, &mut sink).unwrap();
    assert_eq!(sink.frames[0].0.kind, Kind::Ping);
}

#[test]
fn frames_that_are_not_what_they_declare_are_refused() {
    let (_compute, mut device) = links();
    let source = memory(0x1000);
    let batch = completion(1, 0x200);
    let payload = [span(&source, 0, 0x1ff)];
    let frame = Frame {
        header: batch.header(),
        control: batch.control(),
        payload: &payload,
        remote: &[],
    };
    assert!(matches!(
        device.send(&frame),
        Err(FabricError::FrameLengths {
            declared_payload: 0x200,
            payload: 0x1ff,
            ..
        })
    ));
    assert!(matches!(
        device.send(&Frame {
            control: &[],
            ..frame
        }),
        Err(FabricError::FrameLengths {
            declared_control: 24,
            control: 0,
            ..
        })
    ));
    let empty = CompleteBatch::new();
    assert!(device.send(&Frame::plain(empty.header(), &[])).is_err());
    assert_eq!(device.counters().send_calls, 0);
}

/// A sink that lands payloads where it is told to, and may object.
struct Target {
    spans: Vec<Span>,
    objection: bool,
    delivered: usize,
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

fn target(spans: Vec<Span>) -> Target {
    Target {
        spans,
        objection: false,
        delivered: 0,
    }
}

#[test]
fn a_sink_that_names_the_wrong_memory_ends_the_link_without_a_write() {
    let guest = memory(0x1000);
    for spans in [
        vec![],
        vec![span(&guest, 0, 99)],
        vec![span(&guest, 0, 101)],
        vec![span(&guest, 0, 50), span(&guest, 0xff0, 50)],
        vec![span(&guest, usize::MAX, 100)],
    ] {
        let (mut compute, mut device) = links();
        let source = memory(0x1000);
        store(&source, 0, &[0xaa; 100]);
        send_completion(&mut device, 1, &[span(&source, 0, 100)]).unwrap();
        assert!(receive(&mut compute, &mut target(spans)).is_err());
    }
    assert_eq!(load(&guest, 0, 0x1000), vec![0; 0x1000]);
}

#[test]
fn after_a_sink_objects_nothing_is_received_but_a_last_word_can_be_sent() {
    let (mut compute, mut device) = links();
    send_completion(&mut device, 1, &[]).unwrap();
    send_completion(&mut device, 2, &[]).unwrap();
    let mut sink = target(vec![]);
    sink.objection = true;

    let error = receive(&mut compute, &mut sink).unwrap_err();
    assert!(matches!(error, FabricError::Violation { .. }));
    assert!(matches!(
        compute.receive(&mut sink),
        Err(FabricError::Closed)
    ));
    assert_eq!(sink.delivered, 1);

    send_message(&mut compute, &Message::Release).unwrap();
    let mut recorder = Recorder::new(0x1000, 0x1000);
    receive(&mut device, &mut recorder).unwrap();
    assert_eq!(recorder.frames[0].0.kind, Kind::Release);
}

/// Lets half of a payload arrive, revokes a range, and lets the rest arrive. The payload is
/// `0xff` everywhere, and `spans` cover `len` bytes.
fn revoke_halfway(spans: Vec<Span>, len: usize, revoke: &Span) {
    use std::io::Write;
    let (mut compute, mut socket) = link_and_socket();
    let bytes = completion_bytes(1, &vec![0xff; len]);
    let half = bytes.len() - len / 2;
    let mut sink = target(spans);
    let mut written = 0;
    // Loopback may hand the half over in parts, and large halves do not fit its buffers.
    while written < half {
        written += socket
            .write(&bytes[written..half.min(written + 0x8000)])
            .unwrap();
        wait(&compute, PollFlags::IN);
        while compute.receive(&mut sink).unwrap() != Received::Idle {}
    }
    while rustix::io::ioctl_fionread(compute.descriptor().as_fd()).unwrap() > 0 {
        compute.receive(&mut sink).unwrap();
    }

    compute.revoke(&revoke.memory, revoke.offset, revoke.len);

    write_and_close(socket, bytes[half..].to_vec());
    receive(&mut compute, &mut sink).unwrap();
    assert_eq!(sink.delivered, 1);
    assert!(matches!(
        receive(&mut compute, &mut sink),
        Err(FabricError::Closed)
    ));
}

#[test]
fn revoked_memory_is_not_written_by_the_rest_of_a_payload() {
    let guest = memory(0x10000);
    let spans = vec![
        span(&guest, 0, 0x4000),
        span(&guest, 0x8000, 0x2000),
        span(&guest, 0xc000, 0x2000),
    ];
    // Half of the payload ends at 0x4000; the range covers the end of what has arrived
    // already, and the middle of a span that has not.
    revoke_halfway(
        spans,
        0x8000,
        &span(&guest, 0x3f00, 0x8000 - 0x3f00 + 0x1000),
    );

    let ones = |offset, len| load(&guest, offset, len).iter().all(|byte| *byte == 0xff);
    let zeros = |offset, len| load(&guest, offset, len).iter().all(|byte| *byte == 0);
    assert!(ones(0, 0x4000), "what had arrived stays");
    assert!(zeros(0x8000, 0x1000), "what is revoked is not written");
    assert!(
        ones(0x9000, 0x1000) && ones(0xc000, 0x2000),
        "the rest lands"
    );
    assert!(zeros(0x4000, 0x4000) && zeros(0xa000, 0x2000) && zeros(0xe000, 0x2000));
}

#[test]
fn revoking_everything_drops_payloads_of_any_length() {
    let guest = memory(0x400000);
    let whole = span(&guest, 0, 0x400000);
    revoke_halfway(vec![whole.clone()], 0x400000, &whole);

    let rest = load(&guest, 0x200000, 0x200000);
    assert!(rest.iter().all(|byte| *byte == 0));
}

#[test]
fn revoking_other_memory_changes_nothing() {
    let (guest, other) = (memory(0x2000), memory(0x2000));
    revoke_halfway(
        vec![span(&guest, 0x1000, 0x1000)],
        0x1000,
        &span(&other, 0, 0x2000),
    );
    assert_eq!(load(&guest, 0x1000, 0x1000), vec![0xff; 0x1000]);

    let guest = memory(0x3000);
    revoke_halfway(
        vec![span(&guest, 0x1000, 0x1000)],
        0x1000,
        &span(&guest, 0, 0x1000),
    );
    revoke_halfway(
        vec![span(&guest, 0x1000, 0x1000)],
        0x1000,
        &span(&guest, 0x2000, 0x1000),
    );
    assert_eq!(load(&guest, 0x1000, 0x1000), vec![0xff; 0x1000]);
}

#[test]
fn a_peer_that_is_gone_is_an_error_and_no_signal() {
    let (compute, mut device) = links();
    drop(compute);
    let error = (0..1000)
        .find_map(|nonce| send_message(&mut device, &Message::Ping { nonce }).err())
        .expect("a closed peer goes unnoticed");
    assert!(error.should_reconnect(), "{error}");
    assert!(matches!(
        send_message(&mut device, &Message::Ping { nonce: 0 }),
        Err(FabricError::Closed)
    ));
    assert!(matches!(device.flush(), Err(FabricError::Closed)));
}
