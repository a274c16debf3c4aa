//! Data arrives where it belongs, in one message each way per command.

use farbus_vfio::driver::block_command;
use farbus_vfio::nvme::{PAGE_SIZE, Status, SubmissionEntry, nvm};

use super::bed::{BLOCK, Bed};

/// Bytes that differ everywhere and between seeds.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn every_size_and_offset_reads_back_as_written_and_lies_in_the_file() {
    let bed = Bed::start("size=16MiB");
    let attached = bed.attach();
    let mut driver = attached.driver(2);
    let mut lba = 0;
    for (index, blocks) in [1, 2, 7, 8, 9, 16, 17, 255, 256, 1024, 2048]
        .into_iter()
        .enumerate()
    {
        let len = blocks * BLOCK as usize;
        for offset in [0, 4, 512, 4092] {
            let data = pattern(lba + 1, len);
            let queue = 1 + (index % 2) as u16;
            let buffer = driver.memory().allocate(len + 2 * PAGE_SIZE).unwrap();
            for (opcode, fill) in [(nvm::WRITE, Some(&data)), (nvm::READ, None)] {
                let zeroes = vec![0; len];
                driver
                    .memory()
                    .write(buffer, offset, fill.unwrap_or(&zeroes))
                    .unwrap();
                let prps = driver.prps(buffer, offset, len).unwrap();
                let mut command = block_command(opcode, lba, len, BLOCK);
                command.set_prps(prps.prp1, prps.prp2);
                driver.command(queue, command).unwrap();
                driver.free_prps(prps);
            }
            let mut back = vec![0; len];
            driver.memory().read(buffer, offset, &mut back).unwrap();
            assert!(back == data, "{len} bytes at offset {offset} differ");
            driver.flush(queue).unwrap();
            let file = std::fs::read(bed.scratch.join("disk.img")).unwrap();
            assert!(file[lba as usize * BLOCK as usize..].starts_with(&data));
            driver.memory().free(buffer);
            lba += blocks as u64;
        }
    }
}

#[test]
fn write_zeroes_and_trim_cross() {
    let bed = Bed::start("size=16MiB");
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    let data = pattern(1, 64 << 10);
    driver.write(1, 0, BLOCK, &data).unwrap();
    driver.compare(1, 0, BLOCK, &data).unwrap();
    driver.write_zeroes(1, 8, 16, false).unwrap();
    driver.deallocate(1, &[(64, 32)]).unwrap();
    let mut back = vec![1; data.len()];
    driver.read(1, 0, BLOCK, &mut back).unwrap();
    let mut expected = data.clone();
    expected[8 * 512..24 * 512].fill(0);
    expected[64 * 512..96 * 512].fill(0);
    assert!(back == expected);
    let differs = driver.compare(1, 0, BLOCK, &data).unwrap_err();
    assert_eq!(differs.status(), Some(Status::COMPARE_FAILURE));
}

#[test]
fn one_message_each_way_per_command_of_any_size() {
    let bed = Bed::start("size=16MiB");
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    let buffer = driver.memory().allocate((1 << 20) + PAGE_SIZE).unwrap();
    for len in [512usize, 4096, 128 << 10, 1 << 20] {
        for opcode in [nvm::WRITE, nvm::READ] {
            let prps = driver.prps(buffer, 512, len).unwrap();
            let mut command = block_command(opcode, 0, len, BLOCK);
            command.set_prps(prps.prp1, prps.prp2);
            // Twice, if the second that separates two pings happens to end in the middle.
            let crossed = || {
                let before = attached.remote.counters().unwrap();
                driver.command(1, command).unwrap();
                let after = attached.remote.counters().unwrap();
                (
                    after.messages_sent - before.messages_sent,
                    after.messages_received - before.messages_received,
                    after.payload_sent - before.payload_sent,
                    after.payload_received - before.payload_received,
                )
            };
            let bytes = len as u64;
            let expected = match opcode {
                nvm::WRITE => (1, 1, bytes, 0),
                _ => (1, 1, 0, bytes),
            };
            let mut crossings = std::iter::repeat_with(crossed).take(3);
            assert!(
                crossings.any(|crossing| crossing == expected),
                "{len} bytes, opcode {opcode}"
            );
        }
    }
}

#[test]
fn batches_share_a_message_and_registers_are_read_locally() {
    let bed = Bed::start("size=16MiB");
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    let before = attached.remote.counters().unwrap();
    let mut flush = SubmissionEntry::new(nvm::FLUSH);
    flush.set_nsid(1);
    let cids: Vec<_> = (0..32).map(|_| driver.enqueue(1, flush).unwrap()).collect();
    driver.ring_sq(1, driver.tail(1).unwrap().into()).unwrap();
    for cid in cids {
        // Looks at CSTS again and again while it waits.
        assert!(driver.wait(1, cid).unwrap().status.is_success());
    }
    for offset in (0..0x1000).step_by(4) {
        driver.read32(offset).unwrap();
    }
    let after = attached.remote.counters().unwrap();
    // One message for the batch, perhaps a ping.
    assert!(after.messages_sent - before.messages_sent <= 2);
    assert!(after.messages_received - before.messages_received <= 33);
}

#[test]
fn transfers_larger_than_the_limit_are_refused_and_the_limit_is_told() {
    let bed = Bed::start("size=16MiB");
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    let controller = driver.identify(1, 0).unwrap();
    assert_eq!(controller[77], 8, "MDTS of 1 MiB");
    let len = (1 << 20) + BLOCK as usize;
    let mut command = block_command(nvm::READ, 0, len, BLOCK);
    command.set_prps(0x1_0000_0000, 0x1_0000_0000);
    let refused = driver.command(1, command).unwrap_err();
    assert_eq!(refused.status(), Some(Status::INVALID_FIELD));
}
