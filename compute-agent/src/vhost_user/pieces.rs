//! Cuts the data of a request into NVMe commands (NVMe 1.4 §4.3).
//!
//! PRP entries name guest memory directly, and with them a command can have any memory that begins
//! at a multiple of four bytes and goes on in whole pages. Where one buffer of a request ends
//! within a page, or the next one begins within one, a command must end; if that is in the middle
//! of a block of the drive, the block goes through a bounce buffer.

#![forbid(unsafe_code)]

use farbus_vfio::nvme::PAGE_SIZE;

use super::request::Segment;

const PAGE: u64 = PAGE_SIZE as u64;

/// A position in the data of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Which segment.
    pub segment: usize,
    /// Bytes into it.
    pub offset: u32,
}

/// What is limited, and by how much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The drive's block in bytes.
    pub block: u32,
    /// Most bytes of one command: a multiple of the block.
    pub transfer: u32,
    /// Most bytes of a command through a bounce buffer: a multiple of the block.
    pub bounce: u32,
}

/// The data of one command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Bytes, a multiple of the block, never 0.
    pub len: u32,
    /// Whether PRPs can name the memory; otherwise the data goes through a bounce buffer.
    pub direct: bool,
}

/// Contiguous ranges of guest memory (address, bytes) from `cursor` on.
fn ranges(segments: &[Segment], cursor: Cursor) -> impl Iterator<Item = (u64, u64)> + '_ {
    let offset = u64::from(cursor.offset);
    segments
        .iter()
        .skip(cursor.segment)
        .enumerate()
        .map(move |(n, segment)| {
            let skip = if n == 0 { offset } else { 0 };
            let len = u64::from(segment.len).saturating_sub(skip);
            (segment.address.saturating_add(skip), len)
        })
        .filter(|(_, len)| *len > 0)
}

/// How many bytes from `cursor` on PRPs can name, at most `limit`.
fn direct_len(segments: &[Segment], cursor: Cursor, limit: u64) -> u64 {
    let mut total = 0;
    let mut end = None;
    for (address, len) in ranges(segments, cursor) {
        let fits = match end {
            None => address % 4 == 0,
            Some(end) => address == end || (end % PAGE == 0 && address % PAGE == 0),
        };
        if !fits || total >= limit {
            break;
        }
        total += len;
        end = address.checked_add(len);
        if end.is_none() {
            break;
        }
    }
    total.min(limit)
}

/// The next command's data, of a request with `left` bytes (a multiple of the block) still to do
/// from `cursor` on.
pub fn next_piece(segments: &[Segment], cursor: Cursor, left: u32, limits: Limits) -> Piece {
    let Limits {
        block,
        transfer,
        bounce,
    } = limits;
    let len = direct_len(segments, cursor, left.min(transfer).into()) as u32;
    let whole = len - len % block;
    if whole > 0 {
        return Piece {
            len: whole,
            direct: true,
        };
    }
    // As many blocks as cannot be named, each for itself: one bounce buffer takes them together.
    let most = left.min(bounce);
    let mut len = block.min(most);
    let mut at = advance(segments, cursor, block);
    while len + block <= most && direct_len(segments, at, block.into()) < u64::from(block) {
        len += block;
        at = advance(segments, at, block);
    }
    Piece { len, direct: false }
}

/// The position `by` bytes after `cursor`.
pub fn advance(segments: &[Segment], cursor: Cursor, by: u32) -> Cursor {
    let Cursor {
        mut segment,
        mut offset,
    } = cursor;
    let mut by = by;
    while let Some(here) = segments.get(segment) {
        let rest = here.len.saturating_sub(offset);
        if by < rest {
            offset += by;
            break;
        }
        by -= rest;
        segment += 1;
        offset = 0;
    }
    Cursor { segment, offset }
}

/// The parts of segments that hold `len` bytes from `cursor` on.
pub fn within(
    segments: &[Segment],
    cursor: Cursor,
    len: u32,
) -> impl Iterator<Item = Segment> + '_ {
    let mut left = u64::from(len);
    ranges(segments, cursor).map_while(move |(address, len)| {
        let len = len.min(left);
        left -= len;
        (len > 0).then_some(Segment {
            address,
            len: len as u32,
        })
    })
}

/// The PRP entries of `len` bytes that PRPs can name: the first one is returned, the others are
/// given to `store` as (index, address); returns how many of those there were.
pub fn prps(
    segments: &[Segment],
    cursor: Cursor,
    len: u32,
    mut store: impl FnMut(usize, u64),
) -> (u64, usize) {
    let mut first = None;
    let mut count = 0;
    for Segment { address, len } in within(segments, cursor, len) {
        let end = address.saturating_add(len.into());
        // A page whose beginning is in this range; the one that `address` is within has its
        // entry already, be it the first one or that of the range before.
        let mut page = match first {
            None => (address & !(PAGE - 1)).saturating_add(PAGE),
            Some(_) => address.div_ceil(PAGE).saturating_mul(PAGE),
        };
        first.get_or_insert(address);
        while page < end {
            store(count, page);
            count += 1;
            page = page.saturating_add(PAGE);
        }
    }
    (first.unwrap_or(0), count)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits {
        block: 512,
        transfer: 1 << 20,
        bounce: 1 << 16,
    };

    fn segments(list: &[(u64, u32)]) -> Vec<Segment> {
        let segment = |&(address, len): &(u64, u32)| Segment { address, len };
        list.iter().map(segment).collect()
    }

    fn piece(list: &[(u64, u32)], limits: Limits) -> Piece {
        let total = list.iter().map(|(_, len)| len).sum();
        next_piece(&segments(list), Cursor::default(), total, limits)
    }

    #[test]
    fn pages_that_follow_each_other_in_a_request_are_one_command() {
        let whole = piece(
            &[(0x1200, 0xe00), (0x9000, 0x1000), (0x4000, 0x200)],
            LIMITS,
        );
        assert_eq!(
            whole,
            Piece {
                len: 0x2000,
                direct: true
            }
        );
    }

    #[test]
    fn buffers_that_end_within_a_page_end_a_command() {
        let cut = piece(&[(0x1000, 0x200), (0x9000, 0x1000)], LIMITS);
        assert_eq!(
            cut,
            Piece {
                len: 0x200,
                direct: true
            }
        );
    }

    #[test]
    fn blocks_that_are_cut_or_crooked_are_bounced_and_only_those() {
        let limits = Limits {
            block: 4096,
            ..LIMITS
        };
        let cut = [(0x1000, 0x800), (0x9000, 0x800), (0x20000, 0x4000)];
        assert_eq!(
            piece(&cut, limits),
            Piece {
                len: 0x1000,
                direct: false
            }
        );
        let odd = piece(&[(0x1001, 0x1000)], LIMITS);
        assert_eq!(
            odd,
            Piece {
                len: 0x1000,
                direct: false
            }
        );
    }

    proptest! {
        /// Whatever the buffers are, the pieces cover the data once and in order, and what PRPs
        /// name is the memory that was meant.
        #[test]
        fn pieces_cover_a_request_exactly_once(
            list in prop::collection::vec(
                (0u64..64, 0u64..4096, 1u32..5000, any::<bool>(), any::<bool>()), 1..20),
            block in prop::sample::select(vec![512u32, 4096]),
        ) {
            let mut all = Vec::new();
            for (n, (page, offset, len, aligned, whole)) in list.into_iter().enumerate() {
                let address = ((n as u64 * 64 + page) << 13) + if aligned { 0 } else { offset };
                let len = if whole { len.div_ceil(512) * 512 } else { len };
                all.push(Segment { address, len });
            }
            let total: u32 = all.iter().map(|s| s.len).sum();
            if let (Some(last), rest @ 1..) = (all.last_mut(), total % block) {
                last.len += block - rest;
            }
            let total: u32 = all.iter().map(|s| s.len).sum();
            let limits = Limits { block, transfer: 16 << 10, bounce: 8 << 10 };
            let (mut cursor, mut left) = (Cursor::default(), total);
            let mut covered = Vec::new();
            while left > 0 {
                let piece = next_piece(&all, cursor, left, limits);
                prop_assert!(piece.len > 0 && piece.len <= left && piece.len % block == 0);
                if piece.direct {
                    prop_assert!(piece.len <= limits.transfer);
                    let mut entries = Vec::new();
                    let (first, count) = prps(&all, cursor, piece.len, |n, address| {
                        assert_eq!(n, entries.len());
                        entries.push(address);
                    });
                    prop_assert_eq!(count, entries.len());
                    prop_assert!(first % 4 == 0);
                    let mut rest = piece.len;
                    for (n, address) in std::iter::once(first).chain(entries).enumerate() {
                        prop_assert!(n == 0 || address % PAGE == 0);
                        let here = rest.min((PAGE - address % PAGE) as u32);
                        covered.extend((0..here).map(|b| address + u64::from(b)));
                        rest -= here;
                    }
                    prop_assert_eq!(rest, 0);
                } else {
                    prop_assert!(piece.len <= limits.bounce);
                    for s in within(&all, cursor, piece.len) {
                        covered.extend((0..s.len).map(|b| s.address + u64::from(b)));
                    }
                }
                cursor = advance(&all, cursor, piece.len);
                left -= piece.len;
            }
            let meant = all
                .iter()
                .flat_map(|s| (0..s.len).map(|b| s.address + u64::from(b)));
            prop_assert!(meant.eq(covered));
        }
    }
}
