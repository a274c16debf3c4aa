//! Reads of 4 KiB from a software drive that holds nothing, for counting instructions:
//!
//! ```text
//! cargo build --release -p farbus-vfio --example doorbell_cost
//! valgrind --tool=callgrind --toggle-collect='*SoftNvme*region_write*' \
//!     target/release/examples/doorbell_cost null 20000 32
//! ```
//!
//! The count that it ends with, divided by the number of commands, is what a command costs the
//! controller, with its share of both doorbells.

use std::error::Error;
use std::sync::Arc;

use farbus_vfio::driver::{DriverConfig, NvmeDriver, block_command};
use farbus_vfio::nvme::nvm;
use farbus_vfio::soft_nvme::{SoftNvme, SoftNvmeConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let config = match arguments.next().as_deref() {
        Some("memory") => SoftNvmeConfig::memory(64 << 20),
        _ => SoftNvmeConfig::null(64 << 20),
    };
    let count: u64 = arguments.next().unwrap_or("20000".into()).parse()?;
    let depth: u64 = arguments.next().unwrap_or("32".into()).parse()?;
    let function = Arc::new(SoftNvme::open(&config)?);
    let mut driver = NvmeDriver::new(function, DriverConfig::default())?;
    driver.enable()?;
    driver.create_queue_pair(1, 128, Some(1))?;
    let buffer = driver.memory().allocate(depth as usize * 4096)?;
    for batch in 0..count / depth {
        for n in 0..depth {
            let mut command = block_command(nvm::READ, (batch * depth + n) % 16000 * 8, 8, 1);
            command.set_prps(buffer.iova().0 + n * 4096, 0);
            driver.enqueue(1, command)?;
        }
        driver.ring_sq(1, u32::from(driver.tail(1)?))?;
        for _ in 0..depth {
            driver.poll(1)?.ok_or("a completion is missing")?;
        }
    }
    println!("{} commands", count / depth * depth);
    Ok(())
}
