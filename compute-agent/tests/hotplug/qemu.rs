//! What QEMU and its guests answer, and what becomes of it.

use std::sync::mpsc;
use std::time::Duration;

use farbus_compute_agent::hotplug::{
    DeviceKind, HotplugError, PlugDevice, Plugged, Unplugged, is_plugged, plug, unplug,
};
use serde_json::{Value, json};

use crate::peer::{Peer, done, error, event, nvme, returns};

const ENOUGH: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(300);
const NAME: &str = "farbus-d0";
const DELETED: &str = "DEVICE_DELETED";

/// What `qom-list` says of a machine with these devices.
fn peripherals(devices: &[(&str, &str)]) -> Value {
    let listed: Vec<_> = devices
        .iter()
        .map(|(name, kind)| json!({"name": name, "type": format!("child<{kind}>")}))
        .collect();
    returns(&json!(listed))
}

/// A QEMU that has the device, and does this when it is asked to delete it. What is written to it after
/// `qom-list` has said that the device is gone is not looked at.
fn with_device(
    mut delete: impl FnMut(u32) -> Vec<Value> + Send + 'static,
) -> (Peer, mpsc::Receiver<String>) {
    let (told, heard) = mpsc::channel();
    let mut asked = 0;
    let peer = Peer::qemu(move |command, arguments| {
        let _ = told.send(format!("{command} {arguments}"));
        match command {
            "qom-list" => vec![peripherals(&[(NAME, "vfio-user-pci")])],
            "device_del" => {
                asked += 1;
                delete(asked)
            }
            "chardev-remove" => vec![error("GenericError", "Chardev 'x' not found")],
            _ => vec![done()],
        }
    });
    (peer, heard)
}

#[test]
fn device_is_gone_when_qemu_says_so_even_before_it_answers() {
    let answers: [fn() -> Vec<Value>; 2] = [
        || vec![event(DELETED, NAME), done()],
        || {
            let others = [event("RESET", "x"), event(DELETED, "farbus-d00")];
            [&[done()], &others[..], &[event(DELETED, NAME)]].concat()
        },
    ];
    for answer in answers {
        let (peer, _) = with_device(move |_| answer());
        assert_eq!(
            unplug(&peer.as_qemu(), "d0", ENOUGH, false).unwrap(),
            Unplugged::Now
        );
    }
}

#[test]
fn guest_that_refuses_is_an_error_unless_it_is_forced() {
    let (peer, _) = with_device(|_| vec![done(), event("DEVICE_UNPLUG_GUEST_ERROR", NAME)]);
    let refused = unplug(&peer.as_qemu(), "d0", ENOUGH, false).unwrap_err();
    assert!(
        matches!(refused, HotplugError::GuestRefused { .. }),
        "{refused}"
    );
    assert_eq!(
        unplug(&peer.as_qemu(), "d0", ENOUGH, true).unwrap(),
        Unplugged::Abandoned
    );
}

#[test]
fn guest_that_says_nothing_keeps_the_device() {
    let (peer, _) = with_device(|_| vec![done()]);
    let kept = unplug(&peer.as_qemu(), "d0", SHORT, false).unwrap_err();
    assert!(kept.is_the_guests_will(), "{kept}");
    assert!(kept.to_string().contains(NAME), "{kept}");
    assert_eq!(
        unplug(&peer.as_qemu(), "d0", SHORT, true).unwrap(),
        Unplugged::Abandoned
    );
}

#[test]
fn guest_is_asked_once_even_without_any_time() {
    let (peer, heard) = with_device(|_| vec![done()]);
    let forced = unplug(&peer.as_qemu(), "d0", Duration::ZERO, true).unwrap();
    assert_eq!(forced, Unplugged::Abandoned);
    assert!(heard.try_iter().any(|said| said.starts_with("device_del")));
}

#[test]
fn request_of_somebody_else_is_waited_for() {
    let (peer, _) = with_device(|_| {
        let reason = "Device farbus-d0 is already in the process of unplug";
        vec![error("GenericError", reason), event(DELETED, NAME)]
    });
    assert_eq!(
        unplug(&peer.as_qemu(), "d0", ENOUGH, false).unwrap(),
        Unplugged::Now
    );
}

#[test]
fn slot_that_is_busy_is_asked_again() {
    let (peer, _) = with_device(|asked| match asked {
        1 => vec![error(
            "GenericError",
            "Hot-unplug failed: guest is busy (power indicator blinking)",
        )],
        _ => vec![done(), event(DELETED, NAME)],
    });
    assert_eq!(
        unplug(&peer.as_qemu(), "d0", ENOUGH, false).unwrap(),
        Unplugged::Now
    );
}

#[test]
fn device_that_went_without_a_word_is_found_to_be_gone() {
    let mut looks = 0;
    let peer = Peer::qemu(move |command, _| match command {
        "qom-list" => {
            looks += 1;
            let there = [(NAME, "vfio-user-pci")];
            vec![peripherals(if looks < 2 { &there } else { &[] })]
        }
        "chardev-remove" => vec![error("GenericError", "Chardev 'x' not found")],
        _ => vec![done()],
    });
    assert_eq!(
        unplug(&peer.as_qemu(), "d0", ENOUGH, false).unwrap(),
        Unplugged::Now
    );
}

#[test]
fn slot_without_hot_plug_is_told_of() {
    let (peer, _) = with_device(|_| {
        vec![error(
            "GenericError",
            "Bus 'pcie.0' does not support hotplugging",
        )]
    });
    let refused = unplug(&peer.as_qemu(), "d0", ENOUGH, true).unwrap_err();
    let said = refused.to_string();
    assert!(
        said.contains("pcie.0") && said.contains("root port with hot-plug"),
        "{said}"
    );
}

#[test]
fn device_of_that_name_and_another_kind_is_left_alone() {
    let peer = Peer::qemu(|command, _| match command {
        "qom-list" => vec![peripherals(&[(NAME, "e1000e")])],
        _ => panic!("{command}"),
    });
    for taken in [
        plug(&peer.as_qemu(), &nvme(ENOUGH)).unwrap_err(),
        unplug(&peer.as_qemu(), "d0", ENOUGH, true).unwrap_err(),
        is_plugged(&peer.as_qemu(), "d0").unwrap_err(),
    ] {
        assert!(
            matches!(taken, HotplugError::NameTaken { .. }) && taken.to_string().contains("e1000e"),
            "{taken}"
        );
    }
}

#[test]
fn device_that_is_there_is_not_plugged_again() {
    let (peer, heard) = with_device(|_| vec![done()]);
    assert_eq!(
        plug(&peer.as_qemu(), &nvme(ENOUGH)).unwrap(),
        Plugged::Already
    );
    assert!(is_plugged(&peer.as_qemu(), "d0").unwrap());
    assert!(heard.try_iter().all(|said| said.starts_with("qom-list")));
}

#[test]
fn qemu_without_vfio_user_is_told_of() {
    let peer = Peer::qemu(|command, _| match command {
        "qom-list" | "query-memdev" => vec![returns(&json!([]))],
        _ => vec![error(
            "GenericError",
            "'vfio-user-pci' is not a valid device model name",
        )],
    });
    let said = plug(&peer.as_qemu(), &nvme(ENOUGH))
        .unwrap_err()
        .to_string();
    assert!(said.contains("10.1 or newer"), "{said}");
}

fn virtio() -> PlugDevice {
    PlugDevice {
        kind: DeviceKind::VhostUserBlk {
            num_queues: 4,
            queue_size: 256,
        },
        ..nvme(ENOUGH)
    }
}

#[test]
fn virtio_drive_gets_a_chardev_that_an_older_qemu_understands() {
    let (told, heard) = mpsc::channel();
    let peer = Peer::qemu(move |command, arguments| {
        let _ = told.send((command.to_owned(), arguments.clone()));
        match command {
            "qom-list" | "query-memdev" => vec![returns(&json!([]))],
            "chardev-add" if arguments.to_string().contains("reconnect-ms") => vec![error(
                "GenericError",
                "Parameter 'backend.data.reconnect-ms' is unexpected",
            )],
            "chardev-remove" => vec![error("GenericError", "Chardev 'x' not found")],
            _ => vec![done()],
        }
    });
    assert_eq!(plug(&peer.as_qemu(), &virtio()).unwrap(), Plugged::Now);
    let heard: Vec<_> = heard.try_iter().collect();
    let (_, chardev) = heard.iter().rfind(|(c, _)| c == "chardev-add").unwrap();
    assert_eq!(chardev["id"], "farbus-d0-char");
    assert_eq!(chardev["backend"]["data"]["reconnect"], 1);
    let (_, device) = heard.iter().rfind(|(c, _)| c == "device_add").unwrap();
    assert_eq!(
        device,
        &json!({"driver": "vhost-user-blk-pci", "id": NAME, "bus": "rp1", "chardev": "farbus-d0-char",
                "num-queues": 4, "queue-size": 256})
    );
}

#[test]
fn virtio_drive_that_qemu_refuses_leaves_no_chardev() {
    let (told, heard) = mpsc::channel();
    let peer = Peer::qemu(move |command, _| {
        let _ = told.send(command.to_owned());
        match command {
            "qom-list" | "query-memdev" => vec![returns(&json!([]))],
            "device_add" => vec![error("GenericError", "Failed to connect")],
            _ => vec![done()],
        }
    });
    let refused = plug(&peer.as_qemu(), &virtio()).unwrap_err();
    assert!(
        refused.to_string().contains("Failed to connect"),
        "{refused}"
    );
    let heard: Vec<_> = heard.try_iter().collect();
    assert_eq!(
        heard[heard.len() - 3..],
        ["chardev-add", "device_add", "chardev-remove"]
    );
}
