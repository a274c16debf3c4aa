//! Where a function keeps its MSI-X table, which is the kernel's and not to be touched.

#![forbid(unsafe_code)]

use std::io;
use std::ops::Range;

use crate::config::find_msix;
use crate::function::RegionIndex;

/// Bytes of an entry (PCI 3.0 §6.8.2.9).
const ENTRY: u64 = 16;

/// The BAR and the bytes of the MSI-X table, found by `read`, which reads configuration space;
/// `None` without the capability.
pub(super) fn table_of(
    read: impl Fn(u16, &mut [u8]) -> io::Result<()>,
) -> Option<(RegionIndex, Range<u64>)> {
    let (_, layout) = find_msix(read)?;
    let (region, start) = layout.table;
    Some((region, start..start + ENTRY * u64::from(layout.vectors)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BarKind, ConfigImage, MsixLayout, header};

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
