//! What each command carries: the direction and length of its data, or the status that
//! answers a command which cannot cross.
//!
//! Both halves of the engine use this table, each on its own copy of the command: the compute
//! half to gather and land data, the device half to refuse what a hostile peer made up.

use farbus_vfio::nvme::{PAGE_SIZE, Status, SubmissionEntry, admin, nvm};

use super::description::Namespaces;

/// Direction and length of a command's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// The command has no data.
    None,
    /// Bytes from the guest to the device.
    ToDevice(u32),
    /// Bytes from the device to the guest.
    FromDevice(u32),
}

impl Transfer {
    /// Length of the data in bytes.
    pub fn len(self) -> u32 {
        match self {
            Self::None => 0,
            Self::ToDevice(len) | Self::FromDevice(len) => len,
        }
    }

    /// Whether there is no data.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

const PAGE: u32 = PAGE_SIZE as u32;

/// Feature identifiers (NVMe 1.4 §5.21.1, figure 271).
pub(super) mod feature {
    #![allow(missing_docs, reason = "the names are the specification's own")]
    pub(crate) const LBA_RANGE_TYPE: u8 = 0x03;
    pub(crate) const NUMBER_OF_QUEUES: u8 = 0x07;
    pub(crate) const AUTONOMOUS_POWER: u8 = 0x0c;
    pub(crate) const HOST_MEMORY_BUFFER: u8 = 0x0d;
    pub(crate) const TIMESTAMP: u8 = 0x0e;
    pub(crate) const PREDICTABLE_LATENCY: u8 = 0x13;
    pub(crate) const HOST_BEHAVIOR: u8 = 0x16;
    pub(crate) const HOST_IDENTIFIER: u8 = 0x81;
}

/// What an admin command carries. Commands that the engine does not lend to a guest are
/// answered as by a controller that does not have them; [`super::identify`] makes the
/// controller say so.
pub fn of_admin(sqe: &SubmissionEntry) -> Result<Transfer, Status> {
    check_flags(sqe)?;
    match sqe.opcode() {
        admin::DELETE_SQ
        | admin::CREATE_SQ
        | admin::DELETE_CQ
        | admin::CREATE_CQ
        | admin::ABORT
        | admin::ASYNC_EVENT
        | admin::SELF_TEST
        | admin::KEEP_ALIVE => Ok(Transfer::None),
        admin::GET_LOG_PAGE => {
            let dwords = u64::from(sqe.dword(10) >> 16) | u64::from(sqe.dword(11) & 0xffff) << 16;
            from_device((dwords + 1) * 4)
        }
        admin::IDENTIFY => Ok(Transfer::FromDevice(PAGE)),
        admin::SET_FEATURES => match sqe.dword(10) as u8 {
            // The guest's memory cannot be the device's: see the device half, which gives it
            // local memory.
            feature::HOST_MEMORY_BUFFER => Err(Status::INVALID_FIELD),
            id => Ok(match feature_data(id, sqe.dword(11)) {
                0 => Transfer::None,
                len => Transfer::ToDevice(len),
            }),
        },
        admin::GET_FEATURES => {
            // Select 3 asks for the capabilities of a feature: no data (NVMe 1.4 §5.15.1).
            let select = sqe.dword(10) >> 8 & 7;
            match sqe.dword(10) as u8 {
                feature::HOST_MEMORY_BUFFER => Err(Status::INVALID_FIELD),
                id if select != 3 => Ok(match feature_data(id, sqe.dword(11)) {
                    0 => Transfer::None,
                    len => Transfer::FromDevice(len),
                }),
                _ => Ok(Transfer::None),
            }
        }
        // Minimum number of dwords, 0's based, in CDW12 (NVMe 1.4 §5.27).
        admin::GET_LBA_STATUS => from_device((u64::from(sqe.dword(12)) + 1) * 4),
        _ => Err(Status::INVALID_OPCODE),
    }
}

/// Length of a feature's data structure in bytes (NVMe 1.4 §5.21.1), 0 for none. `cdw11` has
/// the flag that makes the host identifier an extended one.
fn feature_data(id: u8, cdw11: u32) -> u32 {
    match id {
        feature::LBA_RANGE_TYPE => PAGE,
        feature::AUTONOMOUS_POWER => 256,
        feature::TIMESTAMP => 8,
        feature::PREDICTABLE_LATENCY | feature::HOST_BEHAVIOR => 512,
        feature::HOST_IDENTIFIER => 8 << (cdw11 & 1),
        _ => 0,
    }
}

/// What a command of the NVM command set carries.
pub fn of_nvm(sqe: &SubmissionEntry, namespaces: &Namespaces) -> Result<Transfer, Status> {
    check_flags(sqe)?;
    match sqe.opcode() {
        nvm::FLUSH | nvm::WRITE_UNCORRECTABLE | nvm::WRITE_ZEROES | nvm::VERIFY => {
            Ok(Transfer::None)
        }
        nvm::READ => Ok(Transfer::FromDevice(block_data(sqe, namespaces)?)),
        nvm::WRITE | nvm::COMPARE => Ok(Transfer::ToDevice(block_data(sqe, namespaces)?)),
        // Number of ranges, 0's based, of 16 bytes (NVMe 1.4 §6.7) and of 32 bytes.
        nvm::DATASET_MANAGEMENT => Ok(Transfer::ToDevice(((sqe.dword(10) & 0xff) + 1) * 16)),
        nvm::COPY => Ok(Transfer::ToDevice(((sqe.dword(12) & 0xff) + 1) * 32)),
        nvm::RESERVATION_REGISTER | nvm::RESERVATION_ACQUIRE => Ok(Transfer::ToDevice(16)),
        nvm::RESERVATION_RELEASE => Ok(Transfer::ToDevice(8)),
        nvm::RESERVATION_REPORT => from_device((u64::from(sqe.dword(10)) + 1) * 4),
        _ => Err(Status::INVALID_OPCODE),
    }
}

/// Fused commands and SGLs are not offered (Identify says so), hence not accepted.
fn check_flags(sqe: &SubmissionEntry) -> Result<(), Status> {
    if sqe.fuse() != 0 || sqe.psdt() != 0 {
        return Err(Status::INVALID_FIELD);
    }
    Ok(())
}

fn from_device(len: u64) -> Result<Transfer, Status> {
    u32::try_from(len)
        .map(Transfer::FromDevice)
        .map_err(|_| Status::INVALID_FIELD)
}

fn block_data(sqe: &SubmissionEntry, namespaces: &Namespaces) -> Result<u32, Status> {
    let format = namespaces
        .get(sqe.nsid())
        .ok_or(Status::INVALID_NAMESPACE)?;
    // At most 2^16 blocks of at most 2^16 + 2^16 bytes: fits in 64 bits, not in 32.
    let len = u64::from(sqe.blocks()) * format.block_len();
    u32::try_from(len).map_err(|_| Status::INVALID_FIELD)
}
