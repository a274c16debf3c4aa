//! Commands of a peer that does not check what it sends: each is refused before the device
//! hears of it, and the half's own state is as before.

use farbus_fabric::FabricError;
use farbus_fabric::wire::{Direction, Placement};
use farbus_shadow_mem::nvme::description::MAX_QUEUE_ENTRIES;
use farbus_vfio::nvme::{SubmissionEntry, admin, nvm};

use super::device::{Claim, LIMITS, create, create_sized, placement, read};

#[track_caller]
fn assert_violation(refused: &Result<(), FabricError>) {
    assert!(
        matches!(refused, Err(FabricError::Violation { .. })),
        "{refused:?}"
    );
}

/// A read of a page with one part of its placement spoilt.
fn refuses(spoil: impl FnOnce(&mut Placement)) {
    let mut claim = Claim::with_queues();
    let mut placement = placement(3, 1, 0, 4096);
    spoil(&mut placement);

    assert_violation(&claim.place(&placement, read(8)));

    assert!(claim.device.state().placed.is_empty());
    claim.assert_io_works();
}

#[test]
fn tag_that_is_in_use_is_refused() {
    let mut claim = Claim::with_queues();
    claim.submit(3, 1, read(8)).unwrap();

    assert_violation(&claim.submit(3, 1, read(8)));
    assert_violation(&claim.submit(3, 0, SubmissionEntry::new(admin::KEEP_ALIVE)));

    assert_eq!(claim.device.state().placed.len(), 1);
    claim.assert_io_works();
}

#[test]
fn tag_that_was_not_granted_is_refused() {
    refuses(|placement| placement.tag.0 = LIMITS.tags);
    refuses(|placement| placement.tag.0 = u16::MAX);
}

#[test]
fn range_beyond_the_shadow_is_refused() {
    refuses(|placement| placement.shadow_offset = LIMITS.shadow_len);
    refuses(|placement| placement.shadow_offset = 0xffff_e000);
}

#[test]
fn range_that_does_not_begin_with_a_page_is_refused() {
    refuses(|placement| placement.shadow_offset = 1);
    refuses(|placement| placement.shadow_offset = 512);
}

#[test]
fn range_that_reaches_out_of_the_shadow_is_refused() {
    let mut claim = Claim::with_queues();
    let last_page = LIMITS.shadow_len - 4096;

    assert_violation(&claim.place(&placement(3, 1, last_page, 8192), read(16)));

    claim
        .place(&placement(3, 1, last_page, 4096), read(8))
        .unwrap();
}

#[test]
fn transfer_beyond_the_limit_is_refused() {
    let mut claim = Claim::with_queues();
    let len = LIMITS.max_transfer + 512;

    assert_violation(&claim.place(&placement(3, 1, 0, len), read(len / 512)));

    assert!(claim.device.state().placed.is_empty());
}

#[test]
fn data_of_another_direction_or_length_than_the_command_has_is_refused() {
    refuses(|placement| placement.direction = Direction::ToDevice);
    refuses(|placement| placement.data_len = 512);
    refuses(|placement| placement.data_len = 8192);
    refuses(|placement| {
        placement.direction = Direction::None;
        placement.data_len = 0;
    });
}

#[test]
fn data_for_a_tag_in_use_does_not_land() {
    let mut claim = Claim::with_queues();
    let mut write = read(8);
    write.0[0] = nvm::WRITE;
    claim.submit(3, 1, write).unwrap();

    // The landing is refused, before a byte of it is.
    assert_violation(&claim.submit(3, 1, write));
}

#[test]
fn queue_that_does_not_exist_is_refused() {
    refuses(|placement| placement.queue.0 = 2);
    refuses(|placement| placement.queue.0 = 64);
    refuses(|placement| placement.queue.0 = 65);
    refuses(|placement| placement.queue.0 = u16::MAX);
}

#[test]
fn more_commands_than_a_queue_holds_are_refused() {
    let mut claim = Claim::with_queues();
    for tag in 0..31 {
        claim.submit(tag, 1, read(8)).unwrap();
    }

    assert_violation(&claim.submit(40, 1, read(8)));

    assert_eq!(claim.device.state().placed.len(), 31);
}

#[test]
fn queue_that_cannot_be_is_not_created() {
    let mut claim = Claim::with_queues();
    for opcode in [admin::CREATE_CQ, admin::CREATE_SQ] {
        for sqe in [
            create(opcode, 0),
            create(opcode, 5),
            create(opcode, 64),
            create(opcode, 65),
            create(opcode, 0xffff),
            create_sized(opcode, 2, 1),
            create_sized(opcode, 2, MAX_QUEUE_ENTRIES + 1),
            create_sized(opcode, 2, 0x1_0000),
            // There is one already.
            create(opcode, 1),
        ] {
            assert_violation(&claim.submit(3, 0, sqe));
        }
    }
    assert!(claim.completed().is_empty());
    claim.assert_io_works();
}

#[test]
fn submission_queue_on_the_admin_completion_queue_is_not_created() {
    let mut claim = Claim::with_queues();
    let mut sqe = create(admin::CREATE_SQ, 2);
    sqe.set_dword(11, 1);

    assert_violation(&claim.submit(3, 0, sqe));
}

#[test]
fn commands_for_a_controller_that_is_off_are_dropped_without_a_word() {
    let mut claim = Claim::of(super::fake_nvme::FakeNvme::new());

    claim.submit(3, 1, read(8)).unwrap();
    claim
        .submit(3, 0, SubmissionEntry::new(admin::KEEP_ALIVE))
        .unwrap();

    assert!(claim.completed().is_empty());
    claim.enable();
    claim.create_queues();
    claim.submit(3, 1, read(8)).unwrap();
}
