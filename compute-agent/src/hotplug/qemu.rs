//! Plugging into QEMU, and taking out.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::ports::{PERIPHERAL, child_type, children, free_port};
use super::qmp::{DeviceEvent, Qmp, Refusal};
use super::wait::Until;
use super::{DeviceKind, HotplugError, PlugDevice, Plugged, Unplugged, device_name};

/// The devices that are made here.
const DRIVERS: [&str; 2] = ["vfio-user-pci", "vhost-user-blk-pci"];

/// How often a guest is asked to let go. QEMU takes no second request within 5 s, and a press of a
/// slot's button within the 5 s in which the guest lets people change their mind means no.
const ASK_AGAIN: Duration = Duration::from_secs(11);

/// How often is looked whether a device is gone whose event was missed.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What QEMU cannot do at once is tried again after this: no event tells that a character device is no
/// longer in use.
const TRY_AGAIN: Duration = Duration::from_millis(200);

/// How soon QEMU connects again to a vhost-user backend that was lost.
const RECONNECT_MS: u32 = 100;

const REMEDY_MEMORY: &str = "start QEMU with -object memory-backend-memfd,id=mem,size=SIZE,share=on \
                             -machine memory-backend=mem";
const REMEDY_VFIO_USER: &str = "; vfio-user needs QEMU 10.1 or newer";
const REMEDY_BUS: &str = "; name the id of a root port, or none";
const REMEDY_HOTPLUG: &str = "; use a root port with hot-plug, not the root bus";

/// The character device that vhost-user goes through.
fn chardev_name(id: &str) -> String {
    format!("{}-char", device_name(id))
}

pub(super) fn plug(
    socket: &Path,
    bus: Option<&str>,
    device: &PlugDevice,
    until: Until,
) -> Result<Plugged, HotplugError> {
    let mut qmp = Qmp::open(socket, until)?;
    let name = device_name(&device.id);
    if find(&mut qmp, &name, until)? {
        return Ok(Plugged::Already);
    }
    refuse_private_memory(&mut qmp, until)?;
    let bus = match bus {
        Some(bus) => bus.to_owned(),
        None => free_port(&mut qmp, until)?,
    };
    let path = device.socket.display().to_string();
    match device.kind {
        DeviceKind::VfioUser => {
            let arguments = json!({
                "driver": "vfio-user-pci",
                "id": name,
                "bus": bus,
                "socket": {"type": "unix", "path": path},
            });
            add_device(&mut qmp, &arguments, until)
        }
        DeviceKind::VhostUserBlk {
            num_queues,
            queue_size,
        } => {
            let chardev = chardev_name(&device.id);
            // One that a crash has left has the path of then, and may be of another form.
            remove_chardev(&mut qmp, &chardev, until)?;
            add_chardev(&mut qmp, &chardev, &path, until)?;
            let arguments = json!({
                "driver": "vhost-user-blk-pci",
                "id": name,
                "bus": bus,
                "chardev": chardev,
                "num-queues": num_queues,
                "queue-size": queue_size,
            });
            let added = add_device(&mut qmp, &arguments, until);
            if added.is_err() {
                // The first error is the one to tell of; what stays is found by the next call.
                let _ = remove_chardev(&mut qmp, &chardev, until);
            }
            added
        }
    }?;
    Ok(Plugged::Now)
}

pub(super) fn unplug(socket: &Path, id: &str, until: Until) -> Result<Unplugged, HotplugError> {
    // The guest is asked once even without any time for it.
    let mut qmp = Qmp::open(socket, until.for_a_question())?;
    let name = device_name(id);
    let was_there = find(&mut qmp, &name, until.for_a_question())?;
    if was_there {
        delete_device(&mut qmp, &name, until)?;
    }
    remove_chardev(&mut qmp, &chardev_name(id), until.for_a_question())?;
    Ok(if was_there {
        Unplugged::Now
    } else {
        Unplugged::Absent
    })
}

pub(super) fn is_plugged(socket: &Path, id: &str, until: Until) -> Result<bool, HotplugError> {
    let mut qmp = Qmp::open(socket, until)?;
    find(&mut qmp, &device_name(id), until)
}

/// Whether QEMU has the device, which must be one of ours.
fn find(qmp: &mut Qmp, name: &str, until: Until) -> Result<bool, HotplugError> {
    let all = children(qmp, PERIPHERAL, until)?;
    let Some((_, kind)) = all.iter().find(|(child, _)| child == name) else {
        return Ok(false);
    };
    match child_type(kind) {
        Some(driver) if DRIVERS.contains(&driver) => Ok(true),
        found => Err(HotplugError::NameTaken {
            name: name.to_owned(),
            found: found.unwrap_or(kind).to_owned(),
        }),
    }
}

/// Memory that QEMU does not share would look to the agent as it was at some time.
fn refuse_private_memory(qmp: &mut Qmp, until: Until) -> Result<(), HotplugError> {
    let backends = qmp.execute("query-memdev", &json!({}), until)?;
    let backends = backends.as_array().map(Vec::as_slice).unwrap_or_default();
    let private = backends
        .iter()
        .find(|backend| backend.get("share") == Some(&Value::Bool(false)));
    match private {
        None => Ok(()),
        Some(backend) => {
            let id = backend.get("id").and_then(Value::as_str);
            Err(HotplugError::MemoryNotShared {
                backend: id.unwrap_or("without a name").to_owned(),
                remedy: REMEDY_MEMORY,
            })
        }
    }
}

fn add_device(qmp: &mut Qmp, arguments: &Value, until: Until) -> Result<(), HotplugError> {
    let Err(refusal) = qmp.ask("device_add", arguments, until)? else {
        return Ok(());
    };
    let remedy = if refusal.says("is not a valid device model name") {
        REMEDY_VFIO_USER
    } else if refusal.says("Bus '") && refusal.says("not found") {
        REMEDY_BUS
    } else if refusal.says("does not support hotplugging") {
        REMEDY_HOTPLUG
    } else {
        ""
    };
    Err(refusal.into_error("device_add", remedy))
}

fn add_chardev(qmp: &mut Qmp, id: &str, path: &str, until: Until) -> Result<(), HotplugError> {
    // Before QEMU 9.2 there were whole seconds only.
    let mut refused = None;
    for (key, value) in [("reconnect-ms", RECONNECT_MS), ("reconnect", 1)] {
        let arguments = json!({
            "id": id,
            "backend": {"type": "socket", "data": {
                "addr": {"type": "unix", "data": {"path": path}},
                "server": false,
                key: value,
            }},
        });
        match qmp.ask("chardev-add", &arguments, until)? {
            Ok(_) => return Ok(()),
            Err(refusal) if refused.is_none() && refusal.says("reconnect-ms") => {
                refused = Some(refusal);
            }
            Err(refusal) => return Err(refusal.into_error("chardev-add", "")),
        }
    }
    Err(refused.map_or(HotplugError::NoVm, |r| r.into_error("chardev-add", "")))
}

/// Removes a character device, if there is one. One that was in use is so for a moment longer than
/// its device was there.
fn remove_chardev(qmp: &mut Qmp, id: &str, until: Until) -> Result<(), HotplugError> {
    loop {
        let refusal = match qmp.ask("chardev-remove", &json!({ "id": id }), until)? {
            Ok(_) => return Ok(()),
            Err(refusal) => refusal,
        };
        if refusal.says("not found") {
            return Ok(());
        }
        if !refusal.says("busy") || until.left() <= TRY_AGAIN {
            return Err(refusal.into_error("chardev-remove", ""));
        }
        std::thread::sleep(TRY_AGAIN);
    }
}

/// Asks the guest to let go of a device, again where that is forgotten, and waits until it has.
fn delete_device(qmp: &mut Qmp, name: &str, until: Until) -> Result<(), HotplugError> {
    loop {
        let asked = qmp.ask("device_del", &json!({ "id": name }), until.for_a_question())?;
        let ask_again = match asked {
            Ok(_) => until.at_most(ASK_AGAIN),
            Err(refusal) if refusal.class == "DeviceNotFound" => return Ok(()),
            // Somebody else has asked, or this was before a restart of ours.
            Err(refusal) if refusal.says("in the process of unplug") => until.at_most(ASK_AGAIN),
            // The slot is on its way from one state to another.
            Err(refusal) if is_busy(&refusal) => until.at_most(LOOK_AGAIN),
            Err(refusal) => return Err(refusal.into_error("device_del", REMEDY_HOTPLUG)),
        };
        while !ask_again.has_passed() {
            match qmp.device_event(name, ask_again.at_most(LOOK_AGAIN))? {
                Some(DeviceEvent::Deleted) => return Ok(()),
                Some(DeviceEvent::GuestRefused) => {
                    return Err(HotplugError::GuestRefused {
                        name: name.to_owned(),
                    });
                }
                None if !find(qmp, name, until.for_a_question())? => return Ok(()),
                None => {}
            }
        }
        if until.has_passed() {
            return Err(HotplugError::GuestKeeps {
                name: name.to_owned(),
                after: until.after,
            });
        }
    }
}

fn is_busy(refusal: &Refusal) -> bool {
    refusal.says("guest is busy") || refusal.says("power indicator blinking")
}
