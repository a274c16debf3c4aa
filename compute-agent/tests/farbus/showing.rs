//! `devices`, `list` and `doctor`.

use axum::http::StatusCode;
use farbus_rest::problem::Problem;
use serde_json::{Value, json};

use crate::standin::{Agent, attachment};

fn devices(unreachable: &Value) -> Value {
    json!({
        "devices": [{
            "id": "rack1/disk0", "device_server": "rack1", "address": "192.0.2.10:7420",
            "export": "disk0", "class": "nvme", "vendor_id": "1b36", "device_id": "0010",
            "model": "QEMU NVMe Ctrl  ", "serial": "s1", "capacity_bytes": 1_610_612_736_u64,
            "block_size_bytes": 512, "numa_node": 1, "state": "claimed", "holder": "192.0.2.7",
        }, {
            "id": "rack1/disk1", "device_server": "rack1", "address": "192.0.2.10:7420",
            "export": "disk1", "class": "other", "vendor_id": "8086", "device_id": "10d3",
            "state": "failed", "why": "it does not\nanswer",
        }],
        "unreachable": unreachable,
    })
}

fn rack2() -> Value {
    json!([{"device_server": "rack2", "address": "192.0.2.11:7420", "error": "connection refused"}])
}

#[test]
fn devices_are_a_table_and_servers_that_do_not_answer_a_remark() {
    let agent = Agent::start();
    agent
        .script
        .answer("GET /v1/devices", 200, &devices(&rack2()));

    let ended = agent.run(&["devices", "--class", "nvme", "--device-server", "rack1"]);

    assert_eq!(ended.code, 0, "{ended:?}");
    let wanted = "\
DEVICE       CLASS  PCI ID     MODEL           CAPACITY  NUMA  STATE    HELD BY, OR WHY
rack1/disk0  nvme   1b36:0010  QEMU NVMe Ctrl  1.5 GiB   1     claimed  192.0.2.7
rack1/disk1  other  8086:10d3  -               -         -     failed   it does not\u{fffd}answer
";
    assert_eq!(ended.stdout, wanted);
    let remark =
        "farbus: device server rack2 at 192.0.2.11:7420 does not answer: connection refused\n";
    assert_eq!(ended.stderr, remark);
    let asked = &agent.script.asked()[0].line;
    assert_eq!(asked, "GET /v1/devices?device_server=rack1&class=nvme");
}

#[test]
fn json_is_what_the_interface_says() {
    let agent = Agent::start();
    agent
        .script
        .answer("GET /v1/devices", 200, &devices(&rack2()));

    let ended = agent.run(&["--json", "devices"]);

    assert_eq!(ended.json()["unreachable"], rack2());
    assert_eq!(
        ended.json()["devices"][0]["capacity_bytes"],
        1_610_612_736_u64
    );
    assert_eq!(ended.stderr, "");
}

#[test]
fn attachments_are_a_table() {
    let agent = Agent::start();
    let all = json!({"attachments": [attachment("vm7", "degraded", Some("the link is lost"))]});
    agent.script.answer("GET /v1/attachments", 200, &all);

    let ended = agent.run(&["list"]);

    assert_eq!(ended.code, 0, "{ended:?}");
    let row = ended.stdout.lines().nth(1).unwrap();
    for shown in [
        "vm7",
        "rack1/disk0",
        "degraded",
        "vfio-user",
        "the link is lost",
    ] {
        assert!(row.contains(shown), "{shown}: {row}");
    }
}

#[test]
fn one_attachment_is_shown_in_full() {
    let agent = Agent::start();
    agent.script.answer(
        "GET /v1/attachments/vm7",
        200,
        &attachment("vm7", "ready", None),
    );

    let ended = agent.run(&["list", "vm7"]);

    assert_eq!(ended.code, 0, "{ended:?}");
    for shown in [
        "socket       /run/farbus/attachments/vm7.sock\n",
        "worker       process 4711, replaced 1 times\n",
        "latency      p50 81.5 µs, p99 2.5 ms\n",
        "fabric RTT   42 µs\n",
    ] {
        assert!(ended.stdout.contains(shown), "{shown}: {}", ended.stdout);
    }
}

#[test]
fn doctor_of_a_healthy_agent_ends_with_0() {
    let agent = Agent::start();
    let own = env!("CARGO_PKG_VERSION");
    agent
        .script
        .answer("GET /v1/version", 200, &json!({"version": own}));
    agent
        .script
        .answer("GET /v1/devices", 200, &devices(&json!([])));

    let ended = agent.run(&["doctor"]);

    assert_eq!(ended.code, 0, "{ended:?}");
    for shown in [
        &*format!("answers: {own}\n"),
        "ok       socket: ",
        "ok       device-servers: rack1 answers and offers 2 devices\n",
        "memlock: ",
        "rdma: ",
        "kernel: Linux ",
        "\nAttachments can work.\n",
    ] {
        assert!(ended.stdout.contains(shown), "{shown}: {}", ended.stdout);
    }
}

#[test]
fn doctor_names_a_device_server_that_does_not_answer_and_ends_with_6() {
    let agent = Agent::start();
    agent
        .script
        .answer("GET /v1/version", 200, &json!({"version": "0.0.1"}));
    agent
        .script
        .answer("GET /v1/devices", 200, &devices(&rack2()));

    let ended = agent.run(&["doctor", "--json"]);

    assert_eq!((ended.code, &*ended.stderr), (6, ""));
    let report = ended.json();
    assert_eq!(report["can_attach"], false);
    let findings = report["findings"].as_array().unwrap();
    let problem = findings.iter().find(|f| f["level"] == "problem").unwrap();
    let what = "rack2 at 192.0.2.11:7420 does not answer: connection refused";
    assert_eq!(problem["finding"], what);
    assert!(
        problem["remedy"]
            .as_str()
            .unwrap()
            .contains("start farbus-device-server there")
    );
    assert!(
        findings
            .iter()
            .any(|f| f["level"] == "note" && f["check"] == "agent")
    );
}

#[test]
fn doctor_says_what_to_do_when_there_is_no_agent() {
    let agent = Agent::start();

    let ended = agent.run(&["doctor", "--agent", "/nonexistent/agent.sock"]);

    assert_eq!(ended.code, 6);
    assert!(
        ended
            .stdout
            .contains("systemctl start farbus-compute-agent"),
        "{}",
        ended.stdout
    );
}

#[test]
fn answer_that_is_no_answer_ends_with_1() {
    let agent = Agent::start();
    agent
        .script
        .answer("GET /v1/devices", 200, &json!({"surprise": true}));

    let ended = agent.run(&["devices"]);

    assert_eq!(ended.code, 1);
    assert!(
        ended.stderr.contains("missing field `devices`"),
        "{ended:?}"
    );
}

#[test]
fn fault_of_the_agent_is_told_as_a_refusal() {
    let agent = Agent::start();
    let status = StatusCode::INTERNAL_SERVER_ERROR;
    let problem = Problem::new(status, "internal", "The daemon has failed", "why");
    agent.script.refuse("GET /v1/attachments", &problem);

    let ended = agent.run(&["list"]);

    assert_eq!(ended.code, 4, "{ended:?}");
}
