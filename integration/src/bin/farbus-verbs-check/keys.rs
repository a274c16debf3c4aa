//! What the device refuses: writes with keys that are dead, or that belong to another connection.

use farbus_fabric::Frame;
use farbus_fabric::RemoteSpan;
use farbus_fabric::verbs::raw::{Access, Status};
use farbus_fabric::wire::{Direction, Placement, QueueId, SubmitBatch, Tag};

use crate::bare::Bare;
use crate::frames::complete;
use crate::pair::{End, GUEST, IOVA, both, memory, pattern};
use crate::{Outcome, ensure};

pub(crate) fn check(address: &str) -> Outcome {
    revoked(address)?;
    fenced_off(address)?;
    bare_keys(address)?;
    println!("keys: ok");
    Ok(())
}

/// Has the device side know the key of the first piece of guest memory.
fn expose(compute: &mut End, device: &mut End) -> Outcome<RemoteSpan> {
    let segment = RemoteSpan {
        address: IOVA + 0x1000,
        len: 12 << 10,
    };
    let placement = Placement {
        tag: Tag(1),
        queue: QueueId(1),
        shadow_offset: 0x5000,
        data_len: 12 << 10,
        direction: Direction::FromDevice,
    };
    let mut batch = SubmitBatch::new();
    batch.push(&placement, &[0; 64], &[segment])?;
    compute
        .link
        .send(&Frame::plain(batch.header(), batch.control()))?;
    device.hear(1)?;
    Ok(segment)
}

fn is_untouched(end: &End) -> Outcome {
    let bytes = end.bytes(0x1000, 12 << 10)?;
    ensure(bytes == pattern(12 << 10, 9), "guest memory was written to")
}

/// Memory is taken back while the device side is about to write there.
fn revoked(address: &str) -> Outcome {
    let guest = memory("check-guest", GUEST)?;
    let (mut compute, mut device) = both(address, &guest, 1)?;
    compute.fill(0x1000, 12 << 10, 9)?;
    let segment = expose(&mut compute, &mut device)?;
    compute.link.revoke(&guest, 0, GUEST);
    complete(&mut device, &[segment])?;
    let error = device.hear_the_end()?;
    println!("write to revoked memory: {error}");
    ensure(
        error.to_string().contains("remote access error"),
        "the device did not refuse it",
    )?;
    println!("the other side: {}", compute.hear_the_end()?);
    is_untouched(&compute)
}

/// The compute side claims anew; the device side of before does not know yet.
fn fenced_off(address: &str) -> Outcome {
    let guest = memory("check-guest", GUEST)?;
    let (mut compute, mut stale) = both(address, &guest, 1)?;
    compute.fill(0x1000, 12 << 10, 9)?;
    let segment = expose(&mut compute, &mut stale)?;
    drop(compute);
    let (mut compute, mut device) = both(address, &guest, 2)?;
    expose(&mut compute, &mut device)?;
    let sent = complete(&mut stale, &[segment]);
    let error = match sent {
        Err(error) => error,
        Ok(()) => stale.hear_the_end()?,
    };
    println!("write of a former epoch: {error}");
    is_untouched(&compute)?;
    complete(&mut device, &[segment])?;
    compute.hear(1)?;
    ensure(
        is_untouched(&compute).is_err(),
        "the new epoch writes nothing",
    )
}

/// The device's own checks, without our protocol: a live queue pair, and a wrong key.
fn bare_keys(address: &str) -> Outcome {
    let guest = memory("check-guest", 1 << 20)?;
    let alive = |end: &Bare| end.region(&guest, IOVA, Access::RemoteWrite);

    let (attacker, victim) = Bare::pair(address)?;
    let region = alive(&victim)?;
    let key = region.remote_key();
    ensure(
        attacker.write_to(IOVA, key, 64)?.is_none(),
        "a live key was refused",
    )?;
    drop(region);
    let status = attacker.write_to(IOVA, key, 64)?;
    println!("write with a dead key: {}", say(status));
    ensure(
        status.is_some_and(Status::is_refusal),
        "a dead key was taken",
    )?;

    let (attacker, _victim) = Bare::pair(address)?;
    let other = Bare::new(address)?;
    let region = alive(&other)?;
    let status = attacker.write_to(IOVA, region.remote_key(), 64)?;
    println!("write with the key of another connection: {}", say(status));
    ensure(
        status.is_some_and(Status::is_refusal),
        "a foreign key was taken",
    )?;

    let (attacker, victim) = Bare::pair(address)?;
    let region = alive(&victim)?;
    let status = attacker.write_to(IOVA + (1 << 20) - 32, region.remote_key(), 64)?;
    println!("write past the end: {}", say(status));
    ensure(
        status.is_some_and(Status::is_refusal),
        "a write past the end was taken",
    )?;

    let (attacker, victim) = Bare::pair(address)?;
    let region = victim.region(&guest, IOVA, Access::Local)?;
    let status = attacker.write_to(IOVA, region.remote_key(), 64)?;
    println!("write to memory that is not for writing: {}", say(status));
    ensure(status.is_some_and(Status::is_refusal), "it was taken")?;
    Ok(())
}

fn say(status: Option<Status>) -> String {
    status.map_or("done".into(), |status| status.to_string())
}
