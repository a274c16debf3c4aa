//! The link dies while the guest's controller is being rebuilt on it.

use farbus_vfio::nvme::{Status, admin, csts, nvm};

use super::guest::{Guest, block_io, create, delete, read, write};

/// The opcodes of what was sent, all of it admin commands.
fn opcodes(guest: &Guest) -> Vec<u8> {
    let sent = guest.wire.take_submitted();
    assert!(sent.iter().all(|command| command.placement.queue.0 == 0));
    sent.iter().map(|command| command.sqe.opcode()).collect()
}

#[test]
fn each_rebuild_takes_every_step_once() {
    let mut guest = Guest::with_queues();
    // Cut once before each of the steps of a rebuild is answered.
    for answered in 0..2 {
        guest.new_link();
        guest.device_says(csts::RDY);
        for _ in 0..answered {
            guest.complete_all();
        }
    }
    guest.new_link();
    guest.device_says(csts::RDY);

    assert_eq!(guest.complete_all()[0].sqe.opcode(), admin::CREATE_CQ);
    assert_eq!(guest.complete_all()[0].sqe.opcode(), admin::CREATE_SQ);

    assert!(opcodes(&guest).is_empty());
    guest.assert_nothing_is_held();
    guest.submit(1, read(1));
    guest.complete_all();
    assert_eq!(guest.completions(1)[0].cid, 1);
}

#[test]
fn commands_that_wait_through_cut_rebuilds_complete_once() {
    let mut guest = Guest::with_queues();
    guest.submit(1, write(7));
    for answered in 0..3 {
        guest.new_link();
        guest.device_says(csts::RDY);
        for _ in 0..answered {
            let tag = guest.wire.take_submitted()[0].placement.tag;
            guest.complete(tag, Status::SUCCESS).unwrap();
        }
    }

    let again = guest.complete_all();

    assert_eq!(again.len(), 1);
    assert_eq!(again[0].placement.queue.0, 1);
    let outcomes = guest.completions(1);
    assert_eq!(outcomes.len(), 1);
    assert_eq!((outcomes[0].cid, outcomes[0].status), (7, Status::SUCCESS));
    guest.assert_nothing_is_held();
}

#[test]
fn queues_with_commands_that_are_being_deleted_are_not_used_after_the_deletion() {
    let mut guest = Guest::with_queues();
    // The deletion comes to a lower tag than the commands that follow it on the new link.
    guest.submit(1, read(1));
    guest.submit(1, read(2));
    guest.submit(0, delete(admin::DELETE_SQ, 1));
    let sent = guest.wire.take_submitted();
    assert_eq!(sent.len(), 3);

    guest.new_link();
    guest.device_says(csts::RDY);
    guest.complete_all();
    guest.complete_all();

    // A batch may be acted on before the next one comes, so what names the queue must not
    // follow its deletion.
    let again = guest.complete_all();
    assert_eq!(again.len(), 1);
    assert_eq!(again[0].sqe.opcode(), admin::DELETE_SQ);
    let outcomes: Vec<_> = guest.completions(1).iter().map(|e| e.status).collect();
    assert_eq!(outcomes, [Status::ABORTED_SQ_DELETION; 2]);
    guest.assert_nothing_is_held();
}

#[test]
fn creation_that_was_under_way_is_done_on_the_new_link() {
    let mut guest = Guest::enabled();
    guest.submit(0, create(admin::CREATE_CQ, 1));

    guest.new_link();
    guest.device_says(csts::RDY);

    let again = guest.complete_all();
    assert_eq!(again.len(), 1);
    assert_eq!(again[0].sqe.opcode(), admin::CREATE_CQ);
    assert_eq!(guest.completions(0)[0].status, Status::SUCCESS);
    guest.assert_nothing_is_held();
}

#[test]
fn step_that_the_new_device_refuses_fails_the_controller_and_holds_nothing() {
    let mut guest = Guest::with_queues();
    guest.submit(1, block_io(nvm::READ, 1, 8));
    guest.new_link();
    guest.device_says(csts::RDY);
    let step = guest.wire.take_submitted()[0].placement.tag;

    guest.complete(step, Status::INTERNAL_ERROR).unwrap();

    assert_eq!(guest.csts() & csts::CFS, csts::CFS);
    guest.write32(farbus_vfio::nvme::reg::CC, 0);
    guest.pump();
    guest.device_says(0);
    guest.assert_nothing_is_held();
    guest.enable();
    guest.create_queues();
}

#[test]
fn guest_that_resets_in_the_middle_of_a_rebuild_starts_over() {
    let mut guest = Guest::with_queues();
    guest.submit(1, read(1));
    guest.new_link();
    guest.device_says(csts::RDY);
    assert_eq!(opcodes(&guest), [admin::CREATE_CQ]);

    guest.half.reset();
    guest.pump();
    super::guest_queues::reset_is_done(&mut guest);

    guest.assert_nothing_is_held();
    guest.enable();
    guest.create_queues();
}
