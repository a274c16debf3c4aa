//! Creating, deleting and running queues.

use std::time::Duration;

use farbus_vfio::nvme::{Status, SubmissionEntry, admin, cc, nvm, reg};

use crate::bench::{Bench, command, pattern, read_block};

fn create(opcode: u8, id: u32, entries: u32, dword11: u32, prp1: u64) -> SubmissionEntry {
    let mut command = command(opcode, 0, &[id | (entries.wrapping_sub(1) << 16), dword11]);
    command.set_prps(prp1, 0);
    command
}

fn status(bench: &mut Bench, command: SubmissionEntry) -> Status {
    bench.driver.execute(0, command).unwrap().status
}

#[test]
fn completion_queues_that_cannot_be_are_refused() {
    let mut bench = Bench::enabled(512);
    bench.driver.create_queue_pair(1, 8, None).unwrap();
    for (id, entries, dword11, prp1, expected) in [
        (0, 8, 1, 0x1000, Status::INVALID_QID),
        (1, 8, 1, 0x1000, Status::INVALID_QID),
        (17, 8, 1, 0x1000, Status::INVALID_QID),
        (0xffff, 8, 1, 0x1000, Status::INVALID_QID),
        (2, 1, 1, 0x1000, Status::INVALID_QUEUE_SIZE),
        (2, 1025, 1, 0x1000, Status::INVALID_QUEUE_SIZE),
        (2, 65536, 1, 0x1000, Status::INVALID_QUEUE_SIZE),
        (2, 8, 0, 0x1000, Status::INVALID_FIELD),
        (2, 8, 1, 0x1010, Status::INVALID_PRP_OFFSET),
        (2, 8, 3 | 17 << 16, 0x1000, Status::INVALID_VECTOR),
        (2, 8, 3 | 0xffff << 16, 0x1000, Status::INVALID_VECTOR),
        (2, 1024, 3 | 16 << 16, 0x1000, Status::SUCCESS),
    ] {
        let command = create(admin::CREATE_CQ, id, entries, dword11, prp1);
        assert_eq!(
            status(&mut bench, command),
            expected,
            "{id} {entries} {dword11:#x}"
        );
    }
}

#[test]
fn submission_queues_that_cannot_be_are_refused() {
    let mut bench = Bench::enabled(512);
    bench.driver.create_queue_pair(1, 8, None).unwrap();
    for (id, entries, dword11, prp1, expected) in [
        (0, 8, 1 | 1 << 16, 0x1000, Status::INVALID_QID),
        (1, 8, 1 | 1 << 16, 0x1000, Status::INVALID_QID),
        (17, 8, 1 | 1 << 16, 0x1000, Status::INVALID_QID),
        (2, 8, 1, 0x1000, Status::INVALID_CQ),
        (2, 8, 1 | 2 << 16, 0x1000, Status::INVALID_CQ),
        (2, 8, 1 | 0xffff << 16, 0x1000, Status::INVALID_CQ),
        (2, 1, 1 | 1 << 16, 0x1000, Status::INVALID_QUEUE_SIZE),
        (2, 1025, 1 | 1 << 16, 0x1000, Status::INVALID_QUEUE_SIZE),
        (2, 8, 1 << 16, 0x1000, Status::INVALID_FIELD),
        (2, 8, 1 | 1 << 16, 0x1001, Status::INVALID_PRP_OFFSET),
        (2, 8, 7 | 1 << 16, 0x1000, Status::SUCCESS),
    ] {
        let command = create(admin::CREATE_SQ, id, entries, dword11, prp1);
        assert_eq!(
            status(&mut bench, command),
            expected,
            "{id} {entries} {dword11:#x}"
        );
    }
}

#[test]
fn entry_sizes_other_than_64_and_16_bytes_get_no_queues() {
    let mut bench = Bench::enabled(512);
    let configuration = bench.driver.read32(reg::CC).unwrap();
    let with = |sq: u32, cq: u32| cc::EN | sq << cc::IOSQES_SHIFT | cq << cc::IOCQES_SHIFT;
    bench.driver.write32(reg::CC, with(6, 5)).unwrap();
    let cq = create(admin::CREATE_CQ, 1, 8, 1, 0x1000);
    assert_eq!(status(&mut bench, cq), Status::INVALID_QUEUE_SIZE);
    bench.driver.write32(reg::CC, with(7, 4)).unwrap();
    assert_eq!(status(&mut bench, cq), Status::SUCCESS);
    let sq = create(admin::CREATE_SQ, 1, 8, 1 | 1 << 16, 0x1000);
    assert_eq!(status(&mut bench, sq), Status::INVALID_QUEUE_SIZE);
    bench.driver.write32(reg::CC, configuration).unwrap();
    assert_eq!(status(&mut bench, sq), Status::SUCCESS);
}

#[test]
fn queues_are_deleted_in_order_only() {
    let mut bench = Bench::ready(512);
    let delete = |opcode, id| command(opcode, 0, &[id]);
    for (opcode, id, expected) in [
        (admin::DELETE_SQ, 0, Status::INVALID_QID),
        (admin::DELETE_CQ, 0, Status::INVALID_QID),
        (admin::DELETE_SQ, 2, Status::INVALID_QID),
        (admin::DELETE_CQ, 0xffff, Status::INVALID_QID),
        (admin::DELETE_CQ, 1, Status::INVALID_QUEUE_DELETION),
        (admin::DELETE_SQ, 1, Status::SUCCESS),
        (admin::DELETE_SQ, 1, Status::INVALID_QID),
        (admin::DELETE_CQ, 1, Status::SUCCESS),
        (admin::DELETE_CQ, 1, Status::INVALID_QID),
    ] {
        assert_eq!(
            status(&mut bench, delete(opcode, id)),
            expected,
            "{opcode:#x} {id}"
        );
    }
}

#[test]
fn a_deleted_queue_completes_nothing_more() {
    let mut bench = Bench::ready(4096);
    for round in 0..20 {
        for _ in 0..63 {
            bench.driver.enqueue(1, block_write_zeroes()).unwrap();
        }
        let tail = bench.driver.tail(1).unwrap();
        bench.driver.ring_sq(1, u32::from(tail)).unwrap();
        let deletion = bench.driver.command(0, command(admin::DELETE_SQ, 0, &[1]));
        assert_eq!(deletion.unwrap(), 0, "round {round}");
        let mut before = 0;
        while bench.driver.poll(1).unwrap().is_some() {
            before += 1;
        }
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(
            bench.driver.poll(1).unwrap(),
            None,
            "after {before} completions"
        );
        bench.recover();
    }
}

fn block_write_zeroes() -> SubmissionEntry {
    command(nvm::WRITE_ZEROES, 1, &[0, 0, 15])
}

#[test]
fn rings_wrap_many_times_and_completions_tell_the_head() {
    let mut bench = Bench::enabled(4096);
    bench.driver.create_queue_pair(1, 3, Some(1)).unwrap();
    bench.driver.create_queue_pair(2, 1024, Some(2)).unwrap();
    for queue in [1, 2] {
        for n in 0..2500u32 {
            let mut command = SubmissionEntry::new(nvm::FLUSH);
            command.set_nsid(1);
            let entry = bench.driver.execute(queue, command).unwrap();
            assert_eq!(entry.status, Status::SUCCESS);
            assert_eq!(entry.sq_id, queue);
            let entries = if queue == 1 { 3 } else { 1024 };
            assert_eq!(u32::from(entry.sq_head), (n + 1) % entries);
        }
    }
}

#[test]
fn several_submission_queues_share_a_completion_queue() {
    let mut bench = Bench::ready(512);
    let memory = bench.driver.memory();
    let rings: Vec<_> = (0..3).map(|_| memory.allocate(4096).unwrap()).collect();
    for (n, ring) in rings.iter().enumerate() {
        let command = create(
            admin::CREATE_SQ,
            5 + n as u32,
            64,
            1 | 1 << 16,
            ring.iova().0,
        );
        assert_eq!(status(&mut bench, command), Status::SUCCESS);
    }
    for (n, ring) in rings.iter().enumerate() {
        // The driver does not know these queues; identifiers of its own queue stand in.
        for slot in 0..5u16 {
            let cid = bench
                .driver
                .enqueue(1, SubmissionEntry::new(nvm::FLUSH))
                .unwrap();
            let mut flush = SubmissionEntry::new(nvm::FLUSH);
            flush.set_nsid(1);
            flush.set_cid(cid);
            bench
                .driver
                .memory()
                .write(*ring, usize::from(slot) * 64, &flush.0)
                .unwrap();
        }
        bench.driver.ring_sq(5 + n as u16, 5).unwrap();
    }
    let mut seen = [0; 3];
    for cid in 0..15 {
        let entry = bench.driver.wait(1, cid).unwrap();
        assert_eq!(entry.status, Status::SUCCESS);
        seen[usize::from(entry.sq_id) - 5] += 1;
    }
    assert_eq!(seen, [5, 5, 5]);
    // Its completion queue cannot go before all three have.
    assert_eq!(
        status(&mut bench, command(admin::DELETE_CQ, 0, &[1])),
        Status::INVALID_QUEUE_DELETION
    );
}

#[test]
fn commands_wait_while_the_completion_queue_is_full() {
    let mut bench = Bench::ready(512);
    let ring = bench.driver.memory().allocate(4096).unwrap();
    let small = bench.driver.memory().allocate(4096).unwrap();
    let cq = create(admin::CREATE_CQ, 2, 4, 1, small.iova().0);
    assert_eq!(status(&mut bench, cq), Status::SUCCESS);
    let sq = create(admin::CREATE_SQ, 2, 64, 1 | 2 << 16, ring.iova().0);
    assert_eq!(status(&mut bench, sq), Status::SUCCESS);
    for slot in 0..20u16 {
        let mut flush = SubmissionEntry::new(nvm::FLUSH);
        flush.set_nsid(1);
        flush.set_cid(slot);
        bench
            .driver
            .memory()
            .write(ring, usize::from(slot) * 64, &flush.0)
            .unwrap();
    }
    bench.driver.ring_sq(2, 20).unwrap();
    let entry = |bench: &mut Bench, slot: usize| {
        let mut bytes = [0; 16];
        bench
            .driver
            .memory()
            .read(small, slot * 16, &mut bytes)
            .unwrap();
        (
            u16::from_le_bytes([bytes[12], bytes[13]]),
            bytes[14] & 1 == 1,
        )
    };
    let mut cids = Vec::new();
    let (mut head, mut phase) = (0usize, true);
    while cids.len() < 20 {
        // Three entries at most are posted, the fourth slot stays as it was.
        let room = 3.min(20 - cids.len());
        let posted = |bench: &mut Bench| -> Vec<bool> {
            let slot = |n| ((head + n) % 4, phase ^ (head + n >= 4));
            (0..4)
                .map(slot)
                .map(|(at, phase)| entry(bench, at).1 == phase)
                .collect()
        };
        let start = std::time::Instant::now();
        while posted(&mut bench).iter().filter(|posted| **posted).count() < room {
            assert!(
                start.elapsed() < crate::bench::LIMIT,
                "stuck after {cids:?}"
            );
        }
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(posted(&mut bench), [room > 0, room > 1, room > 2, false]);
        cids.push(entry(&mut bench, head).0);
        head += 1;
        if head == 4 {
            (head, phase) = (0, !phase);
        }
        bench.driver.ring_cq(2, head as u32).unwrap();
    }
    cids.sort_unstable();
    assert_eq!(cids, (0..20).collect::<Vec<_>>());
}

#[test]
fn event_requests_do_not_use_up_a_tiny_completion_queue() {
    let mut bench = Bench::cold(512);
    let sq = bench.driver.memory().allocate(4096).unwrap();
    let cq = bench.driver.memory().allocate(4096).unwrap();
    bench.driver.write32(reg::AQA, 63 | 1 << 16).unwrap();
    bench.driver.write64(reg::ASQ, sq.iova().0).unwrap();
    bench.driver.write64(reg::ACQ, cq.iova().0).unwrap();
    bench.driver.write32(reg::CC, 0x0046_0001).unwrap();
    crate::bench::until("ready", || bench.driver.read32(reg::CSTS).unwrap() == 1);
    for slot in 0..6u16 {
        let opcode = if slot < 4 {
            admin::ASYNC_EVENT
        } else {
            admin::GET_FEATURES
        };
        let mut entry = command(opcode, 0, &[1]);
        entry.set_cid(slot);
        bench
            .driver
            .memory()
            .write(sq, usize::from(slot) * 64, &entry.0)
            .unwrap();
    }
    bench.driver.ring_sq(0, 6).unwrap();
    bench.driver.ring_sq(9, 6).unwrap();
    let mut cids = Vec::new();
    let (mut head, mut phase) = (0usize, 1);
    for _ in 0..3 {
        let mut bytes = [0; 16];
        let start = std::time::Instant::now();
        loop {
            bench
                .driver
                .memory()
                .read(cq, head * 16, &mut bytes)
                .unwrap();
            if bytes[14] & 1 == phase {
                break;
            }
            assert!(
                start.elapsed() < crate::bench::LIMIT,
                "stuck after {cids:?}"
            );
        }
        cids.push(u16::from_le_bytes([bytes[12], bytes[13]]));
        head = (head + 1) % 2;
        phase ^= u8::from(head == 0);
        bench.driver.ring_cq(0, head as u32).unwrap();
    }
    cids.sort_unstable();
    assert_eq!(cids, [0, 4, 5], "one event and both other commands");
}

#[test]
fn sixty_three_queue_pairs_work_at_once() {
    let disk = crate::bench::Disk::new();
    let config = farbus_vfio::soft_nvme::SoftNvmeConfig {
        queues: 63,
        ..disk.config(512)
    };
    let mut bench = Bench::on(disk, &config);
    bench.driver.enable().unwrap();
    assert_eq!(bench.driver.request_queues(100).unwrap(), 63);
    for id in 1..=63 {
        bench.driver.create_queue_pair(id, 16, Some(id)).unwrap();
    }
    let buffer = bench.driver.memory().allocate(4096 * 64).unwrap();
    let data = pattern(512 * 63, 5);
    bench.driver.write(1, 0, 512, &data).unwrap();
    let mut cids = Vec::new();
    for id in 1..=63u16 {
        let mut command = read_block(u64::from(id) - 1);
        command.set_prps(buffer.iova().0 + 4096 * u64::from(id), 0);
        cids.push(bench.driver.submit(id, command).unwrap());
    }
    for (id, cid) in (1..=63u16).zip(cids) {
        assert_eq!(bench.driver.wait(id, cid).unwrap().status, Status::SUCCESS);
        let mut block = [0; 512];
        bench
            .driver
            .memory()
            .read(buffer, 4096 * usize::from(id), &mut block)
            .unwrap();
        assert!(block[..] == data[512 * (usize::from(id) - 1)..][..512]);
    }
}
