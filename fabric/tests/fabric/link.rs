//! What a TCP link promises to a well-behaved peer and to its own caller.

use farbus_fabric::wire::*;
use farbus_fabric::{FabricError, Frame, Link, Received, Span};
use rustix::event::PollFlags;

use super::support::*;

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
    // Few enough for the smallest of socket buffers.
    const MESSAGES: u64 = 24;
    let (mut compute, mut device) = links();
    let source = memory(0x1000);
    let mut sink = Recorder::new(0x10000, 0x400);
    for tag in 0..MESSAGES {
        send_completion(&mut device, tag as u16, &[span(&source, 0, 0x400)]).unwrap();
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
fn a_message_that_comes_alone_is_not_followed_by_a_call_for_nothing() {
    let (mut compute, mut device) = links();
    let mut sink = Recorder::new(0x1000, 0x1000);
    send_message(&mut device, &Message::Ping { nonce: 1 }).unwrap();
    wait(&compute, PollFlags::IN);

    assert_eq!(compute.receive(&mut sink).unwrap(), Received::Message);
    assert_eq!(compute.receive(&mut sink).unwrap(), Received::Idle);

    assert_eq!(compute.counters().receive_calls, 1);
}

#[test]
fn an_idle_link_says_so() {
    let (mut compute, _device) = links();
    let mut sink = Recorder::new(0x1000, 0x1000);
    assert_eq!(compute.receive(&mut sink).unwrap(), Received::Idle);
    assert_eq!(compute.receive(&mut sink).unwrap(), Received::Idle);
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

#[test]
fn a_sink_that_names_the_wrong_memory_ends_the_link_without_a_write() {
    let guest = memory(0x1000);
    for spans in [
        vec![],
        vec![span(&guest, 0, 1999)],
        vec![span(&guest, 0, 2001)],
        vec![span(&guest, 0, 1000), span(&guest, 0xff0, 1000)],
        vec![span(&guest, usize::MAX, 2000)],
        // The last is beyond what one call takes, and has to be found before the first call.
        (0..1999)
            .map(|at| span(&guest, at, 1))
            .chain([span(&guest, 0x1000, 1)])
            .collect(),
    ] {
        let (mut compute, mut device) = links();
        let source = memory(0x1000);
        store(&source, 0, &[0xaa; 2000]);
        send_completion(&mut device, 1, &[span(&source, 0, 2000)]).unwrap();
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

#[test]
fn a_peer_that_is_gone_is_an_error() {
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
