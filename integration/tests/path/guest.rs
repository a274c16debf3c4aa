//! A hostile or broken guest: each thing it does wrong has the outcome that a controller would
//! give it, and the drive works afterwards.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_integration::scratch::Scratch;
use farbus_shadow_mem::remote::RemoteFunction;
use farbus_vfio::driver::{DriverError, NvmeDriver, block_command};
use farbus_vfio::nvme::{PAGE_SIZE, Status, SubmissionEntry, admin, cc, csts, nvm, reg};
use farbus_vfio::soft_nvme::SoftNvme;
use farbus_vfio::{Function, Iova};

use super::bed::{BLOCK, Bed, eventually};

/// An address at which no guest has memory.
const NOWHERE: u64 = 0x7fff_0000_0000;

fn still_works(driver: &mut NvmeDriver<RemoteFunction>) {
    let data = vec![0xa5; 3 * PAGE_SIZE];
    driver.write(1, 100, BLOCK, &data).unwrap();
    let mut back = vec![0; data.len()];
    driver.read(1, 100, BLOCK, &mut back).unwrap();
    assert!(back == data);
}

fn status_of(
    driver: &mut NvmeDriver<RemoteFunction>,
    queue: u16,
    command: SubmissionEntry,
) -> Status {
    driver.execute(queue, command).unwrap().status
}

#[test]
fn doorbells_out_of_range_are_ignored() {
    let bed = Bed::start("size=1MiB");
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    for queue in [0, 1, 2, 63, 64, 65, 511] {
        for value in [64, 65, 0xffff, 0x1_0000, u32::MAX] {
            driver.ring_sq(queue, value).unwrap();
            driver.ring_cq(queue, value).unwrap();
        }
    }
    // Heads that would consume what was never posted.
    driver.ring_cq(1, 63).unwrap();
    still_works(&mut driver);
}

#[test]
fn prps_to_nowhere_fail_the_command_alone() {
    let bed = Bed::start("size=16MiB");
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    for opcode in [nvm::READ, nvm::WRITE] {
        for (len, prp1, prp2, expected) in [
            (4096, NOWHERE, 0, Status::DATA_TRANSFER_ERROR),
            (4096, u64::MAX - 3, 0, Status::DATA_TRANSFER_ERROR),
            (8192, 0x1_0000_0000, NOWHERE, Status::DATA_TRANSFER_ERROR),
            (1 << 20, 0x1_0000_0000, NOWHERE, Status::DATA_TRANSFER_ERROR),
            (4096, 0x1_0000_0001, 0, Status::INVALID_PRP_OFFSET),
            (
                8192,
                0x1_0000_0000,
                0x1_0000_0200,
                Status::INVALID_PRP_OFFSET,
            ),
            (
                1 << 20,
                0x1_0000_0000,
                0x1_0000_0004,
                Status::INVALID_PRP_OFFSET,
            ),
        ] {
            let mut command = block_command(opcode, 0, len, BLOCK);
            command.set_prps(prp1, prp2);
            assert_eq!(status_of(&mut driver, 1, command), expected, "{command:?}");
        }
    }
    still_works(&mut driver);
}

#[test]
fn prp_lists_that_loop_fail_the_command_alone() {
    let bed = Bed::start("size=16MiB");
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    let list = driver.memory().allocate(PAGE_SIZE).unwrap();
    let last = list.iova().0 + PAGE_SIZE as u64 - 8;
    driver
        .memory()
        .write(list, PAGE_SIZE - 8, &last.to_le_bytes())
        .unwrap();
    let mut command = block_command(nvm::READ, 0, 1 << 20, BLOCK);
    command.set_prps(0x1_0000_0000, last);
    assert_eq!(
        status_of(&mut driver, 1, command),
        Status::DATA_TRANSFER_ERROR
    );
    still_works(&mut driver);
}

#[test]
fn commands_that_cannot_cross_get_the_status_of_a_controller_without_them() {
    let bed = Bed::start("size=16MiB");
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    for opcode in 0..=255 {
        let admin_allowed = [0, 1, 2, 4, 5, 6, 8, 9, 0xa, 0xc, 0x14, 0x18, 0x7c, 0x86];
        if !admin_allowed.contains(&opcode) {
            let status = status_of(&mut driver, 0, SubmissionEntry::new(opcode));
            assert_eq!(status, Status::INVALID_OPCODE, "admin {opcode:#x}");
        }
        let io_allowed = [0, 1, 2, 4, 5, 8, 9, 0xc];
        if !io_allowed.contains(&opcode) {
            let status = status_of(&mut driver, 1, SubmissionEntry::new(opcode));
            assert_eq!(status, Status::INVALID_OPCODE, "I/O {opcode:#x}");
        }
    }
    let mut sgl = block_command(nvm::READ, 0, 512, BLOCK);
    sgl.0[1] = 0x40;
    assert_eq!(status_of(&mut driver, 1, sgl), Status::INVALID_FIELD);
    let mut elsewhere = block_command(nvm::READ, 0, 512, BLOCK);
    elsewhere.set_nsid(2);
    assert_eq!(
        status_of(&mut driver, 1, elsewhere),
        Status::INVALID_NAMESPACE
    );
    let mut beyond = block_command(nvm::READ, u64::MAX, 512, BLOCK);
    beyond.set_prps(0x1_0000_0000, 0);
    assert_eq!(status_of(&mut driver, 1, beyond), Status::LBA_OUT_OF_RANGE);
    still_works(&mut driver);
}

#[test]
fn queues_that_cannot_be_are_refused() {
    let bed = Bed::start("size=16MiB");
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    let mut create = |opcode, cdw10: u32, cdw11: u32, prp1: u64| {
        let mut command = SubmissionEntry::new(opcode);
        command.set_dword(10, cdw10);
        command.set_dword(11, cdw11);
        command.set_prps(prp1, 0);
        status_of(&mut driver, 0, command)
    };
    let ring = 0x1_0000_0000;
    let cq = |cdw10, cdw11, prp1| (admin::CREATE_CQ, cdw10, cdw11, prp1);
    let sq = |cdw10, cdw11, prp1| (admin::CREATE_SQ, cdw10, cdw11, prp1);
    for ((opcode, cdw10, cdw11, prp1), expected) in [
        (cq(15 << 16, 1, ring), Status::INVALID_QID),
        (cq(15 << 16 | 1, 1, ring), Status::INVALID_QID),
        (cq(15 << 16 | 999, 1, ring), Status::INVALID_QID),
        (cq(2, 1, ring), Status::INVALID_QUEUE_SIZE),
        (cq(0xffff << 16 | 2, 1, ring), Status::INVALID_QUEUE_SIZE),
        (cq(15 << 16 | 2, 0, ring), Status::INVALID_FIELD),
        (cq(15 << 16 | 2, 1, ring + 16), Status::INVALID_PRP_OFFSET),
        (cq(15 << 16 | 2, 1, NOWHERE), Status::INVALID_FIELD),
        (
            cq(15 << 16 | 2, 999 << 16 | 3, ring),
            Status::INVALID_VECTOR,
        ),
        (sq(15 << 16 | 2, 1, ring), Status::INVALID_CQ),
        (sq(15 << 16 | 2, 2 << 16 | 1, ring), Status::INVALID_CQ),
        (sq(15 << 16 | 1, 1 << 16 | 1, ring), Status::INVALID_QID),
        ((admin::DELETE_SQ, 0, 0, 0), Status::INVALID_QID),
        ((admin::DELETE_SQ, 2, 0, 0), Status::INVALID_QID),
        ((admin::DELETE_CQ, 0, 0, 0), Status::INVALID_QID),
        ((admin::DELETE_CQ, 1, 0, 0), Status::INVALID_QUEUE_DELETION),
    ] {
        assert_eq!(
            create(opcode, cdw10, cdw11, prp1),
            expected,
            "{opcode} {cdw10:#x} {cdw11:#x}"
        );
    }
    still_works(&mut driver);
}

#[test]
fn queue_memory_that_goes_away_is_fatal_until_the_guest_resets() {
    let bed = Bed::start("size=16MiB");
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    let window = driver.memory().window();
    attached
        .remote
        .unmap_dma(window.iova, window.len as u64)
        .unwrap();
    driver.ring_sq(1, 1).unwrap();
    assert!(driver.read32(reg::CSTS).unwrap() & csts::CFS != 0);
    attached.remote.map_dma(&window).unwrap();
    driver.enable().unwrap();
    driver.create_queue_pair(1, 64, Some(1)).unwrap();
    still_works(&mut driver);
}

#[test]
fn admin_queues_to_nowhere_are_fatal_until_the_guest_resets() {
    let bed = Bed::start("size=16MiB");
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    driver.disable().unwrap();
    driver.write32(reg::AQA, 31 | 31 << 16).unwrap();
    driver.write64(reg::ASQ, NOWHERE).unwrap();
    driver.write64(reg::ACQ, NOWHERE).unwrap();
    driver.write32(reg::CC, 6 << 16 | 4 << 20 | cc::EN).unwrap();
    eventually("ready", || {
        (driver.read32(reg::CSTS).unwrap() & csts::RDY != 0).then_some(())
    });
    driver.ring_sq(0, 1).unwrap();
    assert!(driver.read32(reg::CSTS).unwrap() & csts::CFS != 0);
    driver.enable().unwrap();
    driver.create_queue_pair(1, 64, Some(1)).unwrap();
    still_works(&mut driver);
}

#[test]
fn resets_in_the_middle_of_io_lose_nothing_but_the_commands() {
    let bed = Bed::start("size=16MiB");
    let attached = bed.attach();
    let mut driver = attached.driver(2);
    let buffer = driver.memory().allocate(128 << 10).unwrap();
    for round in 0..40 {
        for queue in [1, 2] {
            for index in 0..30 {
                let prps = driver.prps(buffer, 0, 128 << 10).unwrap();
                let mut command = block_command(nvm::READ, index * 256, 128 << 10, BLOCK);
                command.set_prps(prps.prp1, prps.prp2);
                driver.enqueue(queue, command).unwrap();
                driver.free_prps(prps);
            }
            driver
                .ring_sq(queue, driver.tail(queue).unwrap().into())
                .unwrap();
        }
        match round % 3 {
            0 => driver.disable().unwrap(),
            1 => attached.remote.reset().unwrap(),
            // A guest that does not wait for the controller to stop.
            _ => {
                let enabled = driver.read32(reg::CC).unwrap();
                driver.write32(reg::CC, enabled & !cc::EN).unwrap();
                driver.write32(reg::CC, enabled).unwrap();
            }
        }
        driver.enable().unwrap();
        for queue in [1, 2] {
            driver.create_queue_pair(queue, 64, Some(queue)).unwrap();
        }
        still_works(&mut driver);
    }
}

#[test]
fn completions_wait_while_the_guest_leaves_its_queue_full() {
    completions_wait_for_room(&Bed::start("size=16MiB"));
}

#[test]
fn completions_of_a_drive_that_needs_no_time_wait_for_room_too() {
    let drive = SoftNvme::open(&"backing=memory,size=16MiB".parse().unwrap()).unwrap();
    assert!(drive.completes_at_once());
    let scratch = Scratch::new("path").unwrap();
    let bed = Bed::with_function(scratch, Arc::new(drive));
    let begun = Instant::now();
    completions_wait_for_room(&bed);
    // Twenty times there is room again. Left to the device half's ticks, that took three seconds.
    assert!(begun.elapsed() < Duration::from_millis(1500));
}

fn completions_wait_for_room(bed: &Bed) {
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    // A completion queue of four entries for a submission queue of sixty-four.
    let rings = driver.memory().allocate(2 * PAGE_SIZE).unwrap();
    let (sq, cq) = (rings.iova().0, rings.iova().0 + PAGE_SIZE as u64);
    let mut command = SubmissionEntry::new(admin::CREATE_CQ);
    command.set_prps(cq, 0);
    command.set_dword(10, 3 << 16 | 2);
    command.set_dword(11, 1);
    driver.command(0, command).unwrap();
    let mut command = SubmissionEntry::new(admin::CREATE_SQ);
    command.set_prps(sq, 0);
    command.set_dword(10, 63 << 16 | 2);
    command.set_dword(11, 2 << 16 | 1);
    driver.command(0, command).unwrap();
    for cid in 0..63u16 {
        let mut flush = SubmissionEntry::new(nvm::FLUSH);
        flush.set_nsid(1);
        flush.set_cid(cid);
        driver
            .memory()
            .write(rings, usize::from(cid) * 64, &flush.0)
            .unwrap();
    }
    driver.ring_sq(2, 63).unwrap();

    let mut seen = Vec::new();
    let (mut head, mut phase) = (0usize, 1u16);
    while seen.len() < 63 {
        // Takes what is there only when the queue is full, or at the end.
        let full = 3.min(63 - seen.len());
        let entry = |driver: &mut NvmeDriver<_>, index: usize| {
            let mut bytes = [0; 16];
            driver
                .memory()
                .read(rings, PAGE_SIZE + index * 16, &mut bytes)
                .unwrap();
            let cid = u16::from_le_bytes([bytes[12], bytes[13]]);
            (cid, u16::from_le_bytes([bytes[14], bytes[15]]) & 1)
        };
        let last = head + full - 1;
        let last_phase = if last >= 4 { phase ^ 1 } else { phase };
        eventually("the queue is full", || {
            (entry(&mut driver, last % 4).1 == last_phase).then_some(())
        });
        let beyond = (head + full) % 4;
        if full == 3 {
            let (_, stale) = entry(&mut driver, beyond);
            let fresh = if head + full >= 4 { phase ^ 1 } else { phase };
            assert_ne!(
                stale, fresh,
                "a fourth completion in a queue that holds three"
            );
        }
        for _ in 0..full {
            seen.push(entry(&mut driver, head).0);
            head += 1;
            if head == 4 {
                (head, phase) = (0, phase ^ 1);
            }
        }
        driver.ring_cq(2, head as u32).unwrap();
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..63).collect::<Vec<_>>());
}

#[test]
fn commands_that_change_while_they_are_read_are_carried_as_one_copy() {
    let bed = Bed::start("size=16MiB");
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    let rings = driver.memory().allocate(2 * PAGE_SIZE).unwrap();
    let list = driver.memory().allocate(PAGE_SIZE).unwrap();
    let mut create = SubmissionEntry::new(admin::CREATE_CQ);
    create.set_prps(rings.iova().0 + PAGE_SIZE as u64, 0);
    create.set_dword(10, 63 << 16 | 2);
    create.set_dword(11, 1);
    driver.command(0, create).unwrap();
    let mut create = SubmissionEntry::new(admin::CREATE_SQ);
    create.set_prps(rings.iova().0, 0);
    create.set_dword(10, 63 << 16 | 2);
    create.set_dword(11, 2 << 16 | 1);
    driver.command(0, create).unwrap();
    let window = driver.memory().window();
    let offset = (rings.iova().0 - window.iova.0) as usize;
    let memory = window.memory.clone();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    // Another CPU of the guest that scribbles over the ring and the list.
    let scribbler = std::thread::spawn(move || {
        let mut value = 1u8;
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            use vm_memory::VolatileMemory;
            value = value.wrapping_mul(31).wrapping_add(7);
            for at in (0..PAGE_SIZE).step_by(37) {
                memory
                    .get_slice(offset + at, 1)
                    .unwrap()
                    .copy_from(&[value][..]);
                memory
                    .get_slice(offset + 2 * PAGE_SIZE + at, 1)
                    .unwrap()
                    .copy_from(&[value][..]);
            }
        }
    });
    for tail in 0..2000u32 {
        let mut command = block_command(nvm::READ, 0, 64 << 10, BLOCK);
        command.set_prps(0x1_0000_0000, list.iova().0);
        driver
            .memory()
            .write(rings, (tail % 64) as usize * 64, &command.0)
            .unwrap();
        driver.ring_sq(2, tail % 64).unwrap();
        driver.ring_cq(2, tail % 64).unwrap();
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    scribbler.join().unwrap();
    driver.enable().unwrap();
    driver.create_queue_pair(1, 64, Some(1)).unwrap();
    still_works(&mut driver);
}

#[test]
fn silence_of_a_guest_is_no_reason_to_lose_the_claim() {
    let bed = Bed::start("size=1MiB");
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    // Longer than the device server waits for a sign of life.
    let woken = driver.wait_interrupt(1, Duration::from_secs(7)).unwrap();
    assert!(!woken);
    assert!(attached.remote.take_lost().is_none());
    still_works(&mut driver);
}

#[test]
fn memory_that_is_not_shared_shows_as_a_failed_controller() {
    let bed = Bed::start("size=1MiB");
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    let window = driver.memory().window();
    attached
        .remote
        .unmap_dma(window.iova, window.len as u64)
        .unwrap();
    // What a private copy of the guest's looks like from outside: zeroes.
    let mut stale = window.clone();
    stale.memory = farbus_shadow_mem::shadow::shared_memory("stale", window.len).unwrap();
    stale.offset = 0;
    stale.iova = Iova(window.iova.0);
    attached.remote.map_dma(&stale).unwrap();
    let error = driver.identify(1, 0).unwrap_err();
    assert!(matches!(error, DriverError::Fatal { .. }), "{error}");
}
