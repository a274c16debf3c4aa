//! `farbus` and the agent's service.

use std::path::Path;

use farbus_integration::report::TestResult;
use serde_json::Value;

use crate::site::Site;

#[test]
fn attachment_is_made_shown_and_taken_away() -> TestResult {
    let site = Site::start()?;

    let devices = site.farbus(&["devices", "--state", "free"])?;
    assert_eq!(devices.status.code(), Some(0), "{devices:?}");
    assert!(devices.stdout.contains("rack1/disk0"), "{devices:?}");
    assert!(
        devices
            .stderr
            .contains("device server rack2 at 127.0.0.1:1 does not answer"),
        "{devices:?}"
    );

    let attach = [
        "attach",
        "vm7",
        "--class",
        "nvme",
        "--min-capacity",
        "64MiB",
        "--json",
    ];
    let made = site.farbus(&attach)?;
    assert_eq!(made.status.code(), Some(0), "{made:?}");
    let made: Value = serde_json::from_str(&made.stdout)?;
    assert_eq!(made["state"], "ready");
    assert_eq!(made["device"], "rack1/disk0");
    let socket = made["socket"].as_str().unwrap_or_default();
    assert!(Path::new(socket).exists(), "{socket}");
    // The same wish again is the same attachment.
    let again = site.farbus(&attach)?;
    let again: Value = serde_json::from_str(&again.stdout)?;
    assert_eq!(again["worker"]["pid"], made["worker"]["pid"]);

    let list = site.farbus(&["list"])?;
    assert!(
        list.stdout.contains("vm7") && list.stdout.contains("ready"),
        "{list:?}"
    );
    let top = site.farbus(&["top", "--once", "--json"])?;
    let rows: Value = serde_json::from_str(&top.stdout)?;
    assert_eq!(rows[0]["id"], "vm7", "{top:?}");

    let detached = site.farbus(&["detach", "vm7"])?;
    assert_eq!(detached.status.code(), Some(0), "{detached:?}");
    assert!(!Path::new(socket).exists());
    site.end()?;
    Ok(())
}

#[test]
fn refusals_of_the_service_end_with_4_and_say_what_helps() -> TestResult {
    let site = Site::start()?;
    let refused: [&[&str]; 3] = [
        &["attach", "vm7", "--device", "rack1/disk7"],
        &["attach", "vm7", "--class", "nvme", "--min-capacity", "1TiB"],
        &["detach", "vm7"],
    ];
    for arguments in refused {
        let ended = site.farbus(arguments)?;
        assert!(
            [4, 5].contains(&ended.status.code().unwrap_or(-1)),
            "{arguments:?}: {ended:?}"
        );
        assert!(ended.stderr.starts_with("farbus: "), "{ended:?}");
    }
    site.end()?;
    Ok(())
}

#[test]
fn doctor_finds_the_device_server_that_is_not_there() -> TestResult {
    let site = Site::start()?;

    let ended = site.farbus(&["doctor"])?;

    assert_eq!(ended.status.code(), Some(6), "{ended:?}");
    for found in [
        "ok       agent: ",
        "ok       socket: ",
        "problem  device-servers: rack2 at 127.0.0.1:1 does not answer",
        "ok       device-servers: rack1 answers and offers 1 devices",
        "memlock: the agent may lock",
    ] {
        assert!(ended.stdout.contains(found), "{found}: {}", ended.stdout);
    }
    site.end()?;
    Ok(())
}
