//! The inventory, and lending, on a made-up host.

mod bindings;
mod inventory;
mod sriov;

use super::fake::{FakeFunction, FakeHost};
use crate::PciAddress;

const NVME: &str = "0000:01:00.0";

fn address(text: &str) -> PciAddress {
    text.parse().unwrap()
}

/// A host with an NVMe controller in a group of its own.
fn host_with_nvme() -> FakeHost {
    let host = FakeHost::new();
    host.function(
        NVME,
        &FakeFunction {
            group: Some(12),
            ..FakeFunction::default()
        },
    );
    host
}
