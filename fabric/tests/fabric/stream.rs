//! However a stream is cut into pieces, the same frames come out of it, and no payload byte
//! is anywhere but in its place.

use std::io::Write;

use farbus_fabric::wire::*;
use farbus_fabric::{FabricError, Link, Received};
use proptest::collection::vec;
use proptest::prelude::*;
use rustix::event::PollFlags;

use super::support::*;

#[derive(Clone, Debug)]
enum Step {
    Ping,
    Interrupt,
    Released,
    Notice(usize),
    Data(usize),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        Just(Step::Ping),
        Just(Step::Interrupt),
        Just(Step::Released),
        (0..3000_usize).prop_map(Step::Notice),
        (0..100_usize).prop_map(Step::Data),
        (0..20_000_usize).prop_map(Step::Data),
    ]
}

/// The frames' bytes, and their payloads together.
fn stream_of(steps: &[Step]) -> (Vec<Vec<u8>>, Vec<u8>) {
    let mut payloads = Vec::new();
    let frames = steps
        .iter()
        .enumerate()
        .map(|(number, step)| match step {
            Step::Ping => message_bytes(&Message::Ping {
                nonce: number as u64,
            }),
            Step::Interrupt => message_bytes(&Message::Interrupt {
                kind: InterruptKind::Msix,
                vector: number as u16,
            }),
            Step::Released => message_bytes(&Message::Released),
            Step::Notice(len) => message_bytes(&Message::EngineNotice {
                blob: pattern(number, *len),
            }),
            Step::Data(len) => {
                let data = pattern(number, *len);
                payloads.extend(&data);
                completion_bytes(number as u16, &data)
            }
        })
        .collect();
    (frames, payloads)
}

/// What a frame has besides its payload.
fn prefix(frame: &[u8]) -> &[u8] {
    let header = Header::decode(frame.first_chunk().unwrap()).unwrap();
    &frame[..header.prefix_len()]
}

fn recorded(sink: &Recorder) -> Vec<Vec<u8>> {
    sink.frames
        .iter()
        .map(|(header, control)| [header.encode().as_slice(), control].concat())
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn frames_do_not_depend_on_how_the_stream_is_cut(
        steps in vec(any_step(), 1..30),
        cuts in vec(1..5000_usize, 1..50),
        span_len in 1..9000_usize,
    ) {
        let (mut link, mut socket) = link_and_socket();
        let (frames, payloads) = stream_of(&steps);
        let mut sink = Recorder::new(payloads.len() + 1, span_len.max(payloads.len() / 500));
        let stream = frames.concat();
        let mut rest = stream.as_slice();
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let piece = rest.len().min(*cuts.next().unwrap());
            socket.write_all(&rest[..piece]).unwrap();
            rest = &rest[piece..];
            wait(&link, PollFlags::IN);
            while link.receive(&mut sink).unwrap() == Received::Message {}
        }
        drop(socket);
        let end = receive_to_end(&mut link, &mut sink);

        prop_assert!(matches!(end, FabricError::Closed), "{}", end);
        let expected: Vec<_> = frames.iter().map(|frame| prefix(frame).to_vec()).collect();
        prop_assert_eq!(recorded(&sink), expected);
        prop_assert_eq!(sink.payloads(), payloads);
    }
}

fn short_stream() -> (Vec<Vec<u8>>, Vec<u8>) {
    stream_of(&[
        Step::Released,
        Step::Data(40),
        Step::Ping,
        Step::Data(0),
        Step::Interrupt,
        Step::Released,
        Step::Data(90),
        Step::Notice(60),
    ])
}

#[test]
fn frames_that_dribble_in_byte_by_byte_are_the_same() {
    let (mut link, mut socket) = link_and_socket();
    let (frames, payloads) = short_stream();
    let mut sink = Recorder::new(0x1000, 7);
    for byte in frames.concat() {
        socket.write_all(&[byte]).unwrap();
        wait(&link, PollFlags::IN);
        while link.receive(&mut sink).unwrap() == Received::Message {}
    }
    let expected: Vec<_> = frames.iter().map(|frame| prefix(frame).to_vec()).collect();
    assert_eq!(recorded(&sink), expected);
    assert_eq!(sink.payloads(), payloads);
}

#[test]
fn a_stream_that_ends_anywhere_delivers_its_whole_frames_and_says_how_it_ended() {
    let (frames, _) = short_stream();
    let stream = frames.concat();
    let mut ends = vec![0];
    for frame in &frames {
        ends.push(ends.last().unwrap() + frame.len());
    }
    for cut in 0..=stream.len() {
        let (mut link, socket) = link_and_socket();
        let mut sink = Recorder::new(0x1000, 16);
        write_and_close(socket, stream[..cut].to_vec());

        let end = receive_to_end(&mut link, &mut sink);

        let whole = ends.iter().filter(|end| **end <= cut).count() - 1;
        assert_eq!(sink.frames.len(), whole, "cut at {cut}");
        match (cut - ends[whole], end) {
            (0, FabricError::Closed) => {}
            (unfinished, FabricError::Truncated { received }) => {
                assert_eq!(received, unfinished, "cut at {cut}");
            }
            (_, error) => panic!("cut at {cut}: {error}"),
        }
        assert!(matches!(link.receive(&mut sink), Err(FabricError::Closed)));
    }
}
