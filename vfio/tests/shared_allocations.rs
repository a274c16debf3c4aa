//! The I/O path of a portion of a shared drive allocates nothing, also while two of them are busy: memory
//! use is bounded by what was set up.

#![allow(clippy::unwrap_used, reason = "a test stops where it cannot go on")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use farbus_vfio::driver::{DriverConfig, NvmeDriver, block_command};
use farbus_vfio::nvme::{SubmissionEntry, nvm};
use farbus_vfio::shared::{Portion, SharedDrive, SliceSpec};
use farbus_vfio::soft_nvme::{SoftNvme, SoftNvmeConfig};
use farbus_vfio::{Function, Iova};
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

type Driver = NvmeDriver<Portion>;

fn drive(shared: &Arc<SharedDrive>, index: usize) -> Driver {
    let portion = shared.portion(index).unwrap();
    let config = DriverConfig {
        iova: Iova(*portion.info().iova_ranges[0].start()),
        ..DriverConfig::default()
    };
    let mut driver = NvmeDriver::new(Arc::new(portion), config).unwrap();
    driver.enable().unwrap();
    driver.create_queue_pair(1, 256, Some(1)).unwrap();
    driver
}

/// From one sector to the largest transfer, beginning within a page: a PRP list of 256; and what else
/// there is, refused commands among it.
fn commands(driver: &mut Driver) -> Vec<(SubmissionEntry, bool)> {
    let buffer = driver.memory().allocate((1 << 20) + 4096).unwrap();
    let mut commands = Vec::new();
    for (opcode, len) in [
        (nvm::WRITE, 512),
        (nvm::READ, 8192),
        (nvm::WRITE, 1 << 20),
        (nvm::READ, 1 << 20),
    ] {
        let prps = driver.prps(buffer, 512, len).unwrap();
        let mut command = block_command(opcode, 0, len, 512);
        command.set_prps(prps.prp1, prps.prp2);
        commands.push((command, true));
    }
    let mut flush = SubmissionEntry::new(nvm::FLUSH);
    flush.set_nsid(1);
    commands.push((flush, true));
    commands.push((block_command(nvm::WRITE_ZEROES, 4096, 64, 1), true));
    commands.push((block_command(nvm::READ, 1 << 40, 512, 512), false));
    let ranges = driver.memory().allocate(4096).unwrap();
    let mut trim = SubmissionEntry::new(nvm::DATASET_MANAGEMENT);
    trim.set_nsid(1);
    trim.set_dword(10, 255);
    trim.set_dword(11, 4);
    trim.set_prps(ranges.iova().0, 0);
    commands.push((trim, true));
    commands
}

/// Puts eight commands of every kind through each, looking for completions without sleeping.
fn round(drivers: &mut [Driver; 2], commands: &[Vec<(SubmissionEntry, bool)>; 2]) {
    let start = Instant::now();
    for (driver, commands) in drivers.iter_mut().zip(commands) {
        for _ in 0..8 {
            for (command, _) in commands {
                driver.enqueue(1, *command).unwrap();
            }
        }
        driver.ring(1).unwrap();
    }
    for (driver, commands) in drivers.iter_mut().zip(commands) {
        let wanted = commands.iter().filter(|(_, succeeds)| *succeeds).count();
        let (mut left, mut succeeded) = (8 * commands.len(), 0);
        while left > 0 {
            match driver.poll(1).unwrap() {
                Some(entry) => {
                    succeeded += usize::from(entry.status.is_success());
                    left -= 1;
                }
                None => assert!(start.elapsed() < Duration::from_secs(10)),
            }
        }
        assert_eq!(succeeded, 8 * wanted);
    }
}

/// One test, since the count is of the whole process.
#[test]
fn commands_of_portions_allocate_nothing() {
    let directory = TempDir::new().unwrap();
    let on_file = SoftNvmeConfig {
        size: Some(16 << 20),
        ..SoftNvmeConfig::new(directory.as_path().join("disk.img"))
    };
    for config in [on_file, SoftNvmeConfig::memory(16 << 20)] {
        let function = Arc::new(SoftNvme::open(&config).unwrap());
        let slice = |name: &str, offset| SliceSpec {
            name: name.into(),
            offset,
            size: Some(8 << 20),
            ..SliceSpec::default()
        };
        let shared = SharedDrive::open(function, &[slice("a", 0), slice("b", 8 << 20)]).unwrap();
        let mut drivers = [drive(&shared, 0), drive(&shared, 1)];
        let [a, b] = &mut drivers;
        let commands = [commands(a), commands(b)];
        for _ in 0..5 {
            round(&mut drivers, &commands);
        }
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        for _ in 0..10 {
            round(&mut drivers, &commands);
        }
        let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
        assert_eq!(
            allocations,
            0,
            "{allocations} allocations in {} commands on {}",
            160 * commands[0].len(),
            config.medium
        );
    }
}
