//! How a controller of ours looks to PCI: one BAR with registers, doorbells and MSI-X. A portion of a
//! shared drive looks the same; what is in its MSI-X table means nothing.

use super::identity::VENDOR;
use crate::config::{BarKind, ConfigError, ConfigImage, ConfigSpace, MsixLayout};
use crate::function::{FunctionError, FunctionInfo, InterruptKind, RegionIndex, RegionInfo};
use crate::nvme::PCI_CLASS;

/// Size of BAR 0 in bytes.
pub(crate) const BAR_SIZE: u64 = 0x4000;
/// Where in BAR 0 the MSI-X table is.
pub(crate) const MSIX_TABLE: u64 = 0x2000;
/// Where in BAR 0 the MSI-X pending bits are.
pub(crate) const MSIX_PBA: u64 = 0x3000;

/// BAR 0, and the configuration space of a function with this device id and so many vectors.
pub(crate) fn configuration(
    device: u16,
    vectors: u16,
) -> Result<(RegionInfo, ConfigSpace), ConfigError> {
    let bar0 = RegionInfo {
        index: RegionIndex::BAR0,
        size: BAR_SIZE,
    };
    let layout = MsixLayout {
        vectors,
        table: (RegionIndex::BAR0, MSIX_TABLE),
        pba: (RegionIndex::BAR0, MSIX_PBA),
    };
    let image = ConfigImage::new(VENDOR, device, PCI_CLASS)
        .bar(0, BarKind::Memory64)
        .power_management()
        .msix(layout)
        .express()
        .build();
    let space = ConfigSpace::from_image(&image, &[bar0])?;
    Ok((bar0, space))
}

/// Whether the function has these vectors.
pub(crate) fn check_vectors(
    info: &FunctionInfo,
    kind: InterruptKind,
    first: u32,
    count: usize,
) -> Result<(), FunctionError> {
    let available = info.interrupts.of(kind);
    let end = u64::from(first) + count as u64;
    if end > u64::from(available) {
        return Err(FunctionError::Unsupported(format!(
            "{kind:?} vectors {first} to {end} were asked for, but there are {available}"
        )));
    }
    Ok(())
}

/// The dwords that a write to registers stores, with their offsets. Registers take aligned accesses of 4
/// and 8 bytes, as the specification demands of software (NVMe 1.4 §3.1); others go nowhere.
pub(crate) fn dwords(offset: u64, data: &[u8]) -> impl Iterator<Item = (u64, u32)> {
    let taken = matches!(data.len(), 4 | 8) && offset % data.len() as u64 == 0;
    if !taken {
        log::debug!("a write of {} bytes at {offset:#x} is ignored", data.len());
    }
    let data = if taken { data } else { &[] };
    let values = data.chunks_exact(4).map(|bytes| {
        let bytes = bytes.iter().rev();
        bytes.fold(0, |value, &byte| value << 8 | u32::from(byte))
    });
    (offset..).step_by(4).zip(values)
}
