//! Reading fields out of bytes, and putting them in.

use super::WireError;

/// Takes fields off the front of a byte slice. `what` names the message in errors.
pub(super) struct Reader<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Reader { what, rest: bytes }
    }

    fn truncated(&self, need: usize) -> WireError {
        WireError::Truncated {
            what: self.what,
            need,
            have: self.rest.len(),
        }
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], WireError> {
        let (array, rest) = self
            .rest
            .split_first_chunk()
            .ok_or_else(|| self.truncated(N))?;
        self.rest = rest;
        Ok(array)
    }

    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (bytes, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or_else(|| self.truncated(len))?;
        self.rest = rest;
        Ok(bytes)
    }

    pub(super) fn u8(&mut self) -> Result<u8, WireError> {
        Ok(u8::from_le_bytes(*self.array()?))
    }

    pub(super) fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(*self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(*self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(*self.array()?))
    }

    /// Takes `N` bytes (at most 8) that have to be zero.
    pub(super) fn reserved<const N: usize>(&mut self) -> Result<(), WireError> {
        let value = self
            .array::<N>()?
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte));
        if value != 0 {
            return Err(WireError::Reserved {
                what: self.what,
                value,
            });
        }
        Ok(())
    }

    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Ends the message: nothing may be left.
    pub(super) fn end(self) -> Result<(), WireError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(WireError::Trailing {
            what: self.what,
            extra: self.rest.len(),
        })
    }
}

/// Appends fields to a buffer.
pub(super) trait Put {
    fn put_u8(&mut self, value: u8);
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
    fn put_bytes(&mut self, bytes: &[u8]);
}

impl Put for Vec<u8> {
    fn put_u8(&mut self, value: u8) {
        self.push(value);
    }

    fn put_u16(&mut self, value: u16) {
        self.put_bytes(&value.to_le_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.put_bytes(&value.to_le_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.put_bytes(&value.to_le_bytes());
    }

    fn put_bytes(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// Fails unless `value` is in `min..=max`.
pub(super) fn in_range(
    what: &'static str,
    value: impl TryInto<u64>,
    min: u64,
    max: u64,
) -> Result<(), WireError> {
    // A value too large for u64 is too large for any range.
    let value = value.try_into().unwrap_or(u64::MAX);
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(WireError::OutOfRange {
        what,
        value,
        min,
        max,
    })
}

/// Fails if `len` bytes at `offset` reach past `limit`.
pub(super) fn within(
    what: &'static str,
    offset: u64,
    len: u64,
    limit: u64,
) -> Result<(), WireError> {
    if offset.checked_add(len).is_some_and(|end| end <= limit) {
        return Ok(());
    }
    Err(WireError::Range {
        what,
        offset,
        len,
        limit,
    })
}
