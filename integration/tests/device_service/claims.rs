//! Who may have an export, and who may no longer.

use std::time::Instant;

use farbus_fabric::FabricError;
use farbus_fabric::wire::{ListedState, RefusalCode};
use farbus_integration::deadline::Deadline;
use farbus_integration::process::Kill;

use super::bed::*;

#[test]
fn exports_are_listed_with_what_they_are_and_who_has_them() {
    let exports = [memory("b"), memory("a")].concat();
    let service = Service::start("list", "", &exports);
    let claimed = service.claim("b", "somebody").unwrap();

    let listed = service.list();

    let names: Vec<&str> = listed.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(names, ["a", "b"], "in order of the names");
    let (a, b) = (&listed[0], &listed[1]);
    assert_eq!(
        (a.state, b.state),
        (ListedState::Free, ListedState::Claimed)
    );
    assert!(
        b.holder.as_str().starts_with("somebody at 127.0.0.1:"),
        "{}",
        b.holder
    );
    assert_eq!((a.class, a.vendor), (0x01_0802, 0x4642));
    assert_eq!(a.serial.as_str(), "S-a");
    assert!(a.model.as_str().contains("Farbus"));
    assert_eq!((a.capacity, a.block_size), (Some(8 << 20), Some(512)));

    drop(claimed);
    service.await_export("b", |export| export["state"] == "free");
    let counted = service.export("b");
    assert_eq!(counted["claims"], 1);
    assert!(counted["sent_bytes"].as_u64().unwrap() > 0, "{counted}");
    service.server.terminate().unwrap();
}

/// The agent of the former claim may have gone a moment ago.
#[test]
fn a_claim_waits_for_the_end_of_the_one_before() {
    let service = Service::start("handover", "", &memory("a"));
    for _ in 0..20 {
        let claimed = service.claim("a", "one after the other");
        assert!(claimed.is_ok(), "{:?}", claimed.err());
    }
    service.server.terminate().unwrap();
}

#[test]
fn draining_gives_no_claims_and_ends_with_the_last_one() {
    let exports = [memory("a"), memory("b")].concat();
    let mut service = Service::start("drain", "", &exports);
    let tenant = Tenant::start(&service, "a");

    let (status, drain) = service.ask("POST", "/v1/drain");
    assert_eq!((status, &drain["claims"]), (202, &1.into()));
    let refused = service.claim("b", "late").err().unwrap();
    assert!(
        matches!(
            refused,
            FabricError::Refused {
                code: RefusalCode::NotReady,
                ..
            }
        ),
        "{refused}"
    );
    assert!(refused.to_string().contains("drains"), "{refused}");
    assert!(
        service
            .list()
            .iter()
            .all(|e| e.state == ListedState::Draining)
    );
    assert_eq!(service.ask("GET", "/readyz").0, 503);
    assert_eq!(service.ask("GET", "/healthz").0, 200);

    let (status, undone) = service.ask("DELETE", "/v1/drain");
    assert_eq!((status, &undone["draining"]), (200, &false.into()));
    drop(service.claim("b", "in time").unwrap());
    service.await_export("b", |export| export["state"] == "free");

    service.ask("POST", "/v1/drain");
    tenant.go_on();
    service.server.check_running().unwrap();
    tenant.end();
    let status = service.server.wait_end(Deadline::secs(20)).unwrap();
    assert_eq!(status.code(), Some(0));
}

#[test]
fn sigterm_waits_for_claims_as_long_as_it_may_and_not_when_it_comes_twice() {
    let mut service = Service::start("term", "drain-seconds = 1", &memory("a"));
    let tenant = service.claim("a", "tenant").unwrap();
    let begun = Instant::now();
    service.server.signal(Kill::Term).unwrap();
    let status = service.server.wait_end(Deadline::secs(20)).unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(begun.elapsed().as_millis() >= 900, "{:?}", begun.elapsed());
    drop(tenant);

    let mut service = Service::start("term-twice", "drain-seconds = 3600", &memory("a"));
    let _tenant = service.claim("a", "tenant").unwrap();
    service.server.signal(Kill::Term).unwrap();
    service.await_export("a", |export| export["state"] == "draining");
    assert_eq!(service.ask("DELETE", "/v1/drain").0, 409);
    service.server.signal(Kill::Term).unwrap();
    let status = service.server.wait_end(Deadline::secs(20)).unwrap();
    assert_eq!(status.code(), Some(0));
}

#[test]
fn who_is_evicted_stays_out_for_a_moment_and_others_get_the_export() {
    let service = Service::start("evict", "", &memory("a"));
    let _evicted = service.claim("a", "stuck").unwrap();

    let (status, last) = service.ask("DELETE", "/v1/claims/a");
    assert_eq!(status, 202);
    assert!(
        last["claim"]["holder"]
            .as_str()
            .unwrap()
            .starts_with("stuck at")
    );
    service.await_export("a", |export| export["state"] == "free");

    let refused = service.claim("a", "stuck").err().unwrap();
    assert!(refused.to_string().contains("was evicted"), "{refused}");
    assert!(refused.should_reconnect(), "{refused}");
    assert!(service.claim("a", "another").is_ok());
    assert_eq!(service.ask("DELETE", "/v1/claims/b").0, 404);
    service.await_export("a", |export| export["state"] == "free");
    assert_eq!(service.ask("DELETE", "/v1/claims/a").0, 409);
    service.server.terminate().unwrap();
}

#[test]
fn slices_are_listed_claimed_and_taken_out_each_by_itself() {
    let slice = |name: &str, offset: u32| {
        format!("[[export.slice]]\nname = \"{name}\"\noffset = \"{offset}MiB\"\nsize = \"2MiB\"\n")
    };
    let divided = format!(
        "{}limits = {{ iops = 100000 }}\n{}{}",
        memory("disk"),
        slice("a", 1),
        slice("b", 3)
    );
    let service = Service::start("slices", "", &divided);
    let tenant = service.claim("disk/a", "tenant").unwrap();

    let listed = service.list();

    let names: Vec<&str> = listed.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(names, ["disk/a", "disk/b"]);
    assert_eq!(listed[0].capacity, Some(2 << 20));
    assert_eq!(listed[1].state, ListedState::Free);
    assert_eq!(service.export("disk/a")["state"], "claimed");

    service.configure("");
    service.ask("POST", "/v1/reload");
    assert_eq!(service.list().len(), 1, "the other one is gone at once");
    drop(tenant);
    service.await_export("disk/a", |answer| answer["status"] == 404);
    service.server.terminate().unwrap();
}
