//! QEMU's teaching device (`docs/specs/edu.rst`): registers, one interrupt by pin or message, and a DMA
//! engine with addresses of 28 bits. Nothing of it is NVMe.

use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use farbus_vfio::driver::DmaMemory;
use farbus_vfio::kernel::VfioFunction;
use farbus_vfio::{DmaAccess, Function, FunctionError, InterruptKind, Iova, RegionIndex};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Outcome, ensure};

const ID: u64 = 0x00;
const LIVENESS: u64 = 0x04;
const FACTORIAL: u64 = 0x08;
const STATUS: u64 = 0x20;
const IRQ_STATUS: u64 = 0x24;
const IRQ_RAISE: u64 = 0x60;
const IRQ_ACKNOWLEDGE: u64 = 0x64;
const DMA_SOURCE: u64 = 0x80;
const DMA_TARGET: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;
/// Where the device's own memory is, as its DMA engine sees it.
const OWN_MEMORY: u64 = 0x4_0000;

/// PCI Command register: memory space and bus master.
const COMMAND: u16 = 4;
const COMMAND_ON: [u8; 2] = [6, 0];

const PATIENCE: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_millis(100);

struct Edu<'a>(&'a VfioFunction);

/// Everything that the device can do.
pub(crate) fn check(function: &VfioFunction) -> Outcome {
    let edu = Edu(function);
    function.config_write(COMMAND, &COMMAND_ON)?;
    edu.registers()?;
    println!("registers: ok");
    for kind in [InterruptKind::Intx, InterruptKind::Msi] {
        edu.interrupts(kind)?;
        println!("{kind:?}: signalled, masked, unmasked, silenced");
    }
    edu.dma()?;
    println!("DMA: both ways, and kept out of memory that it may only read");
    Ok(())
}

impl Edu<'_> {
    fn read(&self, offset: u64) -> Result<u32, FunctionError> {
        let mut value = [0; 4];
        self.0.region_read(RegionIndex::BAR0, offset, &mut value)?;
        Ok(u32::from_le_bytes(value))
    }

    fn write(&self, offset: u64, value: u32) -> Result<(), FunctionError> {
        self.0
            .region_write(RegionIndex::BAR0, offset, &value.to_le_bytes())
    }

    fn registers(&self) -> Outcome {
        let id = self.read(ID)?;
        ensure(id & 0xff == 0xed, format!("the id reads as {id:#x}"))?;
        self.write(LIVENESS, 0x1234_5678)?;
        let inverted = self.read(LIVENESS)?;
        ensure(
            inverted == !0x1234_5678,
            format!("{inverted:#x} is no inverse"),
        )?;
        self.write(FACTORIAL, 10)?;
        wait("the factorial", || Ok(self.read(STATUS)? & 1 == 0))?;
        let factorial = self.read(FACTORIAL)?;
        ensure(factorial == 3_628_800, format!("10! is {factorial}"))
    }

    fn interrupts(&self, kind: InterruptKind) -> Outcome {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        self.0
            .set_interrupts(kind, 0, std::slice::from_ref(&Some(event.clone())))?;
        for _ in 0..3 {
            self.raise()?;
            signalled(&event, "an interrupt")?;
            self.acknowledge(kind)?;
        }
        self.0.mask_interrupt(kind, 0, true)?;
        self.raise()?;
        sleep(SILENCE);
        ensure(event.read().is_err(), "a masked interrupt was signalled")?;
        self.0.mask_interrupt(kind, 0, false)?;
        signalled(&event, "what was pending at the unmask")?;
        self.acknowledge(kind)?;

        let other = match kind {
            InterruptKind::Intx => InterruptKind::Msi,
            _ => InterruptKind::Intx,
        };
        let refused = self.0.set_interrupts(other, 0, &[Some(event.clone())]);
        ensure(
            refused.is_err(),
            format!("{other:?} while {kind:?} is in use"),
        )?;
        self.0.set_interrupts(kind, 0, &[None])?;
        // What was left of the unmasking.
        let _ = event.read();
        self.raise()?;
        sleep(SILENCE);
        ensure(event.read().is_err(), "a silenced interrupt was signalled")?;
        self.write(IRQ_ACKNOWLEDGE, 1)?;
        Ok(())
    }

    fn raise(&self) -> Outcome {
        self.write(IRQ_RAISE, 1)?;
        let status = self.read(IRQ_STATUS)?;
        ensure(
            status == 1,
            format!("the interrupt's status is {status:#x}"),
        )
    }

    fn acknowledge(&self, kind: InterruptKind) -> Outcome {
        self.write(IRQ_ACKNOWLEDGE, 1)?;
        if kind == InterruptKind::Intx {
            // The kernel masked it when it fired.
            self.0.mask_interrupt(kind, 0, false)?;
        }
        Ok(())
    }

    fn dma(&self) -> Outcome {
        let mut memory = DmaMemory::new(Iova(0x10_0000), 0x2000)?;
        let (from, to) = (memory.allocate(4096)?, memory.allocate(4096)?);
        let pattern: Vec<u8> = (0..200).collect();
        memory.write(from, 0, &pattern)?;
        self.0.map_dma(&memory.window())?;
        self.copy(from.iova().0, OWN_MEMORY, 1)?;
        self.copy(OWN_MEMORY, to.iova().0, 3)?;
        let mut copied = vec![0; pattern.len()];
        memory.read(to, 0, &mut copied)?;
        ensure(copied == pattern, "the device did not copy")?;

        self.0.unmap_dma(memory.window().iova, 0x2000)?;
        let mut window = memory.window();
        window.access = DmaAccess::Read;
        self.0.map_dma(&window)?;
        let erased = vec![0xee; pattern.len()];
        memory.write(to, 0, &erased)?;
        self.copy(from.iova().0, OWN_MEMORY, 1)?;
        self.copy(OWN_MEMORY, to.iova().0, 3)?;
        memory.read(to, 0, &mut copied)?;
        ensure(
            copied == erased,
            "the device wrote to memory that it may only read",
        )?;
        self.0.unmap_dma(window.iova, 0x2000)?;
        Ok(())
    }

    fn copy(&self, from: u64, to: u64, command: u32) -> Outcome {
        self.write(DMA_SOURCE, from as u32)?;
        self.write(DMA_TARGET, to as u32)?;
        self.write(DMA_COUNT, 200)?;
        self.write(DMA_COMMAND, command)?;
        wait("a copy", || Ok(self.read(DMA_COMMAND)? & 1 == 0))
    }
}

/// Waits for an eventfd.
pub(crate) fn signalled(event: &EventFd, what: &str) -> Outcome {
    wait(what, || Ok(event.read().is_ok()))
}

fn wait(what: &str, mut reached: impl FnMut() -> Outcome<bool>) -> Outcome {
    let begun = Instant::now();
    while !reached()? {
        ensure(begun.elapsed() < PATIENCE, format!("{what} did not come"))?;
        sleep(Duration::from_millis(1));
    }
    Ok(())
}
