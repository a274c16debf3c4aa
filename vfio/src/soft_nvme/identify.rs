//! The Identify data structures (NVMe 1.4 §5.15.2). All have 4096 bytes.

#![forbid(unsafe_code)]

use super::controller::Shape;
use super::features::WARNING_TEMPERATURE;
use super::identity::{Identity, VENDOR};
use super::{events, front, health};
use crate::nvme::PAGE_SIZE;

/// Largest transfer as a power of two of pages: 1 MiB.
pub(super) const MDTS: u8 = 8;
/// Abort commands that may be outstanding, 0's based. They are done one after the other.
const ABORT_LIMIT: u8 = 3;
/// The one format of the namespace that there is.
const NSID: u32 = 1;

pub(crate) type Page = [u8; PAGE_SIZE];

/// CNS 01h (NVMe 1.4 figure 247).
pub(super) fn controller(identity: &Identity) -> Page {
    let mut page = [0; PAGE_SIZE];
    let mut put = |at: usize, bytes: &[u8]| {
        for (to, from) in page.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    };
    put(0, &VENDOR.to_le_bytes());
    put(2, &VENDOR.to_le_bytes());
    put(4, &padded::<20>(&identity.serial));
    put(24, &padded::<40>("Farbus software NVMe controller"));
    put(64, &firmware_revision());
    // Recommended arbitration burst: no limit.
    put(72, &[7]);
    put(77, &[MDTS]);
    put(78, &1u16.to_le_bytes());
    put(80, &front::VERSION.to_le_bytes());
    // An I/O controller.
    put(111, &[1]);
    put(258, &[ABORT_LIMIT, events::LIMIT as u8 - 1]);
    // One firmware slot, which is read only; logs can be read in parts (NUMDU, LPO).
    put(260, &[1 << 1 | 1, 1 << 2]);
    put(262, &[health::ERROR_ENTRIES as u8 - 1]);
    put(266, &WARNING_TEMPERATURE.to_le_bytes());
    put(268, &373u16.to_le_bytes());
    // Entry sizes: exactly 64 and 16 bytes.
    put(512, &[0x66, 0x44]);
    put(516, &NSID.to_le_bytes());
    // Compare, Dataset Management, Write Zeroes, Save and Select in features, Verify.
    put(
        520,
        &(1u16 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 7).to_le_bytes(),
    );
    // A volatile write cache; a Flush may name all namespaces.
    put(525, &[0b111]);
    let name = format!("nqn.2014-08.org.nvmexpress:uuid:{}", identity.uuid_text());
    put(768, name.as_bytes());
    page
}

/// CNS 00h (NVMe 1.4 figure 245).
pub(super) fn namespace(identity: &Identity, shape: Shape) -> Page {
    let mut page = [0; PAGE_SIZE];
    let mut put = |at: usize, bytes: &[u8]| {
        for (to, from) in page.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    };
    let blocks = shape.blocks.to_le_bytes();
    put(0, &blocks);
    put(8, &blocks);
    put(16, &blocks);
    // Bit 0, thin provisioning, would promise a use count; bit 4: the hints below are set.
    put(24, &[1 << 4]);
    // Deallocated blocks read as zero, and Write Zeroes can deallocate.
    put(33, &[if shape.reads_zero { 1 << 3 | 1 } else { 1 << 3 }]);
    // Preferred write and deallocate granularity and alignment, 0's based: the host's pages.
    let page_blocks = ((PAGE_SIZE as u32 >> shape.block_shift).max(1) - 1) as u16;
    for at in [64, 66, 68, 70] {
        put(at, &page_blocks.to_le_bytes());
    }
    put(104, &identity.uuid);
    put(120, &identity.eui64);
    // One format: no metadata, and the best performance.
    put(128, &(u32::from(shape.block_shift) << 16).to_le_bytes());
    page
}

/// CNS 02h: the active namespaces above `after`.
pub(crate) fn namespace_list(after: u32) -> Page {
    let mut page = [0; PAGE_SIZE];
    if after < NSID {
        page[..4].copy_from_slice(&NSID.to_le_bytes());
    }
    page
}

/// CNS 03h: namespace identification descriptors (NVMe 1.4 figure 249).
pub(crate) fn descriptors(identity: &Identity) -> Page {
    let mut page = [0; PAGE_SIZE];
    let mut at = 0;
    for (kind, value) in [
        (1, &identity.eui64[..]),
        (2, &identity.uuid),
        (3, &identity.uuid),
    ] {
        let header = [kind, value.len() as u8, 0, 0];
        for byte in header.iter().chain(value) {
            if let Some(slot) = page.get_mut(at) {
                *slot = *byte;
            }
            at += 1;
        }
    }
    page
}

/// The version of this software, 8 characters.
pub(super) fn firmware_revision() -> [u8; 8] {
    padded(env!("CARGO_PKG_VERSION"))
}

/// ASCII padded with spaces (NVMe 1.4 §1.5).
fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [b' '; N];
    for (to, from) in field.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    field
}
