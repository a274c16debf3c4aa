//! Frames land where they belong, in order, with as many work requests as they need.

use std::time::Instant;

use farbus_fabric::wire::{
    CompleteBatch, CompleteEntry, Direction, Kind, Message, Placement, QueueId, Submit,
    SubmitBatch, Tag,
};
use farbus_fabric::{Frame, RemoteSpan};

use crate::pair::{End, GUEST, IOVA, PATIENCE, both, memory, pattern, span};
use crate::{Outcome, ensure};

/// Where memory is cut into pieces that are registered apart.
const BORDER: usize = 16 << 20;

pub(crate) fn check(address: &str) -> Outcome {
    let guest = memory("check-guest", GUEST)?;
    let (mut compute, mut device) = both(address, &guest, 1)?;
    // The first use of memory registers it; what it costs is not counted.
    write(&mut compute, &mut device)?;
    read(&mut compute, &mut device)?;

    let before = (compute.link.counters(), device.link.counters());
    write(&mut compute, &mut device)?;
    let after = (compute.link.counters(), device.link.counters());
    let sent = |f: fn(&farbus_fabric::Counters) -> u64| f(&after.0) - f(&before.0);
    println!(
        "write of 12 KiB in 3 pieces: {} message, {} work requests, {} doorbell",
        sent(|c| c.messages_sent),
        sent(|c| c.send_calls),
        sent(|c| c.doorbells)
    );
    ensure(sent(|c| c.messages_sent) == 1, "not one message")?;
    ensure(sent(|c| c.payload_sent) == 12 << 10, "not the payload once")?;
    ensure(sent(|c| c.send_calls) == 2, "not one write and one message")?;
    ensure(sent(|c| c.doorbells) == 1, "not one doorbell")?;
    ensure(
        after.1.send_calls == before.1.send_calls,
        "the device side sent",
    )?;

    let before = device.link.counters();
    read(&mut compute, &mut device)?;
    let after = device.link.counters();
    println!(
        "read of 12 KiB into 3 pieces: {} message, {} work requests, {} doorbell",
        after.messages_sent - before.messages_sent,
        after.send_calls - before.send_calls,
        after.doorbells - before.doorbells
    );
    ensure(
        after.send_calls - before.send_calls == 4,
        "not three writes and one message",
    )?;
    ensure(after.doorbells - before.doorbells == 1, "not one doorbell")?;

    // Once the device side has seen it, this side's device is done with the memory.
    let window = span(&compute.memory, 0, GUEST);
    let until = Instant::now() + PATIENCE;
    while compute
        .link
        .is_sending(&window.memory, window.offset, window.len)
    {
        ensure(Instant::now() < until, "the device keeps reading")?;
    }
    in_order(&mut compute, &mut device)?;
    large(&mut compute, &mut device)?;
    println!("frames: ok");
    Ok(())
}

fn placement(direction: Direction) -> Placement {
    Placement {
        tag: Tag(1),
        queue: QueueId(1),
        shadow_offset: 0x5000,
        data_len: 12 << 10,
        direction,
    }
}

/// Data to the device, out of three pieces of guest memory, one of which lies over a border.
fn write(compute: &mut End, device: &mut End) -> Outcome {
    let places = [0x1000, BORDER - 0x800, 0x30_0000];
    for (seed, place) in (1..).zip(places) {
        compute.fill(place, 4096, seed)?;
    }
    let mut batch = SubmitBatch::new();
    batch.push(&placement(Direction::ToDevice), &[0; 64], &[])?;
    compute.link.send(&Frame {
        header: batch.header(),
        control: batch.control(),
        payload: &places.map(|place| span(&compute.memory, place, 4096)),
        remote: &[RemoteSpan {
            address: 0x5000,
            len: 12 << 10,
        }],
    })?;
    let heard = device.hear(1)?;
    ensure(heard[0].0.kind == Kind::Submit, "no Submit")?;
    for (n, seed) in (0..).zip(1..=3) {
        let landed = device.bytes(0x5000 + n * 4096, 4096)?;
        ensure(landed == pattern(4096, seed), format!("piece {n} differs"))?;
    }
    Ok(())
}

/// Data from the device, into three pieces of guest memory.
fn read(compute: &mut End, device: &mut End) -> Outcome {
    let places = [0x2000, 0x40_0000, BORDER + 0x1000].map(|at: usize| at as u64 + IOVA);
    let segments = places.map(|address| RemoteSpan { address, len: 4096 });
    let mut batch = SubmitBatch::new();
    batch.push(&placement(Direction::FromDevice), &[0; 64], &segments)?;
    compute
        .link
        .send(&Frame::plain(batch.header(), batch.control()))?;
    let heard = device.hear(1)?;
    let (header, control) = &heard[0];
    let entry = Submit::decode(header, control)?.entries().next();
    let named: Vec<RemoteSpan> = entry.ok_or("no entry")?.segments.collect();
    ensure(named == segments, "other segments")?;
    device.fill(0x5000, 12 << 10, 7)?;
    complete(device, &named)?;
    compute.hear(1)?;
    let expected = pattern(12 << 10, 7);
    for (place, expected) in places.iter().zip(expected.chunks(4096)) {
        let landed = compute.bytes((place - IOVA) as usize, 4096)?;
        ensure(
            landed == expected,
            format!("the data at {place:#x} differs"),
        )?;
    }
    Ok(())
}

/// A completion with 12 KiB of data.
pub(crate) fn complete(
    device: &mut End,
    remote: &[RemoteSpan],
) -> Result<(), farbus_fabric::FabricError> {
    let mut batch = CompleteBatch::new();
    batch.push(&CompleteEntry {
        tag: Tag(1),
        queue: QueueId(1),
        status: 0,
        data_len: 12 << 10,
        result: 0,
    })?;
    device.link.send(&Frame {
        header: batch.header(),
        control: batch.control(),
        payload: &[span(&device.memory, 0x5000, 12 << 10)],
        remote,
    })
}

/// Far more messages than a ring holds, each way, from a side that heeds congestion to one that
/// is late.
fn in_order(compute: &mut End, device: &mut End) -> Outcome {
    const COUNT: u64 = 3000;
    let (mut next, mut heard, mut congested) = ([0; 2], [0; 2], 0);
    let until = Instant::now() + 6 * PATIENCE;
    while heard != [COUNT; 2] {
        ensure(Instant::now() < until, "messages do not come")?;
        for (n, end) in [&mut *compute, &mut *device].into_iter().enumerate() {
            end.link.flush()?;
            while next[n] < COUNT && !end.link.is_congested() {
                end.send(&Message::Ping { nonce: next[n] })?;
                next[n] += 1;
            }
            congested += u64::from(end.link.is_congested());
        }
        for (n, end) in [&mut *device, &mut *compute].into_iter().enumerate() {
            let mut sink = crate::pair::Heard::default();
            for _ in 0..100 {
                end.link.receive(&mut sink)?;
            }
            for (header, control) in sink.0 {
                let message = Message::decode(&header, &control)?;
                let expected = Message::Ping { nonce: heard[n] };
                ensure(
                    message == expected,
                    format!("{message:?}, not {expected:?}"),
                )?;
                heard[n] += 1;
            }
        }
    }
    ensure(congested > 0, "nothing was ever full")?;
    println!("{COUNT} messages each way: in order");
    Ok(())
}

/// Messages of tens of kilobytes, which wrap around the ring.
fn large(compute: &mut End, device: &mut End) -> Outcome {
    for n in 0..100_u8 {
        let notice = Message::EngineNotice {
            blob: pattern(30_000 + usize::from(n) * 7, n),
        };
        device.send(&notice)?;
        let heard = compute.hear(1)?;
        let message = Message::decode(&heard[0].0, &heard[0].1)?;
        ensure(message == notice, "a long message differs")?;
    }
    println!("100 long messages: whole");
    Ok(())
}
