//! Data that is on its way while the guest takes its memory back, and messages that have
//! arrived where no descriptor shows them.

use farbus_fabric::wire::{Data, FaultCode, Message, Text};
use farbus_shadow_mem::remote::RemoteError;
use farbus_vfio::nvme::{PAGE_SIZE, csts, reg};
use farbus_vfio::{Function, Iova};

use super::guest::{SHADOW_LEN, TAGS};
use super::remote::{Bench, MEMORY_LEN, with_grant};
use super::wire::status;

const PAGE: u64 = 0x8000;

/// Messages that the event loop of the agent receives in one turn.
const BURST: usize = 64;

/// Half of a page has landed when the guest does something; not a byte lands after it.
fn nothing_lands_after(take_back: impl FnOnce(&Bench)) {
    let mut bench = Bench::new();
    bench.begin_identify(PAGE);
    assert_eq!(bench.landed(PAGE), PAGE_SIZE / 2);

    take_back(&bench);
    bench.clear(PAGE);
    bench.end_identify();

    assert_eq!(bench.landed(PAGE), 0);
}

#[test]
fn nothing_lands_after_a_device_reset() {
    nothing_lands_after(|bench| bench.function.reset().unwrap());
}

#[test]
fn nothing_lands_after_a_function_level_reset() {
    nothing_lands_after(Bench::function_level_reset);
}

#[test]
fn nothing_lands_in_memory_that_was_unmapped() {
    nothing_lands_after(|bench| {
        bench
            .function
            .unmap_dma(Iova(0), MEMORY_LEN as u64)
            .unwrap();
    });
}

#[test]
fn data_lands_if_nothing_happens_meanwhile() {
    let mut bench = Bench::new();
    bench.begin_identify(PAGE);
    bench.end_identify();
    assert_eq!(bench.landed(PAGE), PAGE_SIZE);
}

#[test]
fn message_that_came_with_a_whole_burst_is_not_left_waiting() {
    let mut bench = Bench::new();
    let mut messages = vec![status(csts::RDY); BURST - 1];
    // After a long message, the next one is received together with it.
    messages.push(Message::RegisterUpdate {
        region: 0,
        offset: reg::CAP,
        data: Data::new(&[0; Data::MAX]).unwrap(),
    });
    messages.push(Message::Fault {
        code: FaultCode::Fatal,
        text: Text::truncated("x"),
    });

    bench.send(&messages);

    bench.until("the last message's effect", |bench| {
        bench.csts() & csts::CFS != 0
    });
}

#[test]
fn grants_that_cannot_be_are_refused_before_memory_is_set_aside() {
    for (tags, shadow_len) in [
        (u16::MAX, SHADOW_LEN),
        (4097, SHADOW_LEN),
        (63, SHADOW_LEN),
        (1, SHADOW_LEN),
        (TAGS, u32::MAX),
        (TAGS, (1 << 30) + 1),
        (TAGS, 4095),
        (TAGS, 0),
    ] {
        let refused = with_grant(tags, shadow_len);
        assert!(
            matches!(refused, Err(RemoteError::BadGrant { .. })),
            "{tags} tags, {shadow_len} bytes"
        );
    }
}

#[test]
fn grants_at_the_limits_are_taken() {
    for (tags, shadow_len) in [(4096, 1 << 30), (64, 1 << 20)] {
        assert!(with_grant(tags, shadow_len).is_ok());
    }
}
