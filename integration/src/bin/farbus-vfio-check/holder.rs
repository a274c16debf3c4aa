//! Holding a function: until the kernel wants it back, until it reports an error, or until the
//! kernel refuses another window.

use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use farbus_vfio::driver::DmaMemory;
use farbus_vfio::kernel::VfioFunction;
use farbus_vfio::{Function, FunctionError, InterruptKind, Iova, RegionIndex};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::poll::PollContext;

use super::{Outcome, ensure, open};

/// How long a test takes to pull a function out.
const PATIENCE: Duration = Duration::from_secs(30);

/// Maps windows of `bytes` until there are `count`, then unmaps them with one call.
pub(crate) fn map(address: &str, count: &str, bytes: &str) -> Outcome {
    let function = open(address)?;
    let (count, bytes): (u64, usize) = (count.parse()?, bytes.parse()?);
    let first = 1 << 32;
    for n in 0..count {
        let memory = DmaMemory::new(Iova(first + n * bytes as u64), bytes)?;
        function.map_dma(&memory.window())?;
    }
    println!("mapped: {count}");
    function.unmap_dma(Iova(first), count * bytes as u64)?;
    let again = DmaMemory::new(Iova(first), bytes)?;
    function.map_dma(&again.window())?;
    println!("unmapped, and mapped again");
    Ok(())
}

/// Waits for the function's own events; what is left of it is dropped at the end.
pub(crate) fn hold(function: VfioFunction) -> Outcome {
    let poll: PollContext<u32> = PollContext::new()?;
    poll.add(function.unplug_requested(), 0)?;
    poll.add(function.error_reported(), 1)?;
    println!("held: {}", function.address());
    let events = poll.wait()?;
    for event in events.iter_readable() {
        match event.token() {
            0 => println!("event: the kernel wants it back"),
            _ => println!("event: it has reported an error"),
        }
    }
    println!("present: {}", function.is_present());
    drop(function);
    println!("given back");
    Ok(())
}

/// Waits until the function has vanished without a word, and then uses it in every way.
pub(crate) fn outlive(function: VfioFunction) -> Outcome {
    let event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
    let memory = DmaMemory::new(Iova(1 << 32), 0x10000)?.window();
    function.config_write(4, &[6])?;
    function.set_interrupts(InterruptKind::Msix, 0, &[Some(event)])?;
    function.map_dma(&memory)?;
    println!("held: {}", function.address());
    let begun = Instant::now();
    while function.is_present() {
        ensure(begun.elapsed() < PATIENCE, "nobody pulled it out")?;
        sleep(Duration::from_millis(10));
    }
    let mut data = [0; 4];
    let outcomes: [(&str, Result<(), FunctionError>); 7] = [
        (
            "region read",
            function.region_read(RegionIndex::BAR0, 0, &mut data),
        ),
        (
            "region write",
            function.region_write(RegionIndex::BAR0, 0x14, &[0; 4]),
        ),
        ("config write", function.config_write(4, &[6])),
        (
            "mask",
            function.mask_interrupt(InterruptKind::Msix, 0, true),
        ),
        (
            "silence",
            function.set_interrupts(InterruptKind::Msix, 0, &[None]),
        ),
        ("unmap", function.unmap_dma(memory.iova, memory.len as u64)),
        ("reset", function.reset()),
    ];
    for (what, outcome) in outcomes {
        match outcome {
            Ok(()) => println!("{what}: done"),
            Err(error) => println!("{what}: {error}"),
        }
    }
    println!("used: within {} ms", begun.elapsed().as_millis());
    let begun = Instant::now();
    drop(function);
    println!("given back: within {} ms", begun.elapsed().as_millis());
    Ok(())
}
