//! Clients that break the vfio-user protocol, byte by byte. Each gets what it deserves, and
//! the server serves the next one.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod common;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use common::*;
use farbus_vfio::user::Command;
use farbus_vfio::user::body::{MultiWrite, SetIrqsHead, WriteMulti};
use farbus_vfio::user::wire::{FLAG_NO_REPLY, MAX_MESSAGE, MAX_MSG_FDS};
use libc::{EINVAL, ENOTSUP};
use proptest::prelude::*;

/// A message whose size field says something else than its length.
fn with_size(mut message: Vec<u8>, size: u32) -> Vec<u8> {
    message[4..8].copy_from_slice(&size.to_ne_bytes());
    message
}

/// Some of everything, in the order in which QEMU starts a session.
fn session_prefix() -> Vec<u8> {
    let argsz = |argsz: u32, len: usize| {
        let mut body = vec![0; len];
        body[..4].copy_from_slice(&argsz.to_ne_bytes());
        body
    };
    [
        hello(),
        dma_map(0, 0x1000, 0, 3),
        command(Command::DeviceGetInfo, &argsz(16, 16)),
        command(Command::DeviceGetRegionInfo, &argsz(32, 32)),
        command(Command::DeviceGetIrqInfo, &argsz(16, 16)),
        command(Command::RegionRead, &region_access(7, 0, 64)),
        command(
            Command::RegionWrite,
            &[&region_access(0, 0, 4)[..], &[1; 4]].concat(),
        ),
        command(Command::DeviceReset, &[]),
    ]
    .concat()
}

#[test]
fn sizes_that_cannot_be_close_the_connection() {
    let server = Server::start();
    for size in [0, 1, 15, MAX_MESSAGE as u32 + 1, u32::MAX] {
        let mut raw = server.greeted();
        raw.send(&with_size(command(Command::DeviceReset, &[]), size));
        raw.assert_closed();
    }
    server.assert_serves();
}

#[test]
fn sizes_that_cannot_be_close_the_connection_before_the_handshake() {
    let server = Server::start();
    for size in [0, 15, u32::MAX] {
        let mut raw = server.raw();
        raw.send(&with_size(hello(), size));
        raw.assert_closed();
    }
    server.assert_serves();
    assert_eq!(server.function.calls(), []);
}

#[test]
fn a_message_that_neither_asks_nor_answers_closes_the_connection() {
    let server = Server::start();
    let mut raw = server.greeted();
    raw.send(&message(1, Command::DeviceReset as u16, 0xf, &[]));
    raw.assert_closed();
    server.assert_serves();
}

#[test]
fn a_request_before_the_handshake_is_refused_and_closes_the_connection() {
    let server = Server::start();
    for number in [0, 2, 9, 13, 99] {
        let mut raw = server.raw();
        assert_eq!(raw.ask_errno(&message(1, number, 0, &[0; 32])), EINVAL);
        raw.assert_closed();
    }
    assert_eq!(server.function.calls(), [], "nothing reached the function");
    server.assert_serves();
}

#[test]
fn versions_that_cannot_be_spoken_are_refused_and_close_the_connection() {
    let server = Server::start();
    let bodies: [&[u8]; 8] = [
        &[1, 0, 1, 0],
        &[0xff; 4],
        &[],
        &[0, 0, 1],
        b"\0\0\x01\0{}",
        b"\0\0\x01\0{\"capabilities\":[]}\0",
        b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":\"x\"}}\0",
        b"\0\0\x01\0\xff\xfe\xfd\0",
    ];
    for body in bodies {
        let mut raw = server.raw();
        assert_eq!(
            raw.ask_errno(&command(Command::Version, body)),
            EINVAL,
            "{body:?}"
        );
        raw.assert_closed();
    }
    server.assert_serves();
}

#[test]
fn a_handshake_that_wants_no_reply_closes_the_connection() {
    let server = Server::start();
    let mut raw = server.raw();
    raw.send(&message(
        1,
        Command::Version as u16,
        FLAG_NO_REPLY,
        &[0, 0, 1, 0],
    ));
    raw.assert_closed();
    server.assert_serves();
}

#[test]
fn a_second_handshake_is_refused_and_the_session_goes_on() {
    let server = Server::start();
    let mut raw = server.greeted();
    assert_eq!(raw.ask_errno(&hello()), EINVAL);
    raw.assert_in_step();
}

#[test]
fn unknown_commands_are_refused_and_the_stream_stays_in_step() {
    let server = Server::start();
    let mut raw = server.greeted();
    for number in [0, 6, 11, 12, 14, 16, 17, 18, 19, 255, u16::MAX] {
        for len in [0, 1, 16, 5000] {
            let sent = message(number, number, 0, &vec![0xee; len]);
            raw.send(&sent);
            let (header, body) = raw.reply();
            assert_eq!((header.id, header.command), (number, number));
            assert_eq!((header.error as i32, body.len()), (ENOTSUP, 0));
        }
        raw.assert_in_step();
    }
}

#[test]
fn bodies_that_are_too_short_are_refused_and_the_stream_stays_in_step() {
    let server = Server::start();
    let mut raw = server.greeted();
    let full = [
        (2, 32),
        (3, 24),
        (4, 16),
        (5, 32),
        (7, 16),
        (8, 20),
        (9, 16),
        (10, 16),
        (15, 8),
    ];
    for (number, len) in full {
        for cut in 0..len {
            let body = vec![0xff; cut];
            assert_eq!(
                raw.ask_errno(&message(1, number, 0, &body)),
                EINVAL,
                "{number} {cut}"
            );
        }
        raw.assert_in_step();
    }
}

#[test]
fn an_argsz_without_room_for_the_answer_is_refused() {
    let server = Server::start();
    let mut raw = server.greeted();
    for (number, len) in [(2, 32), (3, 24), (4, 16), (5, 32), (7, 16), (8, 20)] {
        let mut body = vec![0; len];
        body[..4].copy_from_slice(&(len as u32 - 1).to_ne_bytes());
        assert_eq!(
            raw.ask_errno(&message(1, number, 0, &body)),
            EINVAL,
            "{number}"
        );
    }
    raw.assert_in_step();
}

#[test]
fn replies_that_nobody_asked_for_are_dropped() {
    let server = Server::start();
    let mut raw = server.greeted();
    for flags in [0x1, 0x21, 0x11] {
        raw.send(&message(3, Command::DmaRead as u16, flags, &[1; 100]));
    }
    raw.assert_in_step();
}

#[test]
fn a_refused_command_that_wants_no_reply_gets_none() {
    let server = Server::start();
    let mut raw = server.greeted();
    raw.send(&message(1, 99, FLAG_NO_REPLY, &[]));
    raw.send(&message(
        1,
        Command::RegionWrite as u16,
        FLAG_NO_REPLY,
        &[0; 3],
    ));
    raw.send(&message(
        1,
        Command::RegionRead as u16,
        FLAG_NO_REPLY,
        &region_access(0, 0, 8),
    ));
    raw.assert_in_step();
}

#[test]
fn accesses_outside_of_a_region_are_refused() {
    let server = Server::start();
    let mut raw = server.greeted();
    let outside = [
        (0, BAR0_SIZE, 1),
        (0, BAR0_SIZE - 4, 8),
        (0, u64::MAX, 1),
        (0, u64::MAX - 3, 8),
        (1, 0, 4),
        (6, ROM_SIZE, 4),
        (7, 4096, 4),
        (7, 0x1_0000, 4),
        (7, u64::MAX, 4),
        (8, 0, 1),
        (9, 0, 1),
        (u32::MAX, 0, 1),
    ];
    for (region, offset, count) in outside {
        let access = region_access(region, offset, count);
        let read = command(Command::RegionRead, &access);
        assert_eq!(raw.ask_errno(&read), EINVAL, "read {region} {offset:#x}");
        let data = vec![1; count as usize];
        let write = command(Command::RegionWrite, &[&access[..], &data].concat());
        assert_eq!(raw.ask_errno(&write), EINVAL, "write {region} {offset:#x}");
    }
    raw.assert_in_step();
    assert_eq!(server.function.calls(), []);
}

#[test]
fn a_write_to_the_rom_is_refused() {
    let server = Server::start();
    let mut raw = server.greeted();
    let body = [&region_access(6, 0, 4)[..], &[1; 4]].concat();
    assert_eq!(
        raw.ask_errno(&command(Command::RegionWrite, &body)),
        ENOTSUP
    );
    assert_eq!(server.function.calls(), []);
}

#[test]
fn counts_beyond_the_data_are_refused() {
    let server = Server::start();
    let mut raw = server.greeted();
    for count in [0, 7, 9, u32::MAX] {
        let body = [&region_access(0, 0, count)[..], &[1; 8]].concat();
        assert_eq!(raw.ask_errno(&command(Command::RegionWrite, &body)), EINVAL);
    }
    for count in [(1 << 20) + 1, u32::MAX] {
        let body = region_access(0, 0, count);
        assert_eq!(raw.ask_errno(&command(Command::RegionRead, &body)), EINVAL);
    }
    let write = MultiWrite {
        offset: 0,
        region: 0,
        count: 4,
        data: [1; 8],
    };
    let body = WriteMulti::encode(&[write, write]);
    for count in [0u64, 1, 3, u64::MAX] {
        let lying = [&count.to_ne_bytes()[..], &body[8..]].concat();
        assert_eq!(
            raw.ask_errno(&command(Command::RegionWriteMulti, &lying)),
            EINVAL
        );
    }
    raw.assert_in_step();
    assert_eq!(server.function.calls(), []);
}

#[test]
fn coalesced_writes_to_nowhere_do_not_keep_the_others_from_being_done() {
    let server = Server::start();
    let mut raw = server.greeted();
    let good = MultiWrite {
        offset: 8,
        region: 0,
        count: 4,
        data: [1; 8],
    };
    let bad = [
        MultiWrite {
            offset: u64::MAX,
            ..good
        },
        MultiWrite { region: 77, ..good },
        MultiWrite { count: 9, ..good },
    ];
    let writes = [good, bad[0], bad[1], bad[2], good];
    let (_, body) = raw.ask(&command(
        Command::RegionWriteMulti,
        &WriteMulti::encode(&writes),
    ));
    assert_eq!(body, 2u64.to_ne_bytes());
    let done = Call::RegionWrite(0, 8, vec![1; 4]);
    assert_eq!(server.function.take_calls(), [done.clone(), done]);
}

#[test]
fn interrupts_that_do_not_exist_are_refused() {
    let server = Server::start();
    let mut raw = server.greeted();
    let (none, eventfd, trigger, mask) = (1, 4, 1 << 5, 1 << 3);
    let cases = [
        (none | trigger, 5, 0, 0),
        (none | trigger, u32::MAX, 0, 0),
        (none | trigger, 2, 0, MSIX + 1),
        (none | trigger, 2, MSIX, 1),
        (none | trigger, 2, u32::MAX, 1),
        (none | trigger, 2, 1, u32::MAX),
        (none | trigger, 2, u32::MAX, u32::MAX),
        (none | trigger, 2, 1, 0),
        (none | trigger, 0, 0, 1),
        (none | trigger, 3, 0, 1),
        (none | mask, 2, 0, 0),
        (eventfd | trigger, 2, 0, 0),
        (eventfd | trigger, 4, 0, 1),
        (eventfd | trigger, 2, 0, u32::MAX),
        (none, 2, 0, 1),
        (trigger, 2, 0, 1),
        (none | eventfd | trigger, 2, 0, 1),
        (none | trigger | mask, 2, 0, 1),
        (none | trigger | 1 << 6, 2, 0, 1),
    ];
    for (flags, index, start, count) in cases {
        let head = SetIrqsHead {
            argsz: 20,
            flags,
            index,
            start,
            count,
        };
        let sent = command(Command::DeviceSetIrqs, &head.encode());
        assert_eq!(raw.ask_errno(&sent), EINVAL, "{head:?}");
    }
    let head = SetIrqsHead {
        argsz: 20,
        flags: 2 | trigger,
        index: 2,
        start: 0,
        count: 3,
    };
    let two_bools = [&head.encode()[..], &[1, 1]].concat();
    assert_eq!(
        raw.ask_errno(&command(Command::DeviceSetIrqs, &two_bools)),
        EINVAL
    );
    raw.assert_in_step();
    assert_eq!(server.function.calls(), []);
}

#[test]
fn interrupts_need_one_eventfd_each() {
    let server = Server::start();
    let mut raw = server.greeted();
    let flags = 4 | 1 << 5;
    let head = SetIrqsHead {
        argsz: 20,
        flags,
        index: 2,
        start: 0,
        count: 2,
    };
    let sent = command(Command::DeviceSetIrqs, &head.encode());
    let files: Vec<OwnedFd> = (0..3).map(|_| memfd(4096)).collect();
    for count in [1, 3, 2] {
        raw.send_fds(&sent, &fds(&files[..count]));
        assert_eq!(raw.errno(), EINVAL, "{count} descriptors, none an eventfd");
    }
    raw.assert_in_step();
    assert_eq!(server.function.calls(), []);
}

#[test]
fn descriptors_with_a_command_that_takes_none_are_closed() {
    let server = Server::start();
    let mut raw = server.greeted();
    let (mut watched, sent) = UnixStream::pair().unwrap();
    watched.set_read_timeout(Some(PATIENCE)).unwrap();
    let read = command(Command::RegionRead, &region_access(0, 0, 4));
    raw.send_fds(&read, &[sent.as_fd(), sent.as_fd()]);
    drop(sent);
    assert!(!raw.reply().0.is_error());
    assert_eq!(watched.read(&mut [0]).unwrap(), 0, "a copy is still open");
    raw.assert_in_step();
}

#[test]
fn more_descriptors_than_a_message_may_have_close_the_connection() {
    let server = Server::start();
    let files: Vec<File> = (0..MAX_MSG_FDS * 2)
        .map(|_| File::open("/dev/null").unwrap())
        .collect();
    let map = dma_map(0, 0x1000, 0, 3);
    let mut at_once = server.greeted();
    at_once.send_fds(&map, &fds(&files));
    at_once.assert_closed();
    let mut bit_by_bit = server.greeted();
    bit_by_bit.send_fds(&map[..10], &fds(&files[..MAX_MSG_FDS]));
    bit_by_bit.send_fds(&map[10..20], &fds(&files[..1]));
    bit_by_bit.assert_closed();
    server.assert_serves();
}

#[test]
fn a_client_that_never_reads_is_disconnected() {
    let server = Server::start();
    let mut raw = server.greeted();
    raw.stream.set_nonblocking(true).unwrap();
    let read = command(Command::RegionRead, &region_access(0, 0, BAR0_SIZE as u32));
    let end = Instant::now() + PATIENCE;
    let refused = loop {
        assert!(Instant::now() < end, "never disconnected");
        match raw.stream.write(&read) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::yield_now(),
            Err(error) => break error.kind(),
        }
    };
    assert!(matches!(
        refused,
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
    ));
    server.assert_serves();
}

#[test]
fn a_disconnect_at_any_byte_leaves_the_server_ready_for_the_next_client() {
    let server = Server::start();
    let prefix = session_prefix();
    for cut in 0..prefix.len() {
        let mut raw = Raw::connect(&server.path);
        // The one before may not be gone yet; then this one is told, which is as good.
        let _ = raw.stream.write_all(&prefix[..cut]);
    }
    server.assert_serves();
}

#[test]
fn a_session_that_arrives_byte_by_byte_is_served() {
    let server = Server::start();
    let mut raw = server.raw();
    for byte in session_prefix() {
        raw.send(&[byte]);
    }
    let errors: Vec<bool> = (0..8).map(|_| raw.reply().0.is_error()).collect();
    assert_eq!(errors, [false; 8]);
    raw.assert_in_step();
}

#[test]
fn messages_in_one_piece_are_served_in_order() {
    let server = Server::start();
    let mut raw = server.raw();
    raw.send(&session_prefix().repeat(1));
    let commands: Vec<u16> = (0..8).map(|_| raw.reply().0.command).collect();
    assert_eq!(commands, [1, 2, 4, 5, 7, 9, 10, 13]);
}

#[test]
fn a_long_message_cut_by_a_disconnect_does_nothing() {
    let server = Server::start();
    let mut raw = server.greeted();
    let body = [&region_access(0, 0, 1 << 20)[..], &[1; 1000]].concat();
    let header = with_size(command(Command::RegionWrite, &body), MAX_MESSAGE as u32);
    raw.send(&header);
    drop(raw);
    server.wait_for(|calls| calls.contains(&Call::Reset));
    let writes = |call: &Call| matches!(call, Call::RegionWrite(..));
    assert!(!server.function.calls().iter().any(writes));
    server.assert_serves();
}

/// Random bytes behind a proper handshake: whatever comes of them, the server lives on.
#[test]
fn random_bytes_do_no_harm() {
    let server = Server::start();
    let bytes = proptest::collection::vec(any::<u8>(), 1..200);
    proptest!(ProptestConfig::with_cases(200), |(bytes in bytes)| {
        let mut raw = server.raw();
        let _ = raw.stream.write_all(&[hello(), bytes].concat());
    });
    server.assert_serves();
}
