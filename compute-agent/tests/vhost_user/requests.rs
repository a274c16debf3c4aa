//! What each request does.

use proptest::prelude::*;

use super::harness::{Buffer, DATA, Guest, HEADERS, INDIRECT, MEMORY, TABLE, options};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

const OK: u8 = 0;
const ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at / 7) as u8 ^ seed).collect()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let words = [sectors.to_le_bytes(), flags.to_le_bytes()].concat();
    [sector.to_le_bytes().to_vec(), words].concat()
}

#[test]
fn what_is_written_is_read_and_the_guest_is_told() {
    let mut guest = Guest::new("");
    guest.put(DATA, &pattern(8192, 3));
    assert_eq!(guest.request(OUT, 8, &[(DATA, 8192, false)]), (OK, 1));
    assert!(guest.is_called());
    assert_eq!(guest.request(FLUSH, 0, &[]), (OK, 1));
    let there = DATA + 0x10000;
    assert_eq!(guest.request(IN, 8, &[(there, 8192, true)]), (OK, 8193));
    assert_eq!(guest.get(there, 8192), pattern(8192, 3));
}

#[test]
fn device_has_a_name() {
    let mut guest = Guest::new("");
    assert_eq!(guest.request(GET_ID, 0, &[(DATA, 20, true)]), (OK, 21));
    assert_eq!(guest.get(DATA, 8), b"serial\0\0");
}

#[test]
fn ranges_are_zeroed_and_discarded_and_nothing_beside_them() {
    let mut guest = Guest::new("");
    guest.put(DATA, &pattern(0x10000, 9));
    guest.request(OUT, 0, &[(DATA, 0x10000, false)]);
    guest.put(DATA, &range(16, 16, 1));
    assert_eq!(guest.request(ZEROES, 0, &[(DATA, 16, false)]).0, OK);
    let two = [range(48, 8, 0), range(64, 8, 0)].concat();
    guest.put(DATA, &two);
    assert_eq!(guest.request(DISCARD, 0, &[(DATA, 32, false)]).0, OK);
    guest.request(IN, 0, &[(DATA, 0x10000, true)]);
    let mut expected = pattern(0x10000, 9);
    expected[16 * 512..32 * 512].fill(0);
    let found = guest.get(DATA, 0x10000);
    // What is discarded reads as zero or as before.
    for (sector, sectors) in [(48, 8), (64, 8)] {
        let bytes = sector * 512..(sector + sectors) * 512;
        expected[bytes.clone()].copy_from_slice(&found[bytes]);
    }
    assert_eq!(found, expected);
}

#[test]
fn flags_that_are_not_known_are_unsupported() {
    let mut guest = Guest::new("");
    guest.put(DATA, &range(0, 8, 1));
    assert_eq!(
        guest.request(DISCARD, 0, &[(DATA, 16, false)]).0,
        UNSUPPORTED
    );
    guest.put(DATA, &range(0, 8, 2));
    assert_eq!(
        guest.request(ZEROES, 0, &[(DATA, 16, false)]).0,
        UNSUPPORTED
    );
    assert_eq!(guest.request(0x77, 0, &[]).0, UNSUPPORTED);
}

#[test]
fn sectors_out_of_range_and_parts_of_blocks_are_errors() {
    let mut guest = Guest::new("block-size=4096");
    let last = (8 << 20) / 512;
    for (sector, len) in [
        (last, 4096),
        (last - 8, 8192),
        (u64::MAX, 4096),
        (u64::MAX - 7, 4096),
        (1, 4096),
        (0, 512),
        (0, 100),
    ] {
        let data = [(DATA, len, true)];
        assert_eq!(guest.request(IN, sector, &data).0, ERROR, "{sector} {len}");
    }
    assert_eq!(guest.request(IN, last - 8, &[(DATA, 4096, true)]).0, OK);
    for (sector, sectors) in [(last, 8), (u64::MAX, 8), (0, u32::MAX), (4, 8)] {
        guest.put(DATA, &range(sector, sectors, 0));
        let data = [(DATA, 16, false)];
        assert_eq!(guest.request(ZEROES, 0, &data).0, ERROR, "{sector}");
        assert_eq!(guest.request(DISCARD, 0, &data).0, ERROR, "{sector}");
    }
}

#[test]
fn read_only_device_refuses_what_changes_it() {
    let mut options = options();
    options.read_only = true;
    let mut guest = Guest::with("", options, false);
    assert_eq!(guest.request(OUT, 0, &[(DATA, 512, false)]).0, ERROR);
    guest.put(DATA, &range(0, 8, 0));
    assert_eq!(guest.request(DISCARD, 0, &[(DATA, 16, false)]).0, ERROR);
    assert_eq!(guest.request(IN, 0, &[(DATA, 512, true)]).0, OK);
}

#[test]
fn header_and_status_may_share_buffers_with_data() {
    let mut guest = Guest::new("");
    guest.put(DATA, &pattern(512, 5));
    guest.request(OUT, 3, &[(DATA, 512, false)]);
    // The header is cut in two; the status is the last byte of the data's buffer.
    let header = guest.header(0, IN, 3);
    let there = DATA + 0x1000;
    guest.chain(
        TABLE,
        0,
        &[
            (header, 5, false),
            (header + 5, 11, false),
            (there, 513, true),
        ],
    );
    guest.offer(0);
    assert_eq!(guest.answer(), (0, 513));
    assert_eq!(guest.get(there, 513), [pattern(512, 5), vec![OK]].concat());
}

#[test]
fn indirect_chains_are_followed() {
    let mut guest = Guest::new("");
    guest.put(DATA, &pattern(1024, 1));
    guest.request(OUT, 0, &[(DATA, 1024, false)]);
    let header = guest.header(1, IN, 0);
    let (table, there) = (DATA + 0x8000, DATA + 0x2200);
    guest.chain(
        table,
        0,
        &[
            (header, 16, false),
            (there, 512, true),
            (there + 0x4000, 512, true),
            (header + 32, 1, true),
        ],
    );
    guest.descriptor(TABLE, 7, table, 64, INDIRECT, 0);
    guest.offer(7);
    assert_eq!(guest.answer(), (7, 1025));
    let found = [guest.get(there, 512), guest.get(there + 0x4000, 512)].concat();
    assert_eq!(found, pattern(1024, 1));
}

#[test]
fn more_requests_than_the_queue_holds_follow_each_other() {
    let mut guest = Guest::new("");
    for round in 0..200u32 {
        let data = pattern(512, round as u8);
        guest.put(DATA, &data);
        let sector = u64::from(round);
        assert_eq!(guest.request(OUT, sector, &[(DATA, 512, false)]).0, OK);
        assert_eq!(guest.request(IN, sector, &[(DATA + 4096, 512, true)]).0, OK);
        assert_eq!(guest.get(DATA + 4096, 512), data);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever buffers the data is in, it goes to the drive and comes back, and nothing beside
    /// the buffers changes.
    #[test]
    fn data_in_any_buffers_is_written_and_read(
        lens in prop::collection::vec((0u32..6000, 0u64..4096), 1..6),
        read in prop::collection::vec((0u32..6000, 0u64..4096), 1..6),
        large in any::<bool>(),
        sector in 0u64..8,
    ) {
        let block: u32 = if large { 4096 } else { 512 };
        let mut guest = Guest::new(if large { "block-size=4096" } else { "" });
        // Buffers in any place, each in an area of its own; as long as `total` together.
        let place = |lens: &[(u32, u64)], base: u64, total: u32, writable: bool| {
            let mut left = total;
            let mut buffers: Vec<Buffer> = Vec::new();
            for (n, (len, offset)) in lens.iter().enumerate() {
                let last = n + 1 == lens.len();
                let len = if last { left } else { (*len).min(left) };
                buffers.push((base + n as u64 * 0x10000 + offset, len, writable));
                left -= len;
            }
            buffers
        };
        let sum: u32 = lens.iter().map(|(len, _)| len).sum();
        let total = sum.div_ceil(block).max(1) * block;
        let written = place(&lens, DATA, total, false);
        let mut expected = Vec::new();
        for (n, (address, len, _)) in written.iter().enumerate() {
            let bytes = pattern(*len as usize, n as u8 ^ 0x35);
            guest.put(*address, &bytes);
            expected.extend(bytes);
        }
        let sector = sector * u64::from(block) / 512;
        prop_assert_eq!(guest.request(OUT, sector, &written).0, OK);
        let buffers = place(&read, DATA + 0x20_0000, total, true);
        let mut all = guest.get(0, MEMORY as usize);
        prop_assert_eq!(guest.request(IN, sector, &buffers), (OK, total + 1));
        let mut at = 0;
        for (address, len, _) in &buffers {
            let there = *address as usize;
            let len = *len as usize;
            all[there..there + len].copy_from_slice(&expected[at..at + len]);
            at += len;
        }
        // Rings, headers and statuses are below.
        let found = guest.get(0, MEMORY as usize);
        prop_assert!(found[HEADERS as usize + 0x1000..] == all[HEADERS as usize + 0x1000..]);
    }
}
