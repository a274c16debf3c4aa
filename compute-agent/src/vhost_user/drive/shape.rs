//! What a drive is, from its Identify data (NVMe 1.4 §5.15).

#![forbid(unsafe_code)]

use farbus_vfio::nvme::PAGE_SIZE;

use super::super::request::SECTOR;

/// Most bytes of one command, whatever the drive says: two PRP pages short of what one list page
/// holds.
const MAX_TRANSFER: u32 = 1 << 20;

/// A drive, as far as a block device is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The namespace that is used.
    pub nsid: u32,
    /// Its size in blocks.
    pub blocks: u64,
    /// Bytes of a block.
    pub block_size: u32,
    /// Most bytes of one command.
    pub max_transfer: u32,
    /// The drive's serial number.
    pub serial: String,
    /// It has Dataset Management.
    pub can_discard: bool,
    /// It has Write Zeroes.
    pub can_write_zeroes: bool,
    /// Blocks that it likes to write, and that it gives back, at a time.
    pub write_granularity: u32,
    /// See [`Self::write_granularity`].
    pub discard_granularity: u32,
    /// Blocks of a write that is the best for it, or 0 if it does not say.
    pub optimal_write: u32,
}

/// A drive that cannot be offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadShape {
    /// There is no namespace.
    #[error("the drive has no namespace")]
    NoNamespace,
    /// The namespace cannot be used.
    #[error("namespace {nsid} has {blocks} blocks of 2^{shift} bytes, which cannot be used")]
    Format {
        /// Which one.
        nsid: u32,
        /// Its size in blocks.
        blocks: u64,
        /// Log2 of the bytes of a block.
        shift: u8,
    },
}

fn field<const N: usize>(page: &[u8], at: usize) -> [u8; N] {
    let bytes = page.get(at..at + N).and_then(|bytes| bytes.try_into().ok());
    bytes.unwrap_or([0; N])
}

/// A number of blocks that is 0's based.
fn blocks_at(page: &[u8], at: usize) -> u32 {
    u32::from(u16::from_le_bytes(field(page, at))) + 1
}

/// The first namespace of an active namespace list.
pub(super) fn first_namespace(list: &[u8]) -> Result<u32, BadShape> {
    match u32::from_le_bytes(field(list, 0)) {
        0 => Err(BadShape::NoNamespace),
        nsid => Ok(nsid),
    }
}

impl Shape {
    /// From the Identify data of a controller and of one of its namespaces.
    pub(super) fn new(controller: &[u8], nsid: u32, namespace: &[u8]) -> Result<Self, BadShape> {
        let [mdts] = field(controller, 77);
        let serial = String::from_utf8_lossy(&field::<20>(controller, 4)).into_owned();
        let oncs = u16::from_le_bytes(field(controller, 520));
        let blocks = u64::from_le_bytes(field(namespace, 0));
        let [features] = field(namespace, 24);
        let [formatted] = field(namespace, 26);
        let [shift] = field(namespace, 128 + 4 * usize::from(formatted & 0xf) + 2);
        let bad = BadShape::Format {
            nsid,
            blocks,
            shift,
        };
        // Blocks beyond a page would have a guest's pages be less than a block.
        if blocks == 0 || !(9..=12).contains(&shift) || blocks.checked_shl(shift.into()).is_none() {
            return Err(bad);
        }
        let hints = features & 1 << 4 != 0;
        let hint = |at| if hints { blocks_at(namespace, at) } else { 1 };
        let max_transfer = match mdts {
            1..=8 => MAX_TRANSFER.min((PAGE_SIZE as u32) << mdts),
            _ => MAX_TRANSFER,
        };
        Ok(Self {
            nsid,
            blocks,
            block_size: 1 << shift,
            max_transfer,
            serial: serial.trim().to_owned(),
            can_discard: oncs & 1 << 2 != 0,
            can_write_zeroes: oncs & 1 << 3 != 0,
            write_granularity: hint(64),
            discard_granularity: hint(68),
            optimal_write: if hints && blocks_at(namespace, 72) > 1 {
                blocks_at(namespace, 72)
            } else {
                0
            },
        })
    }

    /// Size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.blocks
            .saturating_mul(u64::from(self.block_size) / SECTOR)
    }

    /// The block that a sector begins, if it begins one.
    pub fn block_of(&self, sector: u64) -> Option<u64> {
        let per_block = u64::from(self.block_size) / SECTOR;
        (sector % per_block == 0).then_some(sector / per_block)
    }
}
