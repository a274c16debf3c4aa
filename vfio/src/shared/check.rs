//! What a portion's I/O command may say: the one place that decides which blocks are reached.
//!
//! A command is not passed on as it came. A new one is made of what is known to be harmless, with the
//! drive's namespace and block addresses, so that a field that nobody here knows cannot reach
//! anything.

use crate::nvme::{Status, SubmissionEntry, nvm};

/// The namespace id that means all namespaces.
const ALL_NAMESPACES: u32 = 0xffff_ffff;
/// The one namespace of a portion.
pub(super) const NSID: u32 = 1;

/// Dword 12 of a command about blocks: their number, deallocate, force unit access, limited retry.
/// Not: protection information, which needs metadata, and directives, which have ids of the
/// whole drive.
const CONTROL: u32 = 0xffff | 1 << 25 | 1 << 30 | 1 << 31;
/// Dword 13: hints about how the data is used.
const HINTS: u32 = 0xff;
/// Dword 11 of Dataset Management: its three attributes.
const ATTRIBUTES: u32 = 0b111;

/// Bits of Identify Controller's ONCS (NVMe 1.4 §5.15.2.2).
pub(super) mod optional {
    pub(crate) const COMPARE: u16 = 1;
    pub(crate) const WRITE_UNCORRECTABLE: u16 = 1 << 1;
    pub(crate) const DATASET_MANAGEMENT: u16 = 1 << 2;
    pub(crate) const WRITE_ZEROES: u16 = 1 << 3;
    pub(crate) const VERIFY: u16 = 1 << 7;
    /// Those that a portion passes on.
    pub(crate) const PASSED_ON: u16 =
        COMPARE | WRITE_UNCORRECTABLE | DATASET_MANAGEMENT | WRITE_ZEROES | VERIFY;
}

/// What a portion has of its drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The drive's namespace that the slice is of.
    pub nsid: u32,
    /// Its first block there.
    pub first: u64,
    /// How many blocks it has; `first + blocks` is no more than the namespace has.
    pub blocks: u64,
    /// Log2 of a block's bytes.
    pub block_shift: u8,
    /// Largest transfer in bytes.
    pub max_transfer: u32,
    /// The optional commands that the drive has, as in Identify Controller's ONCS.
    pub optional: u16,
}

/// The data of a checked command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// None.
    None,
    /// So many bytes of memory, which the drive reads.
    ToDevice(u32),
    /// So many bytes of memory, which the drive writes.
    FromDevice(u32),
    /// So many ranges in memory, each of which is still to be checked by [`check_range`].
    Ranges(u32),
}

impl Data {
    /// Bytes that the drive transfers, from or to its medium.
    pub(super) fn transferred(self) -> u32 {
        match self {
            Self::None | Self::Ranges(_) => 0,
            Self::ToDevice(len) | Self::FromDevice(len) => len,
        }
    }
}

/// A command as the drive may have it, but for its identifier and where its data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checked {
    /// The command.
    pub entry: SubmissionEntry,
    /// Its data.
    pub data: Data,
    /// Bytes of the medium that it is about, but for Dataset Management's: what it counts for.
    pub work: u32,
}

/// Checks an I/O command of a portion, and translates it to one of the drive.
pub fn check(bounds: &Bounds, command: &SubmissionEntry) -> Result<Checked, Status> {
    if command.fuse() != 0 || command.psdt() != 0 {
        return Err(Status::INVALID_FIELD);
    }
    let opcode = command.opcode();
    let needed = match opcode {
        nvm::FLUSH | nvm::READ | nvm::WRITE => 0,
        nvm::COMPARE => optional::COMPARE,
        nvm::WRITE_UNCORRECTABLE => optional::WRITE_UNCORRECTABLE,
        nvm::DATASET_MANAGEMENT => optional::DATASET_MANAGEMENT,
        nvm::WRITE_ZEROES => optional::WRITE_ZEROES,
        nvm::VERIFY => optional::VERIFY,
        _ => return Err(Status::INVALID_OPCODE),
    };
    if bounds.optional & needed != needed {
        return Err(Status::INVALID_OPCODE);
    }
    let all = command.nsid() == ALL_NAMESPACES && opcode == nvm::FLUSH;
    if command.nsid() != NSID && !all {
        return Err(Status::INVALID_NAMESPACE);
    }
    let mut entry = SubmissionEntry::new(opcode);
    entry.set_nsid(bounds.nsid);
    let mut untransferred = 0;
    let data = match opcode {
        nvm::FLUSH => Data::None,
        nvm::DATASET_MANAGEMENT => {
            let count = command.dword(10) & 0xff;
            entry.set_dword(10, count);
            entry.set_dword(11, command.dword(11) & ATTRIBUTES);
            Data::Ranges(count + 1)
        }
        _ => {
            let blocks = command.blocks();
            entry.set_slba(translate(bounds, command.slba(), blocks)?);
            entry.set_dword(12, command.dword(12) & CONTROL);
            match opcode {
                nvm::READ => Data::FromDevice(transfer(bounds, blocks)?),
                nvm::WRITE | nvm::COMPARE => Data::ToDevice(transfer(bounds, blocks)?),
                _ => {
                    let bytes = u64::from(blocks) << bounds.block_shift;
                    untransferred = u32::try_from(bytes).unwrap_or(u32::MAX);
                    Data::None
                }
            }
        }
    };
    if matches!(opcode, nvm::READ | nvm::WRITE) {
        entry.set_dword(13, command.dword(13) & HINTS);
    }
    let work = data.transferred().max(untransferred);
    Ok(Checked { entry, data, work })
}

/// Checks a range of Dataset Management (NVMe 1.4 §6.7: attributes, number of blocks, first
/// block), and translates it to one of the drive.
pub fn check_range(bounds: &Bounds, range: [u8; 16]) -> Result<[u8; 16], Status> {
    let [a, b, c, d, n0, n1, n2, n3, lba @ ..] = range;
    let blocks = u32::from_le_bytes([n0, n1, n2, n3]);
    let lba = translate(bounds, u64::from_le_bytes(lba), blocks)?;
    let mut translated = [a, b, c, d, n0, n1, n2, n3, 0, 0, 0, 0, 0, 0, 0, 0];
    translated[8..].copy_from_slice(&lba.to_le_bytes());
    Ok(translated)
}

/// Where blocks of the slice are in the drive's namespace.
fn translate(bounds: &Bounds, lba: u64, blocks: u32) -> Result<u64, Status> {
    match lba.checked_add(blocks.into()) {
        Some(end) if end <= bounds.blocks => bounds
            .first
            .checked_add(lba)
            .ok_or(Status::LBA_OUT_OF_RANGE),
        _ => Err(Status::LBA_OUT_OF_RANGE),
    }
}

fn transfer(bounds: &Bounds, blocks: u32) -> Result<u32, Status> {
    u32::try_from(u64::from(blocks) << bounds.block_shift)
        .ok()
        .filter(|len| *len <= bounds.max_transfer)
        .ok_or(Status::INVALID_FIELD)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bounds(first: u64, blocks: u64) -> Bounds {
        Bounds {
            nsid: 3,
            first,
            blocks,
            block_shift: 9,
            max_transfer: 1 << 20,
            optional: optional::PASSED_ON,
        }
    }

    fn any_command() -> impl Strategy<Value = SubmissionEntry> {
        // Mostly commands that exist, near the end of the slice.
        let opcode = prop_oneof![3 => 0u8..0x10, 1 => any::<u8>()];
        let lba = prop_oneof![4 => 0u64..70_000, 1 => any::<u64>()];
        let nsid = prop_oneof![4 => Just(1u32), 1 => any::<u32>()];
        (
            any::<[u8; 32]>(),
            any::<[u8; 32]>(),
            opcode,
            lba,
            nsid,
            any::<bool>(),
        )
            .prop_map(|(low, high, opcode, lba, nsid, plain)| {
                let mut bytes = [0; 64];
                bytes[..32].copy_from_slice(&low);
                bytes[32..].copy_from_slice(&high);
                let mut entry = SubmissionEntry(bytes);
                entry.0[0] = opcode;
                if plain {
                    entry.clear_flags();
                }
                entry.set_nsid(nsid);
                entry.set_slba(lba);
                entry
            })
    }

    proptest! {
        #[test]
        fn no_command_reaches_outside_of_its_slice(
            command in any_command(),
            first in 0u64..1 << 40,
            blocks in 1u64..66_000,
        ) {
            let bounds = bounds(first, blocks);
            if let Ok(Checked { entry, data, .. }) = check(&bounds, &command) {
                prop_assert_eq!(entry.nsid(), bounds.nsid);
                prop_assert_eq!(entry.psdt() | entry.fuse(), 0);
                prop_assert_eq!((entry.mptr(), entry.prp1(), entry.prp2()), (0, 0, 0));
                prop_assert!(data.transferred() <= bounds.max_transfer);
                let about_blocks = !matches!(entry.opcode(), nvm::FLUSH | nvm::DATASET_MANAGEMENT);
                if about_blocks {
                    prop_assert!(entry.slba() >= first);
                    prop_assert!(entry.slba() + u64::from(entry.blocks()) <= first + blocks);
                    prop_assert_eq!(entry.slba() - first, command.slba());
                }
            }
        }

        #[test]
        fn no_range_reaches_outside_of_its_slice(
            range: [u8; 16],
            near in proptest::option::of(0u64..70_000),
            len in proptest::option::of(0u32..70_000),
            first in 0u64..1 << 40,
            blocks in 1u64..66_000,
        ) {
            let mut range = range;
            if let Some(lba) = near {
                range[8..].copy_from_slice(&lba.to_le_bytes());
            }
            if let Some(len) = len {
                range[4..8].copy_from_slice(&len.to_le_bytes());
            }
            if let Ok(translated) = check_range(&bounds(first, blocks), range) {
                let len = u64::from(u32::from_le_bytes(translated[4..8].try_into().unwrap()));
                let lba = u64::from_le_bytes(translated[8..].try_into().unwrap());
                prop_assert!(lba >= first && lba + len <= first + blocks);
                prop_assert_eq!(&translated[..8], &range[..8]);
            }
        }
    }

    fn at(opcode: u8, lba: u64, blocks: u32) -> SubmissionEntry {
        let mut entry = SubmissionEntry::new(opcode);
        entry.set_nsid(NSID);
        entry.set_slba(lba);
        entry.set_dword(12, blocks - 1);
        entry
    }

    #[test]
    fn the_last_block_is_reached_and_the_one_behind_it_is_not() {
        let bounds = bounds(1000, 50);
        let last = check(&bounds, &at(nvm::READ, 49, 1)).unwrap();
        assert_eq!(
            (last.entry.slba(), last.data),
            (1049, Data::FromDevice(512))
        );
        for (lba, blocks) in [(50, 1), (49, 2), (u64::MAX, 1), (u64::MAX - 2, 5)] {
            for opcode in [
                nvm::READ,
                nvm::WRITE,
                nvm::COMPARE,
                nvm::WRITE_ZEROES,
                nvm::VERIFY,
            ] {
                let refused = check(&bounds, &at(opcode, lba, blocks));
                assert_eq!(refused, Err(Status::LBA_OUT_OF_RANGE), "{opcode:#x} {lba}");
            }
        }
    }

    #[test]
    fn what_is_not_known_to_be_harmless_is_refused() {
        let bounds = bounds(0, 100);
        for opcode in [nvm::COPY, nvm::RESERVATION_ACQUIRE, 0x7d, 0x80, 0xff] {
            let refused = check(&bounds, &at(opcode, 0, 1));
            assert_eq!(refused, Err(Status::INVALID_OPCODE), "{opcode:#x}");
        }
        let mut other = at(nvm::READ, 0, 1);
        other.set_nsid(3);
        assert_eq!(check(&bounds, &other), Err(Status::INVALID_NAMESPACE));
        let mut directive = at(nvm::WRITE, 0, 1);
        directive.set_dword(12, 1 << 20 | 0xf << 26 | 1 << 30);
        directive.set_dword(13, 7 << 16 | 3);
        directive.set_dword(15, 5);
        let entry = check(&bounds, &directive).unwrap().entry;
        assert_eq!([12, 13, 14, 15].map(|n| entry.dword(n)), [1 << 30, 3, 0, 0]);
    }

    #[test]
    fn a_command_that_the_drive_does_not_have_is_refused() {
        let without = Bounds {
            optional: 0,
            ..bounds(0, 100)
        };
        assert!(check(&without, &at(nvm::READ, 0, 1)).is_ok());
        let refused = check(&without, &at(nvm::WRITE_ZEROES, 0, 1));
        assert_eq!(refused, Err(Status::INVALID_OPCODE));
    }
}
