//! Completions that nobody waits for: of a device, at the device half, and of a device server,
//! at the compute half.

use farbus_fabric::Sink;
use farbus_fabric::wire::{CompleteBatch, Tag};
use farbus_vfio::nvme::{Status, SubmissionEntry, admin, nvm};

use super::device::{Claim, create, read};
use super::guest::{self, Guest, completion};
use super::wire::landing;

fn delete_sq(queue: u32) -> SubmissionEntry {
    let mut sqe = SubmissionEntry::new(admin::DELETE_SQ);
    sqe.set_dword(10, queue);
    sqe
}

#[test]
fn device_that_completes_what_was_never_sent_is_not_listened_to() {
    let mut claim = Claim::with_queues();
    claim.submit(3, 1, read(8)).unwrap();
    {
        let mut device = claim.device.state();
        // Never sent; beyond all tags; another queue's; no queue's at all.
        device.post(1, 1, 4, Status::SUCCESS, 1);
        device.post(1, 1, 0xffff, Status::SUCCESS, 2);
        device.post(1, 0, 3, Status::SUCCESS, 3);
        device.post(1, 999, 3, Status::SUCCESS, 4);
        device.post(0, 1, 77, Status::SUCCESS, 5);
    }
    assert!(claim.completed().is_empty());

    claim.device.state().complete(1, 3);

    assert_eq!(claim.completed()[0].tag, Tag(3));
    claim.assert_io_works();
}

#[test]
fn device_that_completes_twice_is_listened_to_once() {
    let mut claim = Claim::with_queues();
    claim.submit(3, 1, read(8)).unwrap();
    {
        let mut device = claim.device.state();
        device.complete(1, 3);
        device.post(1, 1, 3, Status::INTERNAL_ERROR, 0);
    }

    let completed = claim.completed();

    assert_eq!(completed.len(), 1);
    assert_eq!(completed[0].status, 0);
    claim.assert_io_works();
}

#[test]
fn more_forged_completions_than_the_ring_has_entries_do_no_harm() {
    let mut claim = Claim::with_queues();
    for round in 0..200 {
        let mut device = claim.device.state();
        for cid in 0..20 {
            device.post(1, 1, cid, Status::SUCCESS, round);
        }
        drop(device);
        assert!(claim.completed().is_empty());
    }
    claim.assert_io_works();
}

#[test]
fn commands_at_the_device_end_with_an_abort_status_when_their_queue_is_deleted() {
    let mut claim = Claim::with_queues();
    for tag in 1..=4 {
        claim.submit(tag, 1, read(8)).unwrap();
    }
    claim.submit(5, 0, delete_sq(1)).unwrap();

    let completed = claim.completed();

    let outcome = |tag| (Tag(tag), Status::ABORTED_SQ_DELETION.0);
    let outcomes: Vec<_> = completed.iter().map(|e| (e.tag, e.status)).collect();
    let mut expected: Vec<_> = (1..=4).map(outcome).collect();
    expected.push((Tag(5), 0));
    assert_eq!(outcomes, expected);
    assert!(completed.iter().all(|entry| entry.data_len == 0));
}

#[test]
fn what_the_device_has_done_before_a_deletion_counts_once() {
    let mut claim = Claim::with_queues();
    claim.submit(1, 1, read(8)).unwrap();
    claim.submit(2, 1, read(8)).unwrap();
    // Completed, and not looked at before the deletion is done.
    claim.device.state().complete(1, 1);
    claim.submit(3, 0, delete_sq(1)).unwrap();

    let outcomes: Vec<_> = claim
        .completed()
        .iter()
        .map(|e| (e.tag, e.status))
        .collect();

    let aborted = Status::ABORTED_SQ_DELETION.0;
    assert_eq!(outcomes, [(Tag(1), 0), (Tag(2), aborted), (Tag(3), 0)]);
}

#[test]
fn stale_completion_does_not_complete_a_command_of_the_queue_that_was_made_again() {
    let mut claim = Claim::with_queues();
    claim.submit(1, 1, read(8)).unwrap();
    claim.device.state().complete(1, 1);
    claim.submit(2, 0, delete_sq(1)).unwrap();
    assert_eq!(claim.completed().len(), 2);
    claim.submit(3, 0, create(admin::CREATE_SQ, 1)).unwrap();
    assert_eq!(claim.completed().len(), 1);

    // The same tag, in the same queue.
    claim.submit(1, 1, read(8)).unwrap();

    assert!(claim.completed().is_empty());
    claim.device.state().complete(1, 1);
    assert_eq!(claim.completed().len(), 1);
}

#[test]
fn completion_that_comes_late_for_an_aborted_command_is_dropped() {
    let mut claim = Claim::with_queues();
    claim.submit(1, 1, read(8)).unwrap();
    claim.submit(2, 0, delete_sq(1)).unwrap();
    assert_eq!(claim.completed().len(), 2);

    claim.device.state().post(1, 1, 1, Status::SUCCESS, 0);

    assert!(claim.completed().is_empty());
    claim.submit(3, 0, create(admin::CREATE_SQ, 1)).unwrap();
    claim.completed();
    claim.assert_io_works();
}

#[test]
fn completions_wait_at_the_device_while_the_network_takes_nothing() {
    let mut claim = Claim::with_queues();
    for tag in 0..20 {
        claim.submit(tag, 1, read(8)).unwrap();
        claim.device.state().complete(1, tag);
    }
    claim.wire.set_congested(true);
    assert!(claim.completed().is_empty());

    claim.wire.set_congested(false);
    claim.half.pump(&mut claim.session).unwrap();

    assert_eq!(claim.wire.take_completed().len(), 20);
}

#[test]
fn device_server_that_completes_what_was_not_sent_breaks_the_protocol() {
    let mut guest = Guest::with_queues();
    guest.submit(1, guest::read(1));
    let tag = guest.wire.take_submitted()[0].placement.tag;

    for stranger in [Tag(tag.0 ^ 1), Tag(guest::TAGS), Tag(u16::MAX)] {
        assert!(guest.complete(stranger, Status::SUCCESS).is_err());
    }
    let twice = [completion(tag, Status::INTERNAL_ERROR, 0); 2];
    assert!(guest.deliver(&twice).is_err());

    assert_eq!(guest.completions(1).len(), 1);
    guest.assert_nothing_is_held();
}

#[test]
fn data_that_was_not_asked_for_has_no_place_to_land() {
    let mut guest = Guest::with_queues();
    guest.submit(1, guest::read(1));
    guest.submit(1, guest::write(2));
    let sent = guest.wire.take_submitted();
    let [read, write] = [sent[0].placement.tag, sent[1].placement.tag];
    let mut lands = |tag, len| {
        let mut batch = CompleteBatch::new();
        batch.push(&completion(tag, Status::SUCCESS, len)).unwrap();
        let half: &mut dyn Sink = &mut guest.half;
        landing(half, &batch.header(), batch.control())
    };

    for (tag, len) in [
        (read, 4095),
        (read, 4097),
        (read, 1 << 20),
        (write, 4096),
        (Tag(900), 4096),
        (Tag(u16::MAX), 4096),
    ] {
        assert!(lands(tag, len).is_err(), "{len} bytes for {tag}");
    }
    let spans = lands(read, 4096).unwrap();
    assert_eq!(spans.iter().map(|span| span.len).sum::<usize>(), 4096);
}

#[test]
fn read_that_succeeds_without_its_data_is_a_transfer_error_for_the_guest() {
    let mut guest = Guest::with_queues();
    guest.submit(1, guest::read(1));
    let tag = guest.wire.take_submitted()[0].placement.tag;

    guest.complete(tag, Status::SUCCESS).unwrap();

    assert_eq!(guest.completions(1)[0].status, Status::DATA_TRANSFER_ERROR);
}

#[test]
fn scattered_data_of_commands_side_by_side_lands_in_the_pages_of_each() {
    const BLOCKS: u32 = 64;
    const FIRST: u64 = 512;
    let mut guest = Guest::with_queues();
    // Every other page, and the first from its second block on: nine pieces for eight pages.
    let page = |command: u64, n: u64| guest::DATA + (command * 9 + n) * 0x2000;
    for command in 0..4 {
        let list = 0x3_0000 + command * 0x1000;
        for n in 1..9 {
            guest.store(list + (n - 1) * 8, &page(command, n).to_le_bytes());
        }
        let mut sqe = guest::block_io(nvm::READ, command as u16, BLOCKS);
        sqe.set_prps(page(command, 0) + FIRST, list);
        guest.submit(1, sqe);
    }

    for (command, sent) in (0..).zip(guest.wire.take_submitted()) {
        let mut batch = CompleteBatch::new();
        let entry = completion(sent.placement.tag, Status::SUCCESS, BLOCKS * 512);
        batch.push(&entry).unwrap();
        let spans = landing(&mut guest.half, &batch.header(), batch.control()).unwrap();

        let pieces: Vec<_> = spans.iter().map(|s| (s.offset as u64, s.len)).collect();
        let mut expected: Vec<_> = (0..9).map(|n| (page(command, n), 4096)).collect();
        expected[0] = (page(command, 0) + FIRST, 4096 - FIRST as usize);
        expected[8].1 = FIRST as usize;
        assert_eq!(pieces, expected);
    }
}
