//! Holding a function: until the kernel wants it back, until it reports an error, or until the
//! kernel refuses another window.

use farbus_vfio::driver::DmaMemory;
use farbus_vfio::kernel::VfioFunction;
use farbus_vfio::{Function, Iova};
use vmm_sys_util::poll::PollContext;

use super::{Outcome, open};

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
