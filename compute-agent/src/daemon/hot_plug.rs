//! The daemon's view of hot-plug: a seam, so that tests can have a VMM that fails as they need it.

use std::time::Duration;

use crate::api::Vm;
use crate::hotplug::{self, HotplugError, PlugDevice, Plugged, Unplugged};

/// What plugs devices into VMs. The calls block, within their deadlines.
pub trait HotPlug: Send + Sync {
    /// See [`hotplug::plug`].
    ///
    /// # Errors
    /// See [`HotplugError`].
    fn plug(&self, vm: &Vm, device: &PlugDevice) -> Result<Plugged, HotplugError>;

    /// See [`hotplug::unplug`].
    ///
    /// # Errors
    /// See [`HotplugError`].
    fn unplug(
        &self,
        vm: &Vm,
        id: &str,
        deadline: Duration,
        force: bool,
    ) -> Result<Unplugged, HotplugError>;

    /// See [`hotplug::is_plugged`].
    ///
    /// # Errors
    /// See [`HotplugError`].
    fn is_plugged(&self, vm: &Vm, id: &str) -> Result<bool, HotplugError>;
}

/// The VMMs of this host.
#[derive(Clone, Copy, Debug)]
pub struct Vmms;

impl HotPlug for Vmms {
    fn plug(&self, vm: &Vm, device: &PlugDevice) -> Result<Plugged, HotplugError> {
        hotplug::plug(vm, device)
    }

    fn unplug(
        &self,
        vm: &Vm,
        id: &str,
        deadline: Duration,
        force: bool,
    ) -> Result<Unplugged, HotplugError> {
        hotplug::unplug(vm, id, deadline, force)
    }

    fn is_plugged(&self, vm: &Vm, id: &str) -> Result<bool, HotplugError> {
        hotplug::is_plugged(vm, id)
    }
}
