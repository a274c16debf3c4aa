//! The agent's calls to cloud-hypervisor, held to its published interface by a stand-in.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use farbus_compute_agent::api::Vm;
use farbus_compute_agent::hotplug::{
    DeviceKind, HotplugError, PlugDevice, Plugged, Unplugged, is_plugged, plug, unplug,
};
use farbus_integration::cloud_hypervisor::{Guest, StandIn};
use farbus_integration::deadline::Deadline;
use farbus_integration::report::TestResult;

const SHORT: Duration = Duration::from_millis(300);
const NAME: &str = "farbus-d0";

const KINDS: [(DeviceKind, &str); 2] = [
    (DeviceKind::VfioUser, "vm.add-user-device"),
    (
        DeviceKind::VhostUserBlk {
            num_queues: 4,
            queue_size: 128,
        },
        "vm.add-disk",
    ),
];

fn vm(stand_in: &StandIn) -> Vm {
    Vm::CloudHypervisor {
        api: stand_in.path().to_owned(),
    }
}

fn device(kind: DeviceKind) -> PlugDevice {
    PlugDevice {
        id: "d0".into(),
        socket: "/run/farbus/d0.sock".into(),
        kind,
        deadline: enough(),
    }
}

fn enough() -> Duration {
    Deadline::secs(20).remaining()
}

#[test]
fn devices_of_both_kinds_come_and_go_as_the_document_says() -> TestResult {
    for (kind, call) in KINDS {
        let stand_in = StandIn::start()?;
        let vm = vm(&stand_in);
        for _ in 0..3 {
            assert_eq!(plug(&vm, &device(kind))?, Plugged::Now);
            assert_eq!(stand_in.devices(), [NAME]);
            assert!(is_plugged(&vm, "d0")?);
            assert_eq!(plug(&vm, &device(kind))?, Plugged::Already);
            assert_eq!(unplug(&vm, "d0", enough(), false)?, Unplugged::Now);
            assert_eq!(stand_in.devices(), [""; 0]);
            assert_eq!(unplug(&vm, "d0", enough(), false)?, Unplugged::Absent);
            assert!(!is_plugged(&vm, "d0")?);
        }
        assert_eq!(stand_in.calls(), [call, "vm.remove-device"].repeat(3));
        assert_eq!(stand_in.complaints(), [""; 0]);
    }
    Ok(())
}

#[test]
fn removal_that_succeeds_and_leaves_the_device_is_not_believed() -> TestResult {
    let stand_in = StandIn::start()?;
    let vm = vm(&stand_in);
    plug(&vm, &device(DeviceKind::VfioUser))?;
    stand_in.set_guest(Guest::Keeps);

    let kept = unplug(&vm, "d0", SHORT, false).unwrap_err();
    assert!(kept.is_the_guests_will(), "{kept}");
    assert_eq!(unplug(&vm, "d0", SHORT, true)?, Unplugged::Abandoned);
    assert!(is_plugged(&vm, "d0")?);
    let mut again = device(DeviceKind::VfioUser);
    again.deadline = SHORT;
    let taken = plug(&vm, &again).unwrap_err();
    assert!(taken.is_the_guests_will(), "{taken}");

    stand_in.set_guest(Guest::LetsGoAfter(1));
    assert_eq!(unplug(&vm, "d0", enough(), false)?, Unplugged::Now);
    assert_eq!(plug(&vm, &device(DeviceKind::VfioUser))?, Plugged::Now);
    Ok(())
}

#[test]
fn memory_that_is_not_shared_is_told_of_before_anything_is_plugged() -> TestResult {
    let stand_in = StandIn::start()?;
    stand_in.make_memory_private();
    for (kind, _) in KINDS {
        let refused = plug(&vm(&stand_in), &device(kind)).unwrap_err().to_string();
        assert!(refused.contains("shared=on"), "{refused}");
    }
    assert_eq!(stand_in.calls(), [""; 0]);
    Ok(())
}

#[test]
fn vmm_without_a_vm_is_told_of() -> TestResult {
    let stand_in = StandIn::start()?;
    stand_in.delete_vm();
    let vm = vm(&stand_in);
    for refused in [
        plug(&vm, &device(DeviceKind::VfioUser)).unwrap_err(),
        unplug(&vm, "d0", enough(), true).unwrap_err(),
    ] {
        assert!(matches!(refused, HotplugError::Refused { .. }), "{refused}");
        assert!(
            refused.to_string().contains("created and booted"),
            "{refused}"
        );
    }
    Ok(())
}

/// The stand-in would see a call that is not as the document has it.
#[test]
fn calls_that_the_document_forbids_are_complained_of() -> TestResult {
    for (request, complaint) in [
        ("PUT vm.add-user-device {\"id\": \"x\"}", "needs socket"),
        ("PUT vm.add-user-device {\"socket\": 1}", "not of kind Text"),
        (
            "PUT vm.add-disk {\"num_queues\": \"4\"}",
            "not of kind Integer",
        ),
        ("PUT vm.add-disk {\"socket\": \"/x\"}", "knows no socket"),
        ("PUT vm.remove-device []", "not an object"),
        ("GET vm.remove-device {}", "is a PUT"),
        ("PUT vm.plug {}", "there is no"),
    ] {
        let stand_in = StandIn::start()?;
        let mut words = request.splitn(3, ' ');
        let (method, call, body) = (
            words.next().unwrap(),
            words.next().unwrap(),
            words.next().unwrap(),
        );
        let mut stream = UnixStream::connect(stand_in.path())?;
        write!(
            stream,
            "{method} /api/v1/{call} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
        let complaints = stand_in.complaints();
        assert!(complaints[0].contains(complaint), "{complaints:?}");
    }
    Ok(())
}
