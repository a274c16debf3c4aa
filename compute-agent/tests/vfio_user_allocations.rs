//! The server allocates nothing for a register access, whether synchronous or posted, nor for an
//! interrupt that it raises itself.
#![allow(unsafe_code, reason = "an allocator is unsafe to write")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use common::{PATIENCE, connected};
use event_manager::{EventManager, SubscriberOps};
use farbus_compute_agent::api::Msix;
use farbus_compute_agent::vfio_user::Endpoint;
use farbus_vfio::config::{BarKind, ConfigImage, MsixLayout};
use farbus_vfio::user::body::MultiWrite;
use farbus_vfio::user::{Client, DmaMemory};
use farbus_vfio::{
    DmaWindow, Function, FunctionError, FunctionInfo, InterruptCounts, InterruptKind, Iova,
    RegionIndex, RegionInfo,
};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::tempdir::TempDir;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Counts the allocations of each thread.
struct Counting;

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps to the contract of this method, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Where the function has its MSI-X table.
const TABLE: u64 = 0x800;

/// Reads of its register tell how often the thread that serves it has allocated; writes raise its
/// interrupt.
struct Counter {
    info: FunctionInfo,
    config: Vec<u8>,
    interrupt: Mutex<Option<Arc<EventFd>>>,
}

impl Counter {
    /// Its MSI-X is on, and it is a bus master.
    fn new() -> Self {
        let mut config = ConfigImage::new(0x4642, 1, 0x01_08_02)
            .bar(0, BarKind::Memory64)
            .msix(MsixLayout {
                vectors: 1,
                table: (RegionIndex::BAR0, TABLE),
                pba: (RegionIndex::BAR0, 0xc00),
            })
            .build();
        config[4] = 1 << 2;
        config[0x43] = 1 << 7;
        let info = FunctionInfo {
            label: "counter".into(),
            config_size: 4096,
            regions: vec![RegionInfo {
                index: RegionIndex::BAR0,
                size: 0x1000,
            }],
            interrupts: InterruptCounts {
                msix: 1,
                ..InterruptCounts::default()
            },
            resettable: true,
            iova_ranges: vec![0..=u64::MAX],
        };
        Self {
            info,
            config,
            interrupt: Mutex::default(),
        }
    }
}

impl Function for Counter {
    fn info(&self) -> &FunctionInfo {
        &self.info
    }

    fn config_read(&self, at: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        let at = usize::from(at);
        data.copy_from_slice(&self.config[at..at + data.len()]);
        Ok(())
    }

    fn config_write(&self, _: u16, _: &[u8]) -> Result<(), FunctionError> {
        Ok(())
    }

    fn region_read(&self, _: RegionIndex, _: u64, data: &mut [u8]) -> Result<(), FunctionError> {
        data.copy_from_slice(&ALLOCATIONS.get().to_ne_bytes());
        Ok(())
    }

    fn region_write(&self, _: RegionIndex, _: u64, _: &[u8]) -> Result<(), FunctionError> {
        if let Some(event) = &*self.interrupt.lock().unwrap() {
            event.write(1).unwrap();
        }
        Ok(())
    }

    fn map_dma(&self, _: &DmaWindow) -> Result<(), FunctionError> {
        Ok(())
    }

    fn unmap_dma(&self, _: Iova, _: u64) -> Result<(), FunctionError> {
        Ok(())
    }

    fn set_interrupts(
        &self,
        _: InterruptKind,
        _: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        *self.interrupt.lock().unwrap() = events[0].clone();
        Ok(())
    }

    fn mask_interrupt(&self, _: InterruptKind, _: u32, _: bool) -> Result<(), FunctionError> {
        Ok(())
    }

    fn reset(&self) -> Result<(), FunctionError> {
        Ok(())
    }
}

/// Has a client of a server whose MSI-X is kept like that do something twice, and returns what the
/// server allocates the second time.
fn allocations(msix: Msix, mut act: impl FnMut(&mut Client)) -> u64 {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    let endpoint = Endpoint::bind(&path, Arc::new(Counter::new()))
        .unwrap()
        .with_msix(msix);
    let stop = Arc::new(AtomicBool::new(false));
    let server = std::thread::spawn({
        let stop = stop.clone();
        move || {
            let mut events = EventManager::new().unwrap();
            events.add_subscriber(endpoint);
            while !stop.load(Ordering::SeqCst) {
                events
                    .run_with_timeout(PATIENCE.as_millis() as i32)
                    .unwrap();
            }
        }
    });
    let mut client = connected(&path);
    let mut counts = Vec::new();
    let mut count = |client: &mut Client| {
        let mut count = [0; 8];
        client.region_read(0, 0, &mut count).unwrap();
        counts.push(u64::from_ne_bytes(count));
    };
    for _ in 0..2 {
        count(&mut client);
        act(&mut client);
    }
    count(&mut client);
    stop.store(true, Ordering::SeqCst);
    drop(client);
    server.join().unwrap();
    counts[2] - counts[1]
}

#[test]
fn register_accesses_allocate_nothing() {
    let write = MultiWrite {
        offset: 0,
        region: 0,
        count: 8,
        data: [0; 8],
    };
    let allocated = allocations(Msix::Irqfd, |client| {
        for _ in 0..1000 {
            client.region_write_posted(0, 8, &[1; 4]).unwrap();
        }
        for _ in 0..100 {
            client.region_write(0, 8, &[1; 4]).unwrap();
            client.region_write_multi(&[write; 100], true).unwrap();
        }
    });
    assert_eq!(allocated, 0);
}

/// A client's memory, in which the interrupts arrive.
struct Arrivals(Arc<AtomicU64>);

impl DmaMemory for Arrivals {
    fn read(&mut self, _: Iova, _: &mut [u8]) -> Result<(), i32> {
        Err(libc::EINVAL)
    }

    fn write(&mut self, at: Iova, data: &[u8]) -> Result<(), i32> {
        assert_eq!((at, data), (Iova(0xfee0_1000), &[0x21, 0, 0, 0][..]));
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

#[test]
fn interrupts_that_the_server_raises_allocate_nothing() {
    let arrived = Arc::new(AtomicU64::new(0));
    let allocated = allocations(Msix::Mediated, |client| {
        client.serve_memory(Box::new(Arrivals(arrived.clone())));
        client.region_write(7, 4, &[4, 0]).unwrap();
        let entry = [0xfee0_1000, 0x21u64];
        for (at, half) in (TABLE..).step_by(8).zip(entry) {
            client.region_write(0, at, &half.to_le_bytes()).unwrap();
        }
        let enough = arrived.load(Ordering::SeqCst) + 100;
        let begun = Instant::now();
        while arrived.load(Ordering::SeqCst) < enough {
            assert!(begun.elapsed() < PATIENCE, "no interrupts");
            client.region_write(0, 8, &[1; 4]).unwrap();
        }
    });
    assert_eq!(allocated, 0);
}
