//! Finds capabilities in the configuration space of a function that somebody else keeps.

use super::{LEGACY_SIZE, MsixLayout, STATUS_CAPABILITIES, cap, header};
use crate::function::RegionIndex;

/// A capability that is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapabilityId {
    /// PCI Express (PCIe 4.0 §7.5.3).
    Express,
    /// MSI-X (PCI 3.0 §6.8.2).
    Msix,
}

impl CapabilityId {
    fn byte(self) -> u8 {
        match self {
            Self::Express => cap::EXPRESS,
            Self::Msix => cap::MSIX,
        }
    }
}

/// Where a capability begins (bytes), if the function has it; `read` reads its configuration
/// space.
pub fn find_capability<E>(
    id: CapabilityId,
    read: impl Fn(u16, &mut [u8]) -> Result<(), E>,
) -> Option<u16> {
    if read16(&read, header::STATUS)? & STATUS_CAPABILITIES == 0 {
        return None;
    }
    let mut at = usize::from(read16(&read, header::CAPABILITIES)? & 0xfc);
    // Capabilities are dwords, so that a chain is a circle when it is longer than this.
    for _ in 0..LEGACY_SIZE / 4 {
        if at < header::END {
            return None;
        }
        let [found, next] = read16(&read, at)?.to_le_bytes();
        if found == id.byte() {
            return Some(at as u16);
        }
        at = usize::from(next & 0xfc);
    }
    None
}

/// Where the MSI-X capability begins (bytes), and where its vectors are, if the function has it. Whether
/// the BARs have room for them is not looked at.
pub fn find_msix<E>(read: impl Fn(u16, &mut [u8]) -> Result<(), E>) -> Option<(u16, MsixLayout)> {
    let start = find_capability(CapabilityId::Msix, &read)?;
    let at = usize::from(start);
    let place = |at: usize| {
        let low = u32::from(read16(&read, at)?);
        let word = low | u32::from(read16(&read, at + 2)?) << 16;
        Some((RegionIndex((word & 7) as u8), u64::from(word & !7)))
    };
    let layout = MsixLayout {
        vectors: (read16(&read, at + cap::MSIX_CONTROL)? & 0x7ff) + 1,
        table: place(at + cap::MSIX_TABLE)?,
        pba: place(at + cap::MSIX_PBA)?,
    };
    Some((start, layout))
}

fn read16<E>(read: impl Fn(u16, &mut [u8]) -> Result<(), E>, at: usize) -> Option<u16> {
    let mut bytes = [0; 2];
    read(at as u16, &mut bytes).ok()?;
    Some(u16::from_le_bytes(bytes))
}
