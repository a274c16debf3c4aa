//! A drive whose device server and agent have gone while a guest has it.

use std::time::Instant;

use farbus_compute_agent::api::Vm;
use farbus_compute_agent::hotplug::{self, DeviceKind, Plugged, Unplugged};
use farbus_integration::attached::AttachedDrive;
use farbus_integration::builder::MachineBuilder;
use farbus_integration::daemon::Daemon;
use farbus_integration::deadline::Deadline;
use farbus_integration::guest::Guest;
use farbus_integration::machine::Machine;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use serde_json::Value;

use crate::bed::{ID, NVME, SIZE, device, limit, vm};

/// A guest that has its drive, and the daemons behind that.
struct Plug {
    machine: Machine,
    guest: Guest,
    vm: Vm,
    server: Daemon,
    agent: Daemon,
    _scratch: Scratch,
}

fn plugged(name: &str) -> Result<Plug, Failure> {
    let scratch = Scratch::new(name)?;
    let drive = AttachedDrive::start(&scratch, SIZE)?;
    let qmp = scratch.join("agent.qmp");
    let machine = MachineBuilder::new(name)
        .monitor(&qmp)
        .root_port("rp1", &Value::Null)
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    let vm = vm(&qmp);
    let done = hotplug::plug(&vm, &device(&drive.socket, DeviceKind::VfioUser))?;
    assert_eq!(done, Plugged::Now);
    guest.wait_file(NVME, Deadline::secs(30))?;
    Ok(Plug {
        machine,
        guest,
        vm,
        server: drive.server,
        agent: drive.agent,
        _scratch: scratch,
    })
}

/// With a device server that is dead, a guest's driver would wait a minute for answers to what it says
/// when it leaves. An agent that has ended answers for it: there is no such device.
#[test]
fn drive_whose_agent_has_ended_leaves_a_busy_guest_at_once() -> TestResult {
    let plug = plugged("agent-ended")?;
    let job = plug.guest.spawn(&format!(
        "while dd if={NVME} of=/dev/null bs=64k iflag=direct 2>/dev/null; do :; done"
    ))?;
    plug.guest.wait_until(
        "[ $(awk '{print $1}' /sys/block/nvme0n1/stat) -gt 100 ]",
        Deadline::secs(30),
    )?;
    plug.server.kill()?;
    plug.agent.terminate()?;
    let begun = Instant::now();
    let done = hotplug::unplug(&plug.vm, ID, limit(20), false)?;
    assert_eq!(done, Unplugged::Now);
    println!("gone after {:?}", begun.elapsed());
    job.wait(Deadline::secs(30))?;
    plug.guest
        .wait_until(&format!("[ ! -e {NVME} ]"), Deadline::secs(30))?;
    plug.guest.reboot(Deadline::secs(90))?;
    plug.machine.quit()?;
    Ok(())
}
