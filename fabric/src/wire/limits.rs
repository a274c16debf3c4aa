//! How much a claim may do in a second, as the claimant asks for it and as an operator sets it.

use super::WireError;
use super::codec::{Put, Reader};

/// Limits of one claim; 0 is no limit. Commands beyond a limit wait, they do not fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// I/O commands in a second.
    pub iops: u64,
    /// Commands that may come at once after a while without; 0 is what a tenth of a second brings.
    pub iops_burst: u64,
    /// Bytes read and written in a second.
    pub bytes_per_second: u64,
    /// Bytes that may come at once after a while without; 0 is what a tenth of a second brings.
    pub bytes_burst: u64,
}

impl RateLimits {
    /// No limits.
    pub const NONE: Self = Self {
        iops: 0,
        iops_burst: 0,
        bytes_per_second: 0,
        bytes_burst: 0,
    };

    /// Whether nothing is limited.
    pub fn is_none(&self) -> bool {
        self.iops == 0 && self.bytes_per_second == 0
    }

    /// What keeps to both.
    #[must_use]
    pub fn lower_of(self, other: Self) -> Self {
        let lower = |a: u64, b: u64| match (a, b) {
            (0, limit) | (limit, 0) => limit,
            (a, b) => a.min(b),
        };
        // A rate without a burst has one of a tenth of a second, which the other side cannot raise.
        let burst = |a: (u64, u64), b: (u64, u64)| {
            let real = |(rate, burst): (u64, u64)| match (rate, burst) {
                (1.., 0) => (rate / 10).max(1),
                (_, burst) => burst,
            };
            match (a.1, b.1) {
                (0, 0) => 0,
                _ => lower(real(a), real(b)),
            }
        };
        Self {
            iops: lower(self.iops, other.iops),
            iops_burst: burst((self.iops, self.iops_burst), (other.iops, other.iops_burst)),
            bytes_per_second: lower(self.bytes_per_second, other.bytes_per_second),
            bytes_burst: burst(
                (self.bytes_per_second, self.bytes_burst),
                (other.bytes_per_second, other.bytes_burst),
            ),
        }
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.iops);
        out.put_u64(self.iops_burst);
        out.put_u64(self.bytes_per_second);
        out.put_u64(self.bytes_burst);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            iops: reader.u64()?,
            iops_burst: reader.u64()?,
            bytes_per_second: reader.u64()?,
            bytes_burst: reader.u64()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lower_of_two_limits_holds_and_one_of_nothing_is_none() {
        let mine = RateLimits {
            iops: 100,
            bytes_burst: 7,
            ..RateLimits::NONE
        };
        let theirs = RateLimits {
            iops: 50,
            bytes_per_second: 4096,
            ..RateLimits::NONE
        };
        let both = RateLimits {
            iops: 50,
            iops_burst: 0,
            bytes_per_second: 4096,
            bytes_burst: 7,
        };
        assert_eq!(mine.lower_of(theirs), both);
        assert_eq!(theirs.lower_of(mine), both);
        assert_eq!(mine.lower_of(RateLimits::NONE), mine);
        assert!(RateLimits::NONE.is_none() && !both.is_none());
        let greedy = RateLimits {
            iops_burst: u64::MAX,
            bytes_burst: u64::MAX,
            ..RateLimits::NONE
        };
        let held = theirs.lower_of(greedy);
        assert_eq!((held.iops_burst, held.bytes_burst), (5, 409));
    }
}
