//! What an export's function is, for those who choose one: asked once, before the first claim, and
//! again at every claim, which asks anyway.

use std::sync::Arc;
use std::thread;

use farbus_fabric::wire::{Label, Listed, ListedState, Text};
use farbus_shadow_mem::nvme::device::{DeviceHalf, Identity, Limits};
use farbus_vfio::Function;
use log::{info, warn};

use super::{Export, Status};

/// What is known of a function.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// PCI class code; 0 if unknown, as the ids.
    pub class: u32,
    /// PCI vendor id.
    pub vendor: u16,
    /// PCI device id.
    pub device: u16,
    /// The NUMA node of this host that it is near to.
    pub numa_node: Option<u16>,
    /// Which drive it is, once it has been asked.
    pub identity: Option<Identity>,
}

impl Known {
    /// What can be read without changing the function's state (PCI 3.0 §6.2.1: ids at 0, class
    /// code at 9).
    pub(super) fn read(&mut self, function: &dyn Function) {
        let mut head = [0; 12];
        if function.config_read(0, &mut head).is_err() {
            return;
        }
        self.vendor = u16::from_le_bytes([head[0], head[1]]);
        self.device = u16::from_le_bytes([head[2], head[3]]);
        self.class = u32::from_le_bytes([head[9], head[10], head[11], 0]);
    }

    /// The block size of storage in bytes, and how many it holds.
    pub fn size(&self) -> (Option<u64>, Option<u32>) {
        let identity = self.identity.as_ref();
        (
            identity
                .map(|identity| identity.capacity)
                .filter(|c| *c > 0),
            identity.and_then(|identity| identity.block_size),
        )
    }
}

/// Asks all of them at the same time what they are, which takes each a reset. Nobody must have
/// claimed any.
pub fn ask(exports: &[&Export]) {
    thread::scope(|scope| {
        for export in exports {
            scope.spawn(|| export.ask());
        }
    });
}

impl Export {
    /// Asks the function what it is. One that does not answer properly stays exported, since a
    /// claim may find it better; until then it is listed as failed.
    fn ask(&self) {
        let Ok(function) = self.lock().function.clone() else {
            return;
        };
        match DeviceHalf::open(Arc::clone(&function), Limits::default()) {
            Ok(half) => {
                let identity = half.identity();
                info!(
                    "{}: {}, serial number {}, {} bytes",
                    self.name(),
                    identity.model,
                    identity.serial,
                    identity.capacity
                );
                self.learn(&half);
            }
            Err(error) => {
                let why = format!("{:#}", anyhow::Error::new(error));
                warn!("{}: cannot be used: {why}", self.name());
                self.lock().unusable = Some(why);
            }
        }
    }

    /// Remembers what a function that could be opened has told.
    pub(super) fn learn(&self, half: &DeviceHalf) {
        let mut inner = self.lock();
        inner.unusable = None;
        inner.known.identity = Some(half.identity().clone());
        inner.settings = Some(half.settings().clone());
    }

    /// What peers are told of it.
    pub(super) fn listed(&self, draining: bool) -> Listed {
        let Status {
            state,
            claim,
            why,
            known,
        } = self.status(draining);
        let (capacity, block_size) = known.size();
        let identity = known.identity.unwrap_or_default();
        let holder = claim.map_or_else(String::new, |claim| claim.holder);
        Listed {
            name: self.name().clone(),
            class: known.class,
            vendor: known.vendor,
            device: known.device,
            model: Label::truncated(&identity.model),
            serial: Label::truncated(&identity.serial),
            capacity,
            block_size,
            numa_node: known.numa_node,
            state,
            holder: Text::truncated(&holder),
            why: Text::truncated(&why.unwrap_or_default()),
        }
    }
}

/// A word for each state.
pub fn state_name(state: ListedState) -> &'static str {
    match state {
        ListedState::Free => "free",
        ListedState::Claimed => "claimed",
        ListedState::Failed => "failed",
        ListedState::Draining => "draining",
    }
}
