//! Where a function keeps its MSI-X table, which is the kernel's and not to be touched.

#![forbid(unsafe_code)]

use std::io;
use std::ops::Range;

use crate::config::{LEGACY_SIZE, STATUS_CAPABILITIES, cap, header};
use crate::function::RegionIndex;

/// Bytes of an entry (PCI 3.0 §6.8.2.9).
const ENTRY: u64 = 16;

/// The BAR and the bytes of the MSI-X table, found by `read`, which reads configuration space;
/// `None` without the capability.
pub(super) fn table_of(
    read: impl Fn(u16, &mut [u8]) -> io::Result<()>,
) -> Option<(RegionIndex, Range<u64>)> {
    let read16 = |at: usize| {
        let mut bytes = [0; 2];
        read(at as u16, &mut bytes).ok()?;
        Some(u16::from_le_bytes(bytes))
    };
    if read16(header::STATUS)? & STATUS_CAPABILITIES == 0 {
        return None;
    }
    let mut at = usize::from(read16(header::CAPABILITIES)? & 0xfc);
    // Capabilities are dwords, so that a chain is a circle when it is longer than this.
    for _ in 0..LEGACY_SIZE / 4 {
        if at < header::END {
            return None;
        }
        let [id, next] = read16(at)?.to_le_bytes();
        if id == cap::MSIX {
            let entries = u64::from(read16(at + cap::MSIX_CONTROL)? & 0x7ff) + 1;
            let low = u64::from(read16(at + cap::MSIX_TABLE)?);
            let table = low | u64::from(read16(at + cap::MSIX_TABLE + 2)?) << 16;
            let start = table & !7;
            return Some((
                RegionIndex((table & 7) as u8),
                start..start + ENTRY * entries,
            ));
        }
        at = usize::from(next & 0xfc);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BarKind, ConfigImage, MsixLayout};

    fn find(image: &[u8]) -> Option<(RegionIndex, Range<u64>)> {
        table_of(|at, data| {
            let at = usize::from(at);
            let bytes = image.get(at..at + data.len());
            data.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    fn image() -> ConfigImage {
        ConfigImage::new(0x1b36, 0x10, 0x01_08_02)
            .bar(0, BarKind::Memory64)
            .power_management()
    }

    #[test]
    fn table_is_found_behind_other_capabilities() {
        let layout = MsixLayout {
            vectors: 65,
            table: (RegionIndex(4), 0x2000),
            pba: (RegionIndex(4), 0x3000),
        };
        let found = find(&image().msix(layout).express().build());
        assert_eq!(found, Some((RegionIndex(4), 0x2000..0x2000 + 65 * 16)));
    }

    #[test]
    fn no_capability_no_list_and_a_circle_mean_no_table() {
        assert_eq!(find(&image().build()), None);
        assert_eq!(find(&[0xff; 256]), None);
        assert_eq!(find(&[]), None);
        let mut circle = image().build();
        let first = usize::from(circle[header::CAPABILITIES]);
        circle[first + 1] = first as u8;
        assert_eq!(find(&circle), None);
    }
}
