//! An NVMe controller, driven from user space: queues, data, interrupts, reset, and what must not
//! hurt the program that does it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_vfio::driver::{DmaMemory, DriverConfig, NvmeDriver, block_command};
use farbus_vfio::kernel::{VfioError, VfioFunction};
use farbus_vfio::nvme::{nvm, reg};
use farbus_vfio::{Function, InterruptKind, Iova, RegionIndex};

use super::{Outcome, ensure, open};

const COMMAND: u16 = 4;
const MEMORY_AND_BUS_MASTER: u8 = 6;
const PATIENCE: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_millis(100);
/// Reads whose time is taken.
const READS: usize = 2000;

type Driver = NvmeDriver<VfioFunction>;

/// The whole check, on a controller with at least two I/O queues and 16 MiB.
pub(crate) fn check(address: &str) -> Outcome {
    let function = Arc::new(open(address)?);
    let mut driver = NvmeDriver::new(function.clone(), DriverConfig::default())?;
    let block = start(&mut driver)?;
    let identity = driver.identify(1, 0)?;
    let serial = String::from_utf8_lossy(identity.get(4..24).unwrap_or_default()).into_owned();
    println!("serial: {}", serial.trim());

    let data = verify(&mut driver, block)?;
    println!("data: written, read and compared");
    interrupts(&mut driver, block)?;
    println!("interrupts: signalled, masked, unmasked, silenced one by one");
    table_is_kept_off(&function)?;
    one_read(&mut driver, 1, block, true)?;
    println!("MSI-X table: out of reach");
    // A virtual function's decoding is the physical one's (PCIe 4.0 §9.3.3.3.4).
    let sysfs = format!("/sys/bus/pci/devices/{address}/physfn");
    let is_virtual = Path::new(&sysfs).exists();
    if !is_virtual {
        memory_off(&function)?;
        one_read(&mut driver, 1, block, true)?;
        println!("memory decoding off: errors, and back on: works");
    }
    refusals(&function)?;
    println!("windows and a second user: refused");
    latency(&mut driver, block)?;

    function.reset()?;
    let command = command(&function)?;
    ensure(
        command & MEMORY_AND_BUS_MASTER == 0,
        format!("the command register is {command:#x}"),
    )?;
    ensure(
        is_virtual || read32(&function, reg::CC).is_err(),
        "registers answer right after a reset",
    )?;
    driver.reset()?;
    let cc = driver.read32(reg::CC)?;
    ensure(cc == 0, format!("CC is {cc:#x} after a reset"))?;
    start(&mut driver)?;
    let mut again = vec![0; data.len()];
    driver.read(1, 0, block, &mut again)?;
    ensure(again == data, "the data changed over a reset")?;
    one_read(&mut driver, 2, block, true)?;
    println!("reset: clean, and works again with the same interrupts");

    drop(driver);
    drop(function);
    drop(open(address)?);
    println!("closed and opened again");
    Ok(())
}

/// Enables the controller with two queue pairs on vectors 1 and 2; returns the block size.
fn start(driver: &mut Driver) -> Outcome<u32> {
    driver.enable()?;
    driver.request_queues(2)?;
    for queue in [1, 2] {
        driver.create_queue_pair(queue, 64, Some(queue))?;
    }
    Ok(driver.namespace()?.block_size)
}

/// Transfers from one block to 256 KiB; returns what is at the beginning now.
fn verify(driver: &mut Driver, block: u32) -> Outcome<Vec<u8>> {
    let mut seed = 1_u32;
    let mut random = move || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 24) as u8
    };
    let mut first = Vec::new();
    for len in [block as usize, 4096, 8192, 12288, 65536, 262_144] {
        let data: Vec<u8> = (0..len).map(|_| random()).collect();
        driver.write(1, 0, block, &data)?;
        driver.flush(2)?;
        let mut read = vec![0; len];
        driver.read(2, 0, block, &mut read)?;
        ensure(read == data, format!("{len} bytes came back changed"))?;
        driver.compare(1, 0, block, &data)?;
        first = data;
    }
    Ok(first)
}

/// One read of 4 KiB; its interrupt must come, or must not.
fn one_read(driver: &mut Driver, queue: u16, block: u32, interrupt: bool) -> Outcome {
    let buffer = driver.memory().allocate(4096)?;
    let mut command = block_command(nvm::READ, 0, 4096, block);
    command.set_prps(buffer.iova().0, 0);
    driver.submit(queue, command)?;
    let patience = if interrupt { PATIENCE } else { SILENCE };
    let came = driver.wait_interrupt(queue, patience)?;
    let begun = Instant::now();
    let entry = loop {
        if let Some(entry) = driver.poll(queue)? {
            break entry;
        }
        ensure(begun.elapsed() < PATIENCE, "a read did not complete")?;
    };
    driver.memory().free(buffer);
    ensure(
        entry.status.is_success(),
        format!("a read failed: {:?}", entry.status),
    )?;
    ensure(
        came == interrupt,
        format!("queue {queue}: interrupt {came}, not {interrupt}"),
    )
}

fn interrupts(driver: &mut Driver, block: u32) -> Outcome {
    let function = driver.function().clone();
    // What the commands before have left there.
    for vector in [1, 2] {
        driver.wait_interrupt(vector, Duration::ZERO)?;
    }
    one_read(driver, 1, block, true)?;
    one_read(driver, 2, block, true)?;
    function.mask_interrupt(InterruptKind::Msix, 1, true)?;
    one_read(driver, 1, block, false)?;
    one_read(driver, 2, block, true)?;
    function.mask_interrupt(InterruptKind::Msix, 1, false)?;
    let pending = driver.wait_interrupt(1, PATIENCE)?;
    ensure(pending, "what was pending was not signalled at the unmask")?;
    one_read(driver, 1, block, true)?;

    let event = driver.event(2).cloned();
    function.set_interrupts(InterruptKind::Msix, 2, &[None])?;
    one_read(driver, 2, block, false)?;
    one_read(driver, 1, block, true)?;
    function.set_interrupts(InterruptKind::Msix, 2, &[event])?;
    one_read(driver, 2, block, true)
}

/// The MSI-X table (PCI 3.0 §6.8.2) reads as all ones, and takes nothing.
fn table_is_kept_off(function: &VfioFunction) -> Outcome {
    let mut space = [0; 256];
    function.config_read(0, &mut space)?;
    let mut at = usize::from(space[0x34]);
    while at != 0 && space.get(at) != Some(&0x11) {
        at = usize::from(
            *space
                .get(at + 1)
                .ok_or("a capability list that leaves its space")?,
        );
    }
    let table = space.get(at + 4..at + 8).ok_or("no MSI-X capability")?;
    let table = u32::from_le_bytes(table.try_into()?);
    let bar = RegionIndex((table & 7) as u8);
    let mut entry = [0; 4];
    for offset in [0, 4, 16, 28] {
        let at = u64::from(table & !7) + offset;
        function.region_write(bar, at, &[0xa5; 4])?;
        function.region_read(bar, at, &mut entry)?;
        ensure(
            entry == [0xff; 4],
            format!("the MSI-X table reads as {entry:x?}"),
        )?;
    }
    Ok(())
}

/// A BAR that does not answer is an error, not the end of the process, and comes back.
fn memory_off(function: &VfioFunction) -> Outcome {
    let on = command(function)?;
    for _ in 0..3 {
        let before = read32(function, reg::VS)?;
        function.config_write(COMMAND, &[on & !2])?;
        ensure(
            function
                .region_write(RegionIndex::BAR0, reg::INTMS, &[0; 4])
                .is_err(),
            "a write to nowhere",
        )?;
        ensure(read32(function, reg::VS).is_err(), "a read from nowhere")?;
        function.config_write(COMMAND, &[on])?;
        ensure(
            read32(function, reg::VS)? == before,
            "another version than before",
        )?;
    }
    Ok(())
}

fn refusals(function: &VfioFunction) -> Outcome {
    let memory = |iova| DmaMemory::new(Iova(iova), 0x2000);
    let interrupts = memory(0xfee0_0000)?;
    ensure(
        function.map_dma(&interrupts.window()).is_err(),
        "a window where interrupts go",
    )?;
    let taken = memory(DriverConfig::default().iova.0)?;
    ensure(
        function.map_dma(&taken.window()).is_err(),
        "two windows in one place",
    )?;
    let mut odd = memory(0x8000_0000)?.window();
    odd.len = 0x1800;
    ensure(
        function.map_dma(&odd).is_err(),
        "a window of a page and a half",
    )?;
    let part = function.unmap_dma(DriverConfig::default().iova, 0x1000);
    ensure(part.is_err(), "half of a window was unmapped")?;

    match VfioFunction::open(function.address()) {
        Err(VfioError::GroupBusy { .. }) => Ok(()),
        Err(other) => Err(other.into()),
        Ok(_) => Err("the function has two users".into()),
    }
}

/// Times of reads of 4 KiB, one at a time, by interrupt.
fn latency(driver: &mut Driver, block: u32) -> Outcome {
    let buffer = driver.memory().allocate(4096)?;
    let mut command = block_command(nvm::READ, 0, 4096, block);
    command.set_prps(buffer.iova().0, 0);
    let mut times = Vec::with_capacity(READS);
    for _ in 0..READS {
        let begun = Instant::now();
        driver.submit(1, command)?;
        while driver.poll(1)?.is_none() {
            driver.wait_interrupt(1, PATIENCE)?;
        }
        times.push(begun.elapsed().as_micros());
    }
    times.sort_unstable();
    let at = |share: usize| times.get(READS * share / 100).copied().unwrap_or(0);
    println!(
        "4 KiB reads, one at a time: p50 {} us, p99 {} us",
        at(50),
        at(99)
    );

    let function = driver.function();
    let (mut whole, mut part) = ([0; 4], [0; 3]);
    let begun = Instant::now();
    for _ in 0..READS {
        function.region_read(RegionIndex::BAR0, reg::VS, &mut whole)?;
    }
    let mapped = begun.elapsed();
    let begun = Instant::now();
    for _ in 0..READS {
        // Three bytes are none for the mapping; the kernel reads two, then one.
        function.region_read(RegionIndex::BAR0, reg::VS, &mut part)?;
    }
    let times = [mapped, begun.elapsed()].map(|time| time.as_nanos() / READS as u128);
    println!(
        "register reads: {} ns mapped, {} ns through the kernel",
        times[0], times[1]
    );
    Ok(())
}

fn command(function: &VfioFunction) -> Outcome<u8> {
    let mut command = [0];
    function.config_read(COMMAND, &mut command)?;
    Ok(command[0])
}

fn read32(function: &VfioFunction, offset: u64) -> Result<u32, farbus_vfio::FunctionError> {
    let mut value = [0; 4];
    function.region_read(RegionIndex::BAR0, offset, &mut value)?;
    Ok(u32::from_le_bytes(value))
}
