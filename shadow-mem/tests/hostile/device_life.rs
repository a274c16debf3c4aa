//! Controllers that start, stop and fail as they should not.

use std::time::{Duration, Instant};

use farbus_fabric::wire::{FaultCode, Message, RequestId};
use farbus_shadow_mem::nvme::device::{DeviceError, DeviceHalf};
use farbus_vfio::nvme::{cc, csts};

use super::device::{Claim, LIMITS, read};
use super::fake_nvme::FakeNvme;
use super::guest::CC_ON;
use super::wire::configure;

/// What `CAP.TO` of the fake controller allows, and the least that the engine gives.
const TIMEOUT: Duration = Duration::from_secs(1);

#[test]
fn enable_while_the_controller_is_slow_to_stop_starts_it_when_it_has_stopped() {
    let device = FakeNvme::new();
    device.state().faults.reads_to_stop = 20;
    let mut claim = Claim::of(device);
    claim.enable();

    claim.tell(&configure(CC_ON & !cc::EN)).unwrap();
    claim.tell(&configure(CC_ON)).unwrap();

    claim.until_status(csts::RDY);
    claim.create_queues();
    claim.assert_io_works();
}

#[test]
fn last_word_counts_while_the_controller_is_slow_to_stop() {
    let device = FakeNvme::new();
    device.state().faults.reads_to_stop = 20;
    let mut claim = Claim::of(device.clone());
    claim.enable();
    for enable in [false, true, false, true, false] {
        let value = CC_ON & !cc::EN | u32::from(enable);
        claim.tell(&configure(value)).unwrap();
    }

    claim.until_status(0);

    for _ in 0..50 {
        claim.half.tick();
    }
    claim.half.pump(&mut claim.session).unwrap();
    assert!(claim.wire.take().is_empty());
    claim.enable();
    claim.create_queues();
    claim.assert_io_works();
}

#[test]
fn controller_with_a_fatal_status_can_be_claimed() {
    let device = FakeNvme::new();
    {
        let mut state = device.state();
        state.is_fatal = true;
        state.faults.reads_to_stop = 20;
    }
    let mut claim = Claim::of(device);
    claim.enable();
    claim.create_queues();
    claim.assert_io_works();
}

#[test]
fn controller_that_shows_a_fatal_status_is_stopped_and_works_again() {
    let device = FakeNvme::new();
    device.state().faults.reads_to_stop = 20;
    let mut claim = Claim::of(device.clone());
    claim.enable();
    device.state().is_fatal = true;
    claim.until_status(csts::RDY | csts::CFS);

    claim.tell(&configure(CC_ON & !cc::EN)).unwrap();
    claim.until_status(0);

    claim.enable();
    claim.create_queues();
    claim.assert_io_works();
}

#[test]
fn registers_of_all_ones_are_a_fault() {
    let mut claim = Claim::with_queues();
    claim.submit(3, 1, read(8)).unwrap();

    claim.device.state().faults.is_unplugged = true;

    assert_eq!(claim.until_fault(), FaultCode::Gone);
}

#[test]
fn guest_can_disable_a_controller_that_is_gone() {
    let mut claim = Claim::with_queues();
    {
        let mut state = claim.device.state();
        state.faults.is_unplugged = true;
        state.faults.resets_fail = true;
    }
    claim.until_fault();

    claim.tell(&configure(CC_ON & !cc::EN)).unwrap();

    claim.until_status(0);
}

#[test]
fn controller_that_comes_back_works_after_a_reset() {
    let mut claim = Claim::with_queues();
    claim.device.state().faults.is_unplugged = true;
    claim.until_fault();
    claim.device.state().faults.is_unplugged = false;

    claim
        .tell(&Message::Reset {
            request: RequestId(5),
        })
        .unwrap();

    let outcome = claim.until("a reset", |message| match message {
        Message::ResetDone { request, outcome } => Some((*request, outcome.is_ok())),
        _ => None,
    });
    assert_eq!(outcome, (RequestId(5), true));
    claim.enable();
    claim.create_queues();
    claim.assert_io_works();
}

#[test]
fn controller_that_never_becomes_ready_is_a_fault_when_its_time_is_up() {
    let device = FakeNvme::new();
    let mut claim = Claim::of(device.clone());
    device.state().faults.never_starts = true;
    let start = Instant::now();

    claim.tell(&configure(CC_ON)).unwrap();

    assert_eq!(claim.until_fault(), FaultCode::Unresponsive);
    assert!(start.elapsed() >= TIMEOUT);
    assert!(start.elapsed() < TIMEOUT * 3, "{:?}", start.elapsed());
}

#[test]
fn controller_that_never_becomes_ready_cannot_be_claimed() {
    let device = FakeNvme::new();
    device.state().faults.never_starts = true;
    let start = Instant::now();

    let refused = DeviceHalf::open(device.clone(), LIMITS);

    assert!(matches!(refused, Err(DeviceError::Controller(_))));
    assert!(start.elapsed() < TIMEOUT * 3, "{:?}", start.elapsed());
    assert!(device.state().windows.is_empty());
}

#[test]
fn device_of_another_class_is_refused_before_it_is_touched() {
    let device = FakeNvme::new();
    device.state().faults.is_no_nvme = true;

    let refused = DeviceHalf::open(device.clone(), LIMITS);

    assert!(matches!(refused, Err(DeviceError::NoEngine { class: 0 })));
    assert_eq!(device.state().resets, 0);
    assert!(device.state().windows.is_empty());
}

#[test]
fn controller_that_never_stops_is_a_fault_when_its_time_is_up() {
    let mut claim = Claim::with_queues();
    claim.device.state().faults.reads_to_stop = u32::MAX;

    claim.tell(&configure(CC_ON & !cc::EN)).unwrap();

    assert_eq!(claim.until_fault(), FaultCode::Unresponsive);
}

#[test]
fn every_way_out_of_io_gives_all_tags_back() {
    type WayOut = (&'static str, fn(&mut Claim));
    let ways: [WayOut; 4] = [
        ("disable", |claim| {
            claim.tell(&configure(CC_ON & !cc::EN)).unwrap();
            claim.until_status(0);
        }),
        ("reset", |claim| {
            let request = RequestId(1);
            claim.tell(&Message::Reset { request }).unwrap();
        }),
        ("a fault, then a disable", |claim| {
            claim.device.state().faults.is_unplugged = true;
            claim.until_fault();
            claim.device.state().faults.is_unplugged = false;
            claim.tell(&configure(CC_ON & !cc::EN)).unwrap();
            claim.until_status(0);
        }),
        ("a fault, then an enable", |claim| {
            claim.device.state().faults.is_unplugged = true;
            claim.until_fault();
            claim.device.state().faults.is_unplugged = false;
        }),
    ];
    for (way, leave) in ways {
        let mut claim = Claim::with_queues();
        for tag in 0..31 {
            claim.submit(tag, 1, read(8)).unwrap();
        }

        leave(&mut claim);

        claim.enable();
        claim.create_queues();
        assert!(claim.completed().is_empty(), "{way}");
        for tag in 0..31 {
            let taken = claim.submit(tag, 1, read(8));
            assert!(taken.is_ok(), "{way}: {}", taken.unwrap_err());
        }
    }
}

#[test]
fn end_of_a_claim_resets_the_function_and_takes_its_memory() {
    let claim = Claim::with_queues();
    let device = claim.device.clone();
    let resets = device.state().resets;

    drop(claim);

    assert!(device.state().resets > resets);
    assert!(device.state().windows.is_empty());
}

#[test]
fn answers_that_nobody_takes_stop_the_questions() {
    let mut claim = Claim::of(FakeNvme::new());
    claim.wire.set_congested(true);
    let mut asked = 0;
    while !claim.half.is_backlogged() {
        claim.tell(&Message::Ping { nonce: asked }).unwrap();
        asked += 1;
        assert!(asked < 1000);
    }
    assert!(claim.wire.take().is_empty());

    claim.wire.set_congested(false);
    claim.half.pump(&mut claim.session).unwrap();

    assert!(!claim.half.is_backlogged());
    assert_eq!(claim.wire.take_messages().len() as u64, asked);
}
