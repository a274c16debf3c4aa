//! Asking a server what its function is like, and believing no more of it than can be.

use super::body::{
    DEVICE_PCI, DEVICE_RESET, IRQ_INDEX_INTX, IRQ_INDEX_MSI, IRQ_INDEX_MSIX, REGION_INDEX_CONFIG,
};
use super::error::nonsense;
use super::{Client, ClientError, Command};
use crate::config::{EXTENDED_SIZE, LEGACY_SIZE};
use crate::{FunctionInfo, InterruptCounts, RegionIndex, RegionInfo};

/// Asks for everything that does not change.
pub(super) fn describe(client: &mut Client, label: String) -> Result<FunctionInfo, ClientError> {
    let device = client.device_info()?;
    if device.flags & DEVICE_PCI == 0 {
        return Err(nonsense(
            Command::DeviceGetInfo,
            "its device is not a PCI function".into(),
        ));
    }
    let mut regions = Vec::new();
    for index in 0..RegionIndex::COUNT {
        let size = region_size(client, u32::from(index))?;
        if size == 0 {
            continue;
        }
        if !size.is_power_of_two() || size < 16 {
            return Err(nonsense(
                Command::DeviceGetRegionInfo,
                format!(
                    "{} has {size:#x} bytes, and a BAR has a power of two, at least 16",
                    RegionIndex(index)
                ),
            ));
        }
        regions.push(RegionInfo {
            index: RegionIndex(index),
            size,
        });
    }
    let config_size = region_size(client, REGION_INDEX_CONFIG)?;
    if config_size != LEGACY_SIZE as u64 && config_size != EXTENDED_SIZE as u64 {
        return Err(nonsense(
            Command::DeviceGetRegionInfo,
            format!("configuration space has {config_size:#x} bytes, and not 256 or 4096"),
        ));
    }
    Ok(FunctionInfo {
        label,
        config_size: config_size as u16,
        regions,
        interrupts: InterruptCounts {
            intx: irq_count(client, IRQ_INDEX_INTX, 1)?,
            msi: irq_count(client, IRQ_INDEX_MSI, 32)?,
            msix: irq_count(client, IRQ_INDEX_MSIX, 2048)?,
        },
        resettable: device.flags & DEVICE_RESET != 0,
        iova_ranges: vec![0..=u64::MAX],
    })
}

/// A server may refuse to speak of what there is not.
fn region_size(client: &mut Client, index: u32) -> Result<u64, ClientError> {
    match client.region_info(index) {
        Ok(region) => Ok(region.size),
        Err(ClientError::Refused { .. }) => Ok(0),
        Err(error) => Err(error),
    }
}

fn irq_count(client: &mut Client, index: u32, most: u32) -> Result<u32, ClientError> {
    match client.irq_info(index) {
        Ok(irqs) if irqs.count <= most => Ok(irqs.count),
        Ok(irqs) => Err(nonsense(
            Command::DeviceGetIrqInfo,
            format!(
                "{} interrupts of kind {index}, and there can be {most}",
                irqs.count
            ),
        )),
        Err(ClientError::Refused { .. }) => Ok(0),
        Err(error) => Err(error),
    }
}
