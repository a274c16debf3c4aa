//! `identify`: what the controller and its namespace say about themselves.

use anyhow::Context;
use farbus_vfio::nvme::{cns, reg};
use serde_json::{Value, json};

use crate::cli::IdentifyArgs;
use crate::target::{Target, TargetSpec};

/// DMA memory for admin commands, in bytes.
const MEMORY: usize = 1 << 20;

pub(crate) fn run(args: &IdentifyArgs, specs: &[TargetSpec]) -> anyhow::Result<()> {
    let facts = specs
        .iter()
        .map(|spec| identify(spec, !args.targets.no_dbbuf).with_context(|| spec.to_string()))
        .collect::<anyhow::Result<Vec<_>>>()?;
    if args.json {
        println!("{}", Value::from(facts));
        return Ok(());
    }
    for fact in &facts {
        for (key, value) in fact.as_object().into_iter().flatten() {
            match value {
                Value::String(text) => println!("{key:24} {text}"),
                other => println!("{key:24} {other}"),
            }
        }
        println!();
    }
    Ok(())
}

fn identify(spec: &TargetSpec, dbbuf: bool) -> anyhow::Result<Value> {
    let target = Target::open(spec)?;
    let (mut driver, shadow) = target.drive(MEMORY, dbbuf)?;
    let controller = driver.identify(cns::CONTROLLER, 0)?;
    let shape = driver.namespace()?;
    let queues = driver.request_queues(u16::MAX - 1)?;
    let text = |from: usize, to: usize| {
        let bytes = controller.get(from..to).unwrap_or_default();
        String::from_utf8_lossy(bytes).trim().to_owned()
    };
    let byte = |at: usize| controller.get(at).copied().unwrap_or(0);
    let version = driver.read32(reg::VS)?;
    let capabilities = driver.read64(reg::CAP)?;
    // Offsets: NVMe 1.4 §5.15.2.2.
    Ok(json!({
        "target": spec.to_string(),
        "function": target.function.info().label,
        "serial": text(4, 24),
        "model": text(24, 64),
        "firmware": text(64, 72),
        "version": format!("{}.{}.{}", version >> 16, version >> 8 & 0xff, version & 0xff),
        "max_transfer_bytes": match byte(77) { 0 => None, shift => Some(4096u64 << shift.min(40)) },
        "max_queue_entries": (capabilities & 0xffff) + 1,
        "io_queue_pairs": queues,
        "interrupt_vectors": target.function.info().interrupts.msix,
        "volatile_write_cache": byte(525) & 1 == 1,
        "shadow_doorbells": shadow,
        "block_size_bytes": shape.block_size,
        "blocks": shape.blocks,
        "size_bytes": shape.blocks * u64::from(shape.block_size),
    }))
}
