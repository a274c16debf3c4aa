//! A portion of a shared drive, whose driver does anything: whatever is in its queues and its memory,
//! the blocks and the memory of another portion stay as they are.
//!
//! Nothing is made up around it: the drive below is the software controller in memory, which does
//! what it is told.

use std::sync::Arc;
use std::time::Duration;

use farbus_vfio::driver::{DmaBuffer, DmaMemory, DriverConfig, NvmeDriver};
use farbus_vfio::nvme::{DOORBELL_BASE, PAGE_SIZE, cc, nvm, reg};
use farbus_vfio::shared::{Portion, SharedDrive, SliceSpec};
use farbus_vfio::soft_nvme::{SoftNvme, SoftNvmeConfig};
use farbus_vfio::{Function, Iova, RegionIndex};

use crate::input::Input;

/// The steps of a script, each followed by what it needs.
#[allow(missing_docs, reason = "the names say what they do")]
pub mod step {
    pub const COMMAND: u8 = 0;
    pub const RING: u8 = 1;
    pub const SCRIBBLE: u8 = 2;
    pub const SERVICE: u8 = 3;
    pub const REGISTER: u8 = 4;
    pub const ENABLE: u8 = 5;
    pub const RESET: u8 = 6;
    pub const UNMAP: u8 = 7;
    pub const COUNT: u8 = 8;
}

const BLOCK: u64 = 512;
const BLOCKS: u64 = 64;
const SLICE: u64 = BLOCKS * BLOCK;
/// Pages of the driver's memory: two queues of each kind, then data.
const PAGES: usize = 16;
const MAX_STEPS: usize = 400;
const CANARY: u8 = 0xc5;

/// The driver: nothing but memory and registers.
struct Hostile {
    portion: Arc<Portion>,
    memory: DmaMemory,
    whole: DmaBuffer,
    is_mapped: bool,
    /// Addresses that commands are made of: its own, another's, and none's.
    addresses: Vec<u64>,
    tails: [u16; 2],
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let drive = SoftNvme::open(&SoftNvmeConfig::memory(3 * SLICE)).expect("a drive in memory");
    let slice = |name: &str, offset| SliceSpec {
        name: name.into(),
        offset,
        size: Some(SLICE),
        ..SliceSpec::default()
    };
    let specs = [
        slice("before", 0),
        slice("fuzzed", SLICE),
        slice("after", 2 * SLICE),
    ];
    let shared = SharedDrive::open(Arc::new(drive), &specs).expect("three slices");
    let mut neighbours = [0, 2].map(|index| neighbour(&shared, index));
    let mut secrets = Vec::new();
    for driver in &mut neighbours {
        let all = vec![CANARY; SLICE as usize];
        driver.write(1, 0, BLOCK as u32, &all).expect("a write");
        let secret = driver.memory().allocate(PAGE_SIZE).expect("a page");
        let page = [CANARY; PAGE_SIZE];
        driver.memory().write(secret, 0, &page).expect("a page");
        secrets.push(secret);
    }
    let mut hostile = Hostile::new(&shared, &secrets);
    let mut input = Input::new(bytes);
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        hostile.step(&mut input);
    }
    drop(hostile);
    for (driver, secret) in neighbours.iter_mut().zip(secrets) {
        let mut all = vec![0; SLICE as usize];
        driver.read(1, 0, BLOCK as u32, &mut all).expect("a read");
        assert!(all.iter().all(|byte| *byte == CANARY), "another's blocks");
        let mut page = [0; PAGE_SIZE];
        driver.memory().read(secret, 0, &mut page).expect("a page");
        assert_eq!(page, [CANARY; PAGE_SIZE], "another's memory");
    }
}

fn neighbour(shared: &Arc<SharedDrive>, index: usize) -> NvmeDriver<Portion> {
    let portion = shared.portion(index).expect("a portion");
    let config = DriverConfig {
        iova: Iova(*portion.info().iova_ranges[0].start()),
        memory: 64 * PAGE_SIZE,
        timeout: Duration::from_secs(4),
    };
    let mut driver = NvmeDriver::new(Arc::new(portion), config).expect("a driver");
    driver.enable().expect("a controller");
    driver.create_queue_pair(1, 16, None).expect("queues");
    driver
}

impl Hostile {
    fn new(shared: &Arc<SharedDrive>, secrets: &[DmaBuffer]) -> Self {
        let portion = Arc::new(shared.portion(1).expect("a portion"));
        let range = portion.info().iova_ranges[0].clone();
        let base = *range.start();
        let mut memory = DmaMemory::new(Iova(base), PAGES * PAGE_SIZE).expect("memory");
        let whole = memory.allocate(PAGES * PAGE_SIZE).expect("all of it");
        let mut addresses: Vec<u64> = (0..PAGES).map(|n| base + (n * PAGE_SIZE) as u64).collect();
        addresses.extend(secrets.iter().map(|secret| secret.iova().0));
        // Behind the end of what the driver may map are the portion's own queues.
        addresses.extend([
            0,
            *range.end() + 1,
            *range.end() + 0x1_0001,
            u64::MAX - 4095,
        ]);
        let mut hostile = Self {
            portion,
            memory,
            whole,
            is_mapped: false,
            addresses,
            tails: [0; 2],
        };
        hostile.enable();
        hostile
    }

    fn write(&self, offset: u64, value: &[u8]) {
        // Whatever is refused is refused.
        let _ = self.portion.region_write(RegionIndex::BAR0, offset, value);
    }

    /// Brings the controller up with one pair of I/O queues, as far as it goes.
    fn enable(&mut self) {
        if !self.is_mapped {
            self.is_mapped = self.portion.map_dma(&self.memory.window()).is_ok();
        }
        self.tails = [0; 2];
        let base = self.addresses[0];
        self.write(reg::CC, &0u32.to_le_bytes());
        self.write(reg::AQA, &(31u32 | 31 << 16).to_le_bytes());
        self.write(reg::ASQ, &base.to_le_bytes());
        self.write(reg::ACQ, &(base + 0x1000).to_le_bytes());
        let sizes = 6 << cc::IOSQES_SHIFT | 4 << cc::IOCQES_SHIFT;
        self.write(reg::CC, &(sizes | cc::EN).to_le_bytes());
        for (opcode, at, flags) in [(5u8, base + 0x3000, 1u32), (1, base + 0x2000, 1 << 16 | 1)] {
            let mut entry = [0; 64];
            entry[0] = opcode;
            entry[24..32].copy_from_slice(&at.to_le_bytes());
            entry[40..44].copy_from_slice(&(31u32 << 16 | 1).to_le_bytes());
            entry[44..48].copy_from_slice(&flags.to_le_bytes());
            self.put(0, &entry);
        }
        self.ring(0);
    }

    /// Places an entry behind the others of the admin queue or the I/O queue.
    fn put(&mut self, queue: usize, entry: &[u8; 64]) {
        let at = queue * 2 * PAGE_SIZE + usize::from(self.tails[queue]) * 64;
        let _ = self.memory.write(self.whole, at, entry);
        self.tails[queue] = (self.tails[queue] + 1) % 32;
    }

    fn ring(&self, queue: usize) {
        let tail = u32::from(self.tails[queue]).to_le_bytes();
        self.write(DOORBELL_BASE + queue as u64 * 8, &tail);
        // All that was completed is taken, so that there is room.
        self.write(DOORBELL_BASE + queue as u64 * 8 + 4, &tail);
    }

    fn address(&self, input: &mut Input<'_>) -> u64 {
        let address = self.addresses[usize::from(input.byte()) % self.addresses.len()];
        address.wrapping_add(u64::from(input.byte()) * 16 * u64::from(input.byte() & 1))
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % step::COUNT {
            step::COMMAND => {
                let queue = usize::from(!input.flag());
                let mut entry = [0; 64];
                entry[0] = match input.byte() {
                    byte @ 0..64 => byte,
                    byte => [nvm::READ, nvm::WRITE, nvm::COMPARE, nvm::WRITE_ZEROES]
                        .into_iter()
                        .chain([nvm::DATASET_MANAGEMENT, nvm::VERIFY, nvm::FLUSH, 2])
                        .nth(usize::from(byte) % 8)
                        .unwrap_or(byte),
                };
                entry[1] = input.pick(&[0, 0, 0, 0, 1, 0x40, 0x80, 0xff]);
                entry[2] = input.byte();
                entry[4..8]
                    .copy_from_slice(&input.pick(&[1u32, 1, 1, 2, 0, u32::MAX]).to_le_bytes());
                let prps = [self.address(input), self.address(input)];
                entry[24..32].copy_from_slice(&prps[0].to_le_bytes());
                entry[32..40].copy_from_slice(&prps[1].to_le_bytes());
                let near = BLOCKS.wrapping_add(input.take::<i8>() as u64);
                let lba = input.pick(&[0, near, near, 0u64.wrapping_sub(near), 1 << 32]);
                entry[40..48].copy_from_slice(&lba.to_le_bytes());
                entry[48] = input.byte();
                entry[49] = input.byte() & 1;
                entry[50] = input.byte();
                entry[51] = input.byte();
                self.put(queue, &entry);
            }
            step::RING => self.ring(usize::from(input.flag())),
            step::SCRIBBLE => {
                let at = usize::from(input.take::<u16>()) * 8 % (PAGES * PAGE_SIZE - 64);
                let bytes = match input.flag() {
                    true => self.address(input).to_le_bytes().to_vec(),
                    false => input.bytes(32).to_vec(),
                };
                let _ = self.memory.write(self.whole, at, &bytes);
            }
            step::SERVICE => self.portion.service(),
            step::REGISTER => {
                let offset = u64::from(input.take::<u16>() & 0x3ffc);
                self.write(offset, &input.take::<u32>().to_le_bytes());
            }
            step::ENABLE => self.enable(),
            step::RESET => {
                let _ = self.portion.reset();
            }
            _ => {
                let window = self.memory.window();
                let unmapped = self.portion.unmap_dma(window.iova, window.len as u64);
                self.is_mapped &= unmapped.is_err();
            }
        }
    }
}
