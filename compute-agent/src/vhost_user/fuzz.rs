//! A descriptor chain from the ring to the drive's commands, without a drive, for fuzzing.

#![forbid(unsafe_code)]

use farbus_vfio::nvme::PAGE_SIZE;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::chain::{MAX_PARTS, walk};
use super::pieces::{self, Cursor, Limits};
use super::request::{Kind, SECTOR, parse};

/// Guest memory has a hole between its two parts: addresses and lengths in bytes.
const MEMORY: [(u64, usize); 2] = [(0, 0x8000), (0x1_0000, 0x8000)];
/// Entries of the queue, whose table is at the beginning of memory.
const ENTRIES: u16 = 16;

/// Takes one chain from memory that `bytes` fill, the first byte of which is the chain's head.
///
/// It must come to its end whatever the bytes are, and what it finds must lie in guest memory.
///
/// # Panics
/// When it does not.
#[allow(clippy::panic, reason = "that is how a fuzzer is told")]
pub fn fuzz_request(bytes: &[u8]) {
    let Some((head, image)) = bytes.split_first() else {
        return;
    };
    let ranges = MEMORY.map(|(address, len)| (GuestAddress(address), len));
    let Ok(memory) = GuestMemoryMmap::<()>::from_ranges(&ranges) else {
        return;
    };
    let image = image.get(..MEMORY[0].1).unwrap_or(image);
    let _ = memory.write_slice(image, GuestAddress(0));
    let (mut parts, mut data) = (Vec::new(), Vec::new());
    if walk(&memory, 0, ENTRIES, u16::from(*head), &mut parts).is_err() {
        return;
    }
    assert!(
        parts.len() <= MAX_PARTS,
        "more parts than there is room for"
    );
    let Ok(request) = parse(&memory, &parts, &mut data) else {
        return;
    };
    let inside =
        |address, len: usize| GuestMemoryBackend::check_range(&memory, GuestAddress(address), len);
    assert!(inside(request.status, 1), "the status is elsewhere");
    for segment in &data {
        assert!(segment.len > 0 && inside(segment.address, segment.len as usize));
    }
    let total: u64 = data.iter().map(|segment| u64::from(segment.len)).sum();
    assert!(
        total == u64::from(request.len),
        "data is missing, or made up"
    );
    if matches!(request.kind, Kind::Read | Kind::Write) {
        assert!(total % SECTOR == 0 && total > 0);
        for block in [512, 4096] {
            if total % u64::from(block) == 0 {
                cut(&data, request.len, block, inside);
            }
        }
    }
}

fn cut(
    data: &[super::request::Segment],
    len: u32,
    block: u32,
    inside: impl Fn(u64, usize) -> bool,
) {
    let limits = Limits {
        block,
        transfer: 16 << 10,
        bounce: 8 << 10,
    };
    let (mut cursor, mut left) = (Cursor::default(), len);
    while left > 0 {
        let piece = pieces::next_piece(data, cursor, left, limits);
        assert!(piece.len > 0 && piece.len <= left && piece.len % block == 0);
        if piece.direct {
            let mut rest = piece.len as usize;
            let mut check = |address: u64| {
                let here = rest.min(PAGE_SIZE - address as usize % PAGE_SIZE);
                assert!(inside(address, here), "a PRP names other memory");
                rest -= here;
            };
            let mut others = Vec::new();
            let (first, _) = pieces::prps(data, cursor, piece.len, |_, a| others.push(a));
            check(first);
            others.into_iter().for_each(check);
            assert!(rest == 0, "PRPs name less than the data");
        }
        cursor = pieces::advance(data, cursor, piece.len);
        left -= piece.len;
    }
}
