//! Plugging into cloud-hypervisor, and taking out, over its REST interface.
//!
//! Its `vm.remove-device` says that it is done when the guest has been asked, and forgets the device in
//! the VM's configuration; the device itself, its socket and its id stay until the guest has let go.
//! `vm.info` has both: the configuration, and the tree of what is there. A device is gone when it
//! is in neither.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::http::{self, Answer};
use super::wait::{Until, excerpt};
use super::{DeviceKind, HotplugError, PlugDevice, Plugged, Unplugged, device_name};

const WHAT: &str = "the cloud-hypervisor API";

/// How often is looked whether the guest has let go: the API has no events.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How often a guest is asked to let go.
const ASK_AGAIN: Duration = Duration::from_secs(10);

const REMEDY_MEMORY: &str = "start cloud-hypervisor with --memory size=SIZE,shared=on";

pub(super) fn plug(
    socket: &Path,
    device: &PlugDevice,
    until: Until,
) -> Result<Plugged, HotplugError> {
    let name = device_name(&device.id);
    let info = loop {
        let info = info(socket, until.for_a_question())?;
        match place_of(&info, &name) {
            Place::Nowhere => break info,
            Place::Ours => return Ok(Plugged::Already),
            Place::Other(found) => return Err(HotplugError::NameTaken { name, found }),
            // The guest was asked to let go of it before, and is about to.
            Place::Leaving if !until.has_passed() => std::thread::sleep(LOOK_AGAIN),
            Place::Leaving => {
                let after = until.after;
                return Err(HotplugError::GuestKeeps { name, after });
            }
        }
    };
    refuse_private_memory(&info)?;
    let path = device.socket.display().to_string();
    let (call, body) = match device.kind {
        DeviceKind::VfioUser => ("vm.add-user-device", json!({"socket": path, "id": name})),
        DeviceKind::VhostUserBlk {
            num_queues,
            queue_size,
        } => (
            "vm.add-disk",
            json!({
                "vhost_user": true,
                "vhost_socket": path,
                "num_queues": num_queues,
                "queue_size": queue_size,
                "id": name,
            }),
        ),
    };
    let answer = put(socket, call, &body, until)?;
    if answer.is_success() {
        Ok(Plugged::Now)
    } else {
        Err(refused(call, &answer))
    }
}

pub(super) fn unplug(socket: &Path, id: &str, until: Until) -> Result<Unplugged, HotplugError> {
    let name = device_name(id);
    let mut was_there = false;
    // The guest is asked once even without any time for it.
    loop {
        match place_of(&info(socket, until.for_a_question())?, &name) {
            Place::Nowhere if was_there => return Ok(Unplugged::Now),
            Place::Nowhere => return Ok(Unplugged::Absent),
            Place::Other(found) => return Err(HotplugError::NameTaken { name, found }),
            Place::Ours => ask(socket, &name, until.for_a_question())?,
            // The configuration has forgotten it, so asking again may be refused.
            Place::Leaving => {
                let soon = until.for_a_question();
                put(socket, "vm.remove-device", &json!({ "id": name }), soon)?;
            }
        }
        was_there = true;
        let ask_again = until.at_most(ASK_AGAIN);
        while !ask_again.has_passed() {
            if place_of(&info(socket, until.for_a_question())?, &name) == Place::Nowhere {
                return Ok(Unplugged::Now);
            }
            std::thread::sleep(LOOK_AGAIN.min(ask_again.left()));
        }
        if until.has_passed() {
            let after = until.after;
            return Err(HotplugError::GuestKeeps { name, after });
        }
    }
}

pub(super) fn is_plugged(socket: &Path, id: &str, until: Until) -> Result<bool, HotplugError> {
    let name = device_name(id);
    match place_of(&info(socket, until)?, &name) {
        Place::Nowhere => Ok(false),
        Place::Ours | Place::Leaving => Ok(true),
        Place::Other(found) => Err(HotplugError::NameTaken { name, found }),
    }
}

fn ask(socket: &Path, name: &str, until: Until) -> Result<(), HotplugError> {
    let call = "vm.remove-device";
    let answer = put(socket, call, &json!({ "id": name }), until)?;
    // It may have gone since it was looked for.
    if answer.is_success() || answer.status == 404 {
        Ok(())
    } else {
        Err(refused(call, &answer))
    }
}

/// Where an id is in a VM.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Nowhere,
    /// It is a device of the kinds that are made here.
    Ours,
    /// It is not configured any more, and still there.
    Leaving,
    /// It is something else.
    Other(String),
}

fn place_of(info: &Value, name: &str) -> Place {
    let config = info.get("config");
    let listed = |list: &str| {
        config
            .and_then(|config| config.get(list)?.as_array())
            .and_then(|entries| entries.iter().find(|e| has_id(e, name)))
    };
    if listed("user_devices").is_some() {
        return Place::Ours;
    }
    if let Some(disk) = listed("disks") {
        return match disk.get("vhost_user") {
            Some(Value::Bool(true)) => Place::Ours,
            _ => Place::Other("disk of another kind".to_owned()),
        };
    }
    if ["devices", "net", "fs", "generic_vhost_user", "pmem", "vdpa"]
        .iter()
        .any(|list| listed(list).is_some())
    {
        return Place::Other("device of another kind".to_owned());
    }
    match info.get("device_tree").and_then(|tree| tree.get(name)) {
        Some(_) => Place::Leaving,
        None => Place::Nowhere,
    }
}

fn has_id(entry: &Value, name: &str) -> bool {
    entry.get("id").and_then(Value::as_str) == Some(name)
}

fn refuse_private_memory(info: &Value) -> Result<(), HotplugError> {
    let memory = info.get("config").and_then(|config| config.get("memory"));
    let is_private = |memory: &Value| {
        let on = |key| memory.get(key) == Some(&Value::Bool(true));
        !on("shared") && !on("hugepages")
    };
    let private = |backend: &str| {
        Err(HotplugError::MemoryNotShared {
            backend: backend.to_owned(),
            remedy: REMEDY_MEMORY,
        })
    };
    let Some(memory) = memory else { return Ok(()) };
    match memory.get("zones").and_then(Value::as_array) {
        // With zones, the memory itself has no size.
        Some(zones) if !zones.is_empty() => match zones.iter().find(|zone| is_private(zone)) {
            Some(zone) => private(zone.get("id").and_then(Value::as_str).unwrap_or("zone")),
            None => Ok(()),
        },
        _ if is_private(memory) => private("memory"),
        _ => Ok(()),
    }
}

/// See [`super::fuzz_answer`].
pub(super) fn fuzz_answer(bytes: &[u8]) {
    let Ok(Some(answer)) = http::parse(bytes) else {
        return;
    };
    assert!(answer.body.len() <= bytes.len() && (100..600).contains(&answer.status));
    if let Ok(info) = serde_json::from_slice(&answer.body) {
        let _ = place_of(&info, "farbus-d0");
        let _ = refuse_private_memory(&info);
    }
}

/// The VM's description.
fn info(socket: &Path, until: Until) -> Result<Value, HotplugError> {
    let call = "vm.info";
    let path = format!("/api/v1/{call}");
    let answer = http::request(WHAT, socket, "GET", &path, None, until)?;
    if !answer.is_success() {
        return Err(refused(call, &answer));
    }
    match serde_json::from_slice(&answer.body) {
        Ok(info @ Value::Object(_)) => Ok(info),
        _ => Err(HotplugError::WrongProtocol {
            socket: socket.display().to_string(),
            protocol: WHAT,
            said: excerpt(&answer.body),
        }),
    }
}

fn put(socket: &Path, call: &str, body: &Value, until: Until) -> Result<Answer, HotplugError> {
    let path = format!("/api/v1/{call}");
    http::request(WHAT, socket, "PUT", &path, Some(&body.to_string()), until)
}

fn refused(call: &str, answer: &Answer) -> HotplugError {
    HotplugError::Refused {
        request: call.to_owned(),
        reason: format!("status {}: {}", answer.status, excerpt(&answer.body)),
        remedy: match answer.status {
            404 => "; the VM must have been created and booted",
            _ => "",
        },
    }
}
