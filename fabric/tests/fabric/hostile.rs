//! A TCP link against peers that break the protocol: each is refused before a byte of payload
//! lands and before the sink hears of the frame.

use farbus_fabric::FabricError;
use farbus_fabric::wire::*;

use super::support::*;

/// What a claimed compute-side link makes of these bytes.
fn outcome(bytes: Vec<u8>) -> WireError {
    let (mut link, socket) = link_and_socket();
    let mut sink = Recorder::new(0x10000, 0x1000);
    write_and_close(socket, bytes);
    let error = receive_to_end(&mut link, &mut sink);
    assert_eq!(sink.landed, 0);
    assert!(sink.frames.is_empty());
    assert!(!error.should_reconnect());
    match error {
        FabricError::Malformed(error) => error,
        other => panic!("{other}"),
    }
}

fn completion_with(header: impl FnOnce(Header) -> Header) -> Vec<u8> {
    let batch = completion(1, 512);
    let header = header(Header {
        epoch: EPOCH,
        ..batch.header()
    });
    let mut bytes = header.encode().to_vec();
    bytes.extend(batch.control());
    bytes.extend([0xee; 512]);
    bytes
}

#[test]
fn frames_of_another_epoch_are_refused() {
    for epoch in [Epoch(0), Epoch(6), Epoch(8), Epoch(u64::MAX)] {
        let error = outcome(completion_with(|header| Header { epoch, ..header }));
        assert_eq!(
            error,
            WireError::WrongEpoch {
                kind: Kind::Complete,
                found: epoch,
                expected: EPOCH
            }
        );
    }
}

#[test]
fn messages_of_the_wrong_side_are_refused() {
    let error = outcome(message_bytes(&Message::Describe));
    assert_eq!(
        error,
        WireError::WrongSide {
            kind: Kind::Describe,
            from: Side::Device
        }
    );
}

#[test]
fn messages_of_set_up_are_refused_after_it() {
    let error = outcome(message_bytes(&Message::Claimed {
        epoch: Epoch(9),
        shadow_len: 1,
        tags: 1,
    }));
    assert_eq!(
        error,
        WireError::WrongPhase {
            kind: Kind::Claimed,
            epoch: EPOCH
        }
    );
}

#[test]
fn absurd_sizes_are_refused_by_the_header_alone() {
    for header in [
        completion_with(|header| Header {
            payload_len: u32::MAX,
            ..header
        }),
        completion_with(|header| Header {
            control_len: u32::MAX,
            ..header
        }),
        completion_with(|header| Header {
            count: u16::MAX,
            ..header
        }),
    ] {
        let error = outcome(header[..24].to_vec());
        assert!(matches!(error, WireError::HeaderField { .. }), "{error}");
    }
}

#[test]
fn payload_without_enough_control_is_refused() {
    let error = outcome(completion_with(|header| Header {
        control_len: 0,
        ..header
    }));
    assert!(matches!(
        error,
        WireError::HeaderField {
            field: "control length",
            value: 0,
            ..
        }
    ));
}

#[test]
fn another_protocol_is_refused() {
    let error = outcome(b"GET / HTTP/1.1\r\nHost: farbus\r\n\r\n".to_vec());
    assert_eq!(error, WireError::UnknownKind(0x4547));
}

#[test]
fn a_frame_inside_a_frame_is_payload_and_nothing_else() {
    let (mut link, socket) = link_and_socket();
    let mut sink = Recorder::new(0x10000, 0x1000);
    let inner = message_bytes(&Message::Fault {
        code: FaultCode::Gone,
        text: Text::default(),
    });
    let mut stream = completion_bytes(1, &inner);
    stream.extend(message_bytes(&Message::Ping { nonce: 5 }));
    write_and_close(socket, stream);

    let end = receive_to_end(&mut link, &mut sink);

    assert!(matches!(end, FabricError::Closed));
    let kinds: Vec<_> = sink.frames.iter().map(|(header, _)| header.kind).collect();
    assert_eq!(kinds, [Kind::Complete, Kind::Ping]);
    assert_eq!(sink.payloads(), inner);
}
