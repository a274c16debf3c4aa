//! Protocol versions: each change of the wire is one documented variant.
//!
//! Rules: a released version never changes. `Hello`, `Welcome` and `Refused`, and the header
//! they travel in, are the same in all versions, since they are spoken before one is agreed.

/// A version of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
pub enum ProtocolVersion {
    /// The first: set-up, registers, commands with data, interrupts, reset, release.
    V1 = 1,
    /// Adds the choice of RDMA after a claim, and keys of memory: `RdmaOffer`, `RdmaAnswer`,
    /// `RdmaChoice` and `RdmaKeys`.
    V2 = 2,
    /// Adds what pools and shared drives need: `List` and `Listing`, `ClaimWith`; see docs/protocol.md.
    V3 = 3,
}

/// The oldest version that this code speaks.
pub const OLDEST: ProtocolVersion = ProtocolVersion::V1;
/// The newest version that this code speaks.
pub const NEWEST: ProtocolVersion = ProtocolVersion::V3;

impl ProtocolVersion {
    /// The version with this number, if this code speaks it.
    pub fn from_number(number: u16) -> Option<Self> {
        match number {
            1 => Some(ProtocolVersion::V1),
            2 => Some(ProtocolVersion::V2),
            3 => Some(ProtocolVersion::V3),
            _ => None,
        }
    }

    /// The version's number on the wire.
    pub fn number(self) -> u16 {
        self as u16
    }
}

/// The newest version that both this code and a peer with the given range speak.
pub fn negotiate(oldest: u16, newest: u16) -> Option<ProtocolVersion> {
    let common = newest.min(NEWEST.number());
    if common < oldest.max(OLDEST.number()) {
        return None;
    }
    ProtocolVersion::from_number(common)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_common_version_is_chosen() {
        assert_eq!(negotiate(1, 1), Some(ProtocolVersion::V1));
        assert_eq!(negotiate(1, 2), Some(ProtocolVersion::V2));
        assert_eq!(negotiate(0, u16::MAX), Some(ProtocolVersion::V3));
    }

    #[test]
    fn ranges_that_do_not_meet_have_no_version() {
        assert_eq!(negotiate(4, 9), None);
        assert_eq!(negotiate(0, 0), None);
        assert_eq!(negotiate(5, 1), None);
    }
}
