//! A guest that changes its mind about its controller faster than the device can follow.

use farbus_fabric::wire::Message;
use farbus_vfio::nvme::{cc, csts, reg};

use super::guest::{CC_ON, Guest, read};
use super::guest_queues::reset_is_done;
use super::wire::register_of;

/// The values of CC that were sent.
fn configurations(guest: &Guest) -> Vec<u32> {
    let messages = guest.wire.take_messages();
    messages
        .iter()
        .filter_map(register_of)
        .filter_map(|(offset, value)| (offset == reg::CC).then_some(value))
        .collect()
}

#[test]
fn disable_while_there_is_no_link_ends_at_once() {
    let mut guest = Guest::with_queues();
    guest.submit(1, read(1));
    guest.half.link_lost();

    guest.write32(reg::CC, CC_ON & !cc::EN);

    assert_eq!(guest.csts(), 0);
    guest.assert_nothing_is_held();
}

#[test]
fn disable_that_waits_for_the_device_ends_with_its_link() {
    let mut guest = Guest::with_queues();
    guest.submit(1, read(1));
    guest.write32(reg::CC, CC_ON & !cc::EN);
    guest.pump();
    assert_eq!(guest.csts(), csts::RDY);

    guest.half.link_lost();

    assert_eq!(guest.csts(), 0);
    guest.assert_nothing_is_held();
}

#[test]
fn enable_while_there_is_no_link_is_done_on_the_next_one() {
    let mut guest = Guest::new();
    guest.half.link_lost();
    guest.begin_enable();

    guest.new_link();

    assert_eq!(configurations(&guest), [CC_ON]);
    guest.device_says(csts::RDY);
    assert_eq!(guest.csts(), csts::RDY);
}

#[test]
fn enable_before_the_disable_is_done_waits_for_the_device_to_stop() {
    let mut guest = Guest::with_queues();
    guest.submit(1, read(1));
    guest.write32(reg::CC, CC_ON & !cc::EN);
    guest.pump();
    guest.begin_enable();
    guest.pump();
    assert_eq!(configurations(&guest), [0]);
    // Of before the disable.
    guest.device_says(csts::RDY);
    assert_eq!(guest.csts(), 0);

    guest.device_says(0);

    assert_eq!(configurations(&guest), [CC_ON]);
    guest.assert_nothing_is_held();
    guest.device_says(csts::RDY);
    assert_eq!(guest.csts(), csts::RDY);
    guest.create_queues();
}

#[test]
fn reset_while_the_device_stops_is_answered_at_once_and_followed_by_one_start() {
    let mut guest = Guest::with_queues();
    guest.submit(1, read(1));
    guest.write32(reg::CC, CC_ON & !cc::EN);
    guest.pump();

    guest.half.reset();
    guest.pump();
    assert_eq!(guest.csts(), 0);
    guest.begin_enable();
    guest.pump();
    // Of before the reset: neither means anything any more.
    guest.device_says(0);
    guest.device_says(csts::RDY);
    assert_eq!(guest.csts(), 0);
    reset_is_done(&mut guest);

    assert_eq!(configurations(&guest), [CC_ON]);
    guest.device_says(csts::RDY);
    assert_eq!(guest.csts(), csts::RDY);
    guest.create_queues();
    guest.assert_nothing_is_held();
}

#[test]
fn answer_to_another_reset_is_ignored() {
    let mut guest = Guest::with_queues();
    guest.half.reset();
    guest.pump();
    guest.wire.take();
    guest.half.reset();
    guest.pump();
    guest.begin_enable();
    guest.pump();

    let stale = Message::ResetDone {
        request: farbus_fabric::wire::RequestId(77),
        outcome: Ok(()),
    };
    super::wire::tell(&mut guest.half, &stale).unwrap();
    guest.pump();

    assert!(configurations(&guest).is_empty());
}

#[test]
fn guest_that_changes_its_mind_while_the_network_is_stuck_adds_nothing_to_what_waits() {
    let mut guest = Guest::with_queues();
    guest.wire.take();
    guest.wire.set_congested(true);

    for _ in 0..10_000 {
        guest.write32(reg::CC, CC_ON & !cc::EN);
        guest.pump();
        guest.write32(reg::CC, CC_ON);
        guest.pump();
        guest.half.reset();
        guest.pump();
    }

    assert!(guest.wire.take().is_empty());
}

#[test]
fn device_that_reports_a_fatal_status_shows_it_to_the_guest_until_it_resets() {
    let mut guest = Guest::with_queues();
    guest.submit(1, read(1));
    guest.device_says(csts::RDY | csts::CFS);
    assert_eq!(guest.csts() & csts::CFS, csts::CFS);

    guest.write32(reg::CC, CC_ON & !cc::EN);
    guest.pump();
    guest.device_says(0);
    assert_eq!(guest.csts(), 0);
    guest.enable();
    guest.create_queues();

    guest.assert_nothing_is_held();
}
