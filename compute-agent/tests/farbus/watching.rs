//! `top` and `events`.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use serde_json::json;

use crate::standin::{Agent, attachment};

#[test]
fn top_shows_rates_between_two_looks() {
    let agent = Agent::start();
    let first = attachment("vm7", "ready", None);
    let mut second = first.clone();
    second["statistics"]["reads"] = json!(21_000);
    second["statistics"]["read_bytes"] = json!(86_016_000);
    agent
        .script
        .answer("GET /v1/attachments", 200, &json!({"attachments": [first]}));
    agent.script.answer(
        "GET /v1/attachments",
        200,
        &json!({"attachments": [second]}),
    );

    let ended = agent.run(&["top", "--once", "--json"]);

    assert_eq!(ended.code, 0, "{ended:?}");
    let row = &ended.json()[0];
    let rate = row["reads_per_second"].as_f64().unwrap();
    // A second went by, or more on a busy machine.
    assert!(rate > 0.0 && rate <= 20_000.0, "{rate}");
    let bytes = row["read_bytes_per_second"].as_f64().unwrap();
    assert!((bytes / rate - 4096.0).abs() < 1.0, "{row}");
    assert_eq!(row["writes_per_second"], 0.0);
    assert_eq!(row["in_flight"], 3);
    assert_eq!(row["fabric_rtt_us"], 42.0);
}

#[test]
fn top_is_a_table_for_people() {
    let agent = Agent::start();
    let all = json!({"attachments": [attachment("vm7", "ready", None)]});
    agent.script.answer("GET /v1/attachments", 200, &all);

    let ended = agent.run(&["top", "--once"]);

    let heading = "ID   DEVICE       STATE  READS/s  WRITES/s  READ   WRITTEN  IN FLIGHT  P50      P99     FABRIC RTT";
    let row = "vm7  rack1/disk0  ready  0        0         0 B/s  0 B/s    3          81.5 µs  2.5 ms  42 µs";
    assert_eq!(ended.stdout, format!("{heading}\n{row}\n"));
}

#[test]
fn events_are_printed_and_asked_for_again_from_the_last_one() {
    let agent = Agent::start();
    let event = |sequence: u64, state: &str| {
        let data = json!({
            "sequence": sequence, "time": "2026-01-01T00:00:00.000Z", "attachment": "vm7",
            "state": state, "reason": null,
        });
        format!("event: attachment\nid: {sequence}\ndata: {data}\n\n")
    };
    // The stream ends after each, as with an agent that is restarted.
    agent.script.events(&event(7, "attaching"));
    agent.script.events(&event(8, "ready"));

    let mut child = agent
        .command(&["events", "--after", "6"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    let second = lines.next().unwrap().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();

    assert_eq!(first, "2026-01-01T00:00:00.000Z  vm7  attaching");
    assert_eq!(second, "2026-01-01T00:00:00.000Z  vm7  ready");
    let asked = agent.script.asked();
    assert_eq!(asked[0].last_event.as_deref(), Some("6"));
    assert_eq!(asked[1].last_event.as_deref(), Some("7"));
}
