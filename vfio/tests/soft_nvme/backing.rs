//! The backing file: how it is found, created and refused, and what a failing one looks like.

use std::fs::OpenOptions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use farbus_vfio::driver::block_command;
use farbus_vfio::nvme::{Status, cns, feature, log_page, nvm};
use farbus_vfio::soft_nvme::{BackingError, SoftNvme, SoftNvmeConfig, SoftNvmeError};

use crate::bench::{Bench, Disk, SIZE, pattern, read_block, status_of};

fn refused(config: &SoftNvmeConfig) -> (BackingError, String) {
    match SoftNvme::open(config) {
        Err(SoftNvmeError::Backing(error)) => {
            let message = error.to_string();
            (error, message)
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was not refused"),
    }
}

#[test]
fn a_missing_file_is_created_sparse_and_private() {
    let disk = Disk::new();
    let config = SoftNvmeConfig {
        size: Some(1 << 40),
        ..SoftNvmeConfig::new(disk.path())
    };
    drop(SoftNvme::open(&config).unwrap());
    let metadata = std::fs::metadata(disk.path()).unwrap();
    assert_eq!(metadata.len(), 1 << 40);
    assert_eq!(metadata.blocks(), 0);
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    // The same line works the second time, and so does one without a size.
    drop(SoftNvme::open(&config).unwrap());
    drop(SoftNvme::open(&SoftNvmeConfig::new(disk.path())).unwrap());
}

#[test]
fn a_missing_file_without_a_size_is_refused_with_the_remedy() {
    let disk = Disk::new();
    let (error, message) = refused(&SoftNvmeConfig::new(disk.path()));
    assert!(matches!(error, BackingError::Missing(_)));
    assert!(message.contains("disk.img does not exist") && message.contains("size="));
    assert!(!disk.path().exists());
}

#[test]
fn an_existing_file_is_never_resized() {
    let disk = Disk::new();
    std::fs::write(disk.path(), vec![7; 8192]).unwrap();
    for size in [4096, 16384] {
        let config = SoftNvmeConfig {
            size: Some(size),
            ..SoftNvmeConfig::new(disk.path())
        };
        let (error, message) = refused(&config);
        assert!(matches!(error, BackingError::SizeDiffers { .. }));
        assert!(
            message.contains("8192") && message.contains(&size.to_string()),
            "{message}"
        );
    }
    assert_eq!(std::fs::read(disk.path()).unwrap(), vec![7; 8192]);
}

#[test]
fn files_that_are_no_whole_number_of_blocks_are_refused() {
    let disk = Disk::new();
    for (size, block_size) in [(0, 512), (513, 512), (512, 4096), (4608, 4096)] {
        std::fs::write(disk.path(), vec![0; size]).unwrap();
        let config = SoftNvmeConfig {
            block_size,
            ..SoftNvmeConfig::new(disk.path())
        };
        let (error, message) = refused(&config);
        assert!(matches!(error, BackingError::NotWholeBlocks { .. }));
        assert!(message.contains(&size.to_string()) && message.contains("block-size="));
    }
    std::fs::remove_file(disk.path()).unwrap();
    let config = SoftNvmeConfig {
        size: Some(1000),
        ..SoftNvmeConfig::new(disk.path())
    };
    assert!(matches!(
        refused(&config).0,
        BackingError::NotWholeBlocks { .. }
    ));
    assert!(
        !disk.path().exists(),
        "nothing is created for a size that cannot be"
    );
}

#[test]
fn a_second_controller_on_the_same_file_is_refused() {
    let bench = Bench::cold(512);
    let config = SoftNvmeConfig::new(bench.disk.path());
    assert!(matches!(refused(&config).0, BackingError::InUse(_)));
    // Also by another name.
    let other = bench.disk.path().with_file_name("other.img");
    std::fs::hard_link(bench.disk.path(), &other).unwrap();
    assert!(matches!(
        refused(&SoftNvmeConfig::new(other)).0,
        BackingError::InUse(_)
    ));
    let Bench {
        driver,
        function,
        disk,
    } = bench;
    drop((driver, function));
    drop(SoftNvme::open(&config).unwrap());
    drop(disk);
}

#[test]
fn directories_devices_and_paths_to_nowhere_are_refused() {
    let disk = Disk::new();
    let directory = disk.path().parent().unwrap().to_owned();
    let (error, message) = refused(&SoftNvmeConfig::new(directory));
    assert!(matches!(error, BackingError::Io { .. }), "{message}");
    assert!(matches!(
        refused(&SoftNvmeConfig::new("/dev/null")).0,
        BackingError::Kind(_)
    ));
    let nowhere = SoftNvmeConfig {
        size: Some(4096),
        ..SoftNvmeConfig::new(disk.path().join("no/such/directory"))
    };
    assert!(matches!(
        refused(&nowhere).0,
        BackingError::Io {
            verb: "open" | "create",
            ..
        }
    ));
}

#[test]
fn hand_made_configurations_are_checked_like_text() {
    let disk = Disk::new();
    for config in [
        SoftNvmeConfig {
            queues: 0,
            ..disk.config(512)
        },
        SoftNvmeConfig {
            queues: 64,
            ..disk.config(512)
        },
        SoftNvmeConfig {
            serial: Some("x".repeat(21)),
            ..disk.config(512)
        },
        disk.config(520),
        SoftNvmeConfig::new(""),
    ] {
        assert!(matches!(
            SoftNvme::open(&config),
            Err(SoftNvmeError::Option(_))
        ));
    }
    assert!(!disk.path().exists());
}

#[test]
fn data_survives_the_controller() {
    let mut bench = Bench::ready(4096);
    let data = pattern(1 << 18, 11);
    bench.driver.write(1, 77, 4096, &data).unwrap();
    bench.driver.flush(1).unwrap();
    let Bench {
        driver,
        function,
        disk,
    } = bench;
    drop((driver, function));
    let config = disk.config(4096);
    let mut again = Bench::on(disk, &config);
    again.recover();
    let mut back = vec![0; data.len()];
    again.driver.read(1, 77, 4096, &mut back).unwrap();
    assert!(back == data);
}

#[test]
fn blocks_behind_the_end_of_a_truncated_file_are_bad_not_zero() {
    let mut bench = Bench::ready(4096);
    bench
        .driver
        .write(1, 0, 4096, &pattern(1 << 20, 1))
        .unwrap();
    let file = OpenOptions::new()
        .write(true)
        .open(bench.disk.path())
        .unwrap();
    file.set_len(10 * 4096 + 100).unwrap();

    let driver = &mut bench.driver;
    let mut block = vec![0; 4096];
    driver.read(1, 9, 4096, &mut block).unwrap();
    for lba in [10, 11, 2000] {
        let outcome = driver.read(1, lba, 4096, &mut block);
        assert_eq!(status_of(outcome), Status::UNRECOVERED_READ.with_dnr());
        let outcome = driver.compare(1, lba, 4096, &block);
        assert_eq!(status_of(outcome), Status::UNRECOVERED_READ.with_dnr());
        let outcome = driver.write(1, lba, 4096, &block);
        assert_eq!(status_of(outcome), Status::WRITE_FAULT.with_dnr());
        let outcome = driver.write_zeroes(1, lba, 1, true);
        assert_eq!(status_of(outcome), Status::WRITE_FAULT.with_dnr());
        let outcome = driver.deallocate(1, &[(lba, 1)]);
        assert_eq!(status_of(outcome), Status::WRITE_FAULT.with_dnr());
    }
    driver.write(1, 9, 4096, &block).unwrap();
    assert_eq!(
        file.metadata().unwrap().len(),
        10 * 4096 + 100,
        "it must not grow back"
    );
    let mut log = [0; 512];
    driver.log_page(log_page::SMART, 0, &mut log).unwrap();
    assert_eq!(
        (log[160], log[176]),
        (15, 15),
        "media errors, error log entries"
    );
    let verify = block_command(nvm::VERIFY, 10, 1, 1);
    assert_eq!(bench.io_status(verify), Status::UNRECOVERED_READ.with_dnr());
    assert_eq!(bench.io_status(read_block(SIZE)), Status::LBA_OUT_OF_RANGE);
}

/// Mounts need privileges that not everyone has: without them there is nothing to show here.
#[test]
fn a_full_disk_is_capacity_exceeded_and_reads_go_on() {
    let directory = Disk::new();
    let place = directory.path().parent().unwrap().to_owned();
    let mount = |arguments: &[&str]| {
        let status = std::process::Command::new(arguments[0])
            .args(&arguments[1..])
            .arg(&place)
            .stderr(std::process::Stdio::null())
            .status();
        status.is_ok_and(|status| status.success())
    };
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=1M", "none"]) {
        eprintln!("skipped: no privilege to mount a small file system");
        return;
    }
    let config = SoftNvmeConfig {
        size: Some(SIZE),
        block_size: 4096,
        ..SoftNvmeConfig::new(place.join("disk.img"))
    };
    let mut bench = Bench::on(Disk::new(), &config);
    bench.recover();
    let data = pattern(1 << 18, 2);
    bench.driver.write(1, 0, 4096, &data).unwrap();
    let statuses: Vec<_> = (1..8)
        .filter_map(|n| bench.driver.write(1, n * 64, 4096, &data).err()?.status())
        .collect();
    let mut back = vec![0; data.len()];
    let read = bench.driver.read(1, 0, 4096, &mut back);
    // Giving space back makes room again.
    bench.driver.deallocate(1, &[(64, 1024)]).unwrap();
    let again = bench.driver.write(1, 64, 4096, &data);
    drop(bench);
    assert!(mount(&["umount"]));
    assert!(!statuses.is_empty());
    assert!(
        statuses
            .iter()
            .all(|status| *status == Status::CAPACITY_EXCEEDED)
    );
    assert!(read.is_ok() && back == data);
    again.unwrap();
}

/// Sectors written and flushes done by a block device so far: what has really gone to it
/// (`Documentation/block/stat.rst` of Linux).
fn device_counters(device: &str) -> (u64, u64) {
    let name = device.trim_start_matches("/dev/");
    let text = std::fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
    let fields: Vec<u64> = text
        .split_whitespace()
        .map(|field| field.parse().unwrap())
        .collect();
    (fields[6], fields[15])
}

/// Needs a loop device.
#[test]
fn a_block_device_works_and_says_its_size() {
    let disk = Disk::new();
    std::fs::File::create(disk.path())
        .unwrap()
        .set_len(SIZE)
        .unwrap();
    let attached = std::process::Command::new("losetup")
        .args(["--find", "--show"])
        .arg(disk.path())
        .output();
    let Some(output) = attached.ok().filter(|output| output.status.success()) else {
        eprintln!("skipped: no loop device to be had");
        return;
    };
    let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    let outcome = std::panic::catch_unwind(|| {
        let mut bench = Bench::on(Disk::new(), &SoftNvmeConfig::new(&device));
        bench.recover();
        let shape = bench.driver.namespace().unwrap();
        assert_eq!(shape.blocks * 512, SIZE);
        let data = pattern(1 << 18, 3);
        bench.driver.write(1, 100, 512, &data).unwrap();
        let before = device_counters(&device);
        bench.driver.flush(1).unwrap();
        let after = device_counters(&device);
        assert!(
            after.0 >= before.0 + 512,
            "sectors written: {before:?}, {after:?}"
        );
        assert!(after.1 > before.1, "flushes: {before:?}, {after:?}");
        let mut fua = block_command(nvm::WRITE, 99, 1, 1);
        fua.set_dword(12, fua.dword(12) | 1 << 30);
        bench.driver.send(1, fua, &data[..512]).unwrap();
        let later = device_counters(&device);
        assert!(
            later.0 > after.0 && later.1 > after.1,
            "FUA: {after:?}, {later:?}"
        );
        bench.driver.write_zeroes(1, 101, 3, false).unwrap();
        bench.driver.write_zeroes(1, 110, 5, true).unwrap();
        bench.driver.deallocate(1, &[(200, 100)]).unwrap();
        let mut back = vec![0; data.len()];
        bench.driver.read(1, 100, 512, &mut back).unwrap();
        assert!(back[..512] == data[..512] && back[2048..5120] == data[2048..5120]);
        assert!(
            back[512..2048]
                .iter()
                .chain(&back[5120..7680])
                .all(|byte| *byte == 0)
        );
        let page = bench.driver.identify(cns::NAMESPACE, 1).unwrap();
        assert_eq!(
            page[33] & 7,
            0,
            "what deallocated blocks read as is not promised"
        );
        let busy = SoftNvme::open(&SoftNvmeConfig::new(&device));
        assert!(busy.is_err(), "it is in use");
        bench
            .driver
            .set_feature(feature::VOLATILE_WRITE_CACHE, 0)
            .unwrap();
    });
    let detached = std::process::Command::new("losetup")
        .args(["--detach", &device])
        .status();
    assert!(detached.is_ok_and(|status| status.success()));
    outcome.unwrap();
}

#[test]
fn deallocating_gives_space_back() {
    let mut bench = Bench::ready(4096);
    let data = pattern(1 << 20, 1);
    for n in 0..4 {
        bench.driver.write(1, n * 256, 4096, &data).unwrap();
    }
    bench.driver.flush(1).unwrap();
    let before = std::fs::metadata(bench.disk.path()).unwrap().blocks();
    bench
        .driver
        .deallocate(1, &[(0, 256), (512, 10), (700, 0), (522, 246)])
        .unwrap();
    bench.driver.flush(1).unwrap();
    let after = std::fs::metadata(bench.disk.path()).unwrap();
    assert!(
        after.blocks() <= before - 4000,
        "{before} sectors, then {}",
        after.blocks()
    );
    assert_eq!(after.len(), SIZE);
}
