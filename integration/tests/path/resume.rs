//! The link is cut in the middle of I/O: on a new claim the guest's controller goes on, and
//! every command completes once with the right data.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use farbus_fabric::FabricError;
use farbus_fabric::session::{ClaimedLink, client};
use farbus_shadow_mem::remote::RemoteFunction;
use farbus_vfio::driver::{NvmeDriver, Prps, block_command};
use farbus_vfio::nvme::nvm;

use super::bed::{Attached, BLOCK, Bed, claim_in, eventually, export_name};
use super::proxy::Proxy;

fn claim(wire: &Proxy) -> Result<ClaimedLink, FabricError> {
    let patience = Duration::from_secs(5);
    client::claim(&wire.address, &export_name(), "test", patience)
}

/// A claim of what has lanes already, or is to have.
fn claim_again(attached: &Attached, wire: &Proxy) -> Result<ClaimedLink, FabricError> {
    claim_in(&wire.address, attached.remote.lanes().len() as u16 + 1)
}

/// Commands that have not completed, by queue and command identifier.
type Outstanding = HashMap<(u16, u16), Prps>;

/// Waits until each has completed, once and with success.
fn complete_all(driver: &mut NvmeDriver<RemoteFunction>, outstanding: &mut Outstanding) {
    while !outstanding.is_empty() {
        for queue in [1, 2] {
            // The driver itself refuses a completion that it does not wait for.
            let done = eventually("a completion", || {
                driver.poll(queue).unwrap().map_or_else(
                    || (!outstanding.keys().any(|(q, _)| *q == queue)).then_some(None),
                    |entry| Some(Some(entry)),
                )
            });
            if let Some(entry) = done {
                assert!(entry.status.is_success(), "{entry:?}");
                let prps = outstanding.remove(&(queue, entry.cid)).unwrap();
                driver.free_prps(prps);
            }
        }
    }
}

/// Waits until the cut is noticed, and goes on over a new claim.
fn recover(attached: &Attached, wire: &Proxy) {
    let lost = eventually("the cut is noticed", || {
        attached.remote.service();
        attached.remote.take_lost()
    });
    assert!(lost.error.should_reconnect(), "{}", lost.error);
    drop(lost);
    let claimed = eventually("the export is free again", || {
        claim_again(attached, wire).ok()
    });
    attached.remote.reconnect(claimed).unwrap();
}

#[test]
fn cut_links_lose_nothing_and_complete_nothing_twice() {
    cut_again_and_again(1, |wire, _| wire.cut());
}

#[test]
fn cut_links_of_several_lanes_lose_nothing_and_complete_nothing_twice() {
    cut_again_and_again(2, |wire, _| wire.cut());
}

#[test]
fn a_lane_that_is_lost_takes_the_others_along_and_nothing_is_lost_or_done_twice() {
    // Now the second connection alone, now the first one.
    cut_again_and_again(2, |wire, round| wire.cut_one(usize::from(round % 2)));
}

fn cut_again_and_again(lanes: u16, cut: impl Fn(&Proxy, u8)) {
    let bed = Bed::start("size=64MiB");
    let wire = Proxy::to(&bed.address);
    let attached = Attached::new(claim_in(&wire.address, lanes).unwrap());
    let mut driver = attached.driver(2);
    let len = 64 << 10;
    let buffers: Vec<_> = (0..40)
        .map(|_| driver.memory().allocate(len).unwrap())
        .collect();
    for round in 0..25u8 {
        let mut outstanding = HashMap::new();
        for (slot, buffer) in buffers.iter().enumerate() {
            let queue = 1 + (slot % 2) as u16;
            let write = slot < 20;
            let lba = (slot % 20) as u64 * 128 + if write { 0 } else { 1 << 14 };
            let fill = if write { round ^ slot as u8 } else { 0 };
            driver.memory().write(*buffer, 0, &vec![fill; len]).unwrap();
            let prps = driver.prps(*buffer, 0, len).unwrap();
            let opcode = if write { nvm::WRITE } else { nvm::READ };
            let mut command = block_command(opcode, lba, len, BLOCK);
            command.set_prps(prps.prp1, prps.prp2);
            let cid = driver.submit(queue, command).unwrap();
            assert!(outstanding.insert((queue, cid), prps).is_none());
        }
        cut(&wire, round);
        recover(&attached, &wire);
        complete_all(&mut driver, &mut outstanding);
        for slot in 0..20u8 {
            let mut back = vec![0; len];
            driver
                .read(1, u64::from(slot) * 128, BLOCK, &mut back)
                .unwrap();
            assert!(
                back.iter().all(|byte| *byte == round ^ slot),
                "round {round}, slot {slot}"
            );
        }
    }
}

#[test]
fn registers_answer_and_resets_work_while_there_is_no_link() {
    let bed = Bed::start("size=1MiB");
    let wire = Proxy::to(&bed.address);
    let attached = Attached::new(claim(&wire).unwrap());
    let mut driver = attached.driver(1);
    driver.write(1, 0, BLOCK, &[9; 512]).unwrap();
    wire.cut();
    drop(eventually("the cut is noticed", || {
        attached.remote.service();
        attached.remote.take_lost()
    }));
    assert!(driver.read32(farbus_vfio::nvme::reg::CSTS).unwrap() & 1 == 1);
    // A guest that gives up on the drive and starts over, while nobody is there.
    driver.disable().unwrap();
    let claimed = eventually("the export is free again", || claim(&wire).ok());
    attached.remote.reconnect(claimed).unwrap();
    driver.enable().unwrap();
    driver.create_queue_pair(1, 64, Some(1)).unwrap();
    let mut back = [0; 512];
    driver.read(1, 0, BLOCK, &mut back).unwrap();
    assert_eq!(back, [9; 512]);
}

#[test]
fn links_that_end_at_any_byte_of_a_write_lose_nothing() {
    const LEN: usize = 128 << 10;
    const SLOTS: u8 = 32;
    let bed = Bed::start("size=64MiB");
    let wire = Proxy::to(&bed.address);
    let attached = Attached::new(claim(&wire).unwrap());
    let mut driver = attached.driver(2);
    let buffers: Vec<_> = (0..SLOTS)
        .map(|_| driver.memory().allocate(LEN).unwrap())
        .collect();
    let lba_of = |slot: u8| u64::from(slot) * (LEN as u64 / u64::from(BLOCK));
    // In the header of a frame, behind it, in the commands, and here and there in the data.
    for (round, bytes) in [1, 23, 25, 100, 4_097, 131_071, 1_000_003, 3_333_333]
        .into_iter()
        .enumerate()
    {
        let round = round as u8;
        wire.cut_after(bytes);
        let mut outstanding = Outstanding::new();
        for slot in 0..SLOTS {
            let queue = 1 + u16::from(slot % 2);
            let buffer = buffers[usize::from(slot)];
            let data = vec![round ^ slot; LEN];
            driver.memory().write(buffer, 0, &data).unwrap();
            let prps = driver.prps(buffer, 0, LEN).unwrap();
            let mut command = block_command(nvm::WRITE, lba_of(slot), LEN, BLOCK);
            command.set_prps(prps.prp1, prps.prp2);
            let cid = driver.submit(queue, command).unwrap();
            assert!(outstanding.insert((queue, cid), prps).is_none());
        }

        recover(&attached, &wire);
        complete_all(&mut driver, &mut outstanding);

        for slot in 0..SLOTS {
            let mut back = vec![0; LEN];
            driver.read(1, lba_of(slot), BLOCK, &mut back).unwrap();
            let expected = round ^ slot;
            assert!(
                back.iter().all(|byte| *byte == expected),
                "cut after {bytes} bytes, slot {slot}"
            );
        }
    }
}

#[test]
fn silent_device_server_is_given_up_after_five_seconds_and_recovered() {
    let bed = Bed::start("size=1MiB");
    let wire = Proxy::to(&bed.address);
    let attached = Attached::new(claim(&wire).unwrap());
    let mut driver = attached.driver(1);
    driver.write(1, 0, BLOCK, &[1; 512]).unwrap();
    wire.stall(true);
    let silent = Instant::now();
    let buffer = driver.memory().allocate(512).unwrap();
    let mut command = block_command(nvm::READ, 0, 512, BLOCK);
    command.set_prps(buffer.iova().0, 0);
    let cid = driver.submit(1, command).unwrap();

    let lost = eventually("the silence is noticed", || {
        // Nothing comes, so this only lets time pass.
        driver.wait_interrupt(1, Duration::from_millis(50)).unwrap();
        attached.remote.take_lost()
    });

    assert!(
        matches!(lost.error, FabricError::Timeout { .. }),
        "{}",
        lost.error
    );
    let after = silent.elapsed();
    assert!(
        (Duration::from_secs(4)..Duration::from_secs(8)).contains(&after),
        "{after:?}"
    );
    drop(lost);
    wire.cut();
    wire.stall(false);
    let claimed = eventually("the export is free again", || claim(&wire).ok());
    attached.remote.reconnect(claimed).unwrap();
    assert!(driver.wait(1, cid).unwrap().status.is_success());
    let mut back = [0; 512];
    driver.memory().read(buffer, 0, &mut back).unwrap();
    assert_eq!(back, [1; 512]);
}
