//! `VFIO_USER_REGION_WRITE_MULTI`.

use crate::user::wire::WireError;

/// One of the writes in `VFIO_USER_REGION_WRITE_MULTI`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MultiWrite {
    /// Where in the region, in bytes.
    pub offset: u64,
    /// Which region.
    pub region: u32,
    /// How many bytes of `data` count: at most 8.
    pub count: u32,
    /// The data.
    pub data: [u8; 8],
}

impl MultiWrite {
    /// Length on the wire in bytes.
    pub const LEN: usize = 24;

    /// The bytes to write, or `None` when the count is beyond them.
    pub fn bytes(&self) -> Option<&[u8]> {
        self.data.get(..self.count as usize)
    }

    fn decode(bytes: &[u8; Self::LEN]) -> Self {
        let [
            o0,
            o1,
            o2,
            o3,
            o4,
            o5,
            o6,
            o7,
            r0,
            r1,
            r2,
            r3,
            c0,
            c1,
            c2,
            c3,
            data @ ..,
        ] = *bytes;
        Self {
            offset: u64::from_ne_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            region: u32::from_ne_bytes([r0, r1, r2, r3]),
            count: u32::from_ne_bytes([c0, c1, c2, c3]),
            data,
        }
    }
}

/// `VFIO_USER_REGION_WRITE_MULTI`: several writes, to be done in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteMulti<'a> {
    /// A whole number of writes.
    writes: &'a [u8],
}

impl<'a> WriteMulti<'a> {
    const NAME: &'static str = "REGION_WRITE_MULTI";

    /// Reads the body; each write's count is checked when it is taken.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, WireError> {
        let (count, rest) = bytes
            .split_first_chunk::<8>()
            .ok_or(WireError::BodyTooShort {
                what: Self::NAME,
                len: bytes.len(),
                need: 8,
            })?;
        let count = u64::from_ne_bytes(*count);
        let said = count.saturating_mul(MultiWrite::LEN as u64);
        if said != rest.len() as u64 {
            return Err(WireError::DataLength {
                what: Self::NAME,
                said,
                carried: rest.len(),
            });
        }
        Ok(Self { writes: rest })
    }

    /// How many writes there are.
    pub fn count(&self) -> usize {
        self.writes.len() / MultiWrite::LEN
    }

    /// The writes, in order.
    pub fn iter(&self) -> impl Iterator<Item = MultiWrite> + use<'a> {
        self.writes
            .chunks_exact(MultiWrite::LEN)
            .filter_map(|write| write.first_chunk())
            .map(MultiWrite::decode)
    }

    /// Writes a body.
    pub fn encode(writes: &[MultiWrite]) -> Vec<u8> {
        let mut bytes = (writes.len() as u64).to_ne_bytes().to_vec();
        for write in writes {
            bytes.extend_from_slice(&write.offset.to_ne_bytes());
            bytes.extend_from_slice(&write.region.to_ne_bytes());
            bytes.extend_from_slice(&write.count.to_ne_bytes());
            bytes.extend_from_slice(&write.data);
        }
        bytes
    }
}
