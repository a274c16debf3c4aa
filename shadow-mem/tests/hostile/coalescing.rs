//! Interrupts that the guest has asked to be held back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_vfio::nvme::{Status, SubmissionEntry, admin, feature};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::guest::{CC_ON, Guest, read};

/// Three completions, or 25.5 ms.
const SETTING: u32 = 2 | 255 << 8;

fn features(opcode: u8, dword10: u32, dword11: u32) -> SubmissionEntry {
    let mut sqe = SubmissionEntry::new(opcode);
    sqe.set_dword(10, dword10);
    sqe.set_dword(11, dword11);
    sqe
}

fn ask(guest: &mut Guest, sqe: SubmissionEntry) -> (Status, u64) {
    guest.submit(0, sqe);
    assert!(guest.wire.take_submitted().is_empty(), "it stays here");
    let entry = guest.completions(0)[0];
    (entry.status, entry.result)
}

/// A guest with a pair of queues, what it was set to, and its interrupts 0 and 1.
fn guest(setting: u32) -> (Guest, [Arc<EventFd>; 2]) {
    let mut guest = Guest::with_queues();
    let events = [(); 2].map(|()| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()));
    guest
        .half
        .set_interrupts(0, &events.clone().map(Some))
        .unwrap();
    let set = features(
        admin::SET_FEATURES,
        feature::INTERRUPT_COALESCING.into(),
        setting,
    );
    assert_eq!(ask(&mut guest, set).0, Status::SUCCESS);
    let _ = events[1].read();
    (guest, events)
}

fn complete(guest: &mut Guest, count: u16) {
    for cid in 0..count {
        guest.submit(1, read(cid));
        guest.complete_all();
    }
    guest.completions(1);
}

#[test]
fn interrupts_wait_for_the_threshold() {
    let (mut guest, [_, event]) = guest(SETTING);
    complete(&mut guest, 2);
    assert!(event.read().is_err(), "two are not enough");
    assert!(guest.half.due().is_some());

    complete(&mut guest, 1);

    assert_eq!(event.read().unwrap(), 1);
    assert!(guest.half.due().is_none());
}

#[test]
fn no_interrupt_waits_for_longer_than_the_time() {
    let (mut guest, [_, event]) = guest(0x0fff);
    let before = Instant::now();
    complete(&mut guest, 1);
    let due = guest.half.due().unwrap();
    assert!(due >= before + Duration::from_micros(1500));

    while Instant::now() < due {
        std::hint::spin_loop();
    }
    guest.half.signal_interrupts();

    assert_eq!(event.read().unwrap(), 1);
}

#[test]
fn without_a_time_or_a_threshold_nothing_waits() {
    for setting in [0, 0x00ff, 0xff00] {
        let (mut guest, [_, event]) = guest(setting);
        complete(&mut guest, 1);
        assert_eq!(event.read().unwrap(), 1, "{setting:#x}");
    }
}

#[test]
fn the_admin_queue_and_exempt_vectors_do_not_wait() {
    let (mut guest, [admin_event, event]) = guest(SETTING);
    let _ = admin_event.read();
    let exempt = features(
        admin::SET_FEATURES,
        feature::INTERRUPT_VECTOR.into(),
        1 | 1 << 16,
    );

    assert_eq!(ask(&mut guest, exempt).0, Status::SUCCESS);
    assert_eq!(admin_event.read().unwrap(), 1);
    complete(&mut guest, 1);
    assert_eq!(event.read().unwrap(), 1);
}

#[test]
fn the_guest_reads_back_what_it_has_set() {
    let (mut guest, _) = guest(SETTING);
    let id = u32::from(feature::INTERRUPT_COALESCING);
    let vector = u32::from(feature::INTERRUPT_VECTOR);
    for (dword10, dword11, answer) in [
        (id, 0, u64::from(SETTING)),
        (id | 1 << 8, 0, 0),
        (id | 3 << 8, 0, 4),
        (vector, 1, 1),
        (vector | 1 << 8, 2, 2),
    ] {
        let get = features(admin::GET_FEATURES, dword10, dword11);
        assert_eq!(ask(&mut guest, get), (Status::SUCCESS, answer));
    }
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let (mut guest, _) = guest(0);
    let id = u32::from(feature::INTERRUPT_COALESCING);
    let vector = u32::from(feature::INTERRUPT_VECTOR);
    for (opcode, dword10, dword11, status) in [
        (
            admin::SET_FEATURES,
            id | 1 << 31,
            1,
            Status::FEATURE_NOT_SAVEABLE,
        ),
        (admin::SET_FEATURES, vector, 0xffff, Status::INVALID_FIELD),
        (admin::GET_FEATURES, vector, 8, Status::INVALID_FIELD),
        (admin::GET_FEATURES, id | 7 << 8, 0, Status::INVALID_FIELD),
    ] {
        assert_eq!(
            ask(&mut guest, features(opcode, dword10, dword11)).0,
            status
        );
    }
}

#[test]
fn a_controller_reset_holds_nothing_back_any_more() {
    let (mut guest, [_, event]) = guest(SETTING);
    complete(&mut guest, 1);
    guest.write32(0x14, CC_ON & !1);
    guest.pump();
    guest.device_says(0);
    assert!(guest.half.due().is_none());

    guest.enable();
    guest.create_queues();
    let _ = event.read();
    complete(&mut guest, 1);

    assert_eq!(event.read().unwrap(), 1);
}
