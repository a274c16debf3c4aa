//! A VMM that sends what it likes.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use farbus_compute_agent::vhost_user::channel::{Channel, Ended, Served};
use farbus_compute_agent::vhost_user::device::Device;
use farbus_compute_agent::vhost_user::drive::Drive;
use farbus_vfio::Function;
use farbus_vfio::soft_nvme::{SoftNvme, SoftNvmeConfig};
use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::harness::options;

fn connected() -> (UnixStream, Channel) {
    let config: SoftNvmeConfig = "backing=memory,size=8MiB".parse().unwrap();
    let function: Arc<dyn Function> = Arc::new(SoftNvme::open(&config).unwrap());
    let drive = Drive::bring_up(function.clone(), 1).unwrap();
    let lost = Arc::new(EventFd::new(0).unwrap());
    let device = Device::new(function, drive, options(), lost);
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let channel = Channel::new(theirs, Arc::new(Mutex::new(device))).unwrap();
    (ours, channel)
}

fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [request, flags, body.len() as u32] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(body);
    bytes
}

const GET_FEATURES: u32 = 1;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_CONFIG: u32 = 24;

fn reply(stream: &mut UnixStream) -> Vec<u8> {
    let mut head = [0; 12];
    stream.read_exact(&mut head).unwrap();
    let len = u32::from_ne_bytes(head[8..12].try_into().unwrap());
    let mut body = vec![0; len as usize];
    stream.read_exact(&mut body).unwrap();
    body
}

fn number(bytes: &[u8]) -> u64 {
    u64::from_ne_bytes(bytes[..8].try_into().unwrap())
}

#[test]
fn configuration_space_says_what_the_drive_is() {
    let (mut ours, mut channel) = connected();
    let mut ask = |request, body: &[u8]| {
        ours.write_all(&message(request, 1, body)).unwrap();
        assert_eq!(channel.serve().unwrap(), Served::One);
    };
    ask(GET_FEATURES, &[]);
    ask(GET_PROTOCOL_FEATURES, &[]);
    ask(SET_PROTOCOL_FEATURES, &(1u64 << 9).to_ne_bytes());
    let config: Vec<u8> = [0u32, 60, 0].iter().flat_map(|w| w.to_ne_bytes()).collect();
    ask(GET_CONFIG, &[config, vec![0; 60]].concat());
    let features = number(&reply(&mut ours));
    // VERSION_1, event index, indirect, protocol features; multiqueue, flush, topology, write
    // cache, discard, write zeroes.
    for bit in [32, 29, 28, 30, 12, 9, 10, 11, 13, 14, 2, 6] {
        assert!(features >> bit & 1 == 1, "bit {bit} of {features:#x}");
    }
    let protocol = number(&reply(&mut ours));
    // Multiqueue, acknowledgements, a channel back, configuration, inflight record, slots.
    for bit in [0, 3, 5, 9, 12, 15] {
        assert!(protocol >> bit & 1 == 1, "bit {bit} of {protocol:#x}");
    }
    let space = &reply(&mut ours)[12..];
    assert_eq!(number(space), (8 << 20) / 512);
    assert_eq!(space[12..16], 62u32.to_ne_bytes());
    assert_eq!(space[20..24], 512u32.to_ne_bytes());
    assert_eq!(space[32], 1);
    assert_eq!(space[34..36], 2u16.to_ne_bytes());
}

#[test]
fn message_that_comes_byte_by_byte_is_handled_when_it_is_whole() {
    let (mut ours, mut channel) = connected();
    let whole = message(SET_PROTOCOL_FEATURES, 1, &(1u64 << 9).to_ne_bytes());
    for byte in &whole[..whole.len() - 1] {
        ours.write_all(&[*byte]).unwrap();
        assert!(matches!(
            channel.serve(),
            Ok(Served::None) | Err(Ended::Protocol(_))
        ));
    }
}

#[test]
fn client_that_does_not_read_its_replies_is_let_go() {
    let (mut ours, mut channel) = connected();
    let ended = (0..100_000).find_map(|_| {
        ours.write_all(&message(GET_FEATURES, 1, &[])).unwrap();
        channel.serve().err()
    });
    assert!(matches!(ended, Some(Ended::Protocol(_))), "{ended:?}");
}

#[test]
fn message_that_is_too_long_or_not_known_ends_the_connection() {
    let (mut ours, mut channel) = connected();
    let mut long = message(GET_FEATURES, 1, &[]);
    long[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
    ours.write_all(&long).unwrap();
    assert!(matches!(channel.serve(), Err(Ended::Protocol(_))));
    let (mut ours, mut channel) = connected();
    ours.write_all(&message(0x7777, 1, &[])).unwrap();
    assert!(matches!(channel.serve(), Err(Ended::Refused(_))));
    let (ours, mut channel) = connected();
    drop(ours);
    assert!(matches!(channel.serve(), Err(Ended::Closed)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any messages: each is answered or ends the connection; none makes the device wait.
    #[test]
    fn arbitrary_messages_end_the_connection_at_worst(
        messages in prop::collection::vec(
            (0u32..50, prop::sample::select(vec![0u32, 1, 5, 9, 13]),
             prop::collection::vec(prop::sample::select(vec![0u8, 1, 2, 0x40, 0xff]), 0..80)),
            1..20),
    ) {
        let (mut ours, mut channel) = connected();
        for (request, flags, body) in messages {
            let whole = message(request, flags, &body);
            if ours.write_all(&whole).is_err() {
                break;
            }
            if channel.serve().is_err() {
                break;
            }
        }
    }
}
