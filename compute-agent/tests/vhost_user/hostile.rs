//! Rings and chains that no driver may make: a status where there is one to give, else a broken
//! queue; never memory outside of the guest's.

use proptest::prelude::*;

use super::harness::{DATA, Guest, INDIRECT, MEMORY, NEXT, SIZE, TABLE, WRITE};

const IN: u32 = 0;
const ERROR: u8 = 1;

fn breaks(set_up: impl Fn(&mut Guest)) {
    let mut guest = Guest::new("");
    set_up(&mut guest);
    guest.offer(0);
    assert!(guest.is_broken(), "the queue is not broken");
    assert!(guest.used().is_none());
    next_client_is_served(&mut guest);
}

/// The next client has its rings anew, and what it writes comes back.
fn next_client_is_served(guest: &mut Guest) {
    guest.device.close();
    guest.start_anew();
    guest.put(DATA, &[0x5c; 512]);
    assert_eq!(guest.request(1, 9, &[(DATA, 512, false)]).0, 0);
    assert_eq!(guest.request(IN, 9, &[(DATA + 4096, 512, true)]).0, 0);
    assert_eq!(guest.get(DATA + 4096, 512), [0x5c; 512]);
}

#[test]
fn chain_that_never_ends_breaks_the_queue() {
    breaks(|guest| guest.descriptor(TABLE, 0, DATA, 16, NEXT, 0));
    breaks(|guest| {
        guest.descriptor(TABLE, 0, DATA, 16, NEXT, 1);
        guest.descriptor(TABLE, 1, DATA, 16, NEXT, 0);
    });
}

#[test]
fn descriptor_that_the_table_lacks_breaks_the_queue() {
    breaks(|guest| guest.descriptor(TABLE, 0, DATA, 16, NEXT, SIZE));
    breaks(|guest| guest.descriptor(TABLE, 0, DATA, 16, NEXT, u16::MAX));
}

#[test]
fn indirect_tables_that_cannot_be_break_the_queue() {
    for (address, len) in [
        (DATA, 0),
        (DATA, 15),
        (MEMORY, 64),
        (u64::MAX - 3, 64),
        (DATA, !15),
    ] {
        breaks(|guest| guest.descriptor(TABLE, 0, address, len, INDIRECT, 0));
    }
    breaks(|guest| {
        guest.descriptor(TABLE, 0, DATA, 32, INDIRECT, 0);
        guest.descriptor(DATA, 0, DATA, 32, INDIRECT, 0);
    });
}

#[test]
fn chain_without_a_place_for_the_status_breaks_the_queue() {
    breaks(|guest| guest.chain(TABLE, 0, &[(DATA, 16, false)]));
    breaks(|guest| guest.chain(TABLE, 0, &[(DATA, 16, false), (DATA, 0, true)]));
    breaks(|guest| guest.chain(TABLE, 0, &[(DATA, 16, false), (MEMORY, 1, true)]));
    breaks(|guest| guest.chain(TABLE, 0, &[(DATA, 16, false), (u64::MAX, 2, true)]));
}

#[test]
fn head_that_is_in_use_or_does_not_exist_breaks_the_queue() {
    let mut guest = Guest::new("");
    guest.offer(SIZE);
    assert!(guest.is_broken());
    let mut guest = Guest::new("");
    let header = guest.header(0, IN, 0);
    guest.chain(
        TABLE,
        0,
        &[
            (header, 16, false),
            (DATA, 512, true),
            (header + 32, 1, true),
        ],
    );
    guest.offer(0);
    guest.offer(0);
    assert!(guest.is_broken());
}

#[test]
fn available_index_that_jumps_breaks_the_queue() {
    let mut guest = Guest::new("");
    guest.set_available(SIZE + 1);
    assert!(guest.is_broken());
}

#[test]
fn data_outside_of_memory_and_crooked_chains_are_errors() {
    let mut guest = Guest::new("");
    for data in [
        vec![(MEMORY, 512, true)],
        vec![(MEMORY - 256, 512, true)],
        vec![(u64::MAX - 100, 512, true)],
        vec![(1 << 51, 512, true)],
        vec![((1 << 51) + 4096, 4096, true)],
        vec![(DATA, 0, true)],
        vec![],
        vec![(DATA, 512, true), (DATA, 512, false)],
        vec![(DATA, u32::MAX, true)],
        vec![(DATA, 511, true)],
    ] {
        assert_eq!(guest.request(IN, 0, &data).0, ERROR, "{data:?}");
    }
    assert_eq!(guest.request(1, 0, &[(1 << 51, 4096, false)]).0, ERROR);
    // A header that is too short.
    guest.put(DATA, &[0xff; 64]);
    guest.chain(TABLE, 0, &[(DATA, 15, false), (DATA + 32, 1, true)]);
    guest.offer(0);
    assert_eq!(guest.answer(), (0, 1));
    assert_eq!(guest.get(DATA + 32, 1), [ERROR]);
}

#[test]
fn chain_with_more_buffers_than_there_may_be_breaks_the_queue() {
    breaks(|guest| {
        let buffers: Vec<_> = (0..200).map(|n| (DATA + n * 512, 512, n > 0)).collect();
        guest.chain(DATA + 0x10_0000, 0, &buffers);
        guest.descriptor(TABLE, 0, DATA + 0x10_0000, 200 * 16, INDIRECT, 0);
    });
}

#[test]
fn rings_that_are_not_in_memory_are_not_started() {
    use vhost::vhost_user::VhostUserBackendReqHandlerMut;
    use vhost::vhost_user::message::VhostUserVringAddrFlags;
    let user = super::harness::USER;
    for (table, used, available) in [
        (user + MEMORY, user + 0x3000, user + 0x2000),
        (user + 0x1000, user + MEMORY - 8, user + 0x2000),
        (user + 0x1000, user + 0x3000, user + MEMORY - 2),
        (user + 0x1001, user + 0x3000, user + 0x2000),
        (0, 0, 0),
        (u64::MAX, u64::MAX, u64::MAX),
    ] {
        let mut guest = Guest::new("");
        let flags = VhostUserVringAddrFlags::empty();
        guest
            .device
            .set_vring_addr(0, flags, table, used, available, 0)
            .unwrap();
        assert!(guest.is_broken(), "{table:#x} {used:#x} {available:#x}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Anything at all in the rings: the device goes on or breaks the queue, and the next client
    /// finds a device and a drive that work.
    #[test]
    fn arbitrary_rings_do_no_harm(
        table in prop::collection::vec(
            (0u64..MEMORY + 4096, any::<u32>(), 0u32..4096, 0u16..8, 0u16..SIZE + 1, any::<bool>()),
            usize::from(SIZE)),
        heads in prop::collection::vec(0u16..SIZE + 2, 1..24),
        kinds in prop::collection::vec((0u32..16, 0u64..17000), 8),
    ) {
        let mut guest = Guest::new("");
        for (n, (address, wild, len, flags, next, is_wild)) in (0u16..).zip(&table) {
            let len = if *is_wild { *wild } else { *len };
            // Headers lie in the page that descriptors of this kind point to.
            let address = if flags & WRITE == 0 { DATA + (address % 8) * 16 } else { *address };
            guest.descriptor(TABLE, n, address, len, *flags, *next);
        }
        for (n, (kind, sector)) in kinds.iter().enumerate() {
            let mut header = kind.to_le_bytes().to_vec();
            header.extend([0; 4]);
            header.extend(sector.to_le_bytes());
            guest.put(DATA + n as u64 * 16, &header);
        }
        for head in &heads {
            guest.offer(*head);
        }
        for _ in 0..200 {
            guest.work();
        }
        next_client_is_served(&mut guest);
    }
}
