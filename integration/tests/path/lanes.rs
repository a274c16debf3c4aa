//! Attachments in several lanes: each queue is served by its lane, and what happens to the
//! controller happens to all of them.

use std::time::Duration;

use farbus_shadow_mem::remote::RemoteFunction;
use farbus_vfio::driver::{NvmeDriver, block_command};
use farbus_vfio::nvme::{PAGE_SIZE, nvm};

use super::bed::{Attached, BLOCK, Bed, eventually};

const QUEUES: u16 = 4;

fn filled(queue: u16, slot: u16) -> Vec<u8> {
    vec![(queue * 31 + slot + 1) as u8; 16 << 10]
}

/// Where a queue's slot is on the drive.
fn lba(queue: u16, slot: u16) -> u64 {
    u64::from(queue * 64 + slot) * ((16 << 10) / u64::from(BLOCK))
}

/// Writes and reads back through every queue, many commands at a time in all of them.
fn verify(driver: &mut NvmeDriver<RemoteFunction>) {
    const SLOTS: u16 = 24;
    let buffers: Vec<_> = (0..QUEUES * SLOTS)
        .map(|_| driver.memory().allocate(16 << 10).unwrap())
        .collect();
    for opcode in [nvm::WRITE, nvm::READ] {
        let mut waiting = Vec::new();
        for slot in 0..SLOTS {
            for queue in 1..=QUEUES {
                let data = filled(queue, slot);
                let buffer = buffers[usize::from((queue - 1) * SLOTS + slot)];
                if opcode == nvm::WRITE {
                    driver.memory().write(buffer, 0, &data).unwrap();
                } else {
                    driver
                        .memory()
                        .write(buffer, 0, &vec![0; data.len()])
                        .unwrap();
                }
                let prps = driver.prps(buffer, 0, data.len()).unwrap();
                let mut command = block_command(opcode, lba(queue, slot), data.len(), BLOCK);
                command.set_prps(prps.prp1, prps.prp2);
                let cid = driver.submit(queue, command).unwrap();
                waiting.push((queue, cid, prps));
            }
        }
        for (queue, cid, prps) in waiting {
            assert!(driver.wait(queue, cid).unwrap().status.is_success());
            driver.free_prps(prps);
        }
    }
    for slot in 0..SLOTS {
        for queue in 1..=QUEUES {
            let buffer = buffers[usize::from((queue - 1) * SLOTS + slot)];
            let mut back = vec![0; 16 << 10];
            driver.memory().read(buffer, 0, &mut back).unwrap();
            assert!(back == filled(queue, slot), "queue {queue}, slot {slot}");
        }
    }
    for buffer in buffers {
        driver.memory().free(buffer);
    }
}

fn attach(bed: &Bed, lanes: u16) -> (Attached, NvmeDriver<RemoteFunction>) {
    let attached = bed.attach_in(lanes);
    let driver = attached.driver(QUEUES);
    (attached, driver)
}

#[test]
fn every_queue_reads_back_what_it_wrote_in_one_lane_and_in_several() {
    for lanes in [1, 2, 3, 4] {
        let bed = Bed::start("size=64MiB");
        let (_attached, mut driver) = attach(&bed, lanes);
        verify(&mut driver);
    }
}

#[test]
fn one_message_each_way_per_command_whichever_lane_it_goes_by() {
    let bed = Bed::start("size=16MiB");
    let (attached, mut driver) = attach(&bed, 2);
    let buffer = driver.memory().allocate(PAGE_SIZE).unwrap();
    for queue in 1..=QUEUES {
        let mut command = block_command(nvm::READ, 0, PAGE_SIZE, BLOCK);
        command.set_prps(buffer.iova().0, 0);
        // Again, if the second that separates two pings happens to end in the middle.
        let crossed = || {
            let before = attached.remote.counters().unwrap();
            driver.command(queue, command).unwrap();
            let after = attached.remote.counters().unwrap();
            (
                after.messages_sent - before.messages_sent,
                after.messages_received - before.messages_received,
            )
        };
        let mut crossings = std::iter::repeat_with(crossed).take(5);
        assert!(crossings.any(|crossing| crossing == (1, 1)), "{queue}");
    }
}

#[test]
fn interrupts_come_from_every_lane() {
    let bed = Bed::start("size=16MiB");
    let (_attached, mut driver) = attach(&bed, 2);
    let buffer = driver.memory().allocate(PAGE_SIZE).unwrap();
    for queue in 1..=QUEUES {
        let mut command = block_command(nvm::READ, 0, PAGE_SIZE, BLOCK);
        command.set_prps(buffer.iova().0, 0);
        let cid = driver.submit(queue, command).unwrap();
        let limit = Duration::from_secs(20);
        assert!(driver.wait_interrupt(queue, limit).unwrap(), "{queue}");
        let done = eventually("its completion", || driver.poll(queue).unwrap());
        assert_eq!(done.cid, cid);
    }
}

/// Leaves commands under way in all queues.
fn begin_io(driver: &mut NvmeDriver<RemoteFunction>) {
    let buffer = driver.memory().allocate(256 << 10).unwrap();
    for slot in 0..32 {
        for queue in 1..=QUEUES {
            let opcode = match slot % 2 {
                0 => nvm::WRITE,
                _ => nvm::READ,
            };
            let prps = driver.prps(buffer, 0, 128 << 10).unwrap();
            let mut command = block_command(opcode, 1 << 16, 128 << 10, BLOCK);
            command.set_prps(prps.prp1, prps.prp2);
            driver.submit(queue, command).unwrap();
            // What the device half writes of the lists is a copy: these go with the queues.
            driver.free_prps(prps);
        }
    }
    driver.memory().free(buffer);
}

fn bring_up(driver: &mut NvmeDriver<RemoteFunction>) {
    driver.enable().unwrap();
    for queue in 1..=QUEUES {
        driver.create_queue_pair(queue, 64, Some(queue)).unwrap();
    }
}

#[test]
fn a_controller_that_is_disabled_during_io_on_all_lanes_starts_anew() {
    let bed = Bed::start("size=64MiB");
    let (attached, mut driver) = attach(&bed, 2);
    for _ in 0..20 {
        begin_io(&mut driver);
        driver.disable().unwrap();
        bring_up(&mut driver);
        verify(&mut driver);
    }
    assert!(attached.remote.take_lost().is_none());
}

#[test]
fn a_function_that_is_reset_during_io_on_all_lanes_starts_anew() {
    let bed = Bed::start("size=64MiB");
    // A reset may have to end the link, if writes wait for the network; then it is made anew.
    for _ in 0..10 {
        let (attached, mut driver) = attach(&bed, 2);
        begin_io(&mut driver);
        driver.reset().unwrap();
        if let Some(lost) = attached.remote.take_lost() {
            assert!(lost.error.should_reconnect(), "{}", lost.error);
            continue;
        }
        bring_up(&mut driver);
        verify(&mut driver);
    }
}

#[test]
fn queues_are_deleted_and_made_again_in_their_lanes() {
    let bed = Bed::start("size=64MiB");
    let (_attached, mut driver) = attach(&bed, 2);
    for _ in 0..10 {
        begin_io(&mut driver);
        for queue in 1..=QUEUES {
            driver.delete_queue_pair(queue).unwrap();
        }
        for queue in 1..=QUEUES {
            driver.create_queue_pair(queue, 64, Some(queue)).unwrap();
        }
        verify(&mut driver);
    }
}

#[test]
fn a_device_server_gives_no_more_lanes_than_the_drive_has_queues() {
    let bed = Bed::start("size=16MiB,queues=2");
    let claimed = super::bed::claim_in(&bed.address, 8).unwrap();
    assert_eq!(claimed.lanes.len(), 1);
}
