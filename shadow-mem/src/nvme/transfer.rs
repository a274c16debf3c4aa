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

/// The flag of Set Features that makes a value outlive resets (NVMe 1.4 §5.21).
const SAVE: u32 = 1 << 31;

/// Feature identifiers (NVMe 1.4 §5.21.1, figure 271).
pub(super) mod feature {
    #![allow(missing_docs, reason = "the names are the specification's own")]
    pub(crate) const LBA_RANGE_TYPE: u8 = 0x03;
    pub(crate) const TEMPERATURE_THRESHOLD: u8 = 0x04;
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
            if NOT_LENT_LOGS.contains(&(sqe.dword(10) as u8)) {
                return Err(Status::INVALID_LOG_PAGE);
            }
            let dwords = u64::from(sqe.dword(10) >> 16) | u64::from(sqe.dword(11) & 0xffff) << 16;
            from_device((dwords + 1) * 4)
        }
        admin::IDENTIFY => Ok(Transfer::FromDevice(PAGE)),
        admin::SET_FEATURES => match sqe.dword(10) as u8 {
            id if !is_lent_feature(id) => Err(Status::INVALID_FIELD),
            // It would outlive the reset, and be there for the next tenant.
            _ if sqe.dword(10) & SAVE != 0 => Err(Status::FEATURE_NOT_SAVEABLE),
            id => Ok(match feature_data(id, sqe.dword(11)) {
                0 => Transfer::None,
                len => Transfer::ToDevice(len),
            }),
        },
        admin::GET_FEATURES => {
            // Select 3 asks for the capabilities of a feature: no data (NVMe 1.4 §5.15.1).
            let select = sqe.dword(10) >> 8 & 7;
            match sqe.dword(10) as u8 {
                id if !is_lent_feature(id) => Err(Status::INVALID_FIELD),
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

/// Logs with what the controller did for those who had it before: telemetry of host and
/// controller, and persistent events (NVMe 1.4 §5.14.1, figure 196).
const NOT_LENT_LOGS: [u8; 3] = [0x07, 0x08, 0x0d];

/// Whether a guest can get and set a feature. Of those that the specification names after 1.4,
/// and of vendors' own, nobody here knows which have data; and a device's host memory is this
/// side's own, see the device half.
fn is_lent_feature(id: u8) -> bool {
    matches!(id, 0x01..=0x18 | 0x80 | feature::HOST_IDENTIFIER) && id != feature::HOST_MEMORY_BUFFER
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
        // Number of ranges, 0's based, of 16 bytes each (NVMe 1.4 §6.7).
        nvm::DATASET_MANAGEMENT => Ok(Transfer::ToDevice(((sqe.dword(10) & 0xff) + 1) * 16)),
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
    // At most 2^16 blocks of at most 2^16 bytes: does not fit in 32 bits.
    let len = u64::from(sqe.blocks()) << format.block_shift;
    u32::try_from(len).map_err(|_| Status::INVALID_FIELD)
}
