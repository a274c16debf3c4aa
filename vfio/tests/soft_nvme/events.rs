//! Asynchronous events and interrupts.

use std::sync::Arc;
use std::time::Duration;

use farbus_vfio::nvme::{Status, SubmissionEntry, admin, feature, log_page};
use farbus_vfio::{Function, InterruptKind, RegionIndex};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bench::Bench;

/// That nothing comes can only be waited for.
const SOON: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(5);

fn request(bench: &mut Bench) -> u16 {
    bench
        .driver
        .submit(0, SubmissionEntry::new(admin::ASYNC_EVENT))
        .unwrap()
}

#[test]
fn an_invalid_doorbell_is_reported_once_until_the_log_is_read() {
    let mut bench = Bench::ready(512);
    let first = request(&mut bench);
    let second = request(&mut bench);
    bench.driver.ring_sq(9, 1).unwrap();
    let entry = bench.driver.wait(0, first).unwrap();
    assert_eq!((entry.status, entry.result), (Status::SUCCESS, 0x01_00_00));

    bench.driver.ring_sq(1, 64).unwrap();
    std::thread::sleep(SOON);
    assert_eq!(bench.driver.poll(0).unwrap(), None);
    let mut log = [0; 64];
    bench.driver.log_page(log_page::ERROR, 0, &mut log).unwrap();
    assert_eq!((log[0], log[8], log[10], log[11]), (2, 1, 0xff, 0xff));
    bench.driver.ring_cq(1, 5).unwrap();
    assert_eq!(bench.driver.wait(0, second).unwrap().result, 0x01_01_00);
}

#[test]
fn reading_a_log_can_leave_its_event_alone() {
    let mut bench = Bench::enabled(512);
    let first = request(&mut bench);
    let second = request(&mut bench);
    bench.driver.ring_sq(9, 1).unwrap();
    bench.driver.wait(0, first).unwrap();
    let mut command = SubmissionEntry::new(admin::GET_LOG_PAGE);
    command.set_dword(10, u32::from(log_page::ERROR) | 1 << 15 | 15 << 16);
    bench.driver.receive(0, command, &mut [0; 64]).unwrap();
    bench.driver.ring_sq(9, 1).unwrap();
    std::thread::sleep(SOON);
    assert_eq!(
        bench.driver.poll(0).unwrap(),
        None,
        "the kind must still be silent"
    );
    bench
        .driver
        .log_page(log_page::ERROR, 0, &mut [0; 64])
        .unwrap();
    bench.driver.ring_sq(9, 1).unwrap();
    bench.driver.wait(0, second).unwrap();
}

#[test]
fn an_event_that_comes_before_its_request_waits_for_it() {
    let mut bench = Bench::enabled(512);
    bench.driver.ring_cq(5, 0).unwrap();
    std::thread::sleep(SOON);
    let event = request(&mut bench);
    assert_eq!(bench.driver.wait(0, event).unwrap().result, 0x01_00_00);
}

#[test]
fn a_temperature_past_its_threshold_is_reported_when_the_host_wants_it() {
    let mut bench = Bench::enabled(512);
    let event = request(&mut bench);
    bench
        .driver
        .set_feature(feature::TEMPERATURE_THRESHOLD, 300)
        .unwrap();
    std::thread::sleep(SOON);
    assert_eq!(bench.driver.poll(0).unwrap(), None);
    bench
        .driver
        .set_feature(feature::ASYNC_EVENTS, 1 << 1)
        .unwrap();
    assert_eq!(bench.driver.wait(0, event).unwrap().result, 0x02_01_01);
    let mut log = [0; 512];
    bench.driver.log_page(log_page::SMART, 0, &mut log).unwrap();
    assert_eq!(log[0], 1 << 1);
}

#[test]
fn the_fifth_event_request_is_refused_and_the_others_stay() {
    let mut bench = Bench::enabled(512);
    let requests: Vec<_> = (0..4).map(|_| request(&mut bench)).collect();
    let fifth = request(&mut bench);
    assert_eq!(
        bench.driver.wait(0, fifth).unwrap().status,
        Status::AER_LIMIT_EXCEEDED
    );
    bench.driver.ring_sq(9, 1).unwrap();
    assert!(
        bench
            .driver
            .wait(0, requests[0])
            .unwrap()
            .status
            .is_success()
    );
}

#[test]
fn a_reset_forgets_events_and_requests() {
    let mut bench = Bench::enabled(512);
    for _ in 0..4 {
        request(&mut bench);
    }
    // Once this is answered, the requests before it have been taken in.
    bench.driver.get_feature(feature::ARBITRATION, 0).unwrap();
    bench.driver.enable().unwrap();
    let requests: Vec<_> = (0..4).map(|_| request(&mut bench)).collect();
    bench.driver.ring_sq(9, 1).unwrap();
    assert_eq!(
        bench.driver.wait(0, requests[0]).unwrap().result,
        0x01_00_00
    );
}

#[test]
fn each_queue_signals_its_own_vector() {
    let mut bench = Bench::enabled(512);
    bench.driver.create_queue_pair(1, 8, Some(3)).unwrap();
    bench.driver.create_queue_pair(2, 8, Some(16)).unwrap();
    bench.driver.create_queue_pair(3, 8, None).unwrap();
    while bench.driver.wait_interrupt(0, Duration::ZERO).unwrap() {}
    let mut flush = SubmissionEntry::new(0);
    flush.set_nsid(1);
    for (queue, vector) in [(1, 3), (2, 16)] {
        bench.driver.submit(queue, flush).unwrap();
        assert!(bench.driver.wait_interrupt(vector, LONG).unwrap());
        assert!(
            bench.driver.poll(queue).unwrap().is_some(),
            "data, completion, interrupt"
        );
    }
    bench.driver.command(3, flush).unwrap();
    for vector in 0..17 {
        assert!(
            !bench.driver.wait_interrupt(vector, Duration::ZERO).unwrap(),
            "{vector}"
        );
    }
}

#[test]
fn a_masked_vector_is_pending_and_signalled_once_when_unmasked() {
    let mut bench = Bench::ready(512);
    let function = Arc::clone(&bench.function);
    function
        .mask_interrupt(InterruptKind::Msix, 1, true)
        .unwrap();
    bench.driver.flush(1).unwrap();
    bench.driver.flush(1).unwrap();
    assert!(!bench.driver.wait_interrupt(1, Duration::ZERO).unwrap());
    let mut pending = [0; 8];
    function
        .region_read(RegionIndex::BAR0, 0x3000, &mut pending)
        .unwrap();
    assert_eq!(pending, [2, 0, 0, 0, 0, 0, 0, 0]);
    function
        .mask_interrupt(InterruptKind::Msix, 1, false)
        .unwrap();
    assert_eq!(bench.driver.event(1).unwrap().read().unwrap(), 1);
    function
        .region_read(RegionIndex::BAR0, 0x3000, &mut pending)
        .unwrap();
    assert_eq!(pending, [0; 8]);
}

#[test]
fn an_interrupt_without_a_listener_reaches_the_next_one() {
    let mut bench = Bench::ready(512);
    let function = Arc::clone(&bench.function);
    function
        .set_interrupts(InterruptKind::Msix, 1, &[None])
        .unwrap();
    bench.driver.flush(1).unwrap();
    let event = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    function
        .set_interrupts(InterruptKind::Msix, 1, &[Some(Arc::clone(&event))])
        .unwrap();
    assert_eq!(event.read().unwrap(), 1);
}

#[test]
fn a_counter_at_its_limit_holds_nothing_up() {
    let mut bench = Bench::ready(512);
    // A blocking eventfd with no room left: a write to it would wait for ever.
    let event = Arc::new(EventFd::new(0).unwrap());
    event.write(u64::MAX - 1).unwrap();
    let listeners = [Some(event)];
    bench
        .function
        .set_interrupts(InterruptKind::Msix, 1, &listeners)
        .unwrap();
    for _ in 0..10 {
        bench.driver.flush(1).unwrap();
    }
}

#[test]
fn interrupts_that_do_not_exist_are_refused() {
    let bench = Bench::cold(512);
    let function = &bench.function;
    assert!(
        function
            .set_interrupts(InterruptKind::Msix, 16, &[None, None])
            .is_err()
    );
    assert!(
        function
            .set_interrupts(InterruptKind::Msix, u32::MAX, &[None])
            .is_err()
    );
    assert!(
        function
            .set_interrupts(InterruptKind::Msi, 0, &[None])
            .is_err()
    );
    assert!(
        function
            .set_interrupts(InterruptKind::Intx, 0, &[None])
            .is_err()
    );
    assert!(
        function
            .mask_interrupt(InterruptKind::Msix, 17, true)
            .is_err()
    );
    assert!(
        function
            .set_interrupts(InterruptKind::Msix, 17, &[])
            .is_ok()
    );
}

#[test]
fn the_vector_table_is_memory_that_a_reset_masks() {
    let bench = Bench::cold(512);
    let read = |offset| {
        let mut data = [0; 4];
        bench
            .function
            .region_read(RegionIndex::BAR0, offset, &mut data)
            .unwrap();
        u32::from_le_bytes(data)
    };
    assert_eq!(
        (read(0x2000), read(0x200c), read(0x210c), read(0x211c)),
        (0, 1, 1, 0)
    );
    bench.driver.write32(0x2000, 0xfee0_0000).unwrap();
    bench.driver.write32(0x2ffc, 1).unwrap();
    bench.driver.write32(0x3000, 0xff).unwrap();
    assert_eq!(
        (read(0x2000), read(0x2ffc), read(0x3000)),
        (0xfee0_0000, 0, 0)
    );
    bench.function.reset().unwrap();
    bench.function.config_write(4, &[6, 0]).unwrap();
    assert_eq!(read(0x2000), 0);
}
