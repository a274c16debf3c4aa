//! An attachment from the request to its end, and what is told of it.

use farbus_compute_agent::api::{AttachmentState, DeviceClass, DeviceState};
use farbus_integration::deadline::Deadline;
use farbus_integration::report::TestResult;
use hyper::{Method, header};
use serde_json::json;

use crate::bed::{Bed, prove, vfio_user};

#[test]
fn one_call_makes_an_attachment_and_one_takes_it_away() -> TestResult {
    let bed = Bed::new("life", 1)?;
    let service = &bed.service;

    let (status, attachment) = service.put("vm1", &vfio_user("rack1/d0"))?;

    assert_eq!((status, attachment.state), (202, AttachmentState::Ready));
    assert_eq!(attachment.device.as_deref(), Some("rack1/d0"));
    assert_eq!(vec![attachment.worker.unwrap().pid], service.workers());
    prove(&attachment, 7);
    assert_eq!(
        service.attachments()?,
        [service.attachment("vm1")?.unwrap()]
    );
    assert_eq!(service.devices("")?.devices[0].state, DeviceState::Claimed);
    let gone = service.detach("vm1", false)?;
    assert_eq!(gone.state, AttachmentState::Detached);
    assert_eq!(service.attachment("vm1")?, None);
    assert_eq!(service.remains(), Vec::<std::path::PathBuf>::new());
    assert!(service.workers().is_empty());
    Ok(())
}

#[test]
fn who_repeats_a_call_gets_the_same_attachment() -> TestResult {
    let bed = Bed::new("repeat", 2)?;
    let service = &bed.service;
    let (_, first) = service.put("vm1", &vfio_user("rack1/d0"))?;

    let (status, again) = service.put("vm1", &vfio_user("rack1/d0"))?;
    let other = service.refused("vm1", &vfio_user("rack1/d1"))?;

    assert_eq!((status, again.worker), (200, first.worker));
    assert_eq!(
        (other.status, &other.kind[..]),
        (409, "/problems/attachment-exists")
    );
    assert_eq!(service.workers().len(), 1);
    Ok(())
}

#[test]
fn id_can_be_used_again_at_once() -> TestResult {
    let bed = Bed::new("again", 1)?;
    let service = &bed.service;

    for round in 0..3 {
        let attachment = service.attach("vm1", &vfio_user("rack1/d0"))?;
        prove(&attachment, round);
        assert_eq!(
            service.detach("vm1", false)?.state,
            AttachmentState::Detached
        );
    }

    Ok(())
}

#[test]
fn answer_says_where_the_attachment_is_and_does_not_wait_unless_asked() -> TestResult {
    let bed = Bed::new("location", 1)?;
    let spec = vfio_user("rack1/d0").to_string();

    let answer = bed
        .service
        .ask(Method::PUT, "/v1/attachments/vm1", Some(&spec))?;

    assert_eq!(answer.status, 202);
    assert_eq!(answer.headers[header::LOCATION], "/v1/attachments/vm1");
    let answer: serde_json::Value = serde_json::from_slice(&answer.body)?;
    assert_eq!(answer["state"], "attaching");
    bed.service
        .wait_state("vm1", AttachmentState::Ready, Deadline::secs(60))?;
    Ok(())
}

#[test]
fn selector_takes_devices_that_are_free_until_there_is_none() -> TestResult {
    let bed = Bed::new("select", 2)?;
    let service = &bed.service;
    let spec = json!({"selector": {"device_server": "rack1", "class": "nvme"},
        "endpoint": {"kind": "vhost-user-blk", "num_queues": 1}});

    let first = service.attach("a", &spec)?;
    let second = service.attach("b", &spec)?;
    let third = service.refused("c", &spec)?;

    let mut devices = [first.device.unwrap(), second.device.unwrap()];
    devices.sort_unstable();
    assert_eq!(devices, ["rack1/d0", "rack1/d1"]);
    assert_eq!(
        (third.status, &third.kind[..]),
        (409, "/problems/no-free-device")
    );
    assert_eq!(service.attachment("c")?, None);
    service.detach("a", false)?;
    let reused = service.attach("c", &spec)?;
    assert_eq!(reused.device, Some(devices[0].clone()));
    Ok(())
}

#[test]
fn devices_are_listed_with_what_they_are() -> TestResult {
    let bed = Bed::new("devices", 2)?;
    let service = &bed.service;
    service.attach("vm1", &vfio_user("rack1/d0"))?;

    let all = service.devices("")?;
    let free = service.devices("?state=free&class=nvme&device_server=rack1")?;
    let none = service.devices("?device_server=rack2")?;

    let first = &all.devices[0];
    assert_eq!((&first.id[..], &first.export[..]), ("rack1/d0", "d0"));
    assert_eq!(
        (first.state, first.class),
        (DeviceState::Claimed, DeviceClass::Nvme)
    );
    assert_eq!(first.capacity_bytes, Some(1 << 20));
    assert!(first.holder.is_some());
    let ids: Vec<_> = free.devices.iter().map(|device| &device.id[..]).collect();
    assert_eq!(ids, ["rack1/d1"]);
    assert!(none.devices.is_empty() && none.unreachable.is_empty());
    Ok(())
}

#[test]
fn device_server_that_is_away_is_named_and_the_others_are_listed() -> TestResult {
    let mut bed = Bed::new("away", 1)?;
    bed.kill_server()?;

    let devices = bed.service.devices("")?;
    let refused = bed.service.refused("vm1", &vfio_user("rack1/d0"))?;

    assert_eq!(devices.devices, []);
    assert_eq!(devices.unreachable[0].device_server, "rack1");
    assert_eq!(devices.unreachable[0].address, bed.address);
    assert_eq!(
        (refused.status, &refused.kind[..]),
        (503, "/problems/device-server-unreachable")
    );
    Ok(())
}

#[test]
fn events_tell_what_happens_and_are_replayed() -> TestResult {
    let bed = Bed::new("events", 1)?;
    let service = &bed.service;
    let mut live = service.events(0)?;
    service.attach("vm1", &vfio_user("rack1/d0"))?;
    service.detach("vm1", false)?;
    let ended =
        |event: &farbus_integration::service::Event| event.state == AttachmentState::Detached;

    let seen = service.until(&mut live, Deadline::secs(60), ended)?;
    let first = seen[0].sequence;
    let mut replay = service.events(first)?;
    let replayed = service.until(&mut replay, Deadline::secs(60), ended)?;

    let states: Vec<_> = seen.iter().map(|event| event.state).collect();
    use AttachmentState::{Detached, Detaching, Ready};
    assert_eq!(states, [Ready, Detaching, Detached]);
    assert!(seen.iter().map(|event| event.sequence).eq(first..first + 3));
    assert_eq!(replayed, seen[1..]);
    Ok(())
}

#[test]
fn metrics_name_states_requests_and_device_servers() -> TestResult {
    let bed = Bed::new("metrics", 1)?;
    bed.service.attach("vm1", &vfio_user("rack1/d0"))?;

    let answer = bed.service.ask(Method::GET, "/metrics", None)?;

    let text = String::from_utf8(answer.body.to_vec())?;
    for line in [
        "farbus_attachments{state=\"ready\"} 1",
        "farbus_device_server_reachable{device_server=\"rack1\"} 1",
        "farbus_attachment_worker_restarts_total{attachment=\"vm1\",device=\"rack1/d0\"} 0",
        "farbus_http_requests_total{method=\"PUT\",route=\"/v1/attachments/{id}\",status=\"202\"} 1",
    ] {
        assert!(text.contains(line), "{line} is not in:\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
    Ok(())
}
