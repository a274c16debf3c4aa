//! Plugs what this agent offers into running VMs, and takes it out again.
//!
//! The calls block and have deadlines; they are idempotent, and what they leave behind in the middle of
//! a crash has names that are made from the attachment's id, so that a later call finds it: the
//! device is `farbus-ID`, QEMU's character device for vhost-user is `farbus-ID-char`.
//!
//! | module | knows |
//! |---|---|
//! | `qemu` | what to ask QEMU for, and in which order |
//! | `qmp` | one conversation over QEMU's machine protocol |
//! | `ports` | which root ports are free |
//! | `cloud_hypervisor` | what to ask cloud-hypervisor for |
//! | `http` | one HTTP request over a UNIX socket |
//! | `wait` | deadlines, and sockets that keep to them |
//!
//! The VMM is not trusted: what it says is read up to a bound, and never believed to be of a form.

#![forbid(unsafe_code)]

mod cloud_hypervisor;
mod error;
mod http;
mod ports;
mod qemu;
mod qmp;
mod wait;

use std::path::PathBuf;
use std::time::Duration;

pub use self::error::HotplugError;
use self::wait::Until;
use crate::api::Vm;

/// How long [`is_plugged`] waits for the VMM.
const QUESTION: Duration = Duration::from_secs(5);

/// What is to be plugged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlugDevice {
    /// The attachment's id.
    pub id: String,
    /// The endpoint's socket. Somebody listens there already.
    pub socket: PathBuf,
    /// What listens there.
    pub kind: DeviceKind,
    /// How long the VMM may take for all of it.
    pub deadline: Duration,
}

/// Which kind of endpoint a device is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// A PCIe function, on a vfio-user socket.
    VfioUser,
    /// A virtio block device, on a vhost-user socket.
    VhostUserBlk {
        /// Request queues.
        num_queues: u16,
        /// Descriptors of a queue.
        queue_size: u16,
    },
}

/// How a device came to be in a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plugged {
    /// It was put there.
    Now,
    /// It was there. Whether its socket is the one that was named cannot be asked: who has a new server
    /// for an old id unplugs first.
    Already,
}

/// How a device came to be in no VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unplugged {
    /// The guest has let go of it, and it is gone.
    Now,
    /// It was not there.
    Absent,
    /// By force: the guest has been asked and keeps it. It is gone when the guest lets go, or with the
    /// VM; until then nothing can be plugged under its id.
    Abandoned,
}

/// Plugs a device into a running VM. It is in the VM when this returns; the guest's driver finds it
/// in its own time. What a failure has left is removed, or found by the next call.
pub fn plug(vm: &Vm, device: &PlugDevice) -> Result<Plugged, HotplugError> {
    let until = Until::after(device.deadline);
    match vm {
        Vm::None => Err(HotplugError::NoVm),
        Vm::Qemu { qmp, bus } => qemu::plug(qmp, bus.as_deref(), device, until),
        Vm::CloudHypervisor { api } => cloud_hypervisor::plug(api, device, until),
    }
}

/// Takes the device of the attachment `id` out of a running VM: asks the guest, and waits until it
/// has let go. With `force`, a guest that does not within `deadline` is not an error, nor is one that
/// refuses.
///
/// A guest's driver talks to the device when it leaves it. If nobody can answer for the device, end its
/// endpoint in order before this: the device then reads as one that was pulled out, and the driver
/// leaves at once. An endpoint must not end while the guest keeps the device for other reasons: QEMU
/// aborts when a guest reboots with a vfio-user device that has no server.
pub fn unplug(
    vm: &Vm,
    id: &str,
    deadline: Duration,
    force: bool,
) -> Result<Unplugged, HotplugError> {
    let until = Until::after(deadline);
    let done = match vm {
        Vm::None => Ok(Unplugged::Absent),
        Vm::Qemu { qmp, .. } => qemu::unplug(qmp, id, until),
        Vm::CloudHypervisor { api } => cloud_hypervisor::unplug(api, id, until),
    };
    match done {
        Err(error) if force && error.is_the_guests_will() => Ok(Unplugged::Abandoned),
        done => done,
    }
}

/// Whether the VM has the device of the attachment `id`.
pub fn is_plugged(vm: &Vm, id: &str) -> Result<bool, HotplugError> {
    let until = Until::after(QUESTION);
    match vm {
        Vm::None => Ok(false),
        Vm::Qemu { qmp, .. } => qemu::is_plugged(qmp, id, until),
        Vm::CloudHypervisor { api } => cloud_hypervisor::is_plugged(api, id, until),
    }
}

/// Takes `bytes` for what cloud-hypervisor answers, for fuzzing: what is believed of them is of use.
pub fn fuzz_answer(bytes: &[u8]) {
    cloud_hypervisor::fuzz_answer(bytes);
}

/// The VMM's name for the device of an attachment.
fn device_name(id: &str) -> String {
    format!("farbus-{id}")
}
