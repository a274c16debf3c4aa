//! What the compute half must know of a controller before the guest's driver comes up: the
//! engine part of the fabric's `Description`.
//!
//! Encoded little endian: CAP u64, VS u32, largest transfer in bytes u32, I/O queue pairs u16,
//! namespaces u16, then for each namespace its id u32, log2 of its block's bytes u8, and three
//! reserved bytes of zero.

use farbus_vfio::nvme::{PAGE_SIZE, cap};

/// Namespaces that one description can hold.
pub const MAX_NAMESPACES: usize = 1024;
/// I/O queue pairs that one attachment can have.
pub const MAX_QUEUE_PAIRS: u16 = 64;
/// Entries that one queue can have: what `CAP.MQES` is clamped to.
pub const MAX_QUEUE_ENTRIES: u32 = 1024;
/// Entries of the device's own admin queues, hence one more than the admin commands that the
/// compute half keeps outstanding.
pub const ADMIN_QUEUE_ENTRIES: u32 = 128;

/// How a namespace is formatted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespaceFormat {
    /// The namespace's id.
    pub nsid: u32,
    /// Log2 of the bytes of a block: 9 to 16.
    pub block_shift: u8,
}

/// The namespaces of a controller, by id. One that is not here cannot be read or written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespaces(Vec<NamespaceFormat>);

impl Namespaces {
    /// From any list; the order does not matter.
    pub fn new(mut formats: Vec<NamespaceFormat>) -> Self {
        formats.sort_by_key(|format| format.nsid);
        Self(formats)
    }
    /// The format of one namespace.
    pub fn get(&self, nsid: u32) -> Option<NamespaceFormat> {
        let at = self.0.binary_search_by_key(&nsid, |f| f.nsid).ok()?;
        self.0.get(at).copied()
    }
    /// All of them, ascending by id.
    pub fn all(&self) -> &[NamespaceFormat] {
        &self.0
    }
}

/// A controller as the guest will see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvmeDescription {
    /// The CAP register, reduced to what crosses ([`guest_cap`]).
    pub cap: u64,
    /// The VS register.
    pub vs: u32,
    /// Largest transfer of one command in bytes: a power of two of pages.
    pub max_transfer: u32,
    /// I/O queue pairs that the guest can have.
    pub queue_pairs: u16,
    /// The active namespaces.
    pub namespaces: Namespaces,
}

/// A description that does not hold together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadDescription {
    /// It ends too early or too late.
    #[error("the NVMe description has {0} bytes, which is not its right length")]
    Length(usize),
    /// A field has a value that cannot be.
    #[error("the NVMe description gives {field} the impossible value {value}")]
    Field {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// CAP as a guest may see it: doorbells without stride, pages of 4 KiB, contiguous queues of
/// bounded depth, the NVM command set; no controller memory, no subsystem reset. The device's
/// time-out is the longest there is, since enabling may have to wait for the network.
pub fn guest_cap(device: u64) -> u64 {
    const TIMEOUT_MASK: u64 = 0xff << cap::TO_SHIFT;
    const TIMEOUT: u64 = 255; // units of 500 ms
    let entries = (device & cap::MQES_MASK).min(u64::from(MAX_QUEUE_ENTRIES) - 1);
    let kept = device
        & !(cap::MQES_MASK
            | TIMEOUT_MASK
            | cap::DSTRD_MASK
            | cap::NSSRS
            | cap::CSS_MASK
            | cap::BPS
            | cap::MPSMIN_MASK
            | cap::MPSMAX_MASK
            | cap::PMRS
            | cap::CMBS);
    // Bits 63:58 and 16:24's reserved part carry nothing that a 1.4 driver needs.
    (kept & 0x00ff_ffff_ffff_ffff) | entries | TIMEOUT << cap::TO_SHIFT | cap::CQR | cap::CSS_NVM
}

const HEAD: usize = 20;
const ENTRY: usize = 8;

impl NvmeDescription {
    /// The bytes for the fabric.
    pub fn encode(&self) -> Vec<u8> {
        let namespaces = self.namespaces.all();
        let mut out = Vec::with_capacity(HEAD + namespaces.len() * ENTRY);
        out.extend(self.cap.to_le_bytes());
        out.extend(self.vs.to_le_bytes());
        out.extend(self.max_transfer.to_le_bytes());
        out.extend(self.queue_pairs.to_le_bytes());
        out.extend((namespaces.len() as u16).to_le_bytes());
        for format in namespaces {
            out.extend(format.nsid.to_le_bytes());
            out.extend([format.block_shift, 0, 0, 0]);
        }
        out
    }

    /// Decodes and checks what a peer sent; `shadow_len` is the size of the buffer shadow in
    /// bytes, which no transfer may exceed.
    pub fn decode(bytes: &[u8], shadow_len: u32) -> Result<Self, BadDescription> {
        let mut fields = Fields(bytes);
        let description = Self {
            cap: guest_cap(u64::from_le_bytes(fields.take(bytes)?)),
            vs: u32::from_le_bytes(fields.take(bytes)?),
            max_transfer: u32::from_le_bytes(fields.take(bytes)?),
            queue_pairs: u16::from_le_bytes(fields.take(bytes)?),
            namespaces: Namespaces::default(),
        };
        let bad = |field, value| Err(BadDescription::Field { field, value });
        let max = description.max_transfer;
        if !max.is_power_of_two() || max < PAGE_SIZE as u32 || max > shadow_len {
            return bad("the largest transfer", max.into());
        }
        if max > 512 * PAGE_SIZE as u32 {
            return bad("the largest transfer", max.into());
        }
        let pairs = description.queue_pairs;
        if pairs == 0 || pairs > MAX_QUEUE_PAIRS {
            return bad("the number of queue pairs", pairs.into());
        }
        let count = usize::from(u16::from_le_bytes(fields.take(bytes)?));
        if count > MAX_NAMESPACES {
            return bad("the number of namespaces", count as u64);
        }
        if fields.0.len() != count * ENTRY {
            return Err(BadDescription::Length(bytes.len()));
        }
        let mut formats = Vec::with_capacity(count);
        for _ in 0..count {
            let nsid = u32::from_le_bytes(fields.take(bytes)?);
            let [block_shift, reserved @ ..] = fields.take::<4>(bytes)?;
            if !(9..=16).contains(&block_shift) {
                return bad("log2 of a block", block_shift.into());
            }
            if reserved != [0; 3] {
                return bad("a reserved field", u64::from(reserved[0]));
            }
            formats.push(NamespaceFormat { nsid, block_shift });
        }
        Ok(Self {
            namespaces: Namespaces::new(formats),
            ..description
        })
    }
}

/// The bytes not decoded yet.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self, whole: &[u8]) -> Result<[u8; N], BadDescription> {
        let (field, rest) = self
            .0
            .split_first_chunk::<N>()
            .ok_or(BadDescription::Length(whole.len()))?;
        self.0 = rest;
        Ok(*field)
    }
}
