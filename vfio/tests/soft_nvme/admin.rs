//! Identify, log pages, Abort, and what is refused.

use farbus_vfio::nvme::{Status, SubmissionEntry, admin, cns, log_page};
use farbus_vfio::soft_nvme::SoftNvmeConfig;

use crate::bench::{Bench, Disk, SIZE, read_block, status_of};

fn u16_at(page: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(page[at..at + 2].try_into().unwrap())
}

fn u64_at(page: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
}

#[test]
fn identify_controller_says_what_there_is() {
    let disk = Disk::new();
    let config = SoftNvmeConfig {
        serial: Some("FARBUS 7".to_owned()),
        ..disk.config(512)
    };
    let mut bench = Bench::on(disk, &config);
    bench.driver.enable().unwrap();
    let page = bench.driver.identify(cns::CONTROLLER, 0).unwrap();
    assert_eq!(u16_at(&page, 0), 0x4642);
    assert_eq!(&page[4..24], b"FARBUS 7            ");
    assert!(page[24..72].iter().all(|byte| (b' '..=b'~').contains(byte)));
    assert_eq!(page[77], 8, "MDTS of 1 MiB");
    assert_eq!(&page[80..84], &[0, 4, 1, 0], "VER");
    assert_eq!(page[111], 1, "an I/O controller");
    assert_eq!((page[258], page[259]), (3, 3), "ACL, AERL");
    assert_eq!(page[261], 1 << 2, "LPA");
    assert_eq!((page[512], page[513]), (0x66, 0x44), "SQES, CQES");
    assert_eq!(&page[516..520], &[1, 0, 0, 0], "NN");
    assert_eq!(u16_at(&page, 520), 0x9d, "ONCS");
    assert_eq!(page[525], 7, "VWC");
    assert_eq!(&page[536..540], &[0; 4], "SGLS");
    assert!(page[768..].starts_with(b"nqn.2014-08.org.nvmexpress:uuid:"));
}

#[test]
fn identify_namespace_has_the_size_of_the_file() {
    for block_size in [512u32, 4096] {
        let mut bench = Bench::enabled(block_size);
        let shape = bench.driver.namespace().unwrap();
        assert_eq!(shape.block_size, block_size);
        assert_eq!(shape.blocks * u64::from(block_size), SIZE);
        let page = bench.driver.identify(cns::NAMESPACE, 1).unwrap();
        assert_eq!(u64_at(&page, 8), shape.blocks);
        assert_eq!(page[25], 0, "one format");
        assert_eq!(page[33] & 7, 1, "deallocated blocks read as zero");
    }
}

#[test]
fn lists_and_descriptors_name_the_namespace() {
    let mut bench = Bench::enabled(512);
    let list = bench.driver.identify(cns::NAMESPACE_LIST, 0).unwrap();
    assert_eq!(&list[..8], &[1, 0, 0, 0, 0, 0, 0, 0]);
    let list = bench.driver.identify(cns::NAMESPACE_LIST, 1).unwrap();
    assert!(list.iter().all(|byte| *byte == 0));

    let namespace = bench.driver.identify(cns::NAMESPACE, 1).unwrap();
    let page = bench.driver.identify(cns::DESCRIPTORS, 1).unwrap();
    assert_eq!(&page[..4], &[1, 8, 0, 0]);
    assert_eq!(page[4..12], namespace[120..128], "EUI-64");
    assert_eq!(&page[12..16], &[2, 16, 0, 0]);
    assert_eq!(page[16..32], namespace[104..120], "NGUID");
    assert_eq!(&page[32..36], &[3, 16, 0, 0]);
    assert_eq!(page[36 + 6] >> 4, 8, "UUID version");
    assert_eq!(page[36 + 8] >> 6, 2, "UUID variant");
    assert!(page[52..].iter().all(|byte| *byte == 0));
    assert_eq!(page[4] & 3, 2, "a locally administered EUI-64");
}

#[test]
fn names_stay_with_the_file_and_differ_between_files() {
    let names = |bench: &mut Bench| {
        bench.driver.enable().unwrap();
        let serial = bench.driver.identify(cns::CONTROLLER, 0).unwrap()[4..24].to_vec();
        (serial, bench.driver.identify(cns::DESCRIPTORS, 1).unwrap())
    };
    let mut first = Bench::cold(512);
    let mut second = Bench::cold(512);
    let before = names(&mut first);
    assert_ne!(before, names(&mut second));

    let Bench {
        driver,
        function,
        disk,
    } = first;
    drop((driver, function));
    // Renaming does not change who it is.
    let moved = disk.path().with_file_name("moved.img");
    std::fs::rename(disk.path(), &moved).unwrap();
    let mut again = Bench::on(disk, &SoftNvmeConfig::new(moved));
    assert_eq!(names(&mut again), before);
}

#[test]
fn identify_of_what_does_not_exist_is_refused() {
    let mut bench = Bench::enabled(512);
    for (cns, nsid, status) in [
        (cns::NAMESPACE, 0, Status::INVALID_NAMESPACE),
        (cns::NAMESPACE, 2, Status::INVALID_NAMESPACE),
        (cns::NAMESPACE, 0xffff_ffff, Status::INVALID_NAMESPACE),
        (cns::NAMESPACE_LIST, 0xffff_ffff, Status::INVALID_NAMESPACE),
        (cns::NAMESPACE_LIST, 0xffff_fffe, Status::INVALID_NAMESPACE),
        (cns::DESCRIPTORS, 2, Status::INVALID_NAMESPACE),
        (0x04, 0, Status::INVALID_FIELD),
        (0x10, 0, Status::INVALID_FIELD),
        (0xff, 1, Status::INVALID_FIELD),
    ] {
        assert_eq!(
            status_of(bench.driver.identify(cns, nsid)),
            status,
            "CNS {cns:#x}"
        );
    }
}

#[test]
fn every_other_admin_opcode_is_invalid() {
    let known = [
        admin::DELETE_SQ,
        admin::CREATE_SQ,
        admin::GET_LOG_PAGE,
        admin::DELETE_CQ,
        admin::CREATE_CQ,
        admin::IDENTIFY,
        admin::ABORT,
        admin::SET_FEATURES,
        admin::GET_FEATURES,
        admin::ASYNC_EVENT,
    ];
    let mut bench = Bench::enabled(512);
    for opcode in (0..=255).filter(|opcode| !known.contains(opcode)) {
        assert_eq!(
            bench.admin_status(opcode, 0, &[]),
            Status::INVALID_OPCODE,
            "{opcode:#x}"
        );
    }
}

#[test]
fn fused_commands_and_scatter_gather_lists_are_refused() {
    let mut bench = Bench::enabled(512);
    for flags in [0x01, 0x02, 0x40, 0x80, 0xc0] {
        let mut command = SubmissionEntry::new(admin::IDENTIFY);
        command.set_dword(10, 1);
        command.0[1] = flags;
        let status = bench.driver.execute(0, command).unwrap().status;
        assert_eq!(status, Status::INVALID_FIELD, "flags {flags:#x}");
    }
}

#[test]
fn the_smart_log_counts_live() {
    let mut bench = Bench::ready(512);
    let mut before = vec![0; 512];
    bench
        .driver
        .log_page(log_page::SMART, 0, &mut before)
        .unwrap();
    assert_eq!(before[0], 0, "no warning");
    assert_eq!(u16_at(&before, 1), 310);
    assert_eq!((before[3], u64_at(&before, 112)), (100, 1));

    bench.driver.write(1, 0, 512, &vec![7; 1 << 19]).unwrap();
    let mut data = vec![0; 4096];
    bench.driver.read(1, 0, 512, &mut data).unwrap();
    bench.driver.read(1, 0, 512, &mut data).unwrap();
    assert!(!bench.io_status(read_block(u64::MAX)).is_success());

    let mut after = vec![0; 512];
    bench
        .driver
        .log_page(log_page::SMART, 0, &mut after)
        .unwrap();
    let grown = |at| u64_at(&after, at) - u64_at(&before, at);
    assert_eq!((grown(32), grown(48)), (1, 2), "data units, rounded up");
    assert_eq!((grown(64), grown(80)), (2, 1), "commands");
    assert_eq!(
        (grown(160), grown(176)),
        (0, 1),
        "media errors, error log entries"
    );
}

#[test]
fn the_error_log_has_the_newest_failure_first() {
    let mut bench = Bench::ready(512);
    for lba in [1 << 40, 1 << 41] {
        assert_eq!(bench.io_status(read_block(lba)), Status::LBA_OUT_OF_RANGE);
    }
    let mut log = vec![0xee; 64 * 64];
    bench.driver.log_page(log_page::ERROR, 0, &mut log).unwrap();
    assert_eq!(
        (u64_at(&log, 0), u64_at(&log, 64), u64_at(&log, 128)),
        (2, 1, 0)
    );
    assert_eq!(u16_at(&log, 8), 1, "submission queue");
    assert_eq!(u16_at(&log, 12) >> 1, Status::LBA_OUT_OF_RANGE.0);
    assert_eq!((u64_at(&log, 16), u64_at(&log, 80)), (1 << 41, 1 << 40));
    for _ in 0..100 {
        bench.io_status(read_block(1 << 40));
    }
    bench.driver.log_page(log_page::ERROR, 0, &mut log).unwrap();
    assert_eq!((u64_at(&log, 0), u64_at(&log, 63 * 64)), (102, 39));
}

#[test]
fn logs_can_be_read_in_parts_and_past_their_end() {
    let mut bench = Bench::ready(512);
    bench.io_status(read_block(1 << 40));
    let mut whole = vec![0; 64 * 64];
    bench
        .driver
        .log_page(log_page::ERROR, 0, &mut whole)
        .unwrap();
    let mut part = vec![0; 100];
    bench
        .driver
        .log_page(log_page::ERROR, 4, &mut part)
        .unwrap();
    assert_eq!(part, whole[4..104]);
    let mut long = vec![0xee; 1024];
    bench
        .driver
        .log_page(log_page::FIRMWARE_SLOT, 0, &mut long)
        .unwrap();
    assert_eq!(long[0], 1);
    assert!(long[16..].iter().all(|byte| *byte == 0));
    bench
        .driver
        .log_page(log_page::SMART, 512, &mut part)
        .unwrap();
    assert!(part.iter().all(|byte| *byte == 0));

    let mut dword = [0; 4];
    let driver = &mut bench.driver;
    for (page, offset, status) in [
        (log_page::SMART, 516, Status::INVALID_FIELD),
        (log_page::SMART, u64::MAX - 3, Status::INVALID_FIELD),
        (log_page::SMART, 2, Status::INVALID_FIELD),
        (0x00, 0, Status::INVALID_LOG_PAGE),
        (0x05, 0, Status::INVALID_LOG_PAGE),
        (0x80, 0, Status::INVALID_LOG_PAGE),
    ] {
        assert_eq!(status_of(driver.log_page(page, offset, &mut dword)), status);
    }
    // Four GiB of dwords.
    let all = [u32::from(log_page::SMART) | 0xffff << 16, 0xffff];
    assert_eq!(
        bench.admin_status(admin::GET_LOG_PAGE, 0xffff_ffff, &all),
        Status::INVALID_FIELD
    );
    let one = [u32::from(log_page::SMART)];
    assert_eq!(
        bench.admin_status(admin::GET_LOG_PAGE, 1, &one),
        Status::INVALID_FIELD
    );
}

#[test]
fn abort_takes_event_requests_back_and_leaves_the_rest_alone() {
    let mut bench = Bench::ready(512);
    let event = bench
        .driver
        .submit(0, SubmissionEntry::new(admin::ASYNC_EVENT))
        .unwrap();
    let abort = |queue: u16, cid: u16| {
        let mut command = SubmissionEntry::new(admin::ABORT);
        command.set_dword(10, u32::from(queue) | u32::from(cid) << 16);
        command
    };
    assert_eq!(
        bench
            .driver
            .command(0, abort(0, event.wrapping_add(100)))
            .unwrap(),
        1
    );
    assert_eq!(bench.driver.command(0, abort(1, event)).unwrap(), 1);
    assert_eq!(bench.driver.command(0, abort(999, event)).unwrap(), 1);
    assert_eq!(bench.driver.command(0, abort(0, event)).unwrap(), 0);
    assert_eq!(
        bench.driver.wait(0, event).unwrap().status,
        Status::ABORT_REQUESTED
    );
    assert_eq!(bench.driver.command(0, abort(0, event)).unwrap(), 1);
}
