//! The server allocates nothing for a register access, whether synchronous or posted.
#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{PATIENCE, connected};
use event_manager::{EventManager, SubscriberOps};
use farbus_compute_agent::vfio_user::Endpoint;
use farbus_vfio::user::body::MultiWrite;
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

/// Reads of its register tell how often the thread that serves it has allocated.
struct Counter(FunctionInfo);

impl Function for Counter {
    fn info(&self) -> &FunctionInfo {
        &self.0
    }

    fn config_read(&self, _: u16, _: &mut [u8]) -> Result<(), FunctionError> {
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
        _: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        Ok(())
    }

    fn mask_interrupt(&self, _: InterruptKind, _: u32, _: bool) -> Result<(), FunctionError> {
        Ok(())
    }

    fn reset(&self) -> Result<(), FunctionError> {
        Ok(())
    }
}

#[test]
fn register_accesses_allocate_nothing() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    let function = Counter(FunctionInfo {
        label: "counter".into(),
        config_size: 256,
        regions: vec![RegionInfo {
            index: RegionIndex::BAR0,
            size: 0x1000,
        }],
        interrupts: InterruptCounts::default(),
        resettable: true,
        iova_ranges: vec![0..=u64::MAX],
    });
    let endpoint = Endpoint::bind(&path, Arc::new(function)).unwrap();
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
    let mut count = [0; 8];
    let mut counts = Vec::new();
    let write = MultiWrite {
        offset: 0,
        region: 0,
        count: 8,
        data: [0; 8],
    };
    for _ in 0..2 {
        client.region_read(0, 0, &mut count).unwrap();
        counts.push(u64::from_ne_bytes(count));
        for _ in 0..1000 {
            client.region_write_posted(0, 8, &[1; 4]).unwrap();
        }
        for _ in 0..100 {
            client.region_write(0, 8, &[1; 4]).unwrap();
            client.region_write_multi(&[write; 100], true).unwrap();
        }
    }
    client.region_read(0, 0, &mut count).unwrap();
    counts.push(u64::from_ne_bytes(count));
    assert_eq!(counts[2] - counts[1], 0, "{counts:?}");

    stop.store(true, Ordering::SeqCst);
    drop(client);
    server.join().unwrap();
}
