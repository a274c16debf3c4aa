//! A driver that is wrong or wants to do harm: no panic, no hang, nothing touched that was not
//! mapped, and a reset always leads back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use farbus_vfio::driver::{DmaMemory, DriverError, block_command};
use farbus_vfio::nvme::{DOORBELL_BASE, Status, SubmissionEntry, admin, nvm, reg};
use farbus_vfio::soft_nvme::SoftNvme;
use farbus_vfio::{DmaAccess, DmaWindow, Function, Iova, RegionIndex};
use proptest::prelude::*;

use crate::bench::{Bench, Disk, command, pattern, read_block};

const NOWHERE: u64 = 0x7000_0000_0000;

#[test]
fn data_out_of_reach_is_a_transfer_error_and_the_controller_lives_on() {
    let mut bench = Bench::ready(4096);
    let inside = bench.driver.memory().window().iova.0;
    let end = inside + bench.driver.memory().window().len as u64;
    for (prp1, prp2, blocks) in [
        (NOWHERE, 0, 1),
        (!3, 0, 1),
        (!0xfff, 0, 1),
        (end, 0, 1),
        (inside, NOWHERE, 2),
        (inside, end, 2),
        (inside, NOWHERE, 3),
        (inside, !7, 256),
        (0, 0, 256),
    ] {
        for opcode in [nvm::READ, nvm::WRITE, nvm::COMPARE] {
            let mut command = block_command(opcode, 0, blocks, 1);
            command.set_prps(prp1, prp2);
            assert_eq!(
                bench.io_status(command),
                Status::DATA_TRANSFER_ERROR,
                "{prp1:#x}"
            );
        }
    }
    assert!(!bench.is_fatal());
    bench.assert_works();
}

#[test]
fn misaligned_pointers_are_refused() {
    let mut bench = Bench::ready(4096);
    let inside = bench.driver.memory().window().iova.0;
    for (prp1, prp2, blocks) in [
        (inside + 1, 0, 1),
        (inside, inside + 8, 2),
        (inside, inside + 4, 3),
    ] {
        let mut command = block_command(nvm::READ, 0, blocks, 1);
        command.set_prps(prp1, prp2);
        assert_eq!(bench.io_status(command), Status::INVALID_PRP_OFFSET);
    }
}

#[test]
fn a_list_that_chains_to_itself_ends() {
    let mut bench = Bench::ready(512);
    let list = bench.driver.memory().allocate(4096).unwrap();
    let entries: Vec<u8> = (0..512).flat_map(|_| list.iova().0.to_le_bytes()).collect();
    bench.driver.memory().write(list, 0, &entries).unwrap();
    // 256 pages of data through the last slot of a page: a chain, and then the page again.
    let mut command = block_command(nvm::WRITE, 0, 2048, 1);
    command.set_prps(list.iova().0, list.iova().0 + 4088);
    assert_eq!(bench.io_status(command), Status::SUCCESS);
    // A read that overwrites the list it goes by: what was copied out first is what counts.
    command.0[0] = nvm::READ;
    assert_eq!(bench.io_status(command), Status::SUCCESS);
}

#[test]
fn queue_memory_out_of_reach_is_fatal_until_a_reset() {
    for (asq, acq) in [(NOWHERE, None), (!0xfff, None), (0, Some(NOWHERE))] {
        let mut bench = Bench::cold(4096);
        let good = bench.driver.memory().allocate(4096).unwrap().iova().0;
        bench.driver.write32(reg::AQA, 31 | 31 << 16).unwrap();
        bench
            .driver
            .write64(reg::ASQ, if acq.is_some() { good } else { asq })
            .unwrap();
        bench.driver.write64(reg::ACQ, acq.unwrap_or(good)).unwrap();
        bench.driver.write32(reg::CC, 0x0046_0001).unwrap();
        crate::bench::until("ready", || bench.driver.read32(reg::CSTS).unwrap() & 1 == 1);
        assert!(!bench.is_fatal(), "nothing has been fetched yet");
        bench.driver.ring_sq(0, 1).unwrap();
        bench.await_fatal();
        bench.driver.ring_sq(0, 2).unwrap();
        bench.recover();
        bench.assert_works();
    }
}

#[test]
fn io_queue_memory_out_of_reach_is_fatal_until_a_reset() {
    for opcode in [admin::CREATE_SQ, admin::CREATE_CQ] {
        let mut bench = Bench::ready(4096);
        let good = bench.driver.memory().allocate(8192).unwrap().iova().0;
        let place = |queue| {
            if queue == opcode { !0xfff } else { good }
        };
        for (queue, dword11) in [(admin::CREATE_CQ, 1), (admin::CREATE_SQ, 1 | 2 << 16)] {
            let mut command = command(queue, 0, &[2 | 1023 << 16, dword11]);
            command.set_prps(place(queue), 0);
            bench.driver.command(0, command).unwrap();
        }
        bench.driver.ring_sq(2, 1000).unwrap();
        bench.await_fatal();
        bench.recover();
        bench.assert_works();
    }
}

#[test]
fn unmapping_queues_under_a_running_controller_is_fatal_not_deadly() {
    let mut bench = Bench::ready(4096);
    let window = bench.driver.memory().window();
    bench
        .function
        .unmap_dma(window.iova, window.len as u64)
        .unwrap();
    let outcome = bench.driver.execute(1, read_block(0));
    assert!(
        matches!(outcome, Err(DriverError::Fatal { .. })),
        "{outcome:?}"
    );
    bench.function.map_dma(&window).unwrap();
    bench.recover();
    bench.assert_works();
}

#[test]
fn without_bus_mastering_there_is_no_dma() {
    let mut bench = Bench::ready(4096);
    bench.function.config_write(4, &[2, 0]).unwrap();
    let outcome = bench.driver.execute(1, read_block(0));
    assert!(
        matches!(outcome, Err(DriverError::Fatal { .. })),
        "{outcome:?}"
    );
    bench.function.config_write(4, &[6, 0]).unwrap();
    bench.recover();
    bench.assert_works();
}

#[test]
fn windows_for_reading_are_not_written() {
    let mut bench = Bench::ready(4096);
    let memory = DmaMemory::new(Iova(0x10_0000), 8192).unwrap();
    let window = DmaWindow {
        access: DmaAccess::Read,
        ..memory.window()
    };
    bench.function.map_dma(&window).unwrap();
    let mut memory = memory;
    let buffer = memory.allocate(8192).unwrap();
    memory.write(buffer, 0, &pattern(8192, 1)).unwrap();
    let mut command = block_command(nvm::WRITE, 0, 2, 1);
    command.set_prps(0x10_0000, 0x10_1000);
    assert_eq!(bench.io_status(command), Status::SUCCESS);
    command.0[0] = nvm::READ;
    assert_eq!(bench.io_status(command), Status::DATA_TRANSFER_ERROR);
    let mut identify = SubmissionEntry::new(admin::IDENTIFY);
    identify.set_dword(10, 1);
    identify.set_prps(0x10_0000, 0);
    let status = bench.driver.execute(0, identify).unwrap().status;
    assert_eq!(status, Status::DATA_TRANSFER_ERROR);
    let mut back = vec![0; 8192];
    memory.read(buffer, 0, &mut back).unwrap();
    assert!(back == pattern(8192, 1));
}

#[test]
fn data_may_span_windows_that_are_neighbours() {
    let mut bench = Bench::ready(4096);
    let memory: Vec<_> = (0..4)
        .map(|n| DmaMemory::new(Iova(0x10_0000 + n * 4096), 4096).unwrap())
        .collect();
    for part in &memory {
        bench.function.map_dma(&part.window()).unwrap();
    }
    let mut memory = memory;
    let parts: Vec<_> = memory
        .iter_mut()
        .map(|m| m.allocate(4096).unwrap())
        .collect();
    let data = pattern(8192, 6);
    bench.driver.write(1, 0, 4096, &data).unwrap();
    // Two blocks, over the pages 0 to 2: from the middle of one to the middle of another.
    let list = bench.driver.memory().allocate(4096).unwrap();
    let entries: Vec<u8> = [0x10_1000u64, 0x10_2000]
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect();
    bench.driver.memory().write(list, 0, &entries).unwrap();
    let mut command = block_command(nvm::READ, 0, 2, 1);
    command.set_prps(0x10_0800, list.iova().0);
    assert_eq!(bench.io_status(command), Status::SUCCESS);
    let mut back = vec![0; 3 * 4096];
    for (n, part) in parts.iter().take(3).enumerate() {
        memory[n]
            .read(*part, 0, &mut back[n * 4096..][..4096])
            .unwrap();
    }
    assert!(back[0x800..0x2800] == data);
    assert!(
        back[..0x800]
            .iter()
            .chain(&back[0x2800..])
            .all(|byte| *byte == 0)
    );
    for part in &memory {
        bench.function.unmap_dma(part.window().iova, 4096).unwrap();
    }
}

#[test]
fn commands_that_change_while_they_are_read_do_no_harm() {
    let bench = Bench::ready(512);
    let Bench {
        mut driver,
        function,
        disk,
    } = bench;
    let buffer = driver.memory().allocate(4096).unwrap();
    let sq = driver.memory().allocate(4096).unwrap();
    let cq = driver.memory().allocate(4096).unwrap();
    for (opcode, dword11, at) in [
        (admin::CREATE_CQ, 1, cq.iova().0),
        (admin::CREATE_SQ, 1 | 2 << 16, sq.iova().0),
    ] {
        let mut create = command(opcode, 0, &[2 | 63 << 16, dword11]);
        create.set_prps(at, 0);
        driver.command(0, create).unwrap();
    }
    let done = AtomicBool::new(false);
    let window = driver.memory().window();
    let shared = DmaMemoryView(window);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut seed = 1;
            while !done.load(Ordering::Relaxed) {
                seed += 1;
                let noise = pattern(64, seed);
                shared.write(sq.iova(), (seed as usize % 64) * 64, &noise);
                let mut good = block_command(nvm::WRITE, 0, 1, 1);
                good.set_prps(buffer.iova().0, 0);
                shared.write(sq.iova(), (seed as usize * 7 % 64) * 64, &good.0);
            }
        });
        let mut head = 0;
        for n in 0..3000u32 {
            driver.ring_sq(2, (n * 5) % 64).unwrap();
            head = (head + n) % 64;
            driver.ring_cq(2, head).unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    let mut bench = Bench {
        driver,
        function,
        disk,
    };
    bench.recover();
    bench.driver.flush(1).unwrap();
}

/// Writes into a window the way another process would.
struct DmaMemoryView(DmaWindow);

impl DmaMemoryView {
    fn write(&self, iova: Iova, at: usize, data: &[u8]) {
        use vm_memory::VolatileMemory;
        let start = (iova.0 - self.0.iova.0) as usize + self.0.offset + at;
        self.0
            .memory
            .get_slice(start, data.len())
            .unwrap()
            .copy_from(data);
    }
}

#[test]
fn unmapping_waits_for_the_commands_that_use_the_window() {
    let mut bench = Bench::ready(4096);
    for round in 0..50u64 {
        let mut memory = DmaMemory::new(Iova(0x10_0000), 1 << 20).unwrap();
        bench.function.map_dma(&memory.window()).unwrap();
        let buffer = memory.allocate(1 << 20).unwrap();
        let list = bench.driver.memory().allocate(4096).unwrap();
        let entries: Vec<u8> = (1..256u64)
            .flat_map(|n| (0x10_0000 + n * 4096).to_le_bytes())
            .collect();
        bench.driver.memory().write(list, 0, &entries).unwrap();
        let mut command = block_command(nvm::READ, 0, 256, 1);
        command.set_prps(0x10_0000, list.iova().0);
        let cids: Vec<_> = (0..8)
            .map(|_| bench.driver.submit(1, command).unwrap())
            .collect();
        if round % 2 == 0 {
            std::thread::yield_now();
        }
        bench.function.unmap_dma(Iova(0x10_0000), 1 << 20).unwrap();
        // From here on the memory must stay as it is.
        let mark = vec![0xa5; 1 << 20];
        memory.write(buffer, 0, &mark).unwrap();
        for cid in cids {
            let status = bench.driver.wait(1, cid).unwrap().status;
            assert!(matches!(
                status,
                Status::SUCCESS | Status::DATA_TRANSFER_ERROR
            ));
        }
        let mut back = vec![0; 1 << 20];
        memory.read(buffer, 0, &mut back).unwrap();
        assert!(back == mark, "round {round}");
        bench.driver.memory().free(list);
    }
}

#[test]
fn a_reset_under_load_ends_all_dma() {
    for round in 0..20 {
        let mut bench = Bench::ready(4096);
        let buffer = bench.driver.memory().allocate(1 << 20).unwrap();
        let prps = bench.driver.prps(buffer, 0, 1 << 20).unwrap();
        let mut command = block_command(nvm::READ, 0, 256, 1);
        command.set_prps(prps.prp1, prps.prp2);
        for _ in 0..63 {
            bench.driver.submit(1, command).unwrap();
        }
        if round % 2 == 0 {
            bench.function.reset().unwrap();
        } else {
            bench.driver.disable().unwrap();
        }
        let mark = vec![0x5a; 1 << 20];
        bench.driver.memory().write(buffer, 0, &mark).unwrap();
        std::thread::sleep(Duration::from_millis(2));
        let mut back = vec![0; 1 << 20];
        bench.driver.memory().read(buffer, 0, &mut back).unwrap();
        assert!(back == mark, "round {round}");
        bench.driver.reset().unwrap();
        bench.recover();
        bench.assert_works();
    }
}

/// By hand, since the driver would disable the controller first.
#[test]
fn a_controller_that_is_busy_can_be_dropped() {
    for _ in 0..10 {
        let disk = Disk::new();
        let function = SoftNvme::open(&disk.config(4096)).unwrap();
        let mut memory = DmaMemory::new(Iova(0), 1 << 16).unwrap();
        let [asq, acq, sq, cq] = [(); 4].map(|()| memory.allocate(4096).unwrap());
        let write = |offset: u64, value: u32| {
            function
                .region_write(RegionIndex::BAR0, offset, &value.to_le_bytes())
                .unwrap();
        };
        function.config_write(4, &[6, 0]).unwrap();
        function.map_dma(&memory.window()).unwrap();
        write(reg::AQA, 31 | 31 << 16);
        write(reg::ASQ, asq.iova().0 as u32);
        write(reg::ACQ, acq.iova().0 as u32);
        write(reg::CC, 0x0046_0001);
        crate::bench::until("ready", || {
            let mut status = [0; 4];
            function
                .region_read(RegionIndex::BAR0, reg::CSTS, &mut status)
                .unwrap();
            status[0] & 1 == 1
        });
        for (slot, opcode, dword11, ring) in [
            (0, admin::CREATE_CQ, 1, cq),
            (1, admin::CREATE_SQ, 1 | 1 << 16, sq),
            (2, admin::ASYNC_EVENT, 0, sq),
        ] {
            let mut entry = command(opcode, 0, &[1 | 63 << 16, dword11]);
            entry.set_prps(ring.iova().0, 0);
            memory.write(asq, slot * 64, &entry.0).unwrap();
        }
        for slot in 0..63 {
            let entry = command(nvm::VERIFY, 1, &[0, 0, 1000]);
            memory.write(sq, slot * 64, &entry.0).unwrap();
        }
        write(DOORBELL_BASE, 3);
        crate::bench::until("both queues", || {
            let mut completion = [0; 16];
            memory.read(acq, 16, &mut completion).unwrap();
            completion[14] & 1 == 1
        });
        write(DOORBELL_BASE + 8, 63);
        drop(function);
        let mut completions = vec![0; 64 * 16];
        memory.read(cq, 0, &mut completions).unwrap();
        std::thread::sleep(Duration::from_millis(2));
        let mut later = vec![0; 64 * 16];
        memory.read(cq, 0, &mut later).unwrap();
        assert!(completions == later, "DMA after the end");
    }
}

/// One access to BAR 0: an offset that is likely to be a register, and a value.
fn accesses() -> impl Strategy<Value = Vec<(u64, u64, bool)>> {
    let offset = prop_oneof![
        4 => (0u64..0x40).prop_map(|n| n & !3),
        4 => (0u64..0x110).prop_map(|n| 0x1000 + (n & !3)),
        1 => 0u64..0x4000,
    ];
    let value = prop_oneof![
        3 => 0u64..64,
        2 => Just(0x0046_0001u64),
        1 => Just(0x001f_001fu64),
        1 => (0u64..2048).prop_map(|page| 0x1_0000_0000 + page * 4096),
        1 => any::<u64>(),
    ];
    proptest::collection::vec((offset, value, any::<bool>()), 1..200)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_register_writes_over_arbitrary_memory_are_survived(
        accesses in accesses(), seed: u64,
    ) {
        let mut bench = Bench::cold(512);
        // Memory full of commands that are close to being good.
        let window = bench.driver.memory().window();
        let noise = pattern(1 << 16, seed);
        let memory = DmaMemoryView(window.clone());
        for (n, chunk) in noise.chunks(64).enumerate() {
            let mut entry = [0; 64];
            entry[0] = chunk[0] % 16;
            entry[4] = 1;
            entry[24..32].copy_from_slice(
                &(0x1_0000_0000 + u64::from(chunk[1]) * 4096).to_le_bytes());
            entry[32..40].copy_from_slice(
                &(0x1_0000_0000 + u64::from(chunk[2]) * 4096).to_le_bytes());
            entry[40] = chunk[3] % 20;
            entry[42] = chunk[4] % 16;
            entry[44] = chunk[5] % 4;
            entry[46] = chunk[6] % 4;
            entry[48] = chunk[7] % 64;
            if chunk[8] % 8 == 0 {
                entry.copy_from_slice(chunk);
            }
            memory.write(window.iova, n * 64, &entry);
        }
        for (offset, value, wide) in accesses {
            let bytes = value.to_le_bytes();
            let len = if wide { 8 } else { 4 };
            let _ = bench.function.region_write(RegionIndex::BAR0, offset, &bytes[..len]);
            let _ = bench.function.region_read(RegionIndex::BAR0, offset, &mut [0; 8][..len]);
        }
        bench.driver.reset().unwrap();
        bench.recover();
        bench.driver.flush(1).unwrap();
    }
}
