//! A driver behind an IOMMU: what is asked for, what happens when that is refused, taken back or not
//! answered.

use farbus_compute_agent::vhost_user::iommu::message::Said;
use vhost::vhost_user::VhostUserBackendReqHandlerMut;
use vm_memory::Permissions;

use super::harness::{
    AVAILABLE, DATA, Guest, HEADERS, MEMORY, Mappings, PAGE, SIZE, TABLE, USED, USER, options,
};

const IN: u32 = 0;
const OUT: u32 = 1;
const GET_ID: u32 = 8;
const ZEROES: u32 = 13;
const OK: u8 = 0;
const ERROR: u8 = 1;

fn behind(mappings: Mappings) -> Guest {
    Guest::placed("", options(), true, Some(mappings))
}

fn guest() -> Guest {
    behind(Mappings::default())
}

fn mappings(guest: &mut Guest) -> &mut Mappings {
    guest.iommu.as_mut().unwrap()
}

/// Offers a read or write of a page at `DATA`, as chain 0.
fn offer_page(guest: &mut Guest, kind: u32) {
    let header = guest.header(0, kind, 0);
    let buffers = [
        (header, 16, false),
        (DATA, PAGE as u32, kind == IN),
        (header + 32, 1, true),
    ];
    guest.chain(TABLE, 0, &buffers);
    guest.offer(0);
}

/// Has the device go on until it asks for something.
fn until_it_asks(guest: &mut Guest) {
    mappings(guest).silent = true;
    assert!(guest.work_until(|guest| guest.device.next_ask().is_some()));
}

fn settles(guest: &mut Guest) {
    for _ in 0..100 {
        guest.work();
    }
}

#[test]
fn each_page_is_asked_for_once_while_it_stays_mapped() {
    let mut guest = guest();
    for _ in 0..5 {
        assert_eq!(guest.request(IN, 0, &[(DATA, 8192, true)]).0, OK);
    }
    let mut asked = mappings(&mut guest).asked.clone();
    asked.sort_unstable();
    asked.dedup();
    let needed = [TABLE, AVAILABLE, USED, HEADERS, DATA, DATA + PAGE];
    assert_eq!(asked, needed);
    // The header's page is asked for twice: for reading it, and for the status.
    assert!(mappings(&mut guest).asked.len() <= needed.len() + 1);
}

#[test]
fn unmapped_data_is_an_error_and_the_queue_goes_on() {
    let mut guest = guest();
    mappings(&mut guest).holes = vec![DATA];
    assert_eq!(guest.request(IN, 0, &[(DATA, 4096, true)]).0, ERROR);
    assert_eq!(guest.request(OUT, 0, &[(DATA, 4096, false)]).0, ERROR);
    assert_eq!(guest.request(GET_ID, 0, &[(DATA, 20, true)]).0, ERROR);
    assert_eq!(guest.request(ZEROES, 0, &[(DATA, 16, false)]).0, ERROR);
    // The second of two pages.
    let both = [(DATA - PAGE, 8192, true)];
    assert_eq!(guest.request(IN, 0, &both).0, ERROR);
    mappings(&mut guest).holes.clear();
    assert_eq!(guest.request(IN, 0, &both).0, OK);
}

#[test]
fn memory_that_may_only_be_read_is_not_written() {
    let mut guest = guest();
    mappings(&mut guest).read_only = vec![DATA];
    guest.put(DATA, &[0x11; 4096]);
    assert_eq!(guest.request(IN, 8, &[(DATA, 4096, true)]).0, ERROR);
    assert_eq!(guest.get(DATA, 4096), [0x11; 4096]);
    assert_eq!(guest.request(OUT, 0, &[(DATA, 4096, false)]).0, OK);
}

#[test]
fn chain_whose_table_header_or_status_is_not_mapped_does_no_harm() {
    for hole in [HEADERS, TABLE] {
        let mut guest = behind(Mappings {
            holes: vec![hole],
            ..Mappings::default()
        });
        offer_page(&mut guest, IN);
        assert!(guest.is_broken(), "{hole:#x}");
        assert!(guest.used().is_none());
    }
    for ring in [AVAILABLE, USED] {
        let mut guest = behind(Mappings {
            holes: vec![ring],
            ..Mappings::default()
        });
        assert!(guest.is_broken(), "{ring:#x}");
    }
    let mut guest = behind(Mappings {
        read_only: vec![USED],
        ..Mappings::default()
    });
    assert!(guest.is_broken());
}

/// Linux, when it is lazy: all is dropped again and again, while requests are under way.
#[test]
fn everything_can_be_taken_back_at_any_moment() {
    let mut guest = guest();
    for round in 0..60u64 {
        let bytes = [round as u8; 4096];
        for (kind, at) in [(OUT, DATA), (IN, DATA + 0x8000)] {
            guest.put(DATA, &bytes);
            let header = guest.header(0, kind, round * 8);
            let buffers = [
                (header, 16, false),
                (at, 4096, kind == IN),
                (header + 32, 1, true),
            ];
            guest.chain(TABLE, 0, &buffers);
            guest.offer(0);
            // At another moment each time.
            for _ in 0..round % 6 {
                guest.work();
            }
            guest.invalidate(0, u64::MAX);
            assert_eq!(guest.answer().0, 0);
            assert_eq!(guest.get(header + 32, 1), [OK]);
        }
        assert_eq!(guest.get(DATA + 0x8000, 4096), bytes);
    }
}

#[test]
fn nothing_is_written_to_a_page_that_was_taken_back_while_it_was_read_for() {
    let mut guest = guest();
    guest.put(DATA, &[0x77; 4096]);
    assert_eq!(guest.request(OUT, 0, &[(DATA, 4096, false)]).0, OK);
    guest.put(DATA, &[0; 4096]);
    guest.invalidate(DATA, DATA + PAGE - 1);
    offer_page(&mut guest, IN);
    // By then the drive has read, since nothing else has to be asked for.
    until_it_asks(&mut guest);
    settles(&mut guest);
    mappings(&mut guest).holes = vec![DATA];
    mappings(&mut guest).silent = false;
    assert_eq!(guest.answer().0, 0);
    assert_eq!(guest.get(HEADERS + 32, 1), [ERROR]);
    assert_eq!(guest.get(DATA, 4096), [0; 4096]);
}

#[test]
fn queue_that_waits_for_the_vmm_can_be_stopped_and_goes_on_where_it_was() {
    let mut guest = guest();
    guest.put(DATA, &[0x31; 4096]);
    assert_eq!(guest.request(OUT, 0, &[(DATA, 4096, false)]).0, OK);
    for drops_at in 0..8 {
        guest.put(DATA, &[0; 4096]);
        offer_page(&mut guest, IN);
        for _ in 0..drops_at {
            guest.device.work(true).unwrap();
        }
        mappings(&mut guest).silent = true;
        guest.invalidate(0, u64::MAX);
        assert!(guest.work_until(|guest| guest.device.quiesce(0)));
        let base = guest.device.get_vring_base(0).unwrap().num;
        assert!(base <= drops_at + 2);
        mappings(&mut guest).silent = false;
        guest.go_on();
        assert_eq!(guest.answer().0, 0, "{drops_at}");
        assert_eq!(guest.get(DATA, 4096), [0x31; 4096]);
        settles(&mut guest);
        assert!(guest.used().is_none(), "an answer too many");
    }
    // No bounce buffer was lost.
    for _ in 0..100 {
        assert_eq!(guest.request(IN, 0, &[(DATA, 65536, true)]).0, OK);
    }
}

#[test]
fn answers_to_a_former_run_say_nothing_of_this_one() {
    let mut guest = guest();
    offer_page(&mut guest, IN);
    until_it_asks(&mut guest);
    while guest.device.next_ask().is_some() {
        guest.device.asked();
    }
    assert!(guest.device.quiesce(0));
    guest.device.get_vring_base(0).unwrap();
    guest.device.set_vring_kick(0, None).unwrap();
    guest.device.work(true).unwrap();
    while guest.device.answered(true).is_ok() {}
    mappings(&mut guest).silent = false;
    assert_eq!(guest.answer().0, 0);
}

#[test]
fn mapping_of_memory_that_is_not_shared_is_refused() {
    let mut guest = guest();
    guest.request(IN, 0, &[(DATA, 4096, true)]);
    let mut says = |user, len: u64| {
        guest.device.hear(Said::Update {
            first: 1 << 40,
            last: (1 << 40) + len - 1,
            user,
            access: Permissions::ReadWrite,
        })
    };
    assert!(says(USER, MEMORY));
    assert!(says(USER + MEMORY - 1, 1));
    assert!(!says(USER, MEMORY + 1));
    assert!(!says(USER - 1, 2));
    assert!(!says(0, 4096));
    assert!(!says(1 << 51, 4096));
    assert!(!says(u64::MAX - 4095, 4096));
}

#[test]
fn vmm_that_cannot_be_asked_is_told_that_the_queue_does_not_start() {
    let mut guest = guest();
    guest.device.close();
    guest.set_up();
    guest.device.ask_anew(false);
    assert!(guest.is_broken());
}

#[test]
fn many_requests_wait_together_and_each_is_answered() {
    let mut guest = guest();
    for round in 0..10u64 {
        for n in 0..4u64 {
            let header = guest.header(n, OUT, n * 128);
            let data = DATA + (n + 4 * (round % 2)) * 0x1_0000;
            guest.put(data, &[(n + round) as u8; 0x1_0000]);
            let buffers = [
                (header, 16, false),
                (data, 0x1_0000, false),
                (header + 32, 1, true),
            ];
            guest.chain(TABLE, (n * 4) as u16, &buffers);
        }
        (0..4).for_each(|n| guest.offer(n * 4));
        let mut heads: Vec<_> = (0..4).map(|_| guest.answer().0).collect();
        heads.sort_unstable();
        assert_eq!(heads, [0, 4, 8, 12]);
        guest.invalidate(DATA, DATA + 0x10_0000);
        for n in 0..4 {
            let there = DATA + 0x20_0000;
            let read = guest.request(IN, n * 128, &[(there, 0x1_0000, true)]);
            assert_eq!(read.0, OK);
            assert_eq!(guest.get(there, 0x1_0000), [(n + round) as u8; 0x1_0000]);
        }
    }
    assert!(usize::from(SIZE) < mappings(&mut guest).asked.len());
}
