//! The peer's memory, as far as it has given out keys for it.

use crate::wire::RdmaKey;
use crate::{FabricError, RemoteSpan};

/// Keys that a peer may have alive: enough for a terabyte in pieces of 16 MiB.
const MAX_KEYS: usize = 64 * 1024;

/// Disjoint ranges, ascending by address.
#[derive(Debug, Default)]
pub(super) struct RemoteKeys(Vec<RdmaKey>);

impl RemoteKeys {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes what the peer says about one key.
    pub(super) fn update(&mut self, key: &RdmaKey) -> Result<(), FabricError> {
        let at = self.0.partition_point(|known| known.address < key.address);
        if !key.alive {
            // One that is not known was never used.
            if self
                .0
                .get(at)
                .is_some_and(|known| known.address == key.address)
            {
                self.0.remove(at);
            }
            return Ok(());
        }
        // `RdmaKey::check` has seen that the ends do not overflow.
        let end = |key: &RdmaKey| key.address + key.len;
        let before = at.checked_sub(1).and_then(|before| self.0.get(before));
        let overlaps = before.is_some_and(|before| end(before) > key.address)
            || self.0.get(at).is_some_and(|next| next.address < end(key));
        if overlaps || self.0.len() >= MAX_KEYS {
            return Err(FabricError::violation(format!(
                "a key for {:#x} bytes at {:#x} overlaps another, or is one too many",
                key.len, key.address
            )));
        }
        self.0.insert(at, *key);
        Ok(())
    }

    /// The key for the beginning of a span, and how many of its bytes it is good for.
    pub(super) fn resolve(&self, span: &RemoteSpan) -> Result<(u32, u32), FabricError> {
        let at = self.0.partition_point(|key| key.address <= span.address);
        let found = at.checked_sub(1).and_then(|at| self.0.get(at));
        match found {
            Some(key) if span.address - key.address < key.len => {
                let left = key.len - (span.address - key.address);
                Ok((key.key, left.min(span.len.into()) as u32))
            }
            _ => Err(FabricError::violation(format!(
                "there is no key for {} bytes at {:#x}",
                span.len, span.address
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(address: u64, len: u64, key: u32) -> RdmaKey {
        RdmaKey {
            address,
            len,
            key,
            alive: true,
        }
    }

    fn span(address: u64, len: u32) -> RemoteSpan {
        RemoteSpan { address, len }
    }

    #[test]
    fn spans_are_cut_where_keys_end() {
        let mut keys = RemoteKeys::default();
        keys.update(&key(0x2000, 0x1000, 2)).unwrap();
        keys.update(&key(0x1000, 0x1000, 1)).unwrap();
        assert_eq!(keys.resolve(&span(0x1800, 0x1000)).unwrap(), (1, 0x800));
        assert_eq!(keys.resolve(&span(0x2000, 0x800)).unwrap(), (2, 0x800));
        assert!(keys.resolve(&span(0x3000, 1)).is_err());
        assert!(keys.resolve(&span(0xfff, 1)).is_err());
    }

    #[test]
    fn overlapping_keys_are_refused() {
        let mut keys = RemoteKeys::default();
        keys.update(&key(0x1000, 0x1000, 1)).unwrap();
        for (address, len) in [(0x1000, 1), (0x1fff, 1), (0xfff, 2), (0, 0x4000)] {
            assert!(keys.update(&key(address, len, 9)).is_err());
        }
    }

    #[test]
    fn dead_keys_are_forgotten() {
        let mut keys = RemoteKeys::default();
        let mut one = key(0x1000, 0x1000, 1);
        keys.update(&one).unwrap();
        one.alive = false;
        keys.update(&one).unwrap();
        assert!(keys.is_empty());
        keys.update(&one).unwrap();
    }

    #[test]
    fn keys_are_bounded() {
        let mut keys = RemoteKeys::default();
        for n in 0..MAX_KEYS as u64 {
            keys.update(&key(n, 1, 0)).unwrap();
        }
        assert!(keys.update(&key(MAX_KEYS as u64, 1, 0)).is_err());
    }
}
