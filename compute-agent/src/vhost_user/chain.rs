//! Walks descriptor chains (virtio 1.2 §2.7.5) in memory that a hostile guest owns.
//!
//! `virtio-queue` has a walker of its own, but one that ends silently where a chain is broken,
//! and that only the available ring can be the start of; a request that is taken up again after
//! a restart is no longer in that ring. Each descriptor is copied once, and the copy is what
//! counts.

#![forbid(unsafe_code)]

use virtio_bindings::bindings::virtio_ring::VRING_DESC_ALIGN_SIZE;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

/// Most descriptors of one chain that are looked at, and kept: what the configuration space lets
/// a guest use (`seg_max`), its header and status, and some for guests that split those.
pub const MAX_PARTS: usize = 136;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Guest address of its first byte.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether it is for the device to write to; otherwise the device may only read.
    pub writable: bool,
}

/// A chain that no driver may make. The queue it came from cannot be trusted any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BrokenChain {
    /// A descriptor has an index that its table does not have.
    #[error("descriptor {index} is not in a table of {size}")]
    NoSuchDescriptor {
        /// The index.
        index: u16,
        /// How many the table has.
        size: u16,
    },
    /// A descriptor table is not in the guest's memory.
    #[error("the descriptor at {0:#x} is not in the guest's memory")]
    NotInMemory(u64),
    /// The chain never ends, or has more buffers than the device says it takes.
    #[error("the chain has more than {0} descriptors")]
    TooLong(usize),
    /// An indirect table that is empty, of a crooked size, or within another one.
    #[error("an indirect table of {len} bytes is not possible there")]
    BadIndirect {
        /// Its length in bytes.
        len: u32,
    },
}

/// Collects the buffers of the chain that begins at `head` into `parts`. `table` is the guest
/// address of the queue's descriptor table, `size` its number of entries.
pub fn walk<M: GuestMemory>(
    memory: &M,
    table: u64,
    size: u16,
    head: u16,
    parts: &mut Vec<Part>,
) -> Result<(), BrokenChain> {
    parts.clear();
    let (mut table, mut size, mut index) = (table, size, head);
    let mut indirect = false;
    // Each descriptor adds a part, or is the one that leads to the indirect table.
    for _ in 0..=MAX_PARTS {
        if index >= size {
            return Err(BrokenChain::NoSuchDescriptor { index, size });
        }
        let at = u64::from(index) * u64::from(VRING_DESC_ALIGN_SIZE);
        let refused = BrokenChain::NotInMemory(table.wrapping_add(at));
        let at = table.checked_add(at).ok_or(refused)?;
        let descriptor: Descriptor = memory.read_obj(GuestAddress(at)).map_err(|_| refused)?;
        if descriptor.refers_to_indirect_table() {
            let len = descriptor.len();
            let entries = u16::try_from(len / VRING_DESC_ALIGN_SIZE).unwrap_or(0);
            if indirect || entries == 0 || len % VRING_DESC_ALIGN_SIZE != 0 {
                return Err(BrokenChain::BadIndirect { len });
            }
            (table, size, index, indirect) = (descriptor.addr().0, entries, 0, true);
            continue;
        }
        if parts.len() == MAX_PARTS {
            break;
        }
        parts.push(Part {
            address: descriptor.addr().0,
            len: descriptor.len(),
            writable: descriptor.is_write_only(),
        });
        if !descriptor.has_next() {
            return Ok(());
        }
        index = descriptor.next();
    }
    Err(BrokenChain::TooLong(MAX_PARTS))
}
