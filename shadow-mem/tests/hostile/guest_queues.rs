//! What a guest does to its queues at the worst moment.

use std::sync::Arc;

use farbus_vfio::nvme::{Status, admin, csts, nvm, reg};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::guest::{CC_ON, ENTRIES, Guest, block_io, create, delete, read, write};

#[test]
fn completion_queue_at_the_end_of_the_address_space_fails_the_controller_alone() {
    let mut guest = Guest::new();
    // Commands with which nothing can be done but answer them.
    guest.store(0, &[0xff; 0x1000]);
    guest.write32(reg::AQA, 0x0fff_0fff);
    guest.write32(reg::ACQ, 0xffff_f000);
    guest.write32(reg::ACQ + 4, 0xffff_ffff);
    guest.write32(reg::CC, CC_ON);
    guest.pump();
    guest.device_says(csts::RDY);

    guest.ring_sq(0, 64);
    guest.pump();

    assert_eq!(guest.csts() & csts::CFS, csts::CFS);
}

#[test]
fn submission_queue_at_the_end_of_the_address_space_fails_the_controller_alone() {
    let mut guest = Guest::new();
    guest.write32(reg::AQA, 0x0fff_0fff);
    guest.write32(reg::ASQ, 0xffff_f000);
    guest.write32(reg::ASQ + 4, 0xffff_ffff);
    guest.write32(reg::ACQ, 0x1000);
    guest.write32(reg::CC, CC_ON);
    guest.pump();
    guest.device_says(csts::RDY);

    guest.ring_sq(0, 4095);
    guest.pump();

    assert_eq!(guest.csts() & csts::CFS, csts::CFS);
}

#[test]
fn doorbell_of_a_queue_that_is_being_deleted_sends_nothing() {
    let mut guest = Guest::with_queues();
    guest.submit(1, read(1));
    guest.submit(0, delete(admin::DELETE_SQ, 1));
    let sent = guest.wire.take_submitted();
    guest.submit(1, read(2));
    assert_eq!(sent.len(), 2);
    assert!(guest.wire.take_submitted().is_empty());

    // The device side ends what was at the device, then the deletion.
    let [io, deletion] = [sent[0].placement.tag, sent[1].placement.tag];
    guest.complete(io, Status::ABORTED_SQ_DELETION).unwrap();
    guest.complete(deletion, Status::SUCCESS).unwrap();

    let outcomes: Vec<_> = guest.completions(1).iter().map(|e| e.status).collect();
    assert_eq!(outcomes, [Status::ABORTED_SQ_DELETION]);
    assert_eq!(guest.completions(0)[0].status, Status::SUCCESS);
    guest.submit(1, read(3));
    assert!(guest.wire.take_submitted().is_empty());
    guest.assert_nothing_is_held();
}

#[test]
fn deletion_that_the_device_refuses_lets_the_queue_go_on() {
    let mut guest = Guest::with_queues();
    guest.submit(0, delete(admin::DELETE_SQ, 1));
    let deletion = guest.wire.take_submitted()[0].placement.tag;
    guest.submit(1, read(1));
    assert!(guest.wire.take_submitted().is_empty());

    guest.complete(deletion, Status::INVALID_QID).unwrap();

    guest.complete_all();
    assert_eq!(guest.completions(1)[0].cid, 1);
    guest.assert_nothing_is_held();
}

#[test]
fn queue_that_is_being_created_cannot_be_created_again() {
    let mut guest = Guest::with_queues();
    for opcode in [admin::CREATE_CQ, admin::CREATE_SQ] {
        guest.submit(0, create(opcode, 2));
        let first = guest.wire.take_submitted();

        // The device side may have created it by now; its answer has not come.
        guest.submit(0, create(opcode, 2));

        assert!(guest.wire.take_submitted().is_empty());
        assert_eq!(guest.completions(0)[0].status, Status::INVALID_QID);
        guest
            .complete(first[0].placement.tag, Status::SUCCESS)
            .unwrap();
        assert_eq!(guest.completions(0)[0].status, Status::SUCCESS);
    }
    guest.assert_nothing_is_held();
}

#[test]
fn stale_completion_finds_no_command_of_a_queue_that_was_made_again() {
    let mut guest = Guest::with_queues();
    guest.submit(1, read(1));
    guest.submit(0, delete(admin::DELETE_SQ, 1));
    let sent = guest.wire.take_submitted();
    let [io, deletion] = [sent[0].placement.tag, sent[1].placement.tag];
    guest.complete(io, Status::ABORTED_SQ_DELETION).unwrap();
    guest.complete(deletion, Status::SUCCESS).unwrap();
    guest.submit(0, create(admin::CREATE_SQ, 1));
    guest.complete_all();
    guest.completions(1);

    let stale = guest.complete(io, Status::SUCCESS);

    assert!(stale.is_err());
    assert!(guest.completions(1).is_empty());
}

#[test]
fn held_completions_of_a_deleted_queue_give_their_tags_back() {
    let mut guest = Guest::with_queues();
    // One entry more than the completion queue takes: the guest does not look at it.
    for cid in 0..2 * ENTRIES as u16 {
        guest.submit(1, read(cid));
        guest.complete_all();
    }
    assert!(guest.half.outstanding().commands > 0);

    guest.submit(0, delete(admin::DELETE_SQ, 1));
    guest.complete_all();
    guest.submit(0, delete(admin::DELETE_CQ, 1));
    guest.complete_all();

    assert_eq!(guest.completions(0).len(), 2);
    guest.assert_nothing_is_held();
}

#[test]
fn interrupts_of_before_the_eventfds_are_signalled_when_these_appear() {
    let mut guest = Guest::with_queues();
    guest.submit(1, read(1));
    guest.complete_all();
    let event = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());

    guest
        .half
        .set_interrupts(1, &[Some(event.clone())])
        .unwrap();

    assert_eq!(event.read().unwrap(), 1);
}

#[test]
fn interrupts_survive_eventfds_that_are_taken_away_for_a_moment() {
    let mut guest = Guest::with_queues();
    let event = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    guest
        .half
        .set_interrupts(1, &[Some(event.clone())])
        .unwrap();
    guest.half.set_interrupts(1, &[None]).unwrap();
    guest.submit(1, read(1));
    guest.complete_all();
    assert!(event.read().is_err());

    guest
        .half
        .set_interrupts(1, &[Some(event.clone())])
        .unwrap();

    assert_eq!(event.read().unwrap(), 1);
}

#[test]
fn masked_interrupt_without_an_eventfd_waits_for_both() {
    let mut guest = Guest::with_queues();
    let event = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    guest.half.mask_interrupt(1, true).unwrap();
    guest.submit(1, read(1));
    guest.complete_all();
    guest
        .half
        .set_interrupts(1, &[Some(event.clone())])
        .unwrap();
    assert!(event.read().is_err());

    guest.half.mask_interrupt(1, false).unwrap();

    assert_eq!(event.read().unwrap(), 1);
}

#[test]
fn interrupt_that_is_unmasked_before_its_eventfd_appears_is_not_lost() {
    let mut guest = Guest::with_queues();
    let event = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    guest.half.mask_interrupt(1, true).unwrap();
    guest.submit(1, read(1));
    guest.complete_all();
    guest.half.mask_interrupt(1, false).unwrap();

    guest
        .half
        .set_interrupts(1, &[Some(event.clone())])
        .unwrap();

    assert_eq!(event.read().unwrap(), 1);
}

#[test]
fn every_way_out_of_io_gives_tags_and_shadow_back() {
    type WayOut = (&'static str, fn(&mut Guest));
    let ways: [WayOut; 7] = [
        ("the device answers", |guest| {
            guest.complete_all();
        }),
        ("disable", |guest| {
            guest.write32(reg::CC, CC_ON & !1);
            guest.pump();
            guest.device_says(0);
        }),
        ("disable, and the device completes all the same", |guest| {
            guest.write32(reg::CC, CC_ON & !1);
            guest.complete_all();
            guest.pump();
            guest.device_says(0);
        }),
        ("function level reset", |guest| {
            guest.half.reset();
            guest.pump();
            reset_is_done(guest);
        }),
        ("reset, and the link is lost before its answer", |guest| {
            guest.half.reset();
            guest.pump();
            guest.half.link_lost();
        }),
        ("link lost, then a disable", |guest| {
            guest.half.link_lost();
            guest.write32(reg::CC, CC_ON & !1);
        }),
        ("a device that fails, then a disable", |guest| {
            guest.device_says(csts::RDY | csts::CFS);
            guest.write32(reg::CC, CC_ON & !1);
            guest.pump();
            guest.device_says(0);
        }),
    ];
    for (way, leave) in ways {
        let mut guest = Guest::with_queues();
        for cid in 0..15 {
            guest.submit(1, block_io(nvm::READ, cid, 8));
            guest.submit(1, write(100 + cid));
        }
        assert!(guest.half.outstanding().commands > 0, "{way}");

        leave(&mut guest);

        let held = guest.half.outstanding();
        assert_eq!((held.commands, held.shadow_pages), (0, 0), "{way}");
    }
}

/// The device side answers a reset that was asked for.
pub(crate) fn reset_is_done(guest: &mut Guest) {
    use farbus_fabric::wire::Message;
    let request = guest
        .wire
        .take_messages()
        .into_iter()
        .find_map(|message| match message {
            Message::Reset { request } => Some(request),
            _ => None,
        })
        .unwrap();
    let done = Message::ResetDone {
        request,
        outcome: Ok(()),
    };
    super::wire::tell(&mut guest.half, &done).unwrap();
    guest.pump();
}
