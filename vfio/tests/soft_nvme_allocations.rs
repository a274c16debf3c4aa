//! The I/O path of the software controller allocates nothing: memory use is bounded by what
//! was set up, and no command waits for an allocator.

#![allow(clippy::unwrap_used, reason = "a test stops where it cannot go on")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use farbus_vfio::driver::{DriverConfig, NvmeDriver, block_command};
use farbus_vfio::nvme::{SubmissionEntry, nvm};
use farbus_vfio::soft_nvme::{SoftNvme, SoftNvmeConfig};
use vmm_sys_util::tempdir::TempDir;

/// The system's allocator, with a count.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to `System` unchanged, which keeps the contract. A global allocator
// is the one place that sees all allocations, and the trait is unsafe.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`, which is the same.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Puts eight commands of every kind through, looking for completions without sleeping.
fn round(driver: &mut NvmeDriver<SoftNvme>, commands: &[SubmissionEntry]) {
    let start = Instant::now();
    for _ in 0..8 {
        for command in commands {
            driver.enqueue(1, *command).unwrap();
        }
    }
    driver
        .ring_sq(1, u32::from(driver.tail(1).unwrap()))
        .unwrap();
    let mut left = 8 * commands.len();
    while left > 0 {
        match driver.poll(1).unwrap() {
            Some(entry) => {
                assert!(entry.status.is_success());
                left -= 1;
            }
            None => assert!(start.elapsed() < Duration::from_secs(10)),
        }
    }
}

/// One test, since the count is of the whole process.
#[test]
fn io_commands_allocate_nothing() {
    let directory = TempDir::new().unwrap();
    let on_file = SoftNvmeConfig {
        size: Some(8 << 20),
        ..SoftNvmeConfig::new(directory.as_path().join("disk.img"))
    };
    for config in [
        on_file,
        SoftNvmeConfig::memory(8 << 20),
        SoftNvmeConfig::null(8 << 20),
    ] {
        allocate_nothing(&config);
    }
}

fn allocate_nothing(config: &SoftNvmeConfig) {
    let function = Arc::new(SoftNvme::open(config).unwrap());
    let mut driver = NvmeDriver::new(function, DriverConfig::default()).unwrap();
    driver.enable().unwrap();
    driver.create_queue_pair(1, 256, Some(1)).unwrap();
    let buffer = driver.memory().allocate((1 << 20) + 4096).unwrap();
    let mut commands = Vec::new();
    // From one sector to the largest transfer, beginning within a page: a PRP list of 256.
    for (opcode, len) in [
        (nvm::WRITE, 512),
        (nvm::READ, 4096),
        (nvm::WRITE, 1 << 20),
        (nvm::READ, 1 << 20),
        (nvm::COMPARE, 1 << 17),
    ] {
        let prps = driver.prps(buffer, 512, len).unwrap();
        let mut command = block_command(
            opcode,
            if opcode == nvm::COMPARE { 8192 } else { 0 },
            len,
            512,
        );
        command.set_prps(prps.prp1, prps.prp2);
        commands.push(command);
    }
    // What Compare compares must not change under it.
    let same = driver.memory().allocate(1 << 17).unwrap();
    let prps = driver.prps(same, 0, 1 << 17).unwrap();
    if let Some(command) = commands.last_mut() {
        command.set_prps(prps.prp1, prps.prp2);
    }
    commands.push(block_command(nvm::WRITE_ZEROES, 4096, 64, 1));
    let mut flush = SubmissionEntry::new(nvm::FLUSH);
    flush.set_nsid(1);
    commands.push(flush);

    for _ in 0..5 {
        round(&mut driver, &commands);
    }
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for _ in 0..10 {
        round(&mut driver, &commands);
    }
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    assert_eq!(
        allocations,
        0,
        "{allocations} allocations in {} commands on {}",
        80 * commands.len(),
        config.medium
    );
}
