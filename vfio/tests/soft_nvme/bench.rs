//! What the tests share: a controller on a backing of its own, and a driver for it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_vfio::driver::{DriverConfig, DriverError, NvmeDriver, block_command};
use farbus_vfio::nvme::{Status, SubmissionEntry, csts, nvm, reg};
use farbus_vfio::soft_nvme::{SoftNvme, SoftNvmeConfig};
use vmm_sys_util::tempdir::TempDir;

pub(crate) type Driver = NvmeDriver<SoftNvme>;

/// Size of the backing file in bytes.
pub(crate) const SIZE: u64 = 8 << 20;

/// Anything in these tests takes much less; what takes longer hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);

/// A directory that goes away with the test.
pub(crate) struct Disk {
    directory: TempDir,
}

impl Disk {
    pub(crate) fn new() -> Self {
        Self {
            directory: TempDir::new().unwrap(),
        }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.as_path().join("disk.img")
    }

    pub(crate) fn config(&self, block_size: u32) -> SoftNvmeConfig {
        SoftNvmeConfig {
            size: Some(SIZE),
            block_size,
            ..crate::backing_of(self.path())
        }
    }
}

/// A controller with its driver. The driver goes first when this is dropped.
pub(crate) struct Bench {
    pub(crate) driver: Driver,
    pub(crate) function: Arc<SoftNvme>,
    pub(crate) disk: Disk,
}

impl Bench {
    /// A controller that is not enabled.
    pub(crate) fn cold(block_size: u32) -> Self {
        let disk = Disk::new();
        let config = disk.config(block_size);
        Self::on(disk, &config)
    }

    pub(crate) fn on(disk: Disk, config: &SoftNvmeConfig) -> Self {
        let function = Arc::new(SoftNvme::open(config).unwrap());
        let config = DriverConfig {
            timeout: LIMIT,
            ..DriverConfig::default()
        };
        let driver = NvmeDriver::new(Arc::clone(&function), config).unwrap();
        Self {
            driver,
            function,
            disk,
        }
    }

    /// A controller that is enabled.
    pub(crate) fn enabled(block_size: u32) -> Self {
        let mut bench = Self::cold(block_size);
        bench.driver.enable().unwrap();
        bench
    }

    /// A controller with I/O queue pair 1, of 64 entries and with vector 1.
    pub(crate) fn ready(block_size: u32) -> Self {
        let mut bench = Self::enabled(block_size);
        bench.driver.create_queue_pair(1, 64, Some(1)).unwrap();
        bench
    }

    /// The status of a command that is sent with these dwords 10 and on.
    pub(crate) fn admin_status(&mut self, opcode: u8, nsid: u32, dwords: &[u32]) -> Status {
        let command = command(opcode, nsid, dwords);
        self.driver.execute(0, command).unwrap().status
    }

    /// What is stored: in the file, or as the drive says.
    pub(crate) fn stored(&mut self, block_size: u32) -> Vec<u8> {
        if let Ok(bytes) = std::fs::read(self.disk.path()) {
            return bytes;
        }
        if self.driver.tail(1).is_err() {
            self.recover();
        }
        let mut bytes = vec![0; SIZE as usize];
        for (n, piece) in (0..).zip(bytes.chunks_mut(1 << 20)) {
            let lba = n * (1 << 20) / u64::from(block_size);
            self.driver.read(1, lba, block_size, piece).unwrap();
        }
        bytes
    }

    pub(crate) fn io_status(&mut self, command: SubmissionEntry) -> Status {
        self.driver.execute(1, command).unwrap().status
    }

    /// Writes and reads back a few blocks, to show that the controller works.
    pub(crate) fn assert_works(&mut self) {
        let data = pattern(4096 * 3, 99);
        self.driver.write(1, 8, 4096, &data).unwrap();
        let mut back = vec![0; data.len()];
        self.driver.read(1, 8, 4096, &mut back).unwrap();
        assert!(back == data);
    }

    pub(crate) fn is_fatal(&self) -> bool {
        self.driver.read32(reg::CSTS).unwrap() & csts::CFS != 0
    }

    pub(crate) fn await_fatal(&self) {
        until("fatal status", || self.is_fatal());
    }

    /// Resets the controller and sets up queue pair 1 again.
    pub(crate) fn recover(&mut self) {
        self.driver.enable().unwrap();
        self.driver.create_queue_pair(1, 64, Some(1)).unwrap();
    }
}

/// A command with these dwords 10 and on, and no data.
pub(crate) fn command(opcode: u8, nsid: u32, dwords: &[u32]) -> SubmissionEntry {
    let mut command = SubmissionEntry::new(opcode);
    command.set_nsid(nsid);
    for (n, value) in dwords.iter().enumerate() {
        command.set_dword(10 + n, *value);
    }
    command
}

/// A read of one block.
pub(crate) fn read_block(lba: u64) -> SubmissionEntry {
    block_command(nvm::READ, lba, 1, 1)
}

/// Bytes that differ from place to place and from seed to seed.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// Waits for something that must come.
pub(crate) fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "{what} did not come");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// The status of the command that failed.
pub(crate) fn status_of<T: std::fmt::Debug>(outcome: Result<T, DriverError>) -> Status {
    outcome
        .unwrap_err()
        .status()
        .expect("a command that failed")
}
