//! Commands that are carried out in the middle of a doorbell write.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use farbus_vfio::driver::{DriverConfig, NvmeDriver, block_command};
use farbus_vfio::nvme::{DOORBELL_BASE, SubmissionEntry, cns, nvm};
use farbus_vfio::soft_nvme::{SoftNvme, SoftNvmeConfig};
use farbus_vfio::{Function, RegionIndex};

use crate::bench::{Bench, Disk, SIZE, pattern, read_block};

fn null() -> Bench {
    let mut bench = Bench::on(Disk::new(), &SoftNvmeConfig::null(SIZE));
    bench.recover();
    bench
}

fn flush() -> SubmissionEntry {
    let mut flush = SubmissionEntry::new(nvm::FLUSH);
    flush.set_nsid(1);
    flush
}

#[test]
fn commands_are_done_when_the_doorbell_write_returns() {
    let mut bench = Bench::ready(512);
    let buffer = bench.driver.memory().allocate(4096).unwrap();
    bench.driver.write(1, 7, 512, &pattern(512, 3)).unwrap();
    let mut command = read_block(7);
    command.set_prps(buffer.iova().0, 0);
    let cid = bench.driver.submit(1, command).unwrap();
    let entry = bench.driver.poll(1).unwrap().unwrap();
    assert!(entry.cid == cid && entry.status.is_success());
    let mut back = vec![0; 512];
    bench.driver.memory().read(buffer, 0, &mut back).unwrap();
    assert!(back == pattern(512, 3));
}

#[test]
fn a_batch_raises_one_interrupt() {
    for mut bench in [Bench::ready(512), null()] {
        let event = Arc::clone(bench.driver.event(1).unwrap());
        for commands in [1, 63, 7] {
            for _ in 0..commands {
                bench.driver.enqueue(1, flush()).unwrap();
            }
            let tail = bench.driver.tail(1).unwrap();
            bench.driver.ring_sq(1, u32::from(tail)).unwrap();
            assert_eq!(event.read().unwrap(), 1, "{commands} commands");
            for _ in 0..commands {
                assert!(bench.driver.poll(1).unwrap().is_some());
            }
            assert!(event.read().is_err(), "room alone is no news");
        }
    }
}

/// The queue pair that the driver made is larger than its completions have room for once the
/// host takes none away: the head doorbell itself must go on with what waits.
#[test]
fn a_head_doorbell_goes_on_with_what_waits_for_room() {
    let mut bench = Bench::ready(512);
    for _ in 0..63 {
        bench.driver.enqueue(1, flush()).unwrap();
    }
    bench.driver.ring_sq(1, 63).unwrap();
    // All 63 entries are used. By hand, since the driver knows that its queue is full.
    bench.driver.ring_sq(1, 9).unwrap();
    let event = Arc::clone(bench.driver.event(1).unwrap());
    assert_eq!(event.read().unwrap(), 1);
    bench.driver.ring_cq(1, 4).unwrap();
    assert_eq!(event.read().unwrap(), 1, "four more are posted");
    bench.driver.ring_cq(1, 10).unwrap();
    assert_eq!(event.read().unwrap(), 1, "and the other six");
    bench.driver.ring_cq(1, 11).unwrap();
    assert!(event.read().is_err(), "nothing is left");
}

#[test]
fn no_command_is_lost_or_done_twice_when_several_threads_ring() {
    let mut bench = Bench::enabled(512);
    for queue in 1..=4 {
        let pair = bench.driver.create_queue_pair(queue, 64, Some(queue));
        pair.unwrap();
        for _ in 0..63 {
            bench.driver.enqueue(queue, flush()).unwrap();
        }
    }
    let function = &bench.function;
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let queue = thread % 4 + 1;
            scope.spawn(move || {
                let tail = 63u32.to_le_bytes();
                let at = DOORBELL_BASE + queue * 8;
                let rung = function.region_write(RegionIndex::BAR0, at, &tail);
                rung.unwrap();
            });
        }
    });
    for queue in 1..=4 {
        let mut found = 0;
        while bench.driver.poll(queue).unwrap().is_some() {
            found += 1;
        }
        assert_eq!(found, 63, "queue {queue}");
    }
}

#[test]
fn a_reset_ends_a_batch_of_another_thread() {
    for _ in 0..20 {
        let mut bench = Bench::ready(4096);
        let buffer = bench.driver.memory().allocate(1 << 20).unwrap();
        let prps = bench.driver.prps(buffer, 0, 1 << 20).unwrap();
        let mut command = block_command(nvm::READ, 0, 256, 1);
        command.set_prps(prps.prp1, prps.prp2);
        for _ in 0..63 {
            bench.driver.enqueue(1, command).unwrap();
        }
        let function = Arc::clone(&bench.function);
        let worker = std::thread::spawn(move || {
            let tail = 63u32.to_le_bytes();
            // The reset may be first: then registers do not answer.
            let _ = function.region_write(RegionIndex::BAR0, DOORBELL_BASE + 8, &tail);
        });
        std::thread::yield_now();
        bench.function.reset().unwrap();
        let mark = vec![0x5a; 1 << 20];
        bench.driver.memory().write(buffer, 0, &mark).unwrap();
        worker.join().unwrap();
        let mut back = vec![0; 1 << 20];
        bench.driver.memory().read(buffer, 0, &mut back).unwrap();
        assert!(back == mark);
        bench.driver.reset().unwrap();
        bench.recover();
        bench.assert_works();
    }
}

#[test]
fn nothing_holds_nothing_and_moves_nothing() {
    let mut bench = null();
    let data = pattern(8192, 1);
    bench.driver.write(1, 3, 512, &data).unwrap();
    let buffer = bench.driver.memory().allocate(8192).unwrap();
    bench.driver.memory().write(buffer, 0, &data).unwrap();
    let command = block_command(nvm::READ, 100, 16, 1);
    bench.driver.transfer(1, command, buffer, 8192).unwrap();
    let mut back = vec![0; 8192];
    bench.driver.memory().read(buffer, 0, &mut back).unwrap();
    assert!(back == data, "a read leaves memory as it is");
    bench.driver.compare(1, 3, 512, &[0; 8192]).unwrap();
    bench.driver.write_zeroes(1, 0, 8, true).unwrap();
    bench.driver.deallocate(1, &[(0, 8)]).unwrap();
    bench.driver.flush(1).unwrap();
}

#[test]
fn memory_is_zero_at_first_and_a_new_drive_has_other_names() {
    let mut names = Vec::new();
    for _ in 0..2 {
        let mut bench = Bench::ready(512);
        assert!(bench.stored(512).iter().all(|byte| *byte == 0));
        bench.driver.write(1, 0, 512, &[7; 512]).unwrap();
        names.push(bench.driver.identify(cns::DESCRIPTORS, 1).unwrap());
        names.push(bench.driver.identify(cns::CONTROLLER, 0).unwrap());
    }
    assert_ne!(names[0], names[2]);
    assert_ne!(names[1][4..24], names[3][4..24], "serial numbers");
}

#[test]
fn a_controller_without_threads_for_io_ends_while_it_is_busy() {
    let function = Arc::new(SoftNvme::open(&SoftNvmeConfig::null(SIZE)).unwrap());
    let mut driver = NvmeDriver::new(Arc::clone(&function), DriverConfig::default()).unwrap();
    driver.enable().unwrap();
    driver.create_queue_pair(1, 64, Some(1)).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for tail in (0..64u32).cycle() {
                let at = DOORBELL_BASE + 8;
                let rung = function.region_write(RegionIndex::BAR0, at, &tail.to_le_bytes());
                if rung.is_err() || stop.load(Ordering::SeqCst) {
                    break;
                }
            }
        });
        driver.disable().unwrap();
        stop.store(true, Ordering::SeqCst);
    });
}
