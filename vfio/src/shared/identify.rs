//! What a portion says of itself (NVMe 1.4 §5.15.2): a controller and a namespace with names of
//! their own, and of the drive only what holds for a part of it.

use super::check::optional;
use super::drive::{SharedDrive, Slice};
use crate::nvme::PAGE_SIZE;
use crate::soft_nvme::{Identity, VENDOR};

pub(super) type Page = [u8; PAGE_SIZE];

/// Abort and Asynchronous Event Request commands that may be outstanding.
pub(super) const LIMIT: usize = 4;
/// The version that portions conform to: NVMe 1.4.0.
pub(super) const VERSION: u32 = 0x0001_0400;

/// Offsets into Identify Controller (figure 247).
mod at {
    pub(super) const SERIAL: usize = 4;
    pub(super) const MODEL: usize = 24;
    pub(super) const FIRMWARE: usize = 64;
    pub(super) const TEMPERATURES: usize = 266;
    pub(super) const ONCS: usize = 520;
    pub(super) const VWC: usize = 525;
    pub(super) const ATOMICITY: usize = 526;
}

fn put(page: &mut Page, at: usize, bytes: &[u8]) {
    for (to, from) in page.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

fn of<const N: usize>(page: &[u8], at: usize) -> [u8; N] {
    let bytes = page.get(at..at + N).and_then(|bytes| bytes.try_into().ok());
    bytes.unwrap_or([0; N])
}

/// Who a portion is: the same for the same slice of the same drive.
pub(super) fn identity(drive: &SharedDrive, slice: &Slice) -> Identity {
    let serial = of::<20>(&drive.page, at::SERIAL);
    let model = of::<40>(&drive.page, at::MODEL);
    Identity::named(&format!(
        "slice {} of {} {}",
        slice.name,
        String::from_utf8_lossy(&model),
        String::from_utf8_lossy(&serial)
    ))
}

/// CNS 01h.
pub(super) fn controller(drive: &SharedDrive, slice: &Slice, identity: &Identity) -> Page {
    let mut page = [0; PAGE_SIZE];
    put(&mut page, 0, &VENDOR.to_le_bytes());
    put(&mut page, 2, &VENDOR.to_le_bytes());
    let mut text = [b' '; 20];
    for (to, from) in text.iter_mut().zip(identity.serial.bytes()) {
        *to = from;
    }
    put(&mut page, at::SERIAL, &text);
    let model = of::<40>(&drive.page, at::MODEL);
    let mut text = [b' '; 40];
    for (to, from) in text
        .iter_mut()
        .zip(b"Farbus slice of ".iter().chain(&model))
    {
        *to = *from;
    }
    put(&mut page, at::MODEL, &text);
    put(&mut page, at::FIRMWARE, &of::<8>(&drive.page, at::FIRMWARE));
    put(&mut page, 72, &[7]);
    let pages = slice.bounds.max_transfer / PAGE_SIZE as u32;
    put(&mut page, 77, &[pages.ilog2() as u8]);
    put(&mut page, 78, &1u16.to_le_bytes());
    put(&mut page, 80, &VERSION.to_le_bytes());
    // An I/O controller.
    put(&mut page, 111, &[1]);
    put(&mut page, 258, &[LIMIT as u8 - 1, LIMIT as u8 - 1]);
    // One firmware slot, read only; logs can be read in parts.
    put(&mut page, 260, &[1 << 1 | 1, 1 << 2]);
    put(
        &mut page,
        at::TEMPERATURES,
        &of::<4>(&drive.page, at::TEMPERATURES),
    );
    put(&mut page, 512, &[0x66, 0x44]);
    put(&mut page, 516, &1u32.to_le_bytes());
    // What the drive can of what is passed on, and Save and Select in features.
    let oncs = u16::from_le_bytes(of(&drive.page, at::ONCS)) & optional::PASSED_ON | 1 << 4;
    put(&mut page, at::ONCS, &oncs.to_le_bytes());
    // Whether there is a volatile write cache; a Flush may name all namespaces.
    put(
        &mut page,
        at::VWC,
        &[of::<1>(&drive.page, at::VWC)[0] & 1 | 0b110],
    );
    put(
        &mut page,
        at::ATOMICITY,
        &of::<4>(&drive.page, at::ATOMICITY),
    );
    let name = format!("nqn.2014-08.org.nvmexpress:uuid:{}", identity.uuid_text());
    put(&mut page, 768, name.as_bytes());
    page
}

/// CNS 00h (figure 245).
pub(super) fn namespace(drive: &SharedDrive, slice: &Slice, identity: &Identity) -> Page {
    let whole = drive.namespace_page(slice.bounds.nsid);
    let mut page = [0; PAGE_SIZE];
    for at in [0, 8, 16] {
        put(&mut page, at, &slice.bounds.blocks.to_le_bytes());
    }
    // NSFEAT: errors of deallocated blocks, and whether the hints are set; DLFEAT, and the hints.
    put(&mut page, 24, &[of::<1>(whole, 24)[0] & (1 << 2 | 1 << 4)]);
    put(&mut page, 33, &of::<1>(whole, 33));
    put(&mut page, 64, &of::<8>(whole, 64));
    put(&mut page, 104, &identity.uuid);
    put(&mut page, 120, &identity.eui64);
    // One format, without metadata.
    put(
        &mut page,
        128,
        &(u32::from(slice.bounds.block_shift) << 16).to_le_bytes(),
    );
    page
}
