//! VMs that cannot take a device: errors that name the remedy, and nothing left behind.

use std::path::PathBuf;
use std::time::Duration;

use farbus_compute_agent::api::Vm;
use farbus_compute_agent::hotplug::{self, DeviceKind, HotplugError};
use farbus_integration::attached::AttachedDrive;
use farbus_integration::builder::MachineBuilder;
use farbus_integration::machine::Machine;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use serde_json::{Value, json};

use crate::bed::{SIZE, device, limit, vm};

fn start(scratch: &Scratch, machine: MachineBuilder) -> Result<(Machine, PathBuf), Failure> {
    let qmp = scratch.join("agent.qmp");
    Ok((machine.monitor(&qmp).start(&Tools::open()?)?, qmp))
}

fn refused(vm: &Vm, drive: &AttachedDrive) -> HotplugError {
    hotplug::plug(vm, &device(&drive.socket, DeviceKind::VfioUser)).unwrap_err()
}

#[test]
fn machine_without_a_place_for_a_drive_is_told_of() -> TestResult {
    let scratch = Scratch::new("no-port")?;
    let drive = AttachedDrive::start(&scratch, SIZE)?;
    let machine = MachineBuilder::new("no-port").root_port("fixed", &json!({"hotplug": false}));
    let (machine, qmp) = start(&scratch, machine)?;
    let on = |bus: &str| Vm::Qemu {
        qmp: qmp.clone(),
        bus: Some(bus.into()),
    };

    let none = refused(&vm(&qmp), &drive);
    assert!(
        matches!(none, HotplugError::NoFreePort { ports: 1 }),
        "{none}"
    );
    let unknown = refused(&on("rp9"), &drive).to_string();
    assert!(
        unknown.contains("rp9") && unknown.contains("name the id of a root port"),
        "{unknown}"
    );
    let fixed = refused(&on("fixed"), &drive).to_string();
    assert!(fixed.contains("hot"), "{fixed}");
    assert!(!hotplug::is_plugged(&vm(&qmp), "disk0")?);
    machine.quit()?;
    drive.end()?;
    Ok(())
}

#[test]
fn memory_that_is_not_shared_is_told_of_before_anything_is_plugged() -> TestResult {
    let scratch = Scratch::new("private")?;
    let drive = AttachedDrive::start(&scratch, SIZE)?;
    let machine = MachineBuilder::new("private")
        .private_memory()
        .root_port("rp1", &Value::Null);
    let (machine, qmp) = start(&scratch, machine)?;
    let private = refused(&vm(&qmp), &drive).to_string();
    assert!(
        private.contains("'mem'") && private.contains("share=on"),
        "{private}"
    );
    machine.quit()?;
    drive.end()?;
    Ok(())
}

#[test]
fn socket_that_serves_somebody_else_is_told_of() -> TestResult {
    let scratch = Scratch::new("qmp-busy")?;
    let drive = AttachedDrive::start(&scratch, SIZE)?;
    let (machine, qmp) = start(&scratch, MachineBuilder::new("qmp-busy"))?;
    let other = std::os::unix::net::UnixStream::connect(&qmp)?;
    let mut ask = device(&drive.socket, DeviceKind::VfioUser);
    ask.deadline = Duration::from_secs(1);
    let busy = hotplug::plug(&vm(&qmp), &ask).unwrap_err();
    assert!(matches!(busy, HotplugError::Busy { .. }), "{busy}");
    drop(other);
    let free = hotplug::unplug(&vm(&qmp), "disk0", limit(30), false);
    assert!(free.is_ok(), "{free:?}");
    machine.quit()?;
    drive.end()?;
    Ok(())
}
