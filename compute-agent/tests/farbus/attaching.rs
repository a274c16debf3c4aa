//! `attach` and `detach`.

use axum::http::StatusCode;
use farbus_rest::problem::Problem;
use serde_json::json;

use crate::standin::{Agent, Ended, attachment, farbus};

const PUT: &str = "PUT /v1/attachments/vm7";
const DELETE: &str = "DELETE /v1/attachments/vm7";

#[test]
fn attach_asks_for_what_the_options_say_and_waits_until_it_is_ready() {
    let agent = Agent::start();
    let state = |state| attachment("vm7", state, None);
    agent.script.answer(PUT, 202, &state("attaching"));
    agent.script.answer(PUT, 200, &state("ready"));

    let ended = agent.run(&[
        "attach",
        "vm7",
        "--class",
        "nvme",
        "--min-capacity",
        "1GiB",
        "--endpoint",
        "vhost-user-blk",
        "--num-queues",
        "4",
        "--readonly",
        "--qmp",
        "/run/vm7/qmp.sock",
        "--bus",
        "rp1",
        "--limit",
        "iops=50k,bytes-per-second=1GiB",
        "--fabric",
        "tcp",
    ]);

    assert_eq!(ended.code, 0, "{ended:?}");
    let wanted = "vm7 is ready: rack1/disk0 at /run/farbus/attachments/vm7.sock\n";
    assert_eq!(ended.stdout, wanted);
    let asked = agent.script.asked();
    assert_eq!(asked.len(), 2);
    assert_eq!(asked[0].line, "PUT /v1/attachments/vm7?wait=60");
    let wanted = json!({
        "selector": {
            "device_server": null, "class": "nvme", "vendor_id": null, "device_id": null,
            "model": null, "min_capacity_bytes": 1 << 30, "numa_node": null,
        },
        "endpoint": {"kind": "vhost-user-blk", "num_queues": 4, "readonly": true},
        "vm": {"kind": "qemu", "qmp": "/run/vm7/qmp.sock", "bus": "rp1"},
        "limits": {"iops": 50_000, "bytes_per_second": 1 << 30},
        "fabric": "tcp",
    });
    assert_eq!(asked[0].body, wanted);
    assert_eq!(asked[1].body, wanted);
}

#[test]
fn attach_to_no_machine_asks_for_the_socket_alone() {
    let agent = Agent::start();
    agent
        .script
        .answer(PUT, 202, &attachment("vm7", "attaching", None));

    let ended = agent.run(&[
        "attach",
        "vm7",
        "--device",
        "rack1/disk0",
        "--no-wait",
        "--json",
    ]);

    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(ended.json()["state"], "attaching");
    let asked = agent.script.asked();
    assert_eq!(asked[0].line, "PUT /v1/attachments/vm7?wait=0");
    let wanted = json!({
        "device": "rack1/disk0", "endpoint": {"kind": "vfio-user", "msix": "auto"},
        "vm": {"kind": "none"}, "limits": {}, "fabric": "auto",
    });
    assert_eq!(asked[0].body, wanted);
}

#[test]
fn relative_path_of_a_machine_is_sent_as_absolute() {
    let agent = Agent::start();
    agent
        .script
        .answer(PUT, 200, &attachment("vm7", "ready", None));
    let mut command = agent.command(&[
        "attach",
        "vm7",
        "--device",
        "rack1/disk0",
        "--cloud-hypervisor",
        "api.sock",
    ]);
    command.current_dir("/run");

    let ended = Ended::of(command);

    assert_eq!(ended.code, 0, "{ended:?}");
    let vm = &agent.script.asked()[0].body["vm"];
    assert_eq!(
        *vm,
        json!({"kind": "cloud-hypervisor", "api": "/run/api.sock"})
    );
}

#[test]
fn refusal_is_told_with_its_remedy_and_ends_with_4() {
    let agent = Agent::start();
    let problem = Problem::new(
        StatusCode::CONFLICT,
        "device-claimed",
        "The device is claimed",
        "rack1/disk0 is held by 192.0.2.7",
    )
    .with_remedy("choose another, or detach it there");
    agent.script.refuse(PUT, &problem);

    let ended = agent.run(&["attach", "vm7", "--device", "rack1/disk0", "--json"]);

    assert_eq!(ended.code, 4);
    let wanted = "farbus: The device is claimed: rack1/disk0 is held by 192.0.2.7 \
                  (409 /problems/device-claimed)\n  -> choose another, or detach it there\n";
    assert_eq!(ended.stderr, wanted);
    assert_eq!(ended.json()["type"], "/problems/device-claimed");
}

#[test]
fn attachment_that_fails_ends_with_5_and_the_reason() {
    let agent = Agent::start();
    let failed = attachment("vm7", "failed", Some("QEMU has no free root port"));
    agent.script.answer(PUT, 202, &failed);

    let ended = agent.run(&["attach", "vm7", "--device", "rack1/disk0"]);

    assert_eq!(ended.code, 5);
    assert!(
        ended
            .stderr
            .contains("vm7 has failed: QEMU has no free root port"),
        "{ended:?}"
    );
    assert_eq!(ended.stdout, "");
}

#[test]
fn attachment_that_takes_too_long_ends_with_5_and_is_not_undone() {
    let agent = Agent::start();
    agent.script.answer(
        PUT,
        202,
        &attachment("vm7", "attaching", Some("the device server is away")),
    );

    let ended = agent.run(&["attach", "vm7", "--device", "rack1/disk0", "--timeout", "1"]);

    assert_eq!(ended.code, 5);
    assert!(
        ended
            .stderr
            .contains("still being attached after 1 s: the device server is away"),
        "{ended:?}"
    );
    assert!(
        agent
            .script
            .asked()
            .iter()
            .all(|asked| asked.line.starts_with("PUT"))
    );
}

#[test]
fn detach_waits_until_the_attachment_is_gone() {
    let agent = Agent::start();
    agent
        .script
        .answer(DELETE, 202, &attachment("vm7", "detaching", None));
    agent
        .script
        .answer(DELETE, 200, &attachment("vm7", "detached", None));

    let ended = agent.run(&["detach", "vm7", "--force"]);

    assert_eq!((ended.code, &*ended.stdout), (0, "vm7 is detached\n"));
    let asked = agent.script.asked();
    assert_eq!(asked.len(), 2);
    assert_eq!(
        asked[0].line,
        "DELETE /v1/attachments/vm7?wait=60&force=true"
    );
}

#[test]
fn attachment_that_goes_between_two_questions_is_detached() {
    let agent = Agent::start();
    agent
        .script
        .answer(DELETE, 202, &attachment("vm7", "detaching", None));
    agent.script.refuse(DELETE, &unknown());

    let ended = agent.run(&["detach", "vm7"]);

    assert_eq!(ended.code, 0, "{ended:?}");
}

#[test]
fn guest_that_does_not_let_go_ends_the_wait_with_5() {
    let agent = Agent::start();
    agent.script.answer(
        DELETE,
        202,
        &attachment("vm7", "detaching", Some("the guest has not answered")),
    );

    let ended = agent.run(&["detach", "vm7", "--timeout", "1"]);

    assert_eq!(ended.code, 5);
    assert!(
        ended
            .stderr
            .contains("the guest has not answered; it goes on; --force"),
        "{ended:?}"
    );
}

#[test]
fn detach_of_what_is_not_known_is_refused() {
    let agent = Agent::start();
    agent.script.refuse(DELETE, &unknown());

    let ended = agent.run(&["detach", "vm7"]);

    assert_eq!(ended.code, 4, "{ended:?}");
}

fn unknown() -> Problem {
    Problem::new(
        StatusCode::NOT_FOUND,
        "no-such-attachment",
        "There is no such attachment",
        "'vm7' is not known",
    )
}

#[test]
fn wrong_command_lines_end_with_2_and_ask_nobody() {
    let agent = Agent::start();
    let disk = "--device=rack1/disk0";
    let wrong: [&[&str]; 11] = [
        &["attach", "vm7"],
        &["attach", "VM7", disk],
        &["attach", "../vm7", disk],
        &["attach", "vm7", disk, "--class=nvme"],
        &["attach", "vm7", disk, "--qmp=/a", "--cloud-hypervisor=/b"],
        &["attach", "vm7", disk, "--bus=rp0"],
        &["attach", "vm7", disk, "--readonly"],
        &[
            "attach",
            "vm7",
            disk,
            "--endpoint=vhost-user-blk",
            "--msix=irqfd",
        ],
        &["attach", "vm7", disk, "--limit=speed=1"],
        &["attach", "vm7", "--min-capacity=1GB"],
        &["detach", "a?force=true"],
    ];
    for arguments in wrong {
        let ended = agent.run(arguments);
        assert_eq!(ended.code, 2, "{arguments:?}: {ended:?}");
    }
    assert_eq!(agent.script.asked(), []);
}

#[test]
fn every_command_shows_an_example() {
    for command in [
        "devices",
        "attach",
        "detach",
        "list",
        "top",
        "events",
        "doctor",
        "completions",
    ] {
        let ended = Ended::of(farbus(&[command, "--help"]));
        assert_eq!(ended.code, 0);
        assert!(
            ended.stdout.contains(&format!("\n  farbus {command}")),
            "{}",
            ended.stdout
        );
    }
}
