//! Drives functions of the machine that it runs in through the kernel's VFIO, and says what it
//! saw. The test bed runs it in a machine that has devices to lend.

#![forbid(unsafe_code)]

mod edu;
mod holder;
mod lend;
mod nvme;
mod watched;

use std::error::Error;
use std::process::ExitCode;

use farbus_integration::counting::Counting;
use farbus_vfio::kernel::VfioFunction;
use farbus_vfio::{Function, PciAddress};

const USAGE: &str = "\
usage: farbus-vfio-check describe ADDRESS          what the function is, and whether it resets
       farbus-vfio-check nvme ADDRESS              drives an NVMe controller; overwrites its data
       farbus-vfio-check lend ADDRESS              lends an NVMe controller to two tenants in turn, and
                                                   looks at what stays and what an I/O costs
       farbus-vfio-check edu ADDRESS               drives QEMU's teaching device
       farbus-vfio-check map ADDRESS COUNT BYTES   maps windows for DMA
       farbus-vfio-check hold ADDRESS              holds the function until it is asked for, or fails
       farbus-vfio-check outlive ADDRESS           holds the function until it is gone, then uses it

exit status: 0 done, 1 failed, 2 usage";

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What a check comes to.
type Outcome<T = ()> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["describe", address] => open(address).and_then(|function| describe(&function)),
        ["nvme", address] => nvme::check(address),
        ["lend", address] => lend::check(address),
        ["edu", address] => open(address).and_then(|function| edu::check(&function)),
        ["map", address, count, bytes] => holder::map(address, count, bytes),
        ["hold", address] => open(address).and_then(holder::hold),
        ["outlive", address] => open(address).and_then(holder::outlive),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    let Err(error) = outcome else {
        return ExitCode::SUCCESS;
    };
    println!("failed: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        println!("  because: {error}");
        cause = error.source();
    }
    ExitCode::FAILURE
}

fn open(address: &str) -> Outcome<VfioFunction> {
    let address: PciAddress = address.parse()?;
    Ok(VfioFunction::open(address)?)
}

/// A failure unless something holds.
fn ensure(holds: bool, what: impl Into<String>) -> Outcome {
    if holds {
        Ok(())
    } else {
        Err(what.into().into())
    }
}

/// Prints what the function is, and resets it if it can be reset.
fn describe(function: &VfioFunction) -> Outcome {
    let info = function.info();
    let mut header = [0; 16];
    function.config_read(0, &mut header)?;
    let mut whole = vec![0; usize::from(info.config_size)];
    function.config_read(0, &mut whole)?;
    ensure(
        whole.starts_with(&header),
        "two reads of configuration space differ",
    )?;
    println!("label: {}", info.label);
    let interface = match function.has_iommufd() {
        true => "its own node, with iommufd",
        false => "its group's node",
    };
    println!("opened by: {interface}");
    println!(
        "id: {:02x}{:02x}:{:02x}{:02x}",
        header[1], header[0], header[3], header[2]
    );
    println!(
        "class: {:02x}{:02x}{:02x}",
        header[11], header[10], header[9]
    );
    println!("configuration space: {} bytes", info.config_size);
    for region in &info.regions {
        println!("{}: {} bytes", region.index, region.size);
    }
    let counts = info.interrupts;
    println!(
        "interrupts: INTx {}, MSI {}, MSI-X {}",
        counts.intx, counts.msi, counts.msix
    );
    for range in &info.iova_ranges {
        println!("IOVA: {:#x} to {:#x}", range.start(), range.end());
    }
    ensure(function.is_present(), "the function is absent")?;
    if info.resettable {
        function.reset()?;
        ensure(
            function.is_present(),
            "the function is absent after its reset",
        )?;
        println!("reset: done");
    } else {
        let refusal = function.reset().err().ok_or("a reset that cannot be")?;
        println!("reset: refused: {refusal}");
    }
    Ok(())
}
