//! Peers that are no VMM, or none that means well: an error in time, and no memory without bound.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use farbus_compute_agent::api::Vm;
use farbus_compute_agent::hotplug::{HotplugError, is_plugged, plug, unplug};
use proptest::prelude::*;

use crate::peer::{GREETING, Peer, nvme};

const DEADLINE: Duration = Duration::from_millis(400);

/// Both VMMs' way of each call; every one must fail in time.
fn fails(peer: &Peer) -> Vec<HotplugError> {
    let begun = Instant::now();
    let mut errors = Vec::new();
    for vm in [peer.as_qemu(), peer.as_cloud_hypervisor()] {
        errors.push(plug(&vm, &nvme(DEADLINE)).unwrap_err());
        errors.push(unplug(&vm, "d0", DEADLINE, true).unwrap_err());
    }
    assert!(begun.elapsed() < 30 * DEADLINE, "{:?}", begun.elapsed());
    errors
}

/// Says something once, then something else as long as anybody listens.
fn repeats(first: &'static str, then: &'static str) -> Peer {
    let then = then.repeat(1000);
    Peer::start(move |mut stream| {
        let mut sent = stream.write_all(first.as_bytes());
        while sent.is_ok() {
            sent = stream.write_all(then.as_bytes());
        }
    })
}

/// Says something, and nothing more until the other side has gone.
fn says(what: &'static str) -> Peer {
    Peer::start(move |mut stream| {
        let _ = stream.write_all(what.as_bytes());
        while matches!(stream.read(&mut [0; 4096]), Ok(1..)) {}
    })
}

#[test]
fn silence_is_an_error_that_names_the_likely_cause() {
    let mut held = Vec::new();
    let peer = Peer::start(move |stream| held.push(stream));
    let errors = fails(&peer);
    assert!(
        errors[0].to_string().contains("QEMU serves one at a time"),
        "{}",
        errors[0]
    );
    assert!(
        matches!(errors[2], HotplugError::Timeout { .. }),
        "{}",
        errors[2]
    );
}

#[test]
fn peer_that_hangs_up_is_an_error() {
    let peer = Peer::start(drop);
    for error in fails(&peer) {
        assert!(error.is_vmm_gone(), "{error}");
    }
}

#[test]
fn peer_that_greets_and_dies_is_an_error() {
    let peer = Peer::start(|mut stream| {
        let _ = stream.write_all(GREETING.as_bytes());
        let _ = stream.read(&mut [0; 10]);
    });
    let gone = plug(&peer.as_qemu(), &nvme(DEADLINE)).unwrap_err();
    assert!(gone.is_vmm_gone(), "{gone}");
}

#[test]
fn other_protocols_are_named() {
    let monitor = says("QEMU 11.1.0 monitor - type 'help' for more information\r\n(qemu) ");
    for error in [
        plug(&monitor.as_qemu(), &nvme(DEADLINE)).unwrap_err(),
        plug(&monitor.as_cloud_hypervisor(), &nvme(DEADLINE)).unwrap_err(),
    ] {
        assert!(error.to_string().contains("type 'help'"), "{error}");
    }
}

#[test]
fn line_without_an_end_is_given_up() {
    for endless in [
        repeats("{\"QMP\": \"", "aaaaaaaa"),
        repeats("HTTP/1.1 200 OK\r\nX: ", "aaaaaaaa"),
    ] {
        for error in fails(&endless) {
            assert!(
                matches!(error, HotplugError::WrongProtocol { .. }),
                "{error}"
            );
        }
    }
}

#[test]
fn events_without_an_end_are_given_up() {
    let peer = repeats(
        GREETING,
        "{\"event\": \"DEVICE_DELETED\", \"data\": {\"device\": \"x\"}}\n",
    );
    let error = unplug(&peer.as_qemu(), "d0", DEADLINE, false).unwrap_err();
    assert!(matches!(error, HotplugError::Timeout { .. }), "{error}");
}

#[test]
fn answer_that_never_ends_is_given_up() {
    let peer = says("HTTP/1.1 200 OK\r\nContent-Length: 4000000\r\n\r\n");
    let error = unplug(&peer.as_cloud_hypervisor(), "d0", DEADLINE, false).unwrap_err();
    assert!(matches!(error, HotplugError::Timeout { .. }), "{error}");
}

#[test]
fn nobody_at_the_socket_is_an_error_that_names_it() {
    let nowhere = "/nonexistent/vmm.sock";
    for vm in [
        Vm::Qemu {
            qmp: nowhere.into(),
            bus: None,
        },
        Vm::CloudHypervisor {
            api: nowhere.into(),
        },
    ] {
        let error = plug(&vm, &nvme(DEADLINE)).unwrap_err();
        assert!(
            error.is_vmm_gone() && error.to_string().contains(nowhere),
            "{error}"
        );
    }
    assert!(plug(&Vm::None, &nvme(DEADLINE)).is_err());
}

/// Says `bytes` after a beginning that is right, and hangs up.
fn babbles(greeting: &'static str, bytes: Vec<u8>) -> Peer {
    Peer::start(move |mut stream: UnixStream| {
        let _ = stream.write_all(greeting.as_bytes());
        let _ = stream.read(&mut [0; 4096]);
        let _ = stream.write_all(&bytes);
    })
}

fn plausible() -> impl Strategy<Value = Vec<u8>> {
    let line = prop_oneof![
        Just(r#"{"return": {}, "id": 1}"#),
        Just(r#"{"return": [{"name": 3, "type": null}], "id": 2}"#),
        Just(r#"{"return": "x", "id": 2}"#),
        Just(r#"{"error": {"class": 1}, "id": 2}"#),
        Just(r#"{"event": 7, "data": []}"#),
        Just(r#"{"id": 2}"#),
        Just("[]"),
    ];
    proptest::collection::vec(line, 0..6).prop_map(|lines| lines.join("\n").into_bytes())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_answers_come_to_an_end(
        bytes in prop_oneof![plausible(), proptest::collection::vec(any::<u8>(), 0..300)],
    ) {
        let qemu = babbles(GREETING, bytes.clone());
        prop_assert!(plug(&qemu.as_qemu(), &nvme(DEADLINE)).is_err());
        let other = babbles("HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n", bytes);
        let _ = is_plugged(&other.as_cloud_hypervisor(), "d0");
    }
}
