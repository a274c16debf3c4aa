//! A VMM that sends what it likes.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use farbus_compute_agent::vhost_user::channel::{Channel, Ended, Served};
use farbus_compute_agent::vhost_user::device::Device;
use farbus_compute_agent::vhost_user::drive::Drive;
use farbus_vfio::Function;
use farbus_vfio::soft_nvme::{SoftNvme, SoftNvmeConfig};
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::VhostUserBackendReqHandlerMut;
use vhost::vhost_user::message::{
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserVringAddrFlags,
};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::harness::{USER, options};

fn connected() -> (UnixStream, Channel) {
    let (ours, channel, _) = connected_to_device();
    (ours, channel)
}

fn connected_to_device() -> (UnixStream, Channel, Arc<Mutex<Device>>) {
    let config: SoftNvmeConfig = "backing=memory,size=8MiB".parse().unwrap();
    let function: Arc<dyn Function> = Arc::new(SoftNvme::open(&config).unwrap());
    let drive = Drive::bring_up(function.clone(), 1).unwrap();
    let lost = Arc::new(EventFd::new(0).unwrap());
    let device = Device::new(function, drive, options(), lost);
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let device = Arc::new(Mutex::new(device));
    let channel = Channel::new(theirs, device.clone()).unwrap();
    (ours, channel, device)
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
const SET_BACKEND_REQ_FD: u32 = 21;
const IOTLB: u32 = 22;

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

/// `struct vhost_iotlb_msg`.
fn translation(first: u64, size: u64, user: u64, access: u8, kind: u8) -> Vec<u8> {
    let words = [first, size, user].map(u64::to_ne_bytes).concat();
    [words, vec![access, kind], vec![0; 6]].concat()
}

/// A client whose guest is behind an IOMMU, with a channel back.
fn behind_iommu() -> (UnixStream, UnixStream, Channel, Arc<Mutex<Device>>) {
    let (ours, mut channel, device) = connected_to_device();
    {
        let mut device = device.lock().unwrap();
        device.set_protocol_features(1 << 3 | 1 << 5).unwrap();
        let features = device.get_features().unwrap() & !(1 << 29);
        device.set_features(features).unwrap();
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(1 << 20).unwrap();
        let region = VhostUserMemoryRegion::new(0, 1 << 20, USER, 0);
        device.set_mem_table(&[region], vec![file], None).unwrap();
    }
    let (back, theirs) = UnixStream::pair().unwrap();
    back.set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let whole = message(SET_BACKEND_REQ_FD, 1, &[]);
    ours.send_with_fd(&whole[..], theirs.as_raw_fd()).unwrap();
    assert_eq!(channel.serve().unwrap(), Served::One);
    (ours, back, channel, device)
}

#[test]
fn translations_are_acknowledged_or_refused() {
    let (mut ours, _back, mut channel, _) = behind_iommu();
    for (body, refused) in [
        (translation(0x1000, 0x1000, USER, 3, 2), 0),
        (translation(0x1000, 0x1000, 0, 0, 3), 0),
        (translation(0, 0, 0, 0, 3), 0),
        (translation(0x1000, u64::MAX, 0, 0, 3), 0),
        (translation(0x1000, 0x1000, USER, 0, 2), 1),
        (translation(0x1000, 0, USER, 3, 2), 1),
        (translation(0x1000, 1 << 21, USER, 3, 2), 1),
        (translation(0x1000, 0x1000, 0, 3, 2), 1),
        (translation(0x1000, 0x1000, USER, 3, 1), 1),
        (translation(0x1000, 0x1000, USER, 3, 4), 1),
    ] {
        ours.write_all(&message(IOTLB, 9, &body)).unwrap();
        assert_eq!(channel.serve().unwrap(), Served::One);
        assert_eq!(number(&reply(&mut ours)), refused, "{body:?}");
    }
}

#[test]
fn iommu_is_offered_to_who_has_agreed_to_what_it_needs() {
    let mut device = super::harness::Guest::new("").device;
    let mut offered = |agreed: VhostUserProtocolFeatures| {
        device.set_protocol_features(agreed.bits()).unwrap();
        device.get_features().unwrap() >> 33 & 1 == 1
    };
    let (channel, answers) = (
        VhostUserProtocolFeatures::BACKEND_REQ,
        VhostUserProtocolFeatures::REPLY_ACK,
    );
    assert!(!offered(VhostUserProtocolFeatures::empty()));
    assert!(!offered(channel));
    assert!(!offered(answers));
    assert!(offered(channel | answers));
}

#[test]
fn translations_without_an_iommu_are_refused() {
    let (mut ours, mut channel) = connected();
    let body = translation(0x1000, 0x1000, USER, 3, 2);
    ours.write_all(&message(IOTLB, 9, &body)).unwrap();
    assert_eq!(channel.serve().unwrap(), Served::One);
    assert_eq!(number(&reply(&mut ours)), 1);
}

#[test]
fn translation_that_is_no_message_ends_the_connection() {
    let body = translation(0x1000, 0x1000, USER, 3, 2);
    for whole in [
        message(IOTLB, 9, &body[..26]),
        message(IOTLB, 9, &[&body[..], &[0]].concat()),
        message(IOTLB, 13, &body),
        message(IOTLB, 0, &body),
    ] {
        let (mut ours, _back, mut channel, _) = behind_iommu();
        ours.write_all(&whole).unwrap();
        assert!(matches!(channel.serve(), Err(Ended::Protocol(_))));
    }
    let (ours, _back, mut channel, _) = behind_iommu();
    let whole = message(IOTLB, 9, &body);
    ours.send_with_fd(&whole[..], ours.as_raw_fd()).unwrap();
    assert!(matches!(channel.serve(), Err(Ended::Protocol(_))));
}

#[test]
fn answer_counts_after_what_was_said_before_it_on_the_other_socket() {
    let (mut ours, mut back, mut channel, device) = behind_iommu();
    {
        let mut device = device.lock().unwrap();
        let flags = VhostUserVringAddrFlags::empty();
        device.set_vring_num(0, 16).unwrap();
        let (table, used, available) = (0x10_0000, 0x10_0400, 0x10_0200);
        device
            .set_vring_addr(0, flags, table, used, available, 0)
            .unwrap();
        device.set_vring_kick(0, None).unwrap();
        device.set_vring_enable(0, true).unwrap();
        assert!(device.work(true).unwrap().asks);
    }
    channel.ask();
    // All parts are in one page: to be read, and to be read and written.
    for access in [1, 3] {
        let mut asked = [0; 44];
        back.read_exact(&mut asked).unwrap();
        let header = [1u32, 9, 32].map(u32::to_ne_bytes).concat();
        assert_eq!(asked[..12], header);
        let page = number(&asked[12..]) & !4095;
        assert_eq!((page, asked[36], asked[37]), (0x10_0000, access, 1));
    }
    // Nothing is refused, although all answers are there before any translation is looked at.
    let answer = message(1, 5, &[0; 8]);
    back.write_all(&[&answer[..], &answer[..]].concat())
        .unwrap();
    let body = translation(0x10_0000, 0x1000, USER, 3, 2);
    ours.write_all(&message(IOTLB, 9, &body)).unwrap();
    while channel.serve().unwrap() == Served::One {}
    assert_eq!(number(&reply(&mut ours)), 0);
    let mut device = device.lock().unwrap();
    device.work(true).unwrap();
    assert!(device.next_ask().is_none(), "the queue has not started");
    let base = device.get_vring_base(0).unwrap().num;
    assert_eq!(base, 0);
}

#[test]
fn answers_to_nothing_and_answers_that_are_none_end_the_connection() {
    for said in [
        message(1, 5, &[0; 8]),
        message(2, 5, &[0; 8]),
        message(1, 1, &[0; 8]),
        message(1, 5, &[0; 16]),
        vec![0xff; 20],
    ] {
        let (_ours, mut back, mut channel, _) = behind_iommu();
        back.write_all(&said).unwrap();
        let ended = (0..3).find_map(|_| channel.serve().err());
        assert!(matches!(ended, Some(Ended::Protocol(_))), "{ended:?}");
    }
    let (_ours, back, mut channel, _) = behind_iommu();
    drop(back);
    assert!(matches!(channel.serve(), Err(Ended::Closed)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any translations and answers, in any order.
    #[test]
    fn arbitrary_translations_end_the_connection_at_worst(
        said in prop::collection::vec(
            (any::<bool>(), prop::sample::select(vec![0u64, 0x1000, 1 << 20, u64::MAX]),
             prop::sample::select(vec![0u64, 1, 0x1000, 1 << 20, u64::MAX]),
             prop::sample::select(vec![0u64, USER, USER + 0x1000, u64::MAX]), 0u8..5, 0u8..8),
            1..40),
    ) {
        let (mut ours, mut back, mut channel, device) = behind_iommu();
        for (answers, first, size, user, access, kind) in said {
            if answers {
                back.write_all(&message(1, 5, &u64::from(access).to_ne_bytes())).unwrap();
            } else {
                let body = translation(first, size, user, access, kind);
                ours.write_all(&message(IOTLB, 9, &body)).unwrap();
            }
            if channel.serve().is_err() {
                break;
            }
            device.lock().unwrap().work(true).unwrap();
        }
    }

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
