//! The messages about translations, in both directions: `struct vhost_iotlb_msg`, in the host's
//! byte order. I/O virtual address u64, size u64, user address u64, access u8, kind u8, padding.

#![forbid(unsafe_code)]

use vm_memory::Permissions;

/// Bytes of a message's body.
pub const LEN: usize = 32;

const MISS: u8 = 1;
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;

/// What a VMM says of translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// `first..=last` is mapped to `user` and what follows.
    Update {
        /// The first address.
        first: u64,
        /// The last address.
        last: u64,
        /// Where in the VMM's own memory.
        user: u64,
        /// What the device may do there.
        access: Permissions,
    },
    /// `first..=last` is to be asked for again.
    Invalidate {
        /// The first address.
        first: u64,
        /// The last address.
        last: u64,
    },
}

/// A message that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadMessage {
    /// It has another length.
    #[error("a message of {0} bytes about translations, which have {LEN}")]
    Length(usize),
    /// It is of a kind that no VMM sends.
    #[error("a message of kind {0} about translations")]
    Kind(u8),
    /// What it maps cannot be.
    #[error("a mapping of {size:#x} bytes at {first:#x}, access {access}")]
    Range {
        /// The first address.
        first: u64,
        /// How many there are.
        size: u64,
        /// What the device could do there.
        access: u8,
    },
}

/// Decodes what a VMM says.
pub fn decode(body: &[u8]) -> Result<Said, BadMessage> {
    let body: &[u8; LEN] = body
        .try_into()
        .map_err(|_| BadMessage::Length(body.len()))?;
    let word = |at: usize| {
        let bytes = body.get(at..at + 8).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u64::from_ne_bytes)
    };
    let (first, size, user, [access, kind]) = (word(0), word(8), word(16), [body[24], body[25]]);
    match kind {
        UPDATE => {
            let bad = BadMessage::Range {
                first,
                size,
                access,
            };
            let more = size.checked_sub(1).ok_or(bad)?;
            user.checked_add(more).ok_or(bad)?;
            Ok(Said::Update {
                first,
                last: first.checked_add(more).ok_or(bad)?,
                user,
                access: match access {
                    1 => Permissions::Read,
                    2 => Permissions::Write,
                    3 => Permissions::ReadWrite,
                    _ => return Err(bad),
                },
            })
        }
        // All addresses are one more than the size can say, so that none stands for all: QEMU's
        // sum overflows to that. More than was meant may always be asked for again.
        INVALIDATE if size == 0 => Ok(Said::Invalidate {
            first: 0,
            last: u64::MAX,
        }),
        INVALIDATE => Ok(Said::Invalidate {
            first,
            last: first.saturating_add(size - 1),
        }),
        other => Err(BadMessage::Kind(other)),
    }
}

/// A question for a translation.
pub fn miss(address: u64, access: Permissions) -> [u8; LEN] {
    let mut body = [0; LEN];
    for (to, from) in body.iter_mut().zip(address.to_ne_bytes()) {
        *to = from;
    }
    [body[24], body[25]] = [access as u8, MISS];
    body
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn body(first: u64, size: u64, user: u64, access: u8, kind: u8) -> Vec<u8> {
        let words = [first, size, user].map(u64::to_ne_bytes).concat();
        [words, vec![access, kind], vec![0; 6]].concat()
    }

    #[test]
    fn mappings_and_invalidations_are_understood() {
        assert_eq!(
            decode(&body(0x1000, 0x2000, 0x7000, 3, 2)),
            Ok(Said::Update {
                first: 0x1000,
                last: 0x2fff,
                user: 0x7000,
                access: Permissions::ReadWrite
            })
        );
        let invalidate = |first, last| Ok(Said::Invalidate { first, last });
        assert_eq!(
            decode(&body(0x1000, 1, 0, 0, 3)),
            invalidate(0x1000, 0x1000)
        );
        assert_eq!(decode(&body(0, 0, 0, 0, 3)), invalidate(0, u64::MAX));
        assert_eq!(
            decode(&body(0xfef0_0000, 0u64.wrapping_sub(0xfef0_0000), 0, 0, 3)),
            invalidate(0xfef0_0000, u64::MAX)
        );
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (first, size, user, access) in [
            (0, 0, 0, 3),
            (0, 1, 0, 0),
            (0, 1, 0, 4),
            (u64::MAX, 2, 0, 3),
            (0, 2, u64::MAX, 3),
        ] {
            let refused = decode(&body(first, size, user, access, 2));
            assert!(matches!(refused, Err(BadMessage::Range { .. })));
        }
        for kind in [0, 1, 4, 5, 6, 255] {
            assert_eq!(decode(&body(0, 1, 0, 3, kind)), Err(BadMessage::Kind(kind)));
        }
        assert_eq!(decode(&[0; 26]), Err(BadMessage::Length(26)));
        assert_eq!(
            decode(&miss(1, Permissions::Read)),
            Err(BadMessage::Kind(1))
        );
    }

    proptest! {
        #[test]
        fn whatever_is_understood_is_a_range(bytes in prop::collection::vec(any::<u8>(), 0..40), kind in 0u8..7) {
            let mut bytes = bytes;
            if let Some(place) = bytes.get_mut(25) {
                *place = kind;
            }
            match decode(&bytes) {
                Ok(Said::Update { first, last, user, .. }) => {
                    prop_assert!(first <= last && user.checked_add(last - first).is_some());
                }
                Ok(Said::Invalidate { first, last }) => prop_assert!(first <= last),
                Err(error) => prop_assert!(!error.to_string().is_empty()),
            }
        }
    }
}
