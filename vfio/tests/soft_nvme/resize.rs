//! A drive whose file is made longer while it runs.

use std::time::Instant;

use farbus_vfio::nvme::{Status, SubmissionEntry, admin, feature, log_page};
use farbus_vfio::soft_nvme::{BackingError, SoftNvmeConfig, grow_file};

use crate::bench::{Bench, LIMIT, SIZE};

/// Asynchronous Event Configuration: namespace attribute notices.
const NAMESPACE_NOTICES: u32 = 1 << 8;

fn grown(bench: &Bench, block_size: u32, size: u64) -> Result<bool, BackingError> {
    grow_file(&SoftNvmeConfig {
        size: Some(size),
        ..bench.disk.config(block_size)
    })
}

fn blocks(bench: &mut Bench) -> u64 {
    bench.driver.namespace().unwrap().blocks
}

fn wait_for_blocks(bench: &mut Bench, expected: u64) {
    let begun = Instant::now();
    while blocks(bench) != expected {
        assert!(begun.elapsed() < LIMIT, "it does not grow");
        std::thread::yield_now();
    }
}

#[test]
fn a_host_that_wants_to_know_hears_that_the_drive_has_grown() {
    let mut bench = Bench::ready(512);
    let notices = NAMESPACE_NOTICES;
    bench
        .driver
        .set_feature(feature::ASYNC_EVENTS, notices)
        .unwrap();
    let event = SubmissionEntry::new(admin::ASYNC_EVENT);
    let event = bench.driver.submit(0, event).unwrap();
    assert!(grown(&bench, 512, 2 * SIZE).unwrap());
    let entry = bench.driver.wait(0, event).unwrap();
    // A notice (2): namespace attribute changed (0), log page 4.
    assert_eq!((entry.status, entry.result), (Status::SUCCESS, 0x04_00_02));
    assert_eq!(blocks(&mut bench), 2 * SIZE / 512);
    let mut changed = [0xff; 4096];
    for expected in [1, 0] {
        let page = log_page::CHANGED_NAMESPACES;
        bench.driver.log_page(page, 0, &mut changed).unwrap();
        assert_eq!(changed[0], expected, "it is read once");
        assert!(changed[1..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn blocks_behind_the_old_end_can_be_used_and_those_behind_the_new_one_cannot() {
    let mut bench = Bench::ready(4096);
    assert!(grown(&bench, 4096, 2 * SIZE).unwrap());
    wait_for_blocks(&mut bench, 2 * SIZE / 4096);
    let last = 2 * SIZE / 4096 - 1;
    bench.driver.write(1, last, 4096, &[7; 4096]).unwrap();
    let mut data = [0; 4096];
    bench.driver.read(1, last, 4096, &mut data).unwrap();
    assert_eq!(data, [7; 4096]);
    let error = bench.driver.write(1, last + 1, 4096, &data).unwrap_err();
    assert_eq!(error.status(), Some(Status::LBA_OUT_OF_RANGE));
}

#[test]
fn half_a_block_is_no_block_and_nothing_is_ever_cut_off() {
    let mut bench = Bench::enabled(4096);
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(bench.disk.path())
        .unwrap();
    file.set_len(2 * SIZE + 2048).unwrap();
    wait_for_blocks(&mut bench, 2 * SIZE / 4096);
    file.set_len(SIZE).unwrap();
    file.set_len(SIZE + 4096).unwrap();
    assert_eq!(blocks(&mut bench), 2 * SIZE / 4096);
    assert!(!grown(&bench, 4096, SIZE + 4096).unwrap());
    let error = grown(&bench, 4096, SIZE).unwrap_err();
    assert!(matches!(error, BackingError::SizeDiffers { .. }), "{error}");
}
