//! The Identify data that a guest gets: the device's own, less what cannot cross.

use farbus_vfio::nvme::{PAGE_SIZE, SubmissionEntry, admin};
use vm_memory::volatile_memory::VolatileSlice;
use vm_memory::{Bytes, VolatileMemory};

/// Controller or Namespace Structure: the controller (NVMe 1.4 §5.15.2, figure 244).
pub const CNS_NAMESPACE: u8 = 0;
/// The controller data structure.
pub const CNS_CONTROLLER: u8 = 1;
/// The list of active namespaces.
pub const CNS_ACTIVE_NAMESPACES: u8 = 2;

/// Offsets into the Identify Controller data structure (NVMe 1.4 §5.15.2.2, figure 247).
mod at {
    pub(super) const CMIC: usize = 76;
    pub(super) const MDTS: usize = 77;
    pub(super) const AERL: usize = 259;
    pub(super) const LPA: usize = 261;
    pub(super) const ONCS: usize = 520;
    pub(super) const OCFS: usize = 534;
    pub(super) const OACS: usize = 256;
    pub(super) const HMPRE: usize = 272;
    pub(super) const HMMIN: usize = 276;
    pub(super) const FUSES: usize = 524;
    pub(super) const AVSCC: usize = 264;
    pub(super) const NVSCC: usize = 530;
    pub(super) const SGLS: usize = 536;
    pub(super) const SANICAP: usize = 328;
}

/// Optional admin commands (OACS) that the engine carries: device self-test (bit 4) and Get
/// LBA Status (bit 9). Not lent: security, format, firmware, namespace management,
/// directives, NVMe-MI, virtualization. Doorbell buffers are the compute half's own.
const OACS_KEPT: u16 = 1 << 4 | 1 << 9;

/// Optional NVM commands (ONCS) that the engine does not carry: reservations (bit 5), which a
/// controller that is rebuilt would lose, and Copy (bit 8).
const ONCS_HIDDEN: u16 = 1 << 5 | 1 << 8;
/// Log page attributes (LPA) of logs that are not lent: telemetry and persistent events.
const LPA_HIDDEN: u8 = 1 << 3 | 1 << 4;
/// Most asynchronous event requests at a time, 0's based: they hold admin tags for ever.
const MAX_AERL: u8 = 15;

/// The byte of the Identify Controller data that tells of Doorbell Buffer Config, and its bit
/// there: OACS bit 8.
pub const DOORBELL_BUFFER_BYTE: u64 = at::OACS as u64 + 1;
/// See [`DOORBELL_BUFFER_BYTE`].
pub const DOORBELL_BUFFER_BIT: u8 = 1;

/// Whether a command asks for the Identify Controller data.
pub fn is_of_controller(sqe: &SubmissionEntry) -> bool {
    sqe.opcode() == admin::IDENTIFY && sqe.dword(10) as u8 == CNS_CONTROLLER
}

/// log2, in pages, of the largest transfer.
pub fn mdts(max_transfer: u32) -> u8 {
    (max_transfer / PAGE_SIZE as u32).ilog2() as u8
}

/// The largest transfer of a controller in bytes as its MDTS gives it (0 is no limit), with
/// pages of 4 KiB, but no more than `limit`, a power of two.
pub fn max_transfer(controller: &[u8], limit: u32) -> u32 {
    match controller.get(at::MDTS) {
        Some(&mdts @ 1..=19) => limit.min((PAGE_SIZE as u32) << mdts),
        _ => limit,
    }
}

/// Host memory buffer sizes that a controller asks for, in bytes: preferred and minimum.
pub fn host_memory_wanted(controller: &[u8]) -> (u64, u64) {
    let pages = |at: usize| {
        controller
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u32::from_le_bytes)
    };
    let bytes = |at| u64::from(pages(at)) * PAGE_SIZE as u64;
    (bytes(at::HMPRE), bytes(at::HMMIN))
}

/// Reduces the Identify Controller data in `data`, which must be a whole structure, to what
/// the engine carries.
pub fn reduce_controller(data: &VolatileSlice<'_>, max_transfer: u32) {
    let put = |offset: usize, bytes: &[u8]| {
        if let Ok(field) = data.get_slice(offset, bytes.len()) {
            field.copy_from(bytes);
        }
    };
    let oacs = data.read_obj::<u16>(at::OACS).unwrap_or(0);
    let oncs = data.read_obj::<u16>(at::ONCS).unwrap_or(0);
    let lpa = data.read_obj::<u8>(at::LPA).unwrap_or(0);
    let aerl = data.read_obj::<u8>(at::AERL).unwrap_or(0);
    put(at::ONCS, &(oncs & !ONCS_HIDDEN).to_le_bytes());
    put(at::OCFS, &[0; 2]);
    put(at::LPA, &[lpa & !LPA_HIDDEN]);
    put(at::AERL, &[aerl.min(MAX_AERL)]);
    put(at::CMIC, &[0]);
    put(at::MDTS, &[mdts(max_transfer)]);
    put(at::OACS, &(oacs & OACS_KEPT).to_le_bytes());
    put(at::AVSCC, &[0]);
    put(at::HMPRE, &[0; 4]);
    put(at::HMMIN, &[0; 4]);
    put(at::SANICAP, &[0; 4]);
    put(at::FUSES, &[0; 2]);
    put(at::NVSCC, &[0]);
    put(at::SGLS, &[0; 4]);
}
