//! What a tenant can set in a controller and a reset may leave: features (NVMe 1.4 §5.21.1).
//!
//! A reset is to bring all of them back, unless they were saved, which the engine refuses. Not
//! every controller does that, and some features outlive resets by design. So what is found at
//! a function's first claim is put back at the later ones.

use farbus_vfio::nvme::{SubmissionEntry, admin};
use log::info;

use super::super::description::Namespaces;
use super::super::transfer::feature;
use super::{DeviceError, DeviceHalf};

/// Features without data structures that stay when queues go: arbitration, power management,
/// temperature threshold (of the composite temperature; over and under), volatile write cache,
/// interrupt coalescing, write atomicity, asynchronous events, host controlled thermal
/// management, non-operational power states, sanitize configuration, software progress marker;
/// with the dword 11 that selects one of several values.
const FEATURES: [(u8, u32); 12] = [
    (0x01, 0),
    (0x02, 0),
    (feature::TEMPERATURE_THRESHOLD, 0),
    (feature::TEMPERATURE_THRESHOLD, 1 << 20),
    (0x06, 0),
    (0x08, 0),
    (0x0a, 0),
    (0x0b, 0),
    (0x10, 0),
    (0x11, 0),
    (0x17, 0),
    (0x80, 0),
];
/// A feature that each namespace has for itself: time limited error recovery.
const OF_NAMESPACES: u8 = 0x05;

/// The features of a controller before its first tenant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings(Vec<Setting>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Setting {
    nsid: u32,
    id: u8,
    selector: u32,
    value: u32,
}

impl Setting {
    /// Dword 11 of Set Features.
    fn dword(self) -> u32 {
        match self.id {
            feature::TEMPERATURE_THRESHOLD => self.selector | self.value & 0xffff,
            _ => self.value,
        }
    }
}

impl DeviceHalf {
    /// What is set now, as far as the controller tells.
    pub(super) fn ask_settings(
        &mut self,
        namespaces: &Namespaces,
    ) -> Result<Settings, DeviceError> {
        let ids = namespaces.all().iter().map(|format| format.nsid);
        let of_namespaces: Vec<_> = ids.map(|nsid| (nsid, OF_NAMESPACES, 0)).collect();
        let of_all = FEATURES.map(|(id, selector)| (0, id, selector));
        let mut settings = Vec::new();
        for (nsid, id, selector) in of_all.into_iter().chain(of_namespaces) {
            let mut sqe = SubmissionEntry::new(admin::GET_FEATURES);
            sqe.set_nsid(nsid);
            sqe.set_dword(10, id.into());
            sqe.set_dword(11, selector);
            let cqe = self.run(sqe)?;
            if cqe.status.is_success() {
                settings.push(Setting {
                    nsid,
                    id,
                    selector,
                    value: cqe.result as u32,
                });
            }
        }
        Ok(Settings(settings))
    }

    /// Puts back what differs.
    pub(super) fn put_back(
        &mut self,
        wanted: &Settings,
        found: &Settings,
    ) -> Result<(), DeviceError> {
        for setting in wanted.0.iter().filter(|setting| !found.0.contains(setting)) {
            let mut sqe = SubmissionEntry::new(admin::SET_FEATURES);
            sqe.set_nsid(setting.nsid);
            sqe.set_dword(10, setting.id.into());
            sqe.set_dword(11, setting.dword());
            let status = self.run(sqe)?.status;
            info!(
                "{}: its reset left feature {:#x} as a tenant had set it; put back to {:#x} (status {:#x})",
                self.function.info().label,
                setting.id,
                setting.value,
                status.0
            );
        }
        Ok(())
    }
}
