//! What two sides tell each other so that each can write into the other's memory.

use super::WireError;
use super::codec::{Put, Reader, in_range, within};

/// One end of an RDMA connection: a queue pair, and the ring that its messages land in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RdmaEndpoint {
    /// Address of the port.
    pub gid: [u8; 16],
    /// Local identifier of the port; 0 on Ethernet.
    pub lid: u16,
    /// Largest packet that the port takes, in bytes: a power of two, 256 to 4096.
    pub mtu: u16,
    /// The queue pair: 24 bits.
    pub queue_pair: u32,
    /// Where its numbering of packets begins: 24 bits.
    pub first_packet: u32,
    /// Where the ring begins, as a write names it.
    pub ring_address: u64,
    /// Length of the ring in bytes: a power of two.
    pub ring_len: u32,
    /// The ring's key.
    pub ring_key: u32,
    /// Messages that may be in the ring at a time.
    pub slots: u16,
}

impl RdmaEndpoint {
    /// Least length of a ring: several of the longest messages.
    pub const MIN_RING: u32 = 256 * 1024;
    /// Greatest length of a ring.
    pub const MAX_RING: u32 = 16 * 1024 * 1024;
    /// Fewest messages of a ring.
    pub const MIN_SLOTS: u16 = 256;

    pub(super) fn check(&self) -> Result<(), WireError> {
        const MAX_24: u64 = 0xff_ffff;
        in_range("the number of a queue pair", self.queue_pair, 0, MAX_24)?;
        in_range("the number of a packet", self.first_packet, 0, MAX_24)?;
        in_range("the largest packet", self.mtu, 256, 4096)?;
        power_of_two("the largest packet", self.mtu.into())?;
        in_range(
            "the length of a message ring",
            self.ring_len,
            Self::MIN_RING.into(),
            Self::MAX_RING.into(),
        )?;
        power_of_two("the length of a message ring", self.ring_len)?;
        within(
            "a message ring",
            self.ring_address,
            self.ring_len.into(),
            u64::MAX,
        )?;
        in_range(
            "the number of a ring's messages",
            self.slots,
            Self::MIN_SLOTS.into(),
            u16::MAX.into(),
        )
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_bytes(&self.gid);
        out.put_u16(self.lid);
        out.put_u16(self.mtu);
        out.put_u32(self.queue_pair);
        out.put_u32(self.first_packet);
        out.put_u32(self.ring_len);
        out.put_u64(self.ring_address);
        out.put_u32(self.ring_key);
        out.put_u16(self.slots);
        out.put_u16(0);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let gid = *reader.array()?;
        let lid = reader.u16()?;
        let mtu = reader.u16()?;
        let queue_pair = reader.u32()?;
        let first_packet = reader.u32()?;
        let ring_len = reader.u32()?;
        let ring_address = reader.u64()?;
        let ring_key = reader.u32()?;
        let slots = reader.u16()?;
        reader.reserved::<2>()?;
        Ok(RdmaEndpoint {
            gid,
            lid,
            mtu,
            queue_pair,
            first_packet,
            ring_address,
            ring_len,
            ring_key,
            slots,
        })
    }
}

/// A range of the sender's memory that the receiver may write to, or no longer may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RdmaKey {
    /// Where the range begins, as segments and writes name it.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
    /// The key to write with.
    pub key: u32,
    /// False when the key is dead from here on.
    pub alive: bool,
}

impl RdmaKey {
    /// Most keys of one message.
    pub const MAX: usize = 1024;
    /// Length of a key in bytes.
    pub(super) const LEN: usize = 24;

    pub(super) fn check(&self) -> Result<(), WireError> {
        in_range("the length of memory", self.len, 1, u64::MAX)?;
        within("memory with a key", self.address, self.len, u64::MAX)
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.address);
        out.put_u64(self.len);
        out.put_u32(self.key);
        out.put_u32(self.alive.into());
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let address = reader.u64()?;
        let len = reader.u64()?;
        let key = reader.u32()?;
        let alive = reader.u32()?;
        in_range("the state of a key", alive, 0, 1)?;
        Ok(RdmaKey {
            address,
            len,
            key,
            alive: alive == 1,
        })
    }
}

fn power_of_two(what: &'static str, value: u32) -> Result<(), WireError> {
    if value.is_power_of_two() {
        return Ok(());
    }
    Err(WireError::NoPowerOfTwo { what, value })
}
