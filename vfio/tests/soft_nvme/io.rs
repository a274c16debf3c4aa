//! The NVM commands: data integrity, ranges, and what is durable when.

use farbus_vfio::driver::block_command;
use farbus_vfio::nvme::{Status, SubmissionEntry, feature, nvm};
use proptest::prelude::*;

use crate::bench::{Bench, SIZE, command, pattern, read_block, status_of};

#[test]
fn what_is_written_is_read_back_and_in_the_file() {
    for block_size in [512u32, 4096] {
        let mut bench = Bench::ready(block_size);
        let blocks = SIZE / u64::from(block_size);
        let mut expected = vec![0; SIZE as usize];
        for (n, len) in [1u64, 2, 3, 7, 8, 9, 16, 31, 64, 255, 256]
            .into_iter()
            .enumerate()
        {
            let lba = (n as u64 * 7919) % (blocks - len);
            let data = pattern((len * u64::from(block_size)) as usize, n as u64);
            bench.driver.write(1, lba, block_size, &data).unwrap();
            let at = (lba * u64::from(block_size)) as usize;
            expected[at..at + data.len()].copy_from_slice(&data);
            let mut back = vec![0; data.len()];
            bench.driver.read(1, lba, block_size, &mut back).unwrap();
            assert!(back == data, "{len} blocks of {block_size}");
        }
        bench.driver.flush(1).unwrap();
        assert!(bench.stored(block_size) == expected);
        let mut last = vec![0; block_size as usize];
        bench
            .driver
            .read(1, blocks - 1, block_size, &mut last)
            .unwrap();
    }
}

#[test]
fn the_largest_transfer_works_and_one_block_more_does_not() {
    for block_size in [512u32, 4096] {
        let mut bench = Bench::ready(block_size);
        let data = pattern(1 << 20, 3);
        bench.driver.write(1, 1, block_size, &data).unwrap();
        let mut back = vec![0; 1 << 20];
        bench.driver.read(1, 1, block_size, &mut back).unwrap();
        assert!(back == data);
        let mut more = vec![0; (1 << 20) + block_size as usize];
        let outcome = bench.driver.read(1, 0, block_size, &mut more);
        assert_eq!(status_of(outcome), Status::INVALID_FIELD);
    }
}

#[test]
fn data_may_begin_anywhere_in_a_page() {
    let mut bench = Bench::ready(512);
    let buffer = bench.driver.memory().allocate(3 << 20).unwrap();
    for (at, len) in [
        (4, 512),
        (4092, 512),
        (3584, 1024),
        (2048, 8192),
        (4092, 8192),
        (12, 1 << 20),
        (4092, 1 << 20),
    ] {
        let data = pattern(len, at as u64);
        bench.driver.memory().write(buffer, at, &data).unwrap();
        for opcode in [nvm::WRITE, nvm::READ] {
            let prps = bench.driver.prps(buffer, at, len).unwrap();
            let mut command = block_command(opcode, 9, len, 512);
            command.set_prps(prps.prp1, prps.prp2);
            assert_eq!(bench.io_status(command), Status::SUCCESS, "{at} {len}");
            bench.driver.free_prps(prps);
            let mut back = vec![0; len];
            bench.driver.memory().read(buffer, at, &mut back).unwrap();
            assert!(back == data, "{at} {len}");
            // So that the read has to bring them back, and nothing around them.
            let blank = vec![0xee; (len + at).next_multiple_of(4096) + 4096];
            bench.driver.memory().write(buffer, 0, &blank).unwrap();
        }
    }
}

#[test]
fn ranges_past_the_end_are_refused_without_overflow() {
    let mut bench = Bench::ready(512);
    let blocks = SIZE / 512;
    for opcode in [
        nvm::READ,
        nvm::WRITE,
        nvm::COMPARE,
        nvm::WRITE_ZEROES,
        nvm::VERIFY,
    ] {
        for (lba, count) in [
            (blocks, 1),
            (blocks - 1, 2),
            (0, 65536),
            (u64::MAX, 1),
            (u64::MAX, 65536),
            (u64::MAX - 65535, 65536),
            (1 << 55, 1),
            (1 << 63, 1),
        ] {
            let command = block_command(opcode, lba, count, 1);
            assert_eq!(
                bench.io_status(command),
                Status::LBA_OUT_OF_RANGE,
                "{opcode} {lba:#x}"
            );
        }
    }
    for (lba, count) in [(blocks, 1), (0, u32::MAX), (u64::MAX, u32::MAX)] {
        let outcome = bench.driver.deallocate(1, &[(0, 1), (lba, count)]);
        assert_eq!(status_of(outcome), Status::LBA_OUT_OF_RANGE);
    }
}

#[test]
fn other_namespaces_opcodes_and_flags_are_refused() {
    let mut bench = Bench::ready(512);
    for nsid in [0, 2, 0xffff_fffe, 0xffff_ffff] {
        let mut command = read_block(0);
        command.set_nsid(nsid);
        assert_eq!(
            bench.io_status(command),
            Status::INVALID_NAMESPACE,
            "{nsid:#x}"
        );
    }
    let flush = |nsid| command(nvm::FLUSH, nsid, &[]);
    assert_eq!(bench.io_status(flush(0xffff_ffff)), Status::SUCCESS);
    assert_eq!(bench.io_status(flush(0)), Status::INVALID_NAMESPACE);
    let known = [0x00, 0x01, 0x02, 0x05, 0x08, 0x09, 0x0c];
    for opcode in (0..=255).filter(|opcode| !known.contains(opcode)) {
        let entry = command(opcode, 1, &[]);
        assert_eq!(
            bench.io_status(entry),
            Status::INVALID_OPCODE,
            "{opcode:#x}"
        );
    }
    for flags in [0x01, 0x02, 0x40, 0xc0] {
        let mut command = read_block(0);
        command.0[1] = flags;
        assert_eq!(
            bench.io_status(command),
            Status::INVALID_FIELD,
            "{flags:#x}"
        );
    }
}

#[test]
fn write_zeroes_clears_exactly_its_range() {
    for (block_size, deallocate) in [(512u32, false), (512, true), (4096, false), (4096, true)] {
        let mut bench = Bench::ready(block_size);
        let data = pattern(1 << 20, 1);
        bench.driver.write(1, 0, block_size, &data).unwrap();
        bench.driver.write_zeroes(1, 3, 100, deallocate).unwrap();
        let mut back = vec![0; data.len()];
        bench.driver.read(1, 0, block_size, &mut back).unwrap();
        let (start, end) = (3 * block_size as usize, 103 * block_size as usize);
        assert!(back[..start] == data[..start] && back[end..] == data[end..]);
        assert!(back[start..end].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn deallocated_blocks_read_as_zero_and_their_neighbours_do_not() {
    let mut bench = Bench::ready(4096);
    let data = pattern(1 << 20, 1);
    for n in 0..4 {
        bench.driver.write(1, n * 256, 4096, &data).unwrap();
    }
    bench
        .driver
        .deallocate(1, &[(0, 256), (512, 10), (700, 0), (522, 246)])
        .unwrap();
    let mut back = vec![0; 1 << 20];
    for (lba, zero) in [(0, true), (256, false), (512, true), (768, false)] {
        bench.driver.read(1, lba, 4096, &mut back).unwrap();
        assert_eq!(back.iter().all(|byte| *byte == 0), zero, "{lba}");
        assert!(zero || back == data, "{lba}");
    }
}

#[test]
fn dataset_management_without_deallocate_changes_nothing() {
    let mut bench = Bench::ready(512);
    let data = pattern(4096, 1);
    bench.driver.write(1, 0, 512, &data).unwrap();
    let mut range = [0; 16];
    range[4] = 8;
    let entry = command(nvm::DATASET_MANAGEMENT, 1, &[0, 3]);
    bench.driver.send(1, entry, &range).unwrap();
    let mut back = vec![0; 4096];
    bench.driver.read(1, 0, 512, &mut back).unwrap();
    assert!(back == data);
    // All 256 ranges that there can be.
    bench.driver.deallocate(1, &[(0, 1); 256]).unwrap();
}

#[test]
fn compare_finds_a_single_different_byte() {
    let mut bench = Bench::ready(512);
    let mut data = pattern(1 << 18, 1);
    bench.driver.write(1, 5, 512, &data).unwrap();
    bench.driver.compare(1, 5, 512, &data).unwrap();
    data[(1 << 18) - 1] ^= 1;
    assert_eq!(
        status_of(bench.driver.compare(1, 5, 512, &data)),
        Status::COMPARE_FAILURE
    );
    bench.driver.compare(1, 5, 512, &data[..1 << 17]).unwrap();
}

#[test]
fn verify_and_long_write_zeroes_are_not_bound_by_the_transfer_size() {
    let mut bench = Bench::ready(512);
    assert_eq!(
        bench.io_status(block_command(nvm::VERIFY, 0, 16384, 1)),
        Status::SUCCESS
    );
    assert_eq!(
        bench.io_status(block_command(nvm::WRITE_ZEROES, 0, 16384, 1)),
        Status::SUCCESS
    );
}

#[test]
fn writes_with_the_cache_off_or_fua_succeed_and_persist() {
    let mut bench = Bench::ready(4096);
    let data = pattern(4096, 8);
    let mut fua = block_command(nvm::WRITE, 1, 1, 1);
    fua.set_dword(12, fua.dword(12) | 1 << 30);
    bench.driver.send(1, fua, &data).unwrap();
    bench
        .driver
        .set_feature(feature::VOLATILE_WRITE_CACHE, 0)
        .unwrap();
    bench.driver.write(1, 2, 4096, &data).unwrap();
    bench.driver.write_zeroes(1, 3, 1, false).unwrap();
    bench.driver.deallocate(1, &[(4, 1)]).unwrap();
    let bytes = bench.stored(4096);
    assert!(bytes[4096..8192] == data && bytes[8192..12288] == data);
}

/// What one thread of the workload does: (write?, block address, blocks, seed).
fn operations() -> impl Strategy<Value = Vec<(bool, u64, u64, u64)>> {
    let operation = (any::<bool>(), 0u64..512, 1u64..64, any::<u64>());
    proptest::collection::vec(operation, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn random_reads_and_writes_agree_with_a_model(
        operations in operations(), large_blocks: bool, queues in 1u16..5,
    ) {
        let block_size = if large_blocks { 4096u32 } else { 512 };
        let mut bench = Bench::enabled(block_size);
        for queue in 1..=queues {
            bench.driver.create_queue_pair(queue, 8, Some(queue)).unwrap();
        }
        let mut model = vec![0u8; 1024 * block_size as usize];
        for (n, (write, lba, blocks, seed)) in operations.into_iter().enumerate() {
            let queue = n as u16 % queues + 1;
            let at = (lba * u64::from(block_size)) as usize;
            let len = (blocks * u64::from(block_size)) as usize;
            if write {
                let data = pattern(len, seed);
                bench.driver.write(queue, lba, block_size, &data).unwrap();
                model[at..at + len].copy_from_slice(&data);
            } else {
                let mut data = vec![0; len];
                bench.driver.read(queue, lba, block_size, &mut data).unwrap();
                prop_assert!(data == model[at..at + len]);
            }
        }
        bench.driver.shutdown().unwrap();
        // Enabled again, it has what it had.
        bench.recover();
        let bytes = bench.stored(block_size);
        prop_assert!(bytes[..model.len()] == model);
    }
}

#[test]
fn many_commands_in_flight_keep_their_data_apart() {
    let mut bench = Bench::enabled(512);
    for queue in 1..=4 {
        bench
            .driver
            .create_queue_pair(queue, 64, Some(queue))
            .unwrap();
    }
    let buffer = bench.driver.memory().allocate(2 << 20).unwrap();
    for opcode in [nvm::WRITE, nvm::READ] {
        if opcode == nvm::WRITE {
            bench
                .driver
                .memory()
                .write(buffer, 0, &pattern(1 << 20, 4))
                .unwrap();
        } else {
            bench
                .driver
                .memory()
                .write(buffer, 0, &vec![0; 1 << 20])
                .unwrap();
        }
        let mut waiting: Vec<(u16, u16)> = Vec::new();
        for n in 0..200u64 {
            let queue = n as u16 % 4 + 1;
            let mut command: SubmissionEntry = block_command(opcode, n * 8, 8, 1);
            command.set_prps(buffer.iova().0 + n * 4096, 0);
            waiting.push((queue, bench.driver.submit(queue, command).unwrap()));
        }
        for (queue, cid) in waiting {
            assert_eq!(
                bench.driver.wait(queue, cid).unwrap().status,
                Status::SUCCESS
            );
        }
    }
    let mut back = vec![0; 200 * 4096];
    bench.driver.memory().read(buffer, 0, &mut back).unwrap();
    assert!(back == pattern(1 << 20, 4)[..200 * 4096]);
}
