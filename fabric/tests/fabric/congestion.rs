//! A peer that reads slowly, or not at all: frames wait in bounded storage, whole and in order.

use std::sync::Arc;

use farbus_fabric::wire::*;
use farbus_fabric::{FabricError, Link, Received, Span};
use proptest::prelude::*;
use rustix::event::PollFlags;
use rustix::net::sockopt;

use super::support::*;

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

/// Sends the same frame to a peer that does not read until the link refuses it.
fn refusal(send: impl Fn(&mut dyn Link) -> Result<(), FabricError>) -> (usize, usize, usize) {
    let (_compute, mut device) = links();
    sockopt::set_socket_send_buffer_size(device.descriptor(), 0x4000).unwrap();
    for _ in 0..1_000_000 {
        match send(&mut device) {
            Ok(()) => {}
            Err(FabricError::Backlog {
                frames,
                control,
                spans,
            }) => return (frames, control, spans),
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the backlog has no bound");
}

#[test]
fn frames_control_and_spans_that_wait_are_each_bounded() {
    let (frames, _, _) = refusal(|link| send_message(link, &Message::Ping { nonce: 1 }));
    assert_eq!(frames, 1024);

    let blob = vec![0; 30_000];
    let notice = Message::EngineNotice { blob };
    let (_, control, _) = refusal(|link| send_message(link, &notice));
    assert!(control <= 256 * 1024 && control + 30_028 > 256 * 1024);

    let source = memory(0x1000);
    let payload: Vec<Span> = (0..1000).map(|_| span(&source, 0, 0x1000)).collect();
    let (_, _, spans) = refusal(|link| send_completion(link, 1, &payload));
    assert!(spans <= 16 * 1024 && spans + 1001 > 16 * 1024);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn frames_stay_whole_and_in_order_whatever_the_network_takes(
        sizes in proptest::collection::vec((0..3_usize, 0..40_000_usize), 1..200),
        buffer in 0x4000..0x20000_usize,
    ) {
        let (mut compute, mut device) = links();
        sockopt::set_socket_send_buffer_size(device.descriptor(), buffer).unwrap();
        let source = memory(0x10000);
        store(&source, 0, &pattern(4, 0x10000));
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
        let mut sink = Recorder::new(expected.len() + 1, 0x1000);

        drain(&mut compute, &mut device, &mut sink, 2 * sizes.len());

        prop_assert_eq!(sink.payloads(), expected);
        for (number, pair) in sink.frames.chunks(2).enumerate() {
            prop_assert_eq!(&pair[0].1[..2], &(number as u16).to_le_bytes());
            prop_assert_eq!(&pair[1].1[..], &(number as u64).to_le_bytes());
        }
    }
}

#[test]
fn a_backlog_that_never_empties_goes_round_its_storage() {
    const MESSAGES: usize = 600;
    let (mut compute, mut device) = links();
    sockopt::set_socket_send_buffer_size(device.descriptor(), 0x20000).unwrap();
    sockopt::set_socket_recv_buffer_size(compute.descriptor(), 0x20000).unwrap();
    let mut sink = Recorder::new(1, 1);
    let message = |number: usize| Message::EngineNotice {
        blob: pattern(number, 5000 + number % 700),
    };

    let mut sent = 0;
    while sink.frames.len() < MESSAGES {
        // As many as it takes, so that the storage is full again and again.
        while sent < MESSAGES {
            match send_message(&mut device, &message(sent)) {
                Ok(()) => sent += 1,
                Err(FabricError::Backlog { .. }) => break,
                Err(error) => panic!("{error}"),
            }
        }
        assert!(device.is_congested() || sent == MESSAGES);
        // A little at a time, so that what waits begins and ends anywhere in the storage.
        device.flush().unwrap();
        compute.receive(&mut sink).unwrap();
    }

    for (number, (_, control)) in sink.frames.iter().enumerate() {
        let mut expected = Vec::new();
        message(number).encode(&mut expected).unwrap();
        assert_eq!(control, &expected, "message {number}");
    }
}
