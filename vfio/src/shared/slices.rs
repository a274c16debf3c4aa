//! Which part of a drive a portion gets, as an operator says it and as blocks.

use super::check::{Bounds, optional};
use crate::driver::DriverError;
use crate::function::FunctionError;

/// A part of a drive as an operator says it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SliceSpec {
    /// Its name, which differs from that of every other slice of the drive.
    pub name: String,
    /// The namespace that it is of, or the first one.
    pub namespace: Option<u32>,
    /// Where it begins there, in bytes.
    pub offset: u64,
    /// How long it is in bytes; without, it goes to the end of the namespace.
    pub size: Option<u64>,
    /// It may have blocks in common with others that may, too: for those who know how to share
    /// them.
    pub overlap: bool,
}

/// Why a drive cannot be shared as it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    /// The controller cannot be driven.
    #[error("the controller that is to be shared cannot be brought up")]
    Driver(#[from] DriverError),
    /// The function refused.
    #[error(transparent)]
    Function(#[from] FunctionError),
    /// No slices.
    #[error("no slices are given, so there is nothing to share")]
    NoSlices,
    /// A namespace that does not exist, or cannot be used.
    #[error(
        "slice {slice} is of namespace {namespace}, which the drive does not have, or which has metadata; it has {have}"
    )]
    NoNamespace {
        /// The slice.
        slice: String,
        /// What it asks for.
        namespace: u32,
        /// Those that can be used.
        have: String,
    },
    /// A number that is not of whole blocks.
    #[error(
        "slice {slice}: {what} {value} is not a multiple of the drive's block size, {block} bytes"
    )]
    Misaligned {
        /// The slice.
        slice: String,
        /// Its offset or its size.
        what: &'static str,
        /// As it is given, in bytes.
        value: u64,
        /// Bytes of a block.
        block: u64,
    },
    /// It does not fit.
    #[error(
        "slice {slice} begins at {offset} and has {size} bytes, but namespace {namespace} has {capacity}; \
         make it smaller, or begin it earlier"
    )]
    OutOfBounds {
        /// The slice.
        slice: String,
        /// Where it begins, in bytes.
        offset: u64,
        /// Its size in bytes.
        size: u64,
        /// The namespace.
        namespace: u32,
        /// The namespace's size in bytes.
        capacity: u64,
    },
    /// Two have blocks in common.
    #[error(
        "slices {first} and {second} have blocks in common; move one of them, or give overlap=yes to both \
         if their users know how to share them"
    )]
    Overlap {
        /// The one.
        first: String,
        /// The other.
        second: String,
    },
    /// More than there are queues for.
    #[error(
        "{slices} slices need a queue pair and an interrupt each, but the drive has {pairs} to give \
         away; make fewer slices"
    )]
    TooMany {
        /// How many slices.
        slices: usize,
        /// For how many there is enough.
        pairs: u16,
    },
    /// The function's address space is too small.
    #[error("the function's IOVA ranges have no room for {0} claims")]
    NoIova(usize),
    /// The drive is being closed.
    #[error("the drive is being closed: {0}")]
    Gone(String),
    /// Someone has it.
    #[error("slice {0} is still open")]
    Taken(String),
}

/// A namespace of the drive that is to be shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Namespace {
    pub(super) nsid: u32,
    pub(super) blocks: u64,
    pub(super) block_shift: u8,
    /// Its Identify data.
    pub(super) page: Vec<u8>,
}

impl Namespace {
    /// From its Identify data (NVMe 1.4 §5.15.2.1, figure 245); none if it has metadata.
    pub(super) fn from_page(nsid: u32, page: Vec<u8>) -> Option<Self> {
        let blocks = u64::from_le_bytes(*page.first_chunk()?);
        let at = 128 + usize::from(page.get(26)? & 0xf) * 4;
        let &[low, high, block_shift, _] = page.get(at..at + 4)? else {
            return None;
        };
        let usable = (9..=16).contains(&block_shift)
            && [low, high] == [0; 2]
            && blocks.checked_shl(block_shift.into())? >> block_shift == blocks;
        usable.then_some(Self {
            nsid,
            blocks,
            block_shift,
            page,
        })
    }
}

/// Turns what the operator says into blocks.
pub(super) fn plan(
    specs: &[SliceSpec],
    namespaces: &[Namespace],
    max_transfer: u32,
    oncs: u16,
) -> Result<Vec<Bounds>, SharedError> {
    if specs.is_empty() {
        return Err(SharedError::NoSlices);
    }
    let mut planned: Vec<Bounds> = Vec::with_capacity(specs.len());
    for (n, spec) in specs.iter().enumerate() {
        let bounds = plan_one(spec, namespaces, max_transfer, oncs)?;
        for (other, before) in specs.iter().zip(&planned).take(n) {
            let apart = before.nsid != bounds.nsid
                || before.first >= bounds.first + bounds.blocks
                || bounds.first >= before.first + before.blocks;
            if !(apart || spec.overlap && other.overlap) {
                return Err(SharedError::Overlap {
                    first: other.name.clone(),
                    second: spec.name.clone(),
                });
            }
        }
        planned.push(bounds);
    }
    Ok(planned)
}

fn plan_one(
    spec: &SliceSpec,
    namespaces: &[Namespace],
    max_transfer: u32,
    oncs: u16,
) -> Result<Bounds, SharedError> {
    let found = match spec.namespace {
        Some(nsid) => namespaces.iter().find(|found| found.nsid == nsid),
        None => namespaces.first(),
    };
    let namespace = found.ok_or_else(|| {
        let have: Vec<String> = namespaces.iter().map(|n| n.nsid.to_string()).collect();
        SharedError::NoNamespace {
            slice: spec.name.clone(),
            namespace: spec.namespace.unwrap_or(1),
            have: if have.is_empty() {
                "none".into()
            } else {
                have.join(", ")
            },
        }
    })?;
    let block = 1u64 << namespace.block_shift;
    let capacity = namespace.blocks << namespace.block_shift;
    let size = spec.size.unwrap_or(capacity.saturating_sub(spec.offset));
    for (what, value) in [("offset", spec.offset), ("size", size)] {
        if value % block != 0 {
            return Err(SharedError::Misaligned {
                slice: spec.name.clone(),
                what,
                value,
                block,
            });
        }
    }
    let fits = spec
        .offset
        .checked_add(size)
        .is_some_and(|end| end <= capacity);
    if !fits || size == 0 {
        return Err(SharedError::OutOfBounds {
            slice: spec.name.clone(),
            offset: spec.offset,
            size,
            namespace: namespace.nsid,
            capacity,
        });
    }
    Ok(Bounds {
        nsid: namespace.nsid,
        first: spec.offset >> namespace.block_shift,
        blocks: size >> namespace.block_shift,
        block_shift: namespace.block_shift,
        max_transfer,
        optional: oncs & optional::PASSED_ON,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(nsid: u32, blocks: u64) -> Namespace {
        Namespace {
            nsid,
            blocks,
            block_shift: 12,
            page: Vec::new(),
        }
    }

    fn slice(name: &str, offset: u64, size: u64) -> SliceSpec {
        SliceSpec {
            name: name.into(),
            offset,
            size: Some(size),
            ..SliceSpec::default()
        }
    }

    fn planned(specs: &[SliceSpec]) -> Result<Vec<Bounds>, SharedError> {
        plan(
            specs,
            &[namespace(1, 100), namespace(7, 10)],
            1 << 20,
            0xffff,
        )
    }

    #[test]
    fn slices_become_blocks_of_their_namespaces() {
        let rest = SliceSpec {
            name: "c".into(),
            namespace: Some(7),
            offset: 4096,
            ..SliceSpec::default()
        };
        let bounds = planned(&[slice("a", 0, 40960), slice("b", 40960, 4096), rest]).unwrap();
        let places: Vec<_> = bounds.iter().map(|b| (b.nsid, b.first, b.blocks)).collect();
        assert_eq!(places, [(1, 0, 10), (1, 10, 1), (7, 1, 9)]);
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_values() {
        let refused = |specs: &[SliceSpec]| planned(specs).unwrap_err().to_string();
        assert!(refused(&[slice("a", 512, 4096)]).contains("offset 512"));
        assert!(refused(&[slice("a", 0, 4097)]).contains("size 4097"));
        assert!(refused(&[slice("a", 0, 101 * 4096)]).contains("has 409600"));
        assert!(refused(&[slice("a", u64::MAX - 4095, 4096)]).contains("begins at"));
        assert!(refused(&[slice("a", 0, 0)]).contains("has 0 bytes"));
        assert!(refused(&[slice("a", 0, 8192), slice("b", 4096, 8192)]).contains("a and b"));
        let absent = SliceSpec {
            namespace: Some(2),
            ..slice("a", 0, 4096)
        };
        assert!(refused(&[absent]).contains("it has 1, 7"));
        assert!(refused(&[]).contains("no slices"));
    }

    #[test]
    fn blocks_are_common_only_to_those_that_both_want_it() {
        let common = SliceSpec {
            overlap: true,
            ..slice("a", 0, 8192)
        };
        let other = SliceSpec {
            name: "b".into(),
            ..common.clone()
        };
        assert!(planned(&[common.clone(), other.clone()]).is_ok());
        let third = SliceSpec {
            name: "c".into(),
            overlap: false,
            ..common.clone()
        };
        assert!(planned(&[common, third]).is_err());
    }

    #[test]
    fn a_namespace_with_metadata_is_none_to_share() {
        let mut page = vec![0; 4096];
        page[0] = 100;
        page[128..132].copy_from_slice(&[0, 0, 12, 0]);
        assert_eq!(Namespace::from_page(1, page.clone()).unwrap().blocks, 100);
        page[128] = 8;
        assert!(Namespace::from_page(1, page).is_none());
    }
}
