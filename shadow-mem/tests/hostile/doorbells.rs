//! Doorbells that the guest keeps in its own memory, and what it may put there.

use farbus_vfio::nvme::{Status, SubmissionEntry, admin, csts, nvm};

use super::guest::{
    CC_ON, DATA, ENTRIES, Guest, SQE_BYTES, block_io, completion, create, delete, read, sq_base,
};

/// Where the guest keeps its doorbells, and where it is told when to ring.
const VALUES: u64 = 0x8_0000;
const EVENT_INDICES: u64 = 0x8_1000;

fn config(values: u64, event_indices: u64) -> SubmissionEntry {
    let mut sqe = SubmissionEntry::new(admin::DOORBELL_BUFFER);
    sqe.set_prps(values, event_indices);
    sqe
}

fn outcome(guest: &mut Guest, sqe: SubmissionEntry) -> Status {
    guest.submit(0, sqe);
    assert!(guest.wire.take_submitted().is_empty(), "it stays here");
    guest.completions(0)[0].status
}

/// A guest with a pair of queues and shadow doorbells.
fn guest() -> Guest {
    let mut guest = Guest::with_queues();
    assert_eq!(
        outcome(&mut guest, config(VALUES, EVENT_INDICES)),
        Status::SUCCESS
    );
    guest
}

fn set_tail(guest: &Guest, queue: u64, tail: u32) {
    guest.store(VALUES + queue * 8, &tail.to_le_bytes());
}

fn set_head(guest: &Guest, queue: u64, head: u32) {
    guest.store(VALUES + queue * 8 + 4, &head.to_le_bytes());
}

fn event_index(guest: &Guest, queue: u64, completion: bool) -> u32 {
    u32::from_le_bytes(guest.load(EVENT_INDICES + queue * 8 + 4 * u64::from(completion)))
}

fn place(guest: &Guest, slot: u32, sqe: &SubmissionEntry) {
    guest.store(sq_base(1) + u64::from(slot) * SQE_BYTES, &sqe.0);
}

#[test]
fn identify_offers_them_wherever_its_data_lies() {
    for offset in [0, 0xf00, 0xffc] {
        let mut guest = Guest::enabled();
        let mut sqe = SubmissionEntry::new(admin::IDENTIFY);
        sqe.set_dword(10, 1);
        sqe.set_prps(DATA + offset, DATA + 0x1000);
        guest.submit(0, sqe);
        guest.complete_all();
        assert_eq!(guest.completions(0)[0].status, Status::SUCCESS);
        let oacs = u16::from_le_bytes(guest.load(DATA + offset + 256));
        assert_eq!(oacs, 1 << 8, "at {offset:#x}");
    }
}

#[test]
fn commands_are_found_without_a_doorbell() {
    let mut guest = guest();
    place(&guest, 0, &read(7));
    place(&guest, 1, &read(8));
    set_tail(&guest, 1, 2);

    guest.pump();

    assert_eq!(guest.wire.take_submitted().len(), 2);
}

#[test]
fn before_a_sleep_the_guest_is_asked_to_ring() {
    let mut guest = guest();
    place(&guest, 0, &read(1));
    set_tail(&guest, 1, 1);
    guest.pump();
    guest.complete_all();

    assert!(!guest.half.arm_doorbells(), "nothing is new");
    assert_eq!(event_index(&guest, 1, false), 1);
}

#[test]
fn a_tail_that_comes_just_before_a_sleep_prevents_it_once() {
    let mut guest = guest();
    place(&guest, 0, &read(1));
    set_tail(&guest, 1, 1);

    assert!(guest.half.arm_doorbells());
    guest.pump();

    assert_eq!(guest.wire.take_submitted().len(), 1);
    assert!(!guest.half.arm_doorbells());
}

#[test]
fn tails_that_the_ring_cannot_have_are_ignored_and_keep_nobody_awake() {
    let mut guest = guest();
    for tail in [ENTRIES, 0x10000, u32::MAX] {
        set_tail(&guest, 1, tail);
        guest.pump();
        assert!(!guest.half.arm_doorbells());
    }
    assert!(guest.wire.take_submitted().is_empty());
    assert_eq!(guest.csts(), csts::RDY);
}

#[test]
fn a_register_write_that_was_late_does_not_turn_the_tail_back() {
    let mut guest = guest();
    for slot in 0..3 {
        place(&guest, slot, &read(slot as u16));
    }
    set_tail(&guest, 1, 3);
    guest.pump();
    assert_eq!(guest.complete_all().len(), 3);

    guest.ring_sq(1, 1);
    guest.pump();

    assert!(guest.wire.take_submitted().is_empty());
}

#[test]
fn a_full_completion_queue_goes_on_when_the_head_in_memory_moves() {
    let mut guest = guest();
    let submit = |guest: &mut Guest, number: u32| {
        place(guest, number % ENTRIES, &read(number as u16));
        set_tail(guest, 1, (number + 1) % ENTRIES);
        guest.pump();
        guest.complete_all();
    };
    // One completion more than the queue holds.
    for number in 0..ENTRIES {
        submit(&mut guest, number);
    }
    assert_eq!(guest.half.outstanding().commands, 1, "one has no room");
    assert_eq!(
        event_index(&guest, 1, true),
        0,
        "the guest is to ring at once"
    );

    set_head(&guest, 1, ENTRIES - 1);
    guest.write32(0x1000 + 12, ENTRIES - 1);

    assert_eq!(guest.half.outstanding().commands, 0);
}

#[test]
fn a_completion_queue_that_only_looked_full_takes_the_next_completion() {
    let mut guest = guest();
    for number in 0..2 * ENTRIES {
        place(&guest, number % ENTRIES, &read(number as u16));
        set_tail(&guest, 1, (number + 1) % ENTRIES);
        guest.pump();
        guest.complete_all();
        // The guest consumes at once, and rings nothing.
        set_head(&guest, 1, (number + 1) % ENTRIES);
    }
    guest.assert_nothing_is_held();
}

#[test]
fn pages_that_cannot_be_are_refused() {
    let mut guest = Guest::with_queues();
    let beyond = 1 << 40;
    for (values, event_indices, status) in [
        (VALUES + 4, EVENT_INDICES, Status::INVALID_PRP_OFFSET),
        (VALUES, EVENT_INDICES + 4, Status::INVALID_PRP_OFFSET),
        (VALUES, VALUES, Status::INVALID_FIELD),
        (beyond, EVENT_INDICES, Status::INVALID_FIELD),
        (VALUES, beyond, Status::INVALID_FIELD),
        (!0xfff, EVENT_INDICES, Status::INVALID_FIELD),
    ] {
        assert_eq!(outcome(&mut guest, config(values, event_indices)), status);
    }
    guest.submit(1, read(1));
    assert_eq!(guest.complete_all().len(), 1, "the registers still work");
}

#[test]
fn pages_that_the_guest_takes_away_show_nothing_new() {
    let mut guest = guest();
    guest.half.unmap(farbus_vfio::Iova(0), 1 << 20).unwrap();
    assert!(!guest.half.arm_doorbells());
    guest.pump();
    assert_eq!(guest.csts(), csts::RDY);
}

#[test]
fn a_controller_reset_forgets_them() {
    let mut guest = guest();
    guest.write32(0x14, CC_ON & !1);
    guest.pump();
    guest.device_says(0);
    guest.enable();
    guest.create_queues();
    set_tail(&guest, 1, 5);

    guest.pump();

    assert!(guest.wire.take_submitted().is_empty());
}

#[test]
fn a_new_queue_does_not_start_where_an_old_one_of_that_id_was() {
    let mut guest = guest();
    for (number, opcode) in [admin::DELETE_SQ, admin::CREATE_SQ].into_iter().enumerate() {
        set_tail(&guest, 1, 3 * number as u32);
        let sqe = match opcode {
            admin::DELETE_SQ => delete(opcode, 1),
            _ => create(opcode, 1),
        };
        guest.submit(0, sqe);
        guest.complete_all();
    }

    guest.pump();

    assert!(guest.wire.take_submitted().is_empty());
    assert!(!guest.half.arm_doorbells());
}

#[test]
fn queues_that_were_rung_before_go_on_from_where_they_are() {
    let mut guest = Guest::with_queues();
    guest.submit(1, read(1));
    guest.complete_all();
    guest.completions(1);
    guest.completions(0);
    assert_eq!(
        outcome(&mut guest, config(VALUES, EVENT_INDICES)),
        Status::SUCCESS
    );

    guest.pump();
    assert!(
        guest.wire.take_submitted().is_empty(),
        "nothing is done twice"
    );
    place(&guest, 1, &block_io(nvm::WRITE, 2, 8));
    set_tail(&guest, 1, 2);
    guest.pump();

    let sent = guest.wire.take_submitted();
    assert_eq!(sent.len(), 1);
    guest
        .deliver(&[completion(sent[0].placement.tag, Status::SUCCESS, 0)])
        .unwrap();
    guest.assert_nothing_is_held();
}
