//! Decoders against bytes that nobody of good will sends.

use farbus_fabric::RemoteSpan;
use farbus_fabric::wire::*;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::support::{completion, message_bytes};
use super::wire_values::{any_commands, any_completions, any_message, complete_of, submit_of};

fn header(kind: Kind, count: u16, control_len: u32, payload_len: u32) -> Header {
    Header {
        kind,
        count,
        control_len,
        payload_len,
        epoch: Epoch(1),
    }
}

/// A decoded message, encoded again.
fn encoded_again(body: &Body<'_>) -> Vec<u8> {
    match body {
        Body::Message(message) => {
            let mut control = Vec::new();
            message.encode(&mut control).unwrap();
            control
        }
        Body::Submit(submit) => {
            let mut batch = SubmitBatch::new();
            for entry in submit.entries() {
                let segments: Vec<RemoteSpan> = entry.segments.collect();
                batch
                    .push(&entry.placement, entry.command, &segments)
                    .unwrap();
            }
            batch.control().to_vec()
        }
        Body::Complete(complete) => complete_of(&complete.entries().collect::<Vec<_>>())
            .control()
            .to_vec(),
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..300)) {
        let _ = decode_frame(&bytes);
    }

    #[test]
    fn arbitrary_control_parts_decode_to_what_encodes_to_them(
        kind in select(Kind::ALL),
        count in 0..4_u16,
        control in vec(prop_oneof![Just(0_u8), Just(1), any::<u8>()], 0..300),
        payload_len in prop_oneof![Just(0), any::<u32>()],
    ) {
        let header = header(kind, count, control.len() as u32, payload_len);
        if let Ok(body) = decode_body(&header, &control) {
            prop_assert_eq!(encoded_again(&body), control);
        }
    }

    #[test]
    fn damaged_messages_are_refused_or_mean_what_they_say(
        message in any_message(),
        at: prop::sample::Index,
        value: u8,
    ) {
        let mut frame = message_bytes(&message);
        let at = at.index(frame.len());
        frame[at] = value;
        if let Ok((header, body, _)) = decode_frame(&frame) {
            prop_assert_eq!(encoded_again(&body), &frame[24..header.frame_len()]);
        }
    }

    #[test]
    fn damaged_commands_are_refused_or_mean_what_they_say(
        commands in any_commands(),
        at: prop::sample::Index,
        value: u8,
    ) {
        let batch = submit_of(&commands);
        let mut control = batch.control().to_vec();
        let at = at.index(control.len());
        control[at] = value;
        if let Ok(body) = decode_body(&batch.header(), &control) {
            prop_assert_eq!(encoded_again(&body), control);
        }
    }

    #[test]
    fn messages_cut_anywhere_are_refused(message in any_message(), at: prop::sample::Index) {
        let frame = message_bytes(&message);
        let at = at.index(frame.len());
        let cut = matches!(decode_frame(&frame[..at]), Err(WireError::Truncated { .. }));
        prop_assert!(cut);
    }

    #[test]
    fn control_parts_of_another_length_are_refused(
        entries in any_completions(),
        commands in any_commands(),
        message in any_message(),
    ) {
        let mut control = Vec::new();
        let header = message.encode(&mut control).unwrap();
        let (complete, submit) = (complete_of(&entries), submit_of(&commands));
        for (header, control) in [
            (header, control.as_slice()),
            (complete.header(), complete.control()),
            (submit.header(), submit.control()),
        ] {
            let longer = [control, &[0]].concat();
            let longer_header = Header { control_len: header.control_len + 1, ..header };
            prop_assert!(decode_body(&header, &longer).is_err());
            prop_assert!(decode_body(&longer_header, &longer).is_err());
        }
    }
}

/// A header's bytes with some of them replaced.
fn patched(header: Header, at: usize, bytes: &[u8]) -> [u8; 24] {
    let mut raw = header.encode();
    raw[at..at + bytes.len()].copy_from_slice(bytes);
    raw
}

#[test]
fn headers_are_refused_with_the_offending_value() {
    let ping = header(Kind::Ping, 0, 8, 0);
    let field = |kind, field, value, min, max| WireError::HeaderField {
        kind,
        field,
        value,
        min,
        max,
    };
    for (raw, error) in [
        (
            patched(ping, 0, &[0xff, 0xff]),
            WireError::UnknownKind(0xffff),
        ),
        (patched(ping, 2, &[1]), field(Kind::Ping, "count", 1, 0, 0)),
        (
            patched(ping, 4, &[0xff; 4]),
            field(Kind::Ping, "control length", u32::MAX, 8, 8),
        ),
        (
            patched(ping, 8, &[1]),
            field(Kind::Ping, "payload length", 1, 0, 0),
        ),
        (
            patched(ping, 12, &[0, 1]),
            WireError::Reserved {
                what: "frame header",
                value: 0x100,
            },
        ),
        (
            header(Kind::Submit, 0, 80, 0).encode(),
            field(Kind::Submit, "count", 0, 1, 256),
        ),
        (
            header(Kind::Submit, 257, 65_536, 0).encode(),
            field(Kind::Submit, "count", 257, 1, 256),
        ),
        (
            header(Kind::Submit, 2, 159, 0).encode(),
            field(Kind::Submit, "control length", 159, 160, 65_536),
        ),
        (
            header(Kind::Submit, 1, 65_537, 0).encode(),
            field(Kind::Submit, "control length", 65_537, 80, 65_536),
        ),
        (
            header(Kind::Complete, 2, 47, 0).encode(),
            field(Kind::Complete, "control length", 47, 48, 48),
        ),
        (
            header(Kind::Complete, 1, 24, MAX_PAYLOAD + 1).encode(),
            field(
                Kind::Complete,
                "payload length",
                MAX_PAYLOAD + 1,
                0,
                MAX_PAYLOAD,
            ),
        ),
    ] {
        assert_eq!(Header::decode(&raw), Err(error));
    }
}

#[test]
fn no_kind_allows_a_payload_within_the_look_ahead() {
    for kind in Kind::ALL {
        for count in [0, 1] {
            for control_len in 0..MIN_CONTROL_BEFORE_PAYLOAD as u32 {
                let raw = header(*kind, count, control_len, 1).encode();
                assert!(Header::decode(&raw).is_err(), "{kind} {control_len}");
            }
        }
    }
}

#[test]
fn payload_has_to_be_what_the_entries_say() {
    let batch = completion(1, 512);
    let header = Header {
        payload_len: 513,
        ..batch.header()
    };
    assert_eq!(
        Complete::decode(&header, batch.control()),
        Err(WireError::PayloadSum {
            kind: Kind::Complete,
            declared: 513,
            sum: 512
        })
    );
}

#[test]
fn sums_of_absurd_lengths_do_not_wrap() {
    let mut control = Vec::new();
    for _ in 0..256 {
        let mut entry = [0; 24];
        entry[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        control.extend(entry);
    }
    let header = header(Kind::Complete, 256, control.len() as u32, 0);
    assert_eq!(
        Complete::decode(&header, &control),
        Err(WireError::PayloadSum {
            kind: Kind::Complete,
            declared: 0,
            sum: 256 * u64::from(u32::MAX)
        })
    );
}

#[test]
fn contradictory_commands_are_refused() {
    let placement = |shadow_offset, data_len, direction| Placement {
        tag: Tag(5),
        queue: QueueId(1),
        shadow_offset,
        data_len,
        direction,
    };
    let segment = |address, len| RemoteSpan { address, len };
    let cases = [
        (placement(0, 1, Direction::None), vec![]),
        (placement(0, 0, Direction::ToDevice), vec![]),
        (placement(0, 0, Direction::FromDevice), vec![]),
        (placement(u32::MAX, 1, Direction::ToDevice), vec![]),
        (placement(0, 8, Direction::ToDevice), vec![segment(0, 8)]),
        (placement(0, 8, Direction::FromDevice), vec![segment(0, 7)]),
        (placement(0, 0, Direction::None), vec![segment(0, 0)]),
        (
            placement(0, 8, Direction::FromDevice),
            vec![segment(u64::MAX, 8)],
        ),
    ];
    for (placement, segments) in cases {
        let mut batch = SubmitBatch::new();
        assert!(batch.push(&placement, &[0; 64], &segments).is_err());
        assert!(batch.is_empty());

        // What the encoder does not write, the decoder does not take from others.
        let mut control = Vec::new();
        control.extend(placement.tag.0.to_le_bytes());
        control.extend(placement.queue.0.to_le_bytes());
        control.extend(placement.shadow_offset.to_le_bytes());
        control.extend(placement.data_len.to_le_bytes());
        control.extend([placement.direction as u8, 0, segments.len() as u8, 0]);
        control.extend([0; 64]);
        for segment in segments {
            control.extend(segment.address.to_le_bytes());
            control.extend(segment.len.to_le_bytes());
            control.extend([0; 4]);
        }
        let payload = match placement.direction {
            Direction::ToDevice => placement.data_len,
            Direction::None | Direction::FromDevice => 0,
        };
        let header = header(Kind::Submit, 1, control.len() as u32, payload);
        assert!(Submit::decode(&header, &control).is_err(), "{placement:?}");
    }
}

#[test]
fn segments_that_are_not_there_are_refused() {
    let mut control = vec![0; 80];
    control[14] = 0xff;
    control[15] = 0xff;
    let header = header(Kind::Submit, 1, 80, 0);
    assert_eq!(
        Submit::decode(&header, &control),
        Err(WireError::Truncated {
            what: "a Submit entry",
            need: 65_535 * 16,
            have: 0
        })
    );
}

#[test]
fn strings_that_are_not_utf8_are_refused() {
    let mut frame = message_bytes(&Message::Fault {
        code: FaultCode::Gone,
        text: Text::new("abc").unwrap(),
    });
    frame[24 + 4 + 1] = 0xff;
    assert_eq!(
        decode_frame(&frame).unwrap_err(),
        WireError::NotUtf8 {
            what: "a text",
            valid_up_to: 1
        }
    );
}

#[test]
fn unknown_codes_are_refused_except_of_a_refusal() {
    let mut interrupt = message_bytes(&Message::Interrupt {
        kind: InterruptKind::Msix,
        vector: 1,
    });
    interrupt[24] = 3;
    assert!(decode_frame(&interrupt).is_err());

    let mut refused = message_bytes(&Message::Refused {
        code: RefusalCode::Busy,
        text: Text::default(),
    });
    refused[24..26].copy_from_slice(&999_u16.to_le_bytes());
    let (_, body, _) = decode_frame(&refused).unwrap();
    assert_eq!(
        body,
        Body::Message(Message::Refused {
            code: RefusalCode::Other(999),
            text: Text::default()
        })
    );
}

#[test]
fn admission_is_by_side_epoch_and_phase() {
    let of = |kind, epoch| Header {
        epoch,
        ..header(kind, 0, 0, 0)
    };
    let mut admission = Admission::new(Side::Device);
    let hello = of(Kind::Hello, Epoch::NONE);
    assert_eq!(admission.admit(&hello), Ok(()));
    assert_eq!(
        admission.admit(&of(Kind::Submit, Epoch::NONE)),
        Err(WireError::WrongPhase {
            kind: Kind::Submit,
            epoch: Epoch::NONE
        })
    );
    assert_eq!(
        admission.admit(&of(Kind::Complete, Epoch::NONE)),
        Err(WireError::WrongSide {
            kind: Kind::Complete,
            from: Side::Compute
        })
    );

    admission.set_epoch(Epoch(5));
    assert_eq!(admission.admit(&of(Kind::Submit, Epoch(5))), Ok(()));
    for stale in [Epoch::NONE, Epoch(4), Epoch(6)] {
        assert_eq!(
            admission.admit(&of(Kind::Submit, stale)),
            Err(WireError::WrongEpoch {
                kind: Kind::Submit,
                found: stale,
                expected: Epoch(5)
            })
        );
    }
    assert!(admission.admit(&of(Kind::Hello, Epoch(5))).is_err());
}

/// An offer with a field changed, decoded.
fn offer(change: impl FnOnce(&mut [u8])) -> Result<Message, WireError> {
    let endpoint = RdmaEndpoint {
        gid: [1; 16],
        lid: 0,
        mtu: 1024,
        queue_pair: 17,
        first_packet: 7,
        ring_address: 0x1000,
        ring_len: RdmaEndpoint::MIN_RING,
        ring_key: 5,
        slots: RdmaEndpoint::MIN_SLOTS,
    };
    let mut control = Vec::new();
    let header = Message::RdmaOffer(endpoint).encode(&mut control).unwrap();
    change(&mut control);
    Message::decode(&header, &control)
}

#[test]
fn impossible_endpoints_are_refused() {
    assert!(offer(|_| ()).is_ok());
    for (at, bytes) in [
        (18, &[0, 3][..]),      // packets of 768 bytes
        (18, &[0x80, 0]),       // of 128
        (18, &[0, 0x20]),       // of 8192
        (23, &[1]),             // a queue pair of 25 bits
        (27, &[1]),             // a packet number of 25 bits
        (28, &[0, 0, 2, 0]),    // a ring of 128 KiB
        (28, &[0, 0, 0, 0x40]), // of 1 GiB
        (28, &[1, 0, 4, 0]),    // of an odd length
        (32, &[0xff; 8]),       // behind the end of memory
        (44, &[0xff, 0]),       // 255 messages
        (46, &[1]),             // reserved
    ] {
        let decoded = offer(|control| control[at..at + bytes.len()].copy_from_slice(bytes));
        assert!(decoded.is_err(), "{bytes:x?} at {at}: {decoded:?}");
    }
}

#[test]
fn impossible_keys_are_refused() {
    let key = RdmaKey {
        address: 0x1000,
        len: 0x1000,
        key: 3,
        alive: true,
    };
    let encode = |keys| Message::RdmaKeys(keys).encode(&mut Vec::new());
    assert!(encode(vec![key]).is_ok());
    assert!(encode(vec![]).is_err());
    assert!(encode(vec![key; RdmaKey::MAX + 1]).is_err());
    assert!(encode(vec![RdmaKey { len: 0, ..key }]).is_err());
    let beyond = RdmaKey {
        address: u64::MAX,
        len: 2,
        ..key
    };
    assert!(encode(vec![beyond]).is_err());
    let mut control = Vec::new();
    let header = Message::RdmaKeys(vec![key]).encode(&mut control).unwrap();
    control[20] = 2;
    assert!(Message::decode(&header, &control).is_err());
}
