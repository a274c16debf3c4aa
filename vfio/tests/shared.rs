//! Portions of a shared drive, driven as whole controllers are.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is how a test fails"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use farbus_vfio::driver::{DriverConfig, DriverError, NvmeDriver, block_command};
use farbus_vfio::nvme::{PAGE_SIZE, Status, SubmissionEntry, admin, cns, csts, feature, nvm, reg};
use farbus_vfio::shared::{Portion, SharedDrive, SharedError, SliceSpec};
use farbus_vfio::soft_nvme::{SoftNvme, SoftNvmeConfig};
use farbus_vfio::{
    Around, DmaAccess, DmaWindow, Function, FunctionError, Iova, Notice, RegionIndex,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::poll::PollContext;

const MIB: u64 = 1 << 20;
const BLOCK: u32 = 512;
const BLOCKS: u64 = MIB / 512;

fn slice(name: &str, offset: u64) -> SliceSpec {
    SliceSpec {
        name: name.into(),
        offset,
        size: Some(MIB),
        ..SliceSpec::default()
    }
}

/// A drive of 3 MiB: slices a and b, and a last MiB that is nobody's.
fn share(function: &Arc<SoftNvme>) -> Arc<SharedDrive> {
    SharedDrive::open(function.clone(), &[slice("a", 0), slice("b", MIB)]).unwrap()
}

fn in_memory() -> Arc<SoftNvme> {
    Arc::new(SoftNvme::open(&SoftNvmeConfig::memory(3 * MIB)).unwrap())
}

fn on_a_file() -> (tempfile::Path, Arc<SoftNvme>) {
    let path = tempfile::Path::new();
    let mut config = SoftNvmeConfig::new(&path.0);
    config.size = Some(3 * MIB);
    (path, Arc::new(SoftNvme::open(&config).unwrap()))
}

/// A name for a file that goes away.
mod tempfile {
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicU32, Ordering};

    pub(crate) struct Path(pub(crate) PathBuf);

    impl Path {
        pub(crate) fn new() -> Self {
            static MADE: AtomicU32 = AtomicU32::new(0);
            let n = MADE.fetch_add(1, Ordering::Relaxed);
            let name = format!("farbus-shared-{}-{n}", std::process::id());
            Self(std::env::temp_dir().join(name))
        }
    }

    impl Drop for Path {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }
}

fn drive(portion: Portion) -> NvmeDriver<Portion> {
    let config = DriverConfig {
        iova: Iova(*portion.info().iova_ranges[0].start()),
        memory: 4 << 20,
        timeout: Duration::from_secs(10),
    };
    let mut driver = NvmeDriver::new(Arc::new(portion), config).unwrap();
    driver.enable().unwrap();
    driver.create_queue_pair(1, 64, Some(1)).unwrap();
    driver
}

fn both(function: &Arc<SoftNvme>) -> (NvmeDriver<Portion>, NvmeDriver<Portion>) {
    let shared = share(function);
    (
        drive(shared.portion(0).unwrap()),
        drive(shared.portion(1).unwrap()),
    )
}

fn read(driver: &mut NvmeDriver<Portion>, lba: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    driver.read(1, lba, BLOCK, &mut data).unwrap();
    data
}

fn status(outcome: Result<u64, DriverError>) -> Status {
    outcome.unwrap_err().status().unwrap()
}

#[test]
fn each_portion_is_a_controller_of_its_own_with_its_slice_as_namespace_1() {
    let function = in_memory();
    let (mut a, mut b) = both(&function);
    for driver in [&mut a, &mut b] {
        let shape = driver.namespace().unwrap();
        assert_eq!((shape.blocks, shape.block_size), (BLOCKS, BLOCK));
        let list = driver.identify(cns::NAMESPACE_LIST, 0).unwrap();
        assert_eq!(list[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
        driver.delete_queue_pair(1).unwrap();
        assert_eq!(driver.request_queues(64).unwrap(), 8, "half of 16");
    }
    let names = [&mut a, &mut b].map(|driver| {
        let page = driver.identify(cns::CONTROLLER, 0).unwrap();
        (page[4..24].to_vec(), page[768..1024].to_vec())
    });
    assert_ne!(names[0].0, names[1].0, "serial numbers");
    assert_ne!(names[0].1, names[1].1, "NQNs");
    assert_ne!(
        a.identify(cns::NAMESPACE, 1).unwrap()[104..128],
        b.identify(cns::NAMESPACE, 1).unwrap()[104..128]
    );
}

#[test]
fn portions_read_and_write_the_same_addresses_without_meeting() {
    let (_file, on_a_file) = on_a_file();
    for function in [in_memory(), on_a_file] {
        let (mut a, mut b) = both(&function);
        for lba in [0, 7, BLOCKS - 256] {
            // One page, two, and a list of them.
            for len in [512, 8192, 128 << 10] {
                a.write(1, lba, BLOCK, &vec![0xaa; len]).unwrap();
                b.write(1, lba, BLOCK, &vec![0xbb; len]).unwrap();
                assert_eq!(read(&mut a, lba, len), vec![0xaa; len]);
                assert_eq!(read(&mut b, lba, len), vec![0xbb; len]);
                a.compare(1, lba, BLOCK, &vec![0xaa; len]).unwrap();
                assert!(a.compare(1, lba, BLOCK, &vec![0xbb; len]).is_err());
            }
        }
        a.flush(1).unwrap();
        b.write_zeroes(1, 0, 256, false).unwrap();
        assert_eq!(read(&mut b, 0, 512), [0; 512]);
        assert_eq!(read(&mut a, 0, 512), [0xaa; 512]);
        b.deallocate(1, &[(7, 9), (BLOCKS - 1, 1)]).unwrap();
        assert_eq!(read(&mut b, BLOCKS - 1, 512), [0; 512]);
        assert_eq!(read(&mut a, BLOCKS - 1, 512), [0xaa; 512]);
    }
}

#[test]
fn no_command_reaches_past_either_end_of_a_slice() {
    let function = in_memory();
    let (mut a, mut b) = both(&function);
    a.write(1, BLOCKS - 1, BLOCK, &[0xaa; 512]).unwrap();
    b.write(1, 0, BLOCK, &[0xbb; 512]).unwrap();
    for (lba, len) in [
        (BLOCKS, 512),
        (BLOCKS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX - 1, 1024),
    ] {
        for driver in [&mut a, &mut b] {
            let refused = driver.write(1, lba, BLOCK, &vec![0xee; len]).unwrap_err();
            assert_eq!(refused.status(), Some(Status::LBA_OUT_OF_RANGE));
            let blocks = (len / 512) as u32;
            let refused = driver.write_zeroes(1, lba, blocks, true).unwrap_err();
            assert_eq!(refused.status(), Some(Status::LBA_OUT_OF_RANGE));
            let refused = driver.deallocate(1, &[(0, 1), (lba, blocks)]).unwrap_err();
            assert_eq!(refused.status(), Some(Status::LBA_OUT_OF_RANGE));
        }
    }
    assert_eq!(read(&mut a, BLOCKS - 1, 512), [0xaa; 512]);
    assert_eq!(read(&mut b, 0, 512), [0xbb; 512]);
    let mut other = block_command(nvm::READ, 0, 512, BLOCK);
    other.set_nsid(2);
    assert_eq!(
        status(a.receive(1, other, &mut [0; 512])),
        Status::INVALID_NAMESPACE
    );
    let copy = block_command(nvm::COPY, 0, 512, BLOCK);
    assert_eq!(status(a.send(1, copy, &[0; 512])), Status::INVALID_OPCODE);
}

#[test]
fn memory_of_another_portion_cannot_be_named() {
    let function = in_memory();
    let (mut a, mut b) = both(&function);
    let secret = b.memory().allocate(PAGE_SIZE).unwrap();
    b.memory().write(secret, 0, &[0x5e; PAGE_SIZE]).unwrap();
    let list = a.memory().allocate(PAGE_SIZE).unwrap();
    let own = a.memory().allocate(PAGE_SIZE).unwrap();
    for n in 0..3usize {
        let entry = secret.iova().0;
        a.memory().write(list, 8 * n, &entry.to_le_bytes()).unwrap();
    }
    let cases = [
        (secret.iova().0, 0, 512),
        (own.iova().0, secret.iova().0, 8192),
        (own.iova().0, list.iova().0, 16384),
        // This side's own queues, and nothing at all.
        (a_range_end(&a) + 1, 0, 512),
        (0, 0, 512),
    ];
    for (prp1, prp2, len) in cases {
        for opcode in [nvm::WRITE, nvm::READ, nvm::COMPARE] {
            let mut command = block_command(opcode, 0, len, BLOCK);
            command.set_prps(prp1, prp2);
            assert_eq!(
                status(a.command(1, command)),
                Status::DATA_TRANSFER_ERROR,
                "{prp1:#x} {prp2:#x}"
            );
        }
    }
    let mut ranges = SubmissionEntry::new(nvm::DATASET_MANAGEMENT);
    ranges.set_nsid(1);
    ranges.set_dword(11, 4);
    ranges.set_prps(secret.iova().0, 0);
    assert_eq!(status(a.command(1, ranges)), Status::DATA_TRANSFER_ERROR);
    let mut bytes = [0; PAGE_SIZE];
    b.memory().read(secret, 0, &mut bytes).unwrap();
    assert_eq!(bytes, [0x5e; PAGE_SIZE]);
}

fn a_range_end(driver: &NvmeDriver<Portion>) -> u64 {
    *driver.function().info().iova_ranges[0].end()
}

#[test]
fn windows_are_within_a_portions_own_addresses() {
    let function = in_memory();
    let shared = share(&function);
    let (a, b) = (shared.portion(0).unwrap(), shared.portion(1).unwrap());
    let memory = farbus_vfio::driver::DmaMemory::new(Iova(0), PAGE_SIZE).unwrap();
    let window = |iova| DmaWindow {
        iova: Iova(iova),
        access: DmaAccess::ReadWrite,
        ..memory.window()
    };
    let foreign = *b.info().iova_ranges[0].start();
    for iova in [0, foreign, *a.info().iova_ranges[0].end() + 1] {
        let refused = a.map_dma(&window(iova)).unwrap_err();
        assert!(
            matches!(refused, FunctionError::BadWindow { .. }),
            "{iova:#x}"
        );
    }
    b.map_dma(&window(foreign)).unwrap();
    assert!(a.unmap_dma(Iova(foreign), PAGE_SIZE as u64).is_err());
    b.unmap_dma(Iova(foreign), PAGE_SIZE as u64).unwrap();
}

#[test]
fn a_reset_of_one_portion_does_not_disturb_another() {
    let (_file, function) = on_a_file();
    let (mut a, mut b) = both(&function);
    b.write(1, 0, BLOCK, &[0xbb; 4096]).unwrap();
    let buffer = a.memory().allocate(128 << 10).unwrap();
    for round in 0..20 {
        for n in 0..32u64 {
            let mut command = block_command(nvm::WRITE, n * 8, 4096, BLOCK);
            command.set_prps(buffer.iova().0, 0);
            a.submit(1, command).unwrap();
            let mut data = [0; 4096];
            b.read(1, 0, BLOCK, &mut data).unwrap();
            assert_eq!(data, [0xbb; 4096], "round {round}");
        }
        // In the middle of it, as when a claimant vanishes.
        a.reset().unwrap();
        a.enable().unwrap();
        a.create_queue_pair(1, 64, Some(1)).unwrap();
    }
    a.write(1, 0, BLOCK, &[0xaa; 4096]).unwrap();
    assert_eq!(read(&mut a, 0, 4096), [0xaa; 4096]);
    assert_eq!(read(&mut b, 0, 4096), [0xbb; 4096]);
}

#[test]
fn a_slice_is_open_once_and_again_after_it_was_closed() {
    let function = in_memory();
    let shared = share(&function);
    let first = shared.portion(0).unwrap();
    assert!(matches!(shared.portion(0), Err(SharedError::Taken(name)) if name == "a"));
    let mut driver = drive(first);
    driver.write(1, 3, BLOCK, &[7; 512]).unwrap();
    drop(driver);
    let mut again = drive(shared.portion(0).unwrap());
    assert_eq!(
        read(&mut again, 3, 512),
        [7; 512],
        "the blocks are the claimant's to clear"
    );
}

#[test]
fn the_drive_is_let_go_of_with_its_last_portion() {
    let function = in_memory();
    let (a, b) = both(&function);
    drop(a);
    assert!(Arc::strong_count(&function) > 1);
    drop(b);
    assert_eq!(Arc::strong_count(&function), 1);
    let mut bytes = [0; 4];
    function.config_write(4, &[6, 0]).unwrap();
    function
        .region_read(RegionIndex::BAR0, reg::CC, &mut bytes)
        .unwrap();
    assert_eq!(bytes[0] & 1, 0, "the controller is disabled");
}

#[test]
fn a_drive_that_fails_fails_for_all_and_comes_back_for_all() {
    let function = in_memory();
    let (mut a, mut b) = both(&function);
    a.write(1, 0, BLOCK, &[1; 512]).unwrap();
    b.write(1, 0, BLOCK, &[2; 512]).unwrap();
    // Behind everybody's back.
    function.reset().unwrap();
    function.config_write(4, &[6, 0]).unwrap();
    for driver in [&mut a, &mut b] {
        assert_ne!(driver.read32(reg::CSTS).unwrap() & csts::CFS, 0);
    }
    a.reset().unwrap();
    a.enable().unwrap();
    a.create_queue_pair(1, 64, Some(1)).unwrap();
    assert_eq!(read(&mut a, 0, 512), [1; 512]);
    assert_ne!(
        b.read32(reg::CSTS).unwrap() & csts::CFS,
        0,
        "its queues are no more"
    );
    b.reset().unwrap();
    b.enable().unwrap();
    b.create_queue_pair(1, 64, Some(1)).unwrap();
    assert_eq!(read(&mut b, 0, 512), [2; 512]);
    assert_eq!(read(&mut a, 0, 512), [1; 512]);
}

#[test]
fn notices_of_the_drive_reach_every_portion() {
    let function = Arc::new(Faulty::new());
    let shared = SharedDrive::open(function.clone(), &[slice("a", 0), slice("b", MIB)]).unwrap();
    let portions = [shared.portion(0).unwrap(), shared.portion(1).unwrap()];
    for (notice, event) in [
        (Notice::UnplugRequested, &function.unplug),
        (Notice::ErrorReported, &function.error),
    ] {
        event.write(1).unwrap();
        for portion in &portions {
            let heard = portion.notices();
            let (_, bell) = heard.iter().find(|(said, _)| *said == notice).unwrap();
            let poll: PollContext<u32> = PollContext::new().unwrap();
            poll.add(*bell, 0).unwrap();
            let events = poll.wait_timeout(Duration::from_secs(10)).unwrap();
            assert_eq!(events.iter().count(), 1, "{notice:?}");
        }
    }
}

#[test]
fn a_drive_that_is_gone_is_gone_for_every_portion() {
    let function = Arc::new(Faulty::new());
    let shared = SharedDrive::open(function.clone(), &[slice("a", 0), slice("b", MIB)]).unwrap();
    let (a, b) = (
        drive(shared.portion(0).unwrap()),
        shared.portion(1).unwrap(),
    );
    function.gone.store(true, Ordering::SeqCst);
    assert!(matches!(
        a.read32(reg::CSTS),
        Err(DriverError::Function(FunctionError::Gone(_)))
    ));
    assert!(shared.is_gone());
    // The one that asked nothing is told to let go of it.
    let bells = b.notices();
    let (_, bell) = bells
        .iter()
        .find(|(n, _)| *n == Notice::UnplugRequested)
        .unwrap();
    assert!(bell.read().is_ok());
    assert!(matches!(b.reset(), Err(FunctionError::Gone(_))));
    drop(a);
    assert!(matches!(shared.portion(0), Err(SharedError::Gone(_))));
}

/// A drive with a host that wants it back, or that vanishes.
struct Faulty {
    drive: Arc<SoftNvme>,
    gone: AtomicBool,
    unplug: EventFd,
    error: EventFd,
}

impl Faulty {
    fn new() -> Self {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            drive: in_memory(),
            gone: AtomicBool::new(false),
            unplug: event(),
            error: event(),
        }
    }

    fn check(&self) -> Result<(), FunctionError> {
        match self.gone.load(Ordering::SeqCst) {
            true => Err(FunctionError::Gone("as told".into())),
            false => Ok(()),
        }
    }
}

impl Around for Faulty {
    fn inner(&self) -> &dyn Function {
        &*self.drive
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        self.check()?;
        self.drive.config_read(offset, data)
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), FunctionError> {
        self.check()?;
        self.drive.config_write(offset, data)
    }

    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        self.check()?;
        self.drive.region_read(region, offset, data)
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        self.check()?;
        self.drive.region_write(region, offset, data)
    }

    fn reset(&self) -> Result<(), FunctionError> {
        self.check()?;
        self.drive.reset()
    }

    fn notices(&self) -> Vec<(Notice, &EventFd)> {
        vec![
            (Notice::UnplugRequested, &self.unplug),
            (Notice::ErrorReported, &self.error),
        ]
    }
}

#[test]
fn what_is_the_whole_drives_is_not_for_one_to_change() {
    let function = in_memory();
    let (mut a, mut b) = both(&function);
    let cache = a.get_feature(feature::VOLATILE_WRITE_CACHE, 0).unwrap();
    let refused = a.set_feature(feature::VOLATILE_WRITE_CACHE, 1 - cache);
    assert_eq!(
        refused.unwrap_err().status(),
        Some(Status::FEATURE_NOT_CHANGEABLE)
    );
    a.set_feature(feature::VOLATILE_WRITE_CACHE, cache).unwrap();
    a.set_feature(feature::TEMPERATURE_THRESHOLD, 300).unwrap();
    assert_ne!(
        b.get_feature(feature::TEMPERATURE_THRESHOLD, 0).unwrap(),
        300
    );
    for opcode in [admin::FORMAT, admin::SANITIZE, admin::FIRMWARE_COMMIT, 0xc0] {
        assert_eq!(
            status(a.command(0, SubmissionEntry::new(opcode))),
            Status::INVALID_OPCODE
        );
    }
}

#[test]
fn counters_of_the_health_log_are_a_portions_own() {
    let function = in_memory();
    let (mut a, mut b) = both(&function);
    for _ in 0..5 {
        read(&mut a, 0, 4096);
    }
    let commands = |driver: &mut NvmeDriver<Portion>| {
        let mut log = [0; 512];
        driver.log_page(2, 0, &mut log).unwrap();
        (log[64], log[1])
    };
    let (a, b) = (commands(&mut a), commands(&mut b));
    assert_eq!((a.0, b.0), (5, 0));
    assert!(a.1 != 0 && a.1 == b.1, "the temperature is the drive's");
}

#[test]
fn more_slices_than_queue_pairs_are_refused() {
    let mut config = SoftNvmeConfig::memory(3 * MIB);
    config.queues = 1;
    let function = Arc::new(SoftNvme::open(&config).unwrap());
    let refused = SharedDrive::open(function, &[slice("a", 0), slice("b", MIB)]);
    let message = refused.err().unwrap().to_string();
    assert!(
        message.contains("2 slices") && message.contains("has 1 to give away"),
        "{message}"
    );
}
