//! The NVM commands (NVMe 1.4 §6).

#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use super::controller::{Controller, Scratch};
use super::dma::Access;
use crate::nvme::{Status, SubmissionEntry, nvm};

/// The namespace id that means all namespaces.
const ALL_NAMESPACES: u32 = 0xffff_ffff;
/// Force unit access: dword 12, bit 30.
const FUA: u32 = 1 << 30;
/// Write Zeroes: deallocate, dword 12, bit 25.
const DEALLOCATE: u32 = 1 << 25;
/// Dataset Management: the attribute "deallocate", dword 11, bit 2.
const ATTRIBUTE_DEALLOCATE: u32 = 1 << 2;
/// Bytes of a Dataset Management range (NVMe 1.4 figure 358).
const RANGE_SIZE: usize = 16;

/// A range of the namespace, within its bounds; bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    offset: u64,
    len: u64,
}

/// Carries one command out.
pub(super) fn execute(
    controller: &Controller,
    command: &SubmissionEntry,
    scratch: &mut Scratch,
) -> Status {
    // Fused operations are not advertised (Identify FUSES).
    if command.fuse() != 0 || command.psdt() != 0 {
        return Status::INVALID_FIELD;
    }
    let known = matches!(
        command.opcode(),
        nvm::FLUSH
            | nvm::READ
            | nvm::WRITE
            | nvm::COMPARE
            | nvm::WRITE_ZEROES
            | nvm::DATASET_MANAGEMENT
            | nvm::VERIFY
    );
    if !known {
        return Status::INVALID_OPCODE;
    }
    let all = command.nsid() == ALL_NAMESPACES && command.opcode() == nvm::FLUSH;
    if command.nsid() != 1 && !all {
        return Status::INVALID_NAMESPACE;
    }
    let outcome = match command.opcode() {
        nvm::FLUSH => controller.flush(),
        nvm::READ => read(controller, command, scratch),
        nvm::WRITE => write(controller, command, scratch),
        nvm::COMPARE => compare(controller, command, scratch),
        nvm::WRITE_ZEROES => write_zeroes(controller, command),
        nvm::DATASET_MANAGEMENT => dataset_management(controller, command, scratch),
        _ => verify(controller, command, scratch),
    };
    outcome.err().unwrap_or(Status::SUCCESS)
}

fn read(
    controller: &Controller,
    command: &SubmissionEntry,
    scratch: &mut Scratch,
) -> Result<(), Status> {
    let extent = extent(controller, command)?;
    scratch.map(&controller.dma, command, extent.len as usize, Access::Write)?;
    controller
        .backing
        .read(extent.offset, &scratch.data, &mut scratch.vectors)?;
    controller.health.count_read(extent.len);
    Ok(())
}

fn write(
    controller: &Controller,
    command: &SubmissionEntry,
    scratch: &mut Scratch,
) -> Result<(), Status> {
    let extent = extent(controller, command)?;
    scratch.map(&controller.dma, command, extent.len as usize, Access::Read)?;
    let durable = must_be_durable(controller, command);
    controller.noting_loss(|| {
        controller
            .backing
            .write(extent.offset, &scratch.data, durable, &mut scratch.vectors)
    })?;
    controller.health.count_write(extent.len);
    // The write cache may have been switched off meanwhile, and Set Features has flushed
    // without waiting for this write.
    if !durable && must_be_durable(controller, command) {
        controller.flush()
    } else {
        Ok(())
    }
}

fn write_zeroes(controller: &Controller, command: &SubmissionEntry) -> Result<(), Status> {
    let extent = extent(controller, command)?;
    let deallocate = command.dword(12) & DEALLOCATE != 0;
    controller
        .backing
        .zero(extent.offset, extent.len, deallocate)?;
    if must_be_durable(controller, command) {
        controller.flush()
    } else {
        Ok(())
    }
}

fn dataset_management(
    controller: &Controller,
    command: &SubmissionEntry,
    scratch: &mut Scratch,
) -> Result<(), Status> {
    let count = (command.dword(10) & 0xff) as usize + 1;
    scratch.map(&controller.dma, command, count * RANGE_SIZE, Access::Read)?;
    // Copied out once: what is checked is what is used.
    let ranges = scratch
        .buffer
        .get_mut(..count * RANGE_SIZE)
        .ok_or(Status::INTERNAL_ERROR)?;
    scratch.data.copy_to(0, ranges);
    let parse = |range: &[u8]| {
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
        let blocks = number(range.get(4..8).unwrap_or_default());
        checked_extent(
            controller,
            number(range.get(8..16).unwrap_or_default()),
            blocks,
        )
    };
    for range in ranges.chunks_exact(RANGE_SIZE) {
        parse(range)?;
    }
    // The other attributes are hints about access, of which nothing is made here.
    if command.dword(11) & ATTRIBUTE_DEALLOCATE == 0 {
        return Ok(());
    }
    for range in ranges.chunks_exact(RANGE_SIZE) {
        let extent = parse(range)?;
        if extent.len > 0 {
            controller.backing.deallocate(extent.offset, extent.len)?;
        }
    }
    if controller.write_cache.load(Ordering::SeqCst) {
        Ok(())
    } else {
        controller.flush()
    }
}

fn compare(
    controller: &Controller,
    command: &SubmissionEntry,
    scratch: &mut Scratch,
) -> Result<(), Status> {
    let extent = extent(controller, command)?;
    scratch.map(&controller.dma, command, extent.len as usize, Access::Read)?;
    let Scratch {
        data,
        buffer,
        other,
        ..
    } = scratch;
    let mut done = 0;
    while done < extent.len {
        let len = (extent.len - done).min(buffer.len().min(other.len()) as u64) as usize;
        let (Some(stored), Some(given)) = (buffer.get_mut(..len), other.get_mut(..len)) else {
            return Err(Status::INTERNAL_ERROR);
        };
        controller.backing.read_into(extent.offset + done, stored)?;
        data.copy_to(done as usize, given);
        if stored != given {
            return Err(Status::COMPARE_FAILURE);
        }
        done += len as u64;
    }
    controller.health.count_read(extent.len);
    Ok(())
}

/// Reads without a transfer, so that bad blocks come to light.
fn verify(
    controller: &Controller,
    command: &SubmissionEntry,
    scratch: &mut Scratch,
) -> Result<(), Status> {
    let extent = extent(controller, command)?;
    if controller.backing.is_immediate() {
        // Memory has no bad blocks, and a doorbell write is no time to look for any.
        return Ok(());
    }
    let mut done = 0;
    while done < extent.len {
        let len = (extent.len - done).min(scratch.buffer.len() as u64);
        let buffer = scratch
            .buffer
            .get_mut(..len as usize)
            .ok_or(Status::INTERNAL_ERROR)?;
        controller.backing.read_into(extent.offset + done, buffer)?;
        done += len;
    }
    Ok(())
}

/// The range that a command names in dwords 10 to 12.
fn extent(controller: &Controller, command: &SubmissionEntry) -> Result<Extent, Status> {
    checked_extent(controller, command.slba(), u64::from(command.blocks()))
}

fn checked_extent(controller: &Controller, lba: u64, blocks: u64) -> Result<Extent, Status> {
    let shape = controller.shape();
    match lba.checked_add(blocks) {
        Some(end) if end <= shape.blocks => Ok(Extent {
            offset: lba << shape.block_shift,
            len: blocks << shape.block_shift,
        }),
        _ => Err(Status::LBA_OUT_OF_RANGE),
    }
}

fn must_be_durable(controller: &Controller, command: &SubmissionEntry) -> bool {
    command.dword(12) & FUA != 0 || !controller.write_cache.load(Ordering::SeqCst)
}
