use proptest::prelude::*;

use super::body::*;
use super::caps::Capabilities;
use super::wire::*;

fn any_header() -> impl Strategy<Value = Header> {
    any::<(u16, u16, u32, u32, u32)>().prop_map(|(id, command, size, flags, error)| Header {
        id,
        command,
        size,
        flags,
        error,
    })
}

fn any_capabilities() -> impl Strategy<Value = Capabilities> {
    any::<(
        Option<u64>,
        Option<u64>,
        Option<u64>,
        Option<u64>,
        Option<bool>,
    )>()
    .prop_map(
        |(max_msg_fds, max_data_xfer_size, max_dma_maps, pgsizes, write_multiple)| Capabilities {
            max_msg_fds,
            max_data_xfer_size,
            max_dma_maps,
            pgsizes,
            write_multiple,
            migration: false,
        },
    )
}

fn any_multi_write() -> impl Strategy<Value = MultiWrite> {
    any::<(u64, u32, u32, [u8; 8])>().prop_map(|(offset, region, count, data)| MultiWrite {
        offset,
        region,
        count,
        data,
    })
}

/// The request as it was, and again when it went over the wire.
fn set_irqs_round_trip(action: IrqAction, data: IrqData<'_>, index: u32, start: u32, count: u32) {
    let request = SetIrqs {
        index,
        start,
        count,
        action,
        data,
    };
    assert_eq!(SetIrqs::decode(&request.encode()), Ok(request));
}

proptest! {
    #[test]
    fn headers_survive_the_wire(header in any_header()) {
        prop_assert_eq!(Header::decode(&header.encode()), header);
    }

    #[test]
    fn a_readable_header_announces_a_body_within_bounds(header in any_header()) {
        if let Ok(len) = header.body_len() {
            prop_assert_eq!(len + HEADER_LEN, header.size as usize);
            prop_assert!(len + HEADER_LEN <= MAX_MESSAGE);
        }
    }

    #[test]
    fn capabilities_survive_the_wire(caps in any_capabilities()) {
        prop_assert_eq!(Capabilities::decode(&caps.encode()), Ok(caps));
    }

    #[test]
    fn an_answer_has_nothing_that_was_not_proposed(
        ours in any_capabilities(),
        theirs in any_capabilities(),
    ) {
        let answer = ours.answer_to(&theirs);
        prop_assert_eq!(answer.answer_to(&theirs), answer);
        prop_assert!(answer.max_msg_fds.is_none() || theirs.max_msg_fds.is_some());
        prop_assert!(answer.write_multiple.is_none() || theirs.write_multiple.is_some());
    }

    #[test]
    fn multi_writes_survive_the_wire(
        writes in proptest::collection::vec(any_multi_write(), 0..40),
    ) {
        let body = WriteMulti::encode(&writes);
        let decoded = WriteMulti::decode(&body).unwrap();
        prop_assert_eq!(decoded.count(), writes.len());
        prop_assert_eq!(decoded.iter().collect::<Vec<_>>(), writes);
    }

    #[test]
    fn fixed_bodies_survive_the_wire_and_tolerate_trailing_bytes(
        map in any::<(u32, u32, u64, u64, u64)>(),
        tail in proptest::collection::vec(any::<u8>(), 0..9),
    ) {
        let (argsz, flags, offset, address, size) = map;
        let map = DmaMap { argsz, flags, offset, address, size };
        let bytes = [&map.encode()[..], &tail].concat();
        prop_assert_eq!(DmaMap::decode(&bytes), Ok(map));
    }

    #[test]
    fn irq_requests_survive_the_wire(
        index in any::<u32>(),
        start in any::<u32>(),
        bools in proptest::collection::vec(any::<u8>(), 0..70),
    ) {
        for action in [IrqAction::Mask, IrqAction::Unmask, IrqAction::Trigger] {
            set_irqs_round_trip(action, IrqData::Bool(&bools), index, start, bools.len() as u32);
            set_irqs_round_trip(action, IrqData::None, index, start, 7);
            set_irqs_round_trip(action, IrqData::EventFd, index, start, 3);
        }
    }

    #[test]
    fn any_bytes_decode_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Version::decode(&bytes);
        let _ = DmaMap::decode(&bytes);
        let _ = DmaUnmap::decode(&bytes);
        let _ = DeviceInfo::decode(&bytes);
        let _ = RegionInfo::decode(&bytes);
        let _ = RegionIoFds::decode(&bytes);
        let _ = IrqInfo::decode(&bytes);
        let _ = DmaTransfer::decode(&bytes);
        let _ = SetIrqs::decode(&bytes);
        let _ = WriteMulti::decode(&bytes).map(|multi| multi.iter().count());
        let _ = Capabilities::decode(&bytes);
        if let Ok((access, data)) = decode_region_write(&bytes) {
            prop_assert_eq!(access.count as usize, data.len());
        }
    }

    #[test]
    fn a_body_cut_short_is_refused(cut in 0usize..DmaMap::LEN) {
        prop_assert_eq!(
            DmaMap::decode(&DmaMap::default().encode()[..cut]),
            Err(WireError::BodyTooShort { what: "DMA_MAP", len: cut, need: DmaMap::LEN })
        );
    }
}

#[test]
fn the_header_is_laid_out_as_specified() {
    let header = Header {
        id: 0x1234,
        command: 10,
        size: 0x20,
        flags: 0x11,
        error: 7,
    };
    let bytes = header.encode();
    assert_eq!(bytes[0..2], 0x1234u16.to_ne_bytes());
    assert_eq!(bytes[2..4], 10u16.to_ne_bytes());
    assert_eq!(bytes[4..8], 0x20u32.to_ne_bytes());
    assert_eq!(bytes[8..12], 0x11u32.to_ne_bytes());
    assert_eq!(bytes[12..16], 7u32.to_ne_bytes());
    assert_eq!(header.message_type(), Ok(MessageType::Reply));
    assert!(header.no_reply());
}

#[test]
fn every_command_number_maps_back_to_itself() {
    let known: Vec<u16> = (0..=u16::MAX)
        .filter(|n| Command::from_number(*n).is_some())
        .collect();
    assert_eq!(
        known,
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16, 17, 18]
    );
    assert!(
        known
            .iter()
            .all(|n| Command::from_number(*n).unwrap() as u16 == *n)
    );
}

#[test]
fn sizes_out_of_bounds_are_refused() {
    let with_size = |size| {
        Header {
            size,
            ..Header::default()
        }
        .body_len()
    };
    assert_eq!(
        with_size(15),
        Err(WireError::SizeTooSmall {
            command: 0,
            size: 15
        })
    );
    assert_eq!(with_size(16), Ok(0));
    assert_eq!(with_size(MAX_MESSAGE as u32), Ok(MAX_MESSAGE - HEADER_LEN));
    assert!(matches!(
        with_size(MAX_MESSAGE as u32 + 1),
        Err(WireError::SizeTooLarge { .. })
    ));
    assert!(matches!(
        with_size(u32::MAX),
        Err(WireError::SizeTooLarge { .. })
    ));
}

#[test]
fn a_message_that_neither_asks_nor_answers_is_refused() {
    let header = Header {
        flags: 0x2,
        ..Header::default()
    };
    assert_eq!(
        header.message_type(),
        Err(WireError::UnknownType {
            command: 0,
            flags: 2
        })
    );
}

#[test]
fn an_error_reply_is_a_bare_header_with_the_errno() {
    let asked = Header::command(9, Command::RegionRead, 0, 16);
    let reply = asked.error_reply(libc::ENOTSUP);
    assert_eq!((reply.id, reply.command, reply.size), (9, 9, 16));
    assert_eq!(reply.error, libc::ENOTSUP as u32);
    assert!(reply.is_error());
}

#[test]
fn absent_version_data_has_the_defaults() {
    for data in [&b""[..], b"\0", b"{}\0", b"{\"capabilities\":{}}\0"] {
        assert_eq!(Capabilities::decode(data), Ok(Capabilities::default()));
    }
}

#[test]
fn what_qemu_proposes_is_understood() {
    let data = b"{\"capabilities\": {\"migration\": {\"max_bitmap_size\": 268435456, \
        \"pgsize\": 4096}, \"max_msg_fds\": 16, \"max_data_xfer_size\": 1048576, \
        \"twin_socket\": {\"supported\": true}, \"write_multiple\": true, \
        \"pgsizes\": 4096, \"max_dma_maps\": 65535}}\0";
    let caps = Capabilities::decode(data).unwrap();
    assert_eq!(caps.max_msg_fds, Some(16));
    assert_eq!(caps.write_multiple, Some(true));
    assert!(
        caps.encode().len() < data.len(),
        "QEMU reads no reply longer than its request"
    );
}

#[test]
fn garbage_version_data_is_refused() {
    let no_nul = b"{}";
    let not_json = b"hello\0";
    let wrong_type = b"{\"capabilities\":{\"max_msg_fds\":\"many\"}}\0";
    let array = b"{\"capabilities\":[16]}\0";
    let negative = b"{\"capabilities\":{\"max_msg_fds\":-1}}\0";
    let deep = [vec![b'['; 9000], vec![0]].concat();
    let long = [vec![b' '; 1 << 15], b"{}\0".to_vec()].concat();
    for data in [
        &no_nul[..],
        not_json,
        wrong_type,
        array,
        negative,
        &deep,
        &long,
        b"\xff\xfe\0",
    ] {
        assert!(matches!(
            Capabilities::decode(data),
            Err(WireError::BadVersionData(_))
        ));
    }
}

#[test]
fn irq_flags_that_exclude_each_other_are_refused() {
    let with_flags = |flags| {
        let head = SetIrqsHead {
            argsz: 20,
            flags,
            index: 2,
            start: 0,
            count: 0,
        };
        SetIrqs::decode(&head.encode()).map(drop)
    };
    assert_eq!(with_flags(0b100_001), Ok(()));
    for flags in [
        0,
        0b1,
        0b100_000,
        0b100_011,
        0b110_001,
        0b1_100_001,
        u32::MAX,
    ] {
        assert!(
            matches!(with_flags(flags), Err(WireError::BadFlags { .. })),
            "{flags:#b}"
        );
    }
}

#[test]
fn irq_booleans_must_match_the_count() {
    let head = SetIrqsHead {
        argsz: 20,
        flags: 0b100_010,
        index: 2,
        start: 0,
        count: u32::MAX,
    };
    let bytes = [&head.encode()[..], &[1, 1]].concat();
    assert_eq!(
        SetIrqs::decode(&bytes),
        Err(WireError::DataLength {
            what: "DEVICE_SET_IRQS",
            said: u64::from(u32::MAX),
            carried: 2
        })
    );
}

#[test]
fn a_write_count_beyond_its_data_is_refused() {
    let access = RegionAccess {
        offset: 0,
        region: 0,
        count: u32::MAX,
    };
    let bytes = [&access.encode()[..], &[0; 8]].concat();
    assert!(matches!(
        decode_region_write(&bytes),
        Err(WireError::DataLength { .. })
    ));
    let write = MultiWrite {
        offset: 0,
        region: 0,
        count: 9,
        data: [0; 8],
    };
    assert_eq!(write.bytes(), None);
    let huge = u64::MAX.to_ne_bytes();
    assert!(matches!(
        WriteMulti::decode(&huge),
        Err(WireError::DataLength { .. })
    ));
}
