//! The configuration space of a block device (virtio 1.2 §5.2.4), and the features that say which
//! of its fields count.

#![forbid(unsafe_code)]

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

use super::drive::Shape;
use super::request::SECTOR;

/// Offset of `writeback`, the only field that a driver writes.
pub const WRITEBACK_AT: usize = 32;
/// Length of what is kept: the structure as of virtio 1.2, with fields that do not count as zero.
const LEN: usize = 96;
/// Most buffers of one request.
pub const SEG_MAX: u32 = 126;
/// Most ranges of one discard or write zeroes.
pub const MAX_RANGES: u32 = 32;
/// Most blocks of one NVMe Write Zeroes (NVMe 1.4 §6.16).
pub const MAX_ZEROES: u64 = 1 << 16;

/// What an operator chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Queues that the VMM may use.
    pub num_queues: u16,
    /// Most entries of a queue, a power of two.
    pub queue_size: u16,
    /// Nothing can be written.
    pub read_only: bool,
    /// What the guest reads as the drive's name, if not the drive's own serial number.
    pub serial: Option<String>,
}

/// What a VMM needs whose IOMMU is to be asked: a channel for the questions, and answers.
const ASKING: u64 =
    VhostUserProtocolFeatures::BACKEND_REQ.bits() | VhostUserProtocolFeatures::REPLY_ACK.bits();

/// Virtio and vhost-user features of a drive with this shape, for a VMM with these `protocol` features.
///
/// That the guest's driver may be behind an IOMMU is offered to who has agreed to what that needs. QEMU asks
/// for the features again then; user-mode Linux does not, and could not use a drive that offers it.
pub fn features(shape: &Shape, options: &Options, protocol: u64) -> u64 {
    let mut features = 1u64 << VIRTIO_F_VERSION_1
        | 1 << VIRTIO_RING_F_EVENT_IDX
        | 1 << VIRTIO_RING_F_INDIRECT_DESC
        | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    let mut add = |bit: u32, condition: bool| features |= u64::from(condition) << bit;
    add(VIRTIO_F_ACCESS_PLATFORM, protocol & ASKING == ASKING);
    add(VIRTIO_BLK_F_SEG_MAX, true);
    add(VIRTIO_BLK_F_BLK_SIZE, true);
    add(VIRTIO_BLK_F_TOPOLOGY, true);
    add(VIRTIO_BLK_F_FLUSH, true);
    add(VIRTIO_BLK_F_CONFIG_WCE, true);
    add(VIRTIO_BLK_F_MQ, true);
    add(VIRTIO_BLK_F_RO, options.read_only);
    add(
        VIRTIO_BLK_F_DISCARD,
        shape.can_discard && !options.read_only,
    );
    let zeroes = shape.can_write_zeroes && !options.read_only;
    add(VIRTIO_BLK_F_WRITE_ZEROES, zeroes);
    features
}

/// The configuration space.
pub fn space(shape: &Shape, options: &Options, writeback: bool) -> [u8; LEN] {
    let mut space = [0; LEN];
    let mut put = |at: usize, bytes: &[u8]| {
        for (to, from) in space.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    };
    let block = shape.block_size;
    let sectors = |blocks: u32| blocks.saturating_mul(block / SECTOR as u32);
    put(0, &shape.sectors().to_le_bytes());
    put(
        12,
        &SEG_MAX.min(u32::from(options.queue_size) - 2).to_le_bytes(),
    );
    put(20, &block.to_le_bytes());
    // Physical blocks are what the drive likes to write at a time.
    let exponent = shape.write_granularity.max(1).ilog2();
    put(24, &[exponent as u8, 0]);
    let least = u16::try_from(shape.write_granularity).unwrap_or(1);
    put(26, &least.to_le_bytes());
    put(28, &shape.optimal_write.to_le_bytes());
    put(WRITEBACK_AT, &[writeback.into()]);
    put(34, &options.num_queues.to_le_bytes());
    if shape.can_discard {
        // NVMe counts the blocks of a range in 32 bits (§6.7).
        put(36, &(u32::MAX - u32::MAX % sectors(1)).to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &sectors(shape.discard_granularity).to_le_bytes());
    }
    if shape.can_write_zeroes {
        put(48, &sectors(MAX_ZEROES as u32).to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
    }
    space
}
