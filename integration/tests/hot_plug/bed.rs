//! A machine that has nothing plugged yet, an attached drive, and the calls that bring them together.

use std::path::Path;
use std::time::{Duration, Instant};

use farbus_compute_agent::api::Vm;
use farbus_compute_agent::hotplug::{self, DeviceKind, PlugDevice, Plugged, Unplugged};
use farbus_integration::attached::AttachedDrive;
use farbus_integration::builder::MachineBuilder;
use farbus_integration::deadline::Deadline;
use farbus_integration::guest::Guest;
use farbus_integration::machine::Machine;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use serde_json::{Value, json};

/// The attachment's id.
pub(crate) const ID: &str = "disk0";
/// The drive in the guest, as an NVMe drive.
pub(crate) const NVME: &str = "/dev/nvme0n1";
/// The same, as a virtio drive.
pub(crate) const VIRTIO: &str = "/dev/vda";
/// Of the software drive.
pub(crate) const SIZE: &str = "size=64MiB";

const BOOT_SECS: u64 = 90;
const SOON_SECS: u64 = 30;

/// A machine with two root ports, its guest up, and the drive.
pub(crate) struct Bed {
    pub(crate) drive: AttachedDrive,
    pub(crate) machine: Machine,
    pub(crate) guest: Guest,
    pub(crate) vm: Vm,
    kind: DeviceKind,
    node: &'static str,
    _scratch: Scratch,
}

impl Bed {
    /// With an NVMe drive to plug.
    pub(crate) fn nvme(
        name: &str,
        with: impl FnOnce(MachineBuilder) -> MachineBuilder,
    ) -> Result<Self, Failure> {
        let scratch = Scratch::new(name)?;
        let drive = AttachedDrive::start(&scratch, SIZE)?;
        Self::start(name, scratch, drive, (DeviceKind::VfioUser, NVME), with)
    }

    /// With a virtio drive to plug.
    pub(crate) fn virtio(
        name: &str,
        with: impl FnOnce(MachineBuilder) -> MachineBuilder,
    ) -> Result<Self, Failure> {
        let scratch = Scratch::new(name)?;
        let drive = AttachedDrive::start_vhost_user(&scratch, SIZE, &[])?;
        let kind = DeviceKind::VhostUserBlk {
            num_queues: 2,
            queue_size: 128,
        };
        Self::start(name, scratch, drive, (kind, VIRTIO), with)
    }

    fn start(
        name: &str,
        scratch: Scratch,
        drive: AttachedDrive,
        (kind, node): (DeviceKind, &'static str),
        with: impl FnOnce(MachineBuilder) -> MachineBuilder,
    ) -> Result<Self, Failure> {
        let qmp = scratch.join("agent.qmp");
        let machine = MachineBuilder::new(name)
            .monitor(&qmp)
            .root_port("rp1", &Value::Null)
            .root_port("rp2", &Value::Null);
        let machine = with(machine).start(&Tools::open()?)?;
        let guest = machine.wait_guest(Deadline::secs(BOOT_SECS))?;
        Ok(Self {
            drive,
            machine,
            guest,
            vm: vm(&qmp),
            kind,
            node,
            _scratch: scratch,
        })
    }

    pub(crate) fn device(&self) -> PlugDevice {
        device(&self.drive.socket, self.kind)
    }

    /// Plugs the drive and waits for its block device; how long that took.
    pub(crate) fn plug(&self) -> Result<Duration, Failure> {
        let begun = Instant::now();
        assert_eq!(hotplug::plug(&self.vm, &self.device())?, Plugged::Now);
        self.is_there()?;
        Ok(begun.elapsed())
    }

    /// Waits until the guest has the drive.
    pub(crate) fn is_there(&self) -> TestResult {
        self.guest.wait_file(self.node, Deadline::secs(SOON_SECS))?;
        Ok(())
    }

    /// Has the guest let go of the drive.
    pub(crate) fn unplug(&self) -> TestResult {
        let done = hotplug::unplug(&self.vm, ID, limit(SOON_SECS), false)?;
        assert_eq!(done, Unplugged::Now);
        self.is_gone()
    }

    /// The drive is gone from the guest and from QEMU, which lives.
    pub(crate) fn is_gone(&self) -> TestResult {
        let gone = format!("[ ! -e {} ]", self.node);
        self.guest.wait_until(&gone, Deadline::secs(SOON_SECS))?;
        self.machine.check_running()?;
        assert!(!hotplug::is_plugged(&self.vm, ID)?);
        Ok(())
    }

    /// Writes a pattern that depends on `seed` from each of both CPUs, and reads it back.
    pub(crate) fn io(&self, seed: u32) -> TestResult {
        let drive = self.node;
        for cpu in 0..2 {
            self.guest.check(&format!(
                "on='taskset {mask} dd bs=64k'; yes pattern-{seed}-{cpu} | head -c 1048576 >/tmp/p && \
                 $on if=/tmp/p of={drive} seek={at} oflag=direct 2>/dev/null && \
                 $on if={drive} skip={at} count=16 iflag=direct 2>/dev/null | cmp - /tmp/p",
                mask = 1 << cpu,
                at = cpu * 64,
            ))?;
        }
        Ok(())
    }

    /// See [`objects`].
    pub(crate) fn objects(&self) -> Result<Vec<String>, Failure> {
        objects(&self.machine)
    }

    /// Ends everything in order.
    pub(crate) fn end(self) -> TestResult {
        self.machine.quit()?;
        self.drive.end()?;
        Ok(())
    }
}

/// What QEMU has been made to have at run time, by name.
pub(crate) fn objects(machine: &Machine) -> Result<Vec<String>, Failure> {
    let mut names = Vec::new();
    for (command, arguments, key) in [
        ("qom-list", json!({"path": "/machine/peripheral"}), "name"),
        ("qom-list", json!({"path": "/objects"}), "name"),
        ("query-chardev", json!({}), "label"),
    ] {
        let listed = machine.qmp().execute(command, &arguments)?;
        let listed = listed.as_array().cloned().unwrap_or_default();
        names.extend(listed.iter().map(|entry| entry[key].to_string()));
    }
    names.sort();
    Ok(names)
}

pub(crate) fn vm(qmp: &Path) -> Vm {
    Vm::Qemu {
        qmp: qmp.to_owned(),
        bus: None,
    }
}

pub(crate) fn device(socket: &Path, kind: DeviceKind) -> PlugDevice {
    PlugDevice {
        id: ID.into(),
        socket: socket.to_owned(),
        kind,
        deadline: limit(SOON_SECS),
    }
}

/// A time limit that grows with the test bed's.
pub(crate) fn limit(seconds: u64) -> Duration {
    Deadline::secs(seconds).remaining()
}
