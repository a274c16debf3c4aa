//! Every message survives its encoding, and encodings are what `docs/protocol.md` says.

use farbus_fabric::RemoteSpan;
use farbus_fabric::wire::*;
use proptest::prelude::*;

use super::wire_values::*;

proptest! {
    #[test]
    fn messages_survive_their_encoding(message in any_message(), epoch: u64) {
        let mut bytes = b"before".to_vec();
        let header = message.encode(&mut bytes).unwrap();
        let control = bytes.split_off(6);
        prop_assert_eq!(bytes, b"before");
        let header = Header { epoch: Epoch(epoch), ..header };

        let frame = [&header.encode(), control.as_slice(), b"next"].concat();
        let (decoded, body, payload) = decode_frame(&frame).unwrap();

        prop_assert_eq!(decoded, header);
        prop_assert_eq!(header.frame_len(), frame.len() - 4);
        prop_assert_eq!(body, Body::Message(message));
        prop_assert!(payload.is_empty());
    }

    #[test]
    fn commands_survive_their_encoding(commands in any_commands()) {
        let batch = submit_of(&commands);
        let header = batch.header();
        let decoded = Header::decode(&header.encode()).unwrap();
        prop_assert_eq!(decoded, header);

        let submit = Submit::decode(&decoded, batch.control()).unwrap();

        prop_assert_eq!(submit.entries().len(), commands.len());
        for (entry, command) in submit.entries().zip(&commands) {
            prop_assert_eq!(entry.placement, command.placement);
            prop_assert_eq!(entry.command, &command.bytes);
            prop_assert_eq!(entry.segments.len(), command.segments.len());
            prop_assert_eq!(entry.segments.collect::<Vec<_>>(), command.segments.clone());
        }
    }

    #[test]
    fn completions_survive_their_encoding(entries in any_completions()) {
        let batch = complete_of(&entries);
        let header = Header::decode(&batch.header().encode()).unwrap();

        let complete = Complete::decode(&header, batch.control()).unwrap();

        prop_assert_eq!(complete.entries().len(), entries.len());
        prop_assert_eq!(complete.entries().collect::<Vec<_>>(), entries);
    }
}

#[test]
fn header_has_the_documented_layout() {
    let mut control = Vec::new();
    let header = Message::Ping { nonce: 0x0102 }
        .encode(&mut control)
        .unwrap();
    let header = Header {
        epoch: Epoch(0x0a0b),
        ..header
    };

    assert_eq!(
        header.encode(),
        [
            0x40, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x0b, 0x0a, 0, 0, 0, 0, 0, 0
        ]
    );
    assert_eq!(control, [2, 1, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn submit_has_the_documented_layout() {
    let mut batch = SubmitBatch::new();
    let placement = Placement {
        tag: Tag(0x0102),
        queue: QueueId(0x0304),
        shadow_offset: 0x0506_0708,
        data_len: 0x200,
        direction: Direction::FromDevice,
    };
    let segment = RemoteSpan {
        address: 0x1_2345_6000,
        len: 0x200,
    };
    batch.push(&placement, &[0xcc; 64], &[segment]).unwrap();

    let control = batch.control();
    assert_eq!(
        control[..16],
        [2, 1, 4, 3, 8, 7, 6, 5, 0, 2, 0, 0, 2, 0, 1, 0]
    );
    assert_eq!(control[16..80], [0xcc; 64]);
    assert_eq!(
        control[80..],
        [0, 0x60, 0x45, 0x23, 1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(batch.header().payload_len, 0);
}

#[test]
fn complete_has_the_documented_layout() {
    let batch = complete_of(&[CompleteEntry {
        tag: Tag(0x0102),
        queue: QueueId(3),
        status: 0x0405,
        data_len: 0x0607,
        result: 0x08,
    }]);

    assert_eq!(
        batch.control(),
        [
            2, 1, 3, 0, 5, 4, 0, 0, 7, 6, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0
        ]
    );
    assert_eq!(batch.header().payload_len, 0x0607);
}

#[test]
fn join_and_joined_have_the_documented_layout() {
    let mut control = Vec::new();
    let header = Message::Join(join(1, 2, 0xab))
        .encode(&mut control)
        .unwrap();
    assert_eq!(header.kind.number(), 0x0d);
    assert_eq!(
        control[..16],
        [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2, 0, 0, 0, 0, 0]
    );
    assert_eq!(control[16..], [0xab; 16]);

    control.clear();
    let joined = Joined {
        place: LanePlace { lane: 0, lanes: 2 },
        token: JoinToken([0xcd; 16]),
    };
    let header = Message::Joined(joined).encode(&mut control).unwrap();
    assert_eq!(header.kind.number(), 0x0e);
    assert_eq!(control[..8], [0, 0, 2, 0, 0, 0, 0, 0]);
    assert_eq!(control[8..], [0xcd; 16]);
}

#[test]
fn kinds_are_found_by_their_numbers() {
    for kind in Kind::ALL {
        assert_eq!(Kind::from_number(kind.number()), Some(*kind));
    }
    assert_eq!(Kind::from_number(0), None);
    assert_eq!(Kind::ALL.len(), 33);
}

/// `docs/protocol.md`, RDMA.
#[test]
fn an_endpoint_has_the_bytes_of_the_table() {
    let endpoint = RdmaEndpoint {
        gid: *b"0123456789abcdef",
        lid: 0x0102,
        mtu: 4096,
        queue_pair: 0x03_0405,
        first_packet: 0x06_0708,
        ring_address: 0x1112_1314_1516_1718,
        ring_len: 0x8_0000,
        ring_key: 0x2122_2324,
        slots: 0x3132,
    };
    let mut control = Vec::new();
    Message::RdmaOffer(endpoint).encode(&mut control).unwrap();
    assert_eq!(
        control,
        [
            &b"0123456789abcdef"[..],
            &[
                0x02, 0x01, 0x00, 0x10, 0x05, 0x04, 0x03, 0, 0x08, 0x07, 0x06, 0
            ],
            &[0, 0, 8, 0, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11],
            &[0x24, 0x23, 0x22, 0x21, 0x32, 0x31, 0, 0],
        ]
        .concat()
    );
}

#[test]
fn batches_are_full_at_the_limits_and_usable_after_clear() {
    let mut batch = CompleteBatch::new();
    let entry = CompleteEntry {
        tag: Tag(1),
        queue: QueueId(1),
        status: 0,
        data_len: MAX_PAYLOAD,
        result: 0,
    };
    batch.push(&entry).unwrap();
    let full = batch.push(&entry).unwrap_err();
    assert_eq!(
        full,
        WireError::BatchFull {
            entries: 1,
            control: 24,
            payload: MAX_PAYLOAD
        }
    );

    batch.clear();
    assert!(batch.is_empty());
    let entry = CompleteEntry {
        data_len: 0,
        ..entry
    };
    for _ in 0..256 {
        batch.push(&entry).unwrap();
    }
    assert!(!batch.has_room(0));
    assert!(batch.push(&entry).is_err());
    assert!(Complete::decode(&batch.header(), batch.control()).is_ok());
}

#[test]
fn commands_with_many_segments_fill_a_batch_early() {
    let mut batch = SubmitBatch::new();
    let segments = vec![
        RemoteSpan {
            address: 0x1000,
            len: 1
        };
        4000
    ];
    let placement = Placement {
        tag: Tag(1),
        queue: QueueId(1),
        shadow_offset: 0,
        data_len: 4000,
        direction: Direction::FromDevice,
    };
    batch.push(&placement, &[0; 64], &segments).unwrap();
    assert!(!batch.has_room(0, 100));
    assert!(!batch.has_room(0, usize::MAX));
    assert!(batch.push(&placement, &[0; 64], &segments).is_err());
    assert_eq!(batch.len(), 1);
    assert!(Submit::decode(&batch.header(), batch.control()).is_ok());
}

fn join(lane: u16, lanes: u16, token: u8) -> Join {
    Join {
        epoch: Epoch(1),
        place: LanePlace { lane, lanes },
        token: JoinToken([token; 16]),
    }
}

#[test]
fn values_that_a_decoder_would_refuse_are_not_encoded() {
    let data = Data::new(&[1; 8]).unwrap();
    let request = RequestId(1);
    let description = Description {
        config: vec![0; 256],
        regions: Vec::new(),
        interrupts: InterruptCounts::default(),
        engine: EngineKind::None,
        blob: Vec::new(),
    };
    let region = |index, size| Region { index, size };
    for message in [
        Message::Claimed {
            epoch: Epoch::NONE,
            shadow_len: 1,
            tags: 1,
        },
        Message::Claimed {
            epoch: Epoch(1),
            shadow_len: 1,
            tags: 0,
        },
        // A lane beyond the last, none at all, and too many.
        Message::Join(join(2, 2, 1)),
        Message::Join(join(0, 0, 0)),
        Message::Join(join(0, LanePlace::MAX + 1, 0)),
        // A token where there is none yet, and none where there must be one.
        Message::Join(join(0, 2, 1)),
        Message::Join(join(1, 2, 0)),
        Message::Joined(Joined {
            place: LanePlace { lane: 0, lanes: 2 },
            token: JoinToken::NONE,
        }),
        Message::ConfigRead {
            request,
            offset: 4095,
            len: 2,
        },
        Message::ConfigRead {
            request,
            offset: 0,
            len: 65,
        },
        Message::ConfigRead {
            request,
            offset: 0,
            len: 0,
        },
        Message::ConfigWrite { offset: 4089, data },
        Message::ConfigWrite {
            offset: 0,
            data: Data::EMPTY,
        },
        Message::RegisterRead {
            request,
            region: 7,
            offset: 0,
            len: 4,
        },
        Message::RegisterRead {
            request,
            region: 0,
            offset: 0,
            len: 9,
        },
        Message::RegisterRead {
            request,
            region: 0,
            offset: u64::MAX - 2,
            len: 4,
        },
        Message::RegisterWrite {
            region: 0,
            offset: u64::MAX,
            data,
        },
        Message::RegisterUpdate {
            region: 0,
            offset: 0,
            data: Data::EMPTY,
        },
        Message::EngineNotice {
            blob: vec![0; 32 * 1024 + 1],
        },
        Message::Description(Box::new(Description {
            config: vec![0; 255],
            ..description.clone()
        })),
        Message::Description(Box::new(Description {
            config: vec![0; 4097],
            ..description.clone()
        })),
        Message::Description(Box::new(Description {
            blob: vec![0; 32 * 1024 + 1],
            ..description.clone()
        })),
        Message::Description(Box::new(Description {
            regions: vec![region(7, 1)],
            ..description.clone()
        })),
        Message::Description(Box::new(Description {
            regions: vec![region(0, 0)],
            ..description.clone()
        })),
        Message::Description(Box::new(Description {
            regions: vec![region(1, 4096), region(1, 4096)],
            ..description
        })),
    ] {
        let mut out = Vec::new();
        assert!(message.encode(&mut out).is_err(), "{message:?}");
        assert!(out.is_empty());
    }
}

#[test]
fn longest_description_fits_a_frame() {
    let description = Description {
        config: vec![1; 4096],
        regions: (0..7)
            .map(|index| Region {
                index,
                size: u64::MAX,
            })
            .collect(),
        interrupts: InterruptCounts {
            intx: 1,
            msi: 32,
            msix: 2048,
        },
        engine: EngineKind::Nvme,
        blob: vec![2; 32 * 1024],
    };
    let message = Message::Description(Box::new(description));
    let mut control = Vec::new();
    let header = message.encode(&mut control).unwrap();
    assert_eq!(Message::decode(&header, &control), Ok(message));
}
