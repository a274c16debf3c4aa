//! Commands that a host commonly issues, as methods that wait for the outcome.

#![forbid(unsafe_code)]

use super::memory::DmaBuffer;
use super::queue::QueuePair;
use super::shadow::ShadowDoorbells;
use super::{DriverError, NvmeDriver, pages};
use crate::function::Function;
use crate::nvme::{PAGE_SIZE, SubmissionEntry, admin, cns, feature, nvm};

/// The one namespace that these commands are about.
const NSID: u32 = 1;
/// The namespace id that means all namespaces.
const ALL_NAMESPACES: u32 = 0xffff_ffff;

/// Identify Controller: Optional Admin Command Support, bytes, and its bit 8: the command Doorbell
/// Buffer Config (NVMe 1.4 §5.15.2.2).
const OACS: usize = 256;
const DOORBELL_BUFFER: u16 = 1 << 8;

/// What Identify says about a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespaceShape {
    /// Number of blocks.
    pub blocks: u64,
    /// Size of a block in bytes.
    pub block_size: u32,
}

/// A command's data pointer: both PRPs, and the page that holds the list if there is one.
#[derive(Clone, Copy, Debug)]
pub struct Prps {
    /// PRP entry 1.
    pub prp1: u64,
    /// PRP entry 2.
    pub prp2: u64,
    list: Option<DmaBuffer>,
}

impl<F: Function + ?Sized> NvmeDriver<F> {
    /// Makes the PRPs for `len` bytes of a buffer, from `at` on (NVMe 1.4 §4.3). Give them
    /// back with [`Self::free_prps`] once the command is done.
    pub fn prps(&mut self, buffer: DmaBuffer, at: usize, len: usize) -> Result<Prps, DriverError> {
        if at.checked_add(len).is_none_or(|end| end > buffer.size()) {
            return Err(DriverError::OutOfBounds {
                at,
                len,
                size: buffer.size(),
            });
        }
        let prp1 = buffer.iova().0 + at as u64;
        let first = PAGE_SIZE - (prp1 % PAGE_SIZE as u64) as usize;
        let second = prp1 + first as u64;
        let rest = pages(len.saturating_sub(first));
        if rest < 2 {
            let prp2 = if rest == 0 { 0 } else { second };
            return Ok(Prps {
                prp1,
                prp2,
                list: None,
            });
        }
        let list = self.memory.allocate(rest * 8)?;
        if list.size() > PAGE_SIZE {
            self.memory.free(list);
            return Err(DriverError::OutOfBounds {
                at,
                len,
                size: PAGE_SIZE * PAGE_SIZE / 8,
            });
        }
        for n in 0..rest {
            let entry = second + (n * PAGE_SIZE) as u64;
            self.memory.write(list, n * 8, &entry.to_le_bytes())?;
        }
        Ok(Prps {
            prp1,
            prp2: list.iova().0,
            list: Some(list),
        })
    }

    /// Takes a PRP list back.
    pub fn free_prps(&mut self, prps: Prps) {
        if let Some(list) = prps.list {
            self.memory.free(list);
        }
    }

    /// Carries out a command with `len` bytes of a buffer as its data.
    pub fn transfer(
        &mut self,
        queue: u16,
        mut command: SubmissionEntry,
        buffer: DmaBuffer,
        len: usize,
    ) -> Result<u64, DriverError> {
        let prps = self.prps(buffer, 0, len)?;
        command.set_prps(prps.prp1, prps.prp2);
        let outcome = self.command(queue, command);
        self.free_prps(prps);
        outcome
    }

    /// Carries out a command that brings `data.len()` bytes.
    pub fn receive(
        &mut self,
        queue: u16,
        command: SubmissionEntry,
        data: &mut [u8],
    ) -> Result<u64, DriverError> {
        let buffer = self.memory.allocate(data.len())?;
        let outcome = self
            .transfer(queue, command, buffer, data.len())
            .and_then(|result| {
                self.memory.read(buffer, 0, data)?;
                Ok(result)
            });
        self.free_unless_lost(buffer, outcome)
    }

    /// Carries out a command that takes `data`.
    pub fn send(
        &mut self,
        queue: u16,
        command: SubmissionEntry,
        data: &[u8],
    ) -> Result<u64, DriverError> {
        let buffer = self.memory.allocate(data.len())?;
        let outcome = self
            .memory
            .write(buffer, 0, data)
            .and_then(|()| self.transfer(queue, command, buffer, data.len()));
        self.free_unless_lost(buffer, outcome)
    }

    /// A command that timed out may still use its buffer, which must then not be given out.
    fn free_unless_lost<T>(
        &mut self,
        buffer: DmaBuffer,
        outcome: Result<T, DriverError>,
    ) -> Result<T, DriverError> {
        if !matches!(outcome, Err(DriverError::Timeout { .. })) {
            self.memory.free(buffer);
        }
        outcome
    }

    /// Identify: any data structure (NVMe 1.4 §5.15).
    pub fn identify(&mut self, cns: u8, nsid: u32) -> Result<Vec<u8>, DriverError> {
        let mut command = SubmissionEntry::new(admin::IDENTIFY);
        command.set_nsid(nsid);
        command.set_dword(10, u32::from(cns));
        let mut page = vec![0; PAGE_SIZE];
        self.receive(0, command, &mut page)?;
        Ok(page)
    }

    /// The size of namespace 1.
    pub fn namespace(&mut self) -> Result<NamespaceShape, DriverError> {
        let page = self.identify(cns::NAMESPACE, NSID)?;
        let byte = |at: usize| page.get(at).copied().unwrap_or(0);
        let blocks = (0..8).rev().fold(0, |n, at| n << 8 | u64::from(byte(at)));
        let format = usize::from(byte(26) & 0xf);
        let shift = u32::from(byte(128 + 4 * format + 2));
        let block_size = 1u32.checked_shl(shift).filter(|size| *size >= 512);
        let unusable = DriverError::Unusable("the block size of its namespace makes no sense");
        Ok(NamespaceShape {
            blocks,
            block_size: block_size.ok_or(unusable)?,
        })
    }

    /// Get Log Page: `data.len()` bytes (a multiple of 4) from `offset` on.
    pub fn log_page(&mut self, page: u8, offset: u64, data: &mut [u8]) -> Result<(), DriverError> {
        let dwords = (data.len() / 4).saturating_sub(1) as u32;
        let mut command = SubmissionEntry::new(admin::GET_LOG_PAGE);
        command.set_nsid(ALL_NAMESPACES);
        command.set_dword(10, u32::from(page) | dwords << 16);
        command.set_dword(11, dwords >> 16);
        command.set_dword(12, offset as u32);
        command.set_dword(13, (offset >> 32) as u32);
        self.receive(0, command, data).map(|_| ())
    }

    /// Get Features: the current value.
    pub fn get_feature(&mut self, id: u8, parameter: u32) -> Result<u32, DriverError> {
        let mut command = SubmissionEntry::new(admin::GET_FEATURES);
        command.set_dword(10, u32::from(id));
        command.set_dword(11, parameter);
        Ok(self.command(0, command)? as u32)
    }

    /// Set Features: the result.
    pub fn set_feature(&mut self, id: u8, value: u32) -> Result<u32, DriverError> {
        let mut command = SubmissionEntry::new(admin::SET_FEATURES);
        command.set_dword(10, u32::from(id));
        command.set_dword(11, value);
        Ok(self.command(0, command)? as u32)
    }

    /// Asks for I/O queue pairs; returns how many there may be.
    pub fn request_queues(&mut self, pairs: u16) -> Result<u16, DriverError> {
        let wanted = u32::from(pairs.max(1)) - 1;
        let granted = self.set_feature(feature::NUMBER_OF_QUEUES, wanted | wanted << 16)?;
        Ok((granted & 0xffff)
            .min(granted >> 16)
            .saturating_add(1)
            .min(0xffff) as u16)
    }

    /// Agrees on doorbells in memory with a controller that offers them (Identify Controller,
    /// OACS bit 8), for the I/O queues that are created afterwards; returns whether it does.
    pub fn use_shadow_doorbells(&mut self) -> Result<bool, DriverError> {
        let page = self.identify(cns::CONTROLLER, 0)?;
        let oacs = page.get(OACS..).and_then(|bytes| bytes.first_chunk());
        let offered = oacs.is_some_and(|bytes| u16::from_le_bytes(*bytes) & DOORBELL_BUFFER != 0);
        if !offered || self.shadow.is_some() {
            return Ok(offered);
        }
        let shadow = ShadowDoorbells::new(&mut self.memory)?;
        let (values, events) = shadow.iovas();
        let mut command = SubmissionEntry::new(admin::DOORBELL_BUFFER);
        command.set_prps(values, events);
        match self.command(0, command) {
            Ok(_) => {
                self.shadow = Some(shadow);
                Ok(true)
            }
            // It may still write there.
            Err(error @ DriverError::Timeout { .. }) => Err(error),
            Err(error) => {
                shadow.free(&mut self.memory);
                Err(error)
            }
        }
    }

    /// Creates a completion queue and a submission queue with the same id and size, with an
    /// interrupt or without.
    pub fn create_queue_pair(
        &mut self,
        id: u16,
        entries: u16,
        vector: Option<u16>,
    ) -> Result<(), DriverError> {
        if self.queues.contains_key(&id) || entries < 2 {
            return Err(DriverError::NoQueue(id));
        }
        if let Some(shadow) = &self.shadow {
            for index in [usize::from(id) * 2, usize::from(id) * 2 + 1] {
                shadow.clear(&self.memory, index * self.doorbell_stride as usize)?;
            }
        }
        let pair = QueuePair::new(&mut self.memory, id, entries, vector)?;
        let created = self.create_both(&pair, id, entries, vector);
        match created {
            Ok(()) => {
                self.queues.insert(id, pair);
                Ok(())
            }
            Err(error) => {
                pair.free(&mut self.memory);
                Err(error)
            }
        }
    }

    fn create_both(
        &mut self,
        pair: &QueuePair,
        id: u16,
        entries: u16,
        vector: Option<u16>,
    ) -> Result<(), DriverError> {
        let size_and_id = u32::from(entries - 1) << 16 | u32::from(id);
        let mut command = SubmissionEntry::new(admin::CREATE_CQ);
        command.set_prps(pair.cq_iova(), 0);
        command.set_dword(10, size_and_id);
        command.set_dword(11, vector.map_or(1, |vector| u32::from(vector) << 16 | 3));
        self.command(0, command)?;
        let mut command = SubmissionEntry::new(admin::CREATE_SQ);
        command.set_prps(pair.sq_iova(), 0);
        command.set_dword(10, size_and_id);
        command.set_dword(11, u32::from(id) << 16 | 1);
        self.command(0, command).map(|_| ())
    }

    /// Deletes a queue pair.
    pub fn delete_queue_pair(&mut self, id: u16) -> Result<(), DriverError> {
        if id == 0 || !self.queues.contains_key(&id) {
            return Err(DriverError::NoQueue(id));
        }
        for opcode in [admin::DELETE_SQ, admin::DELETE_CQ] {
            let mut command = SubmissionEntry::new(opcode);
            command.set_dword(10, u32::from(id));
            self.command(0, command)?;
        }
        if let Some(pair) = self.queues.remove(&id) {
            pair.free(&mut self.memory);
        }
        Ok(())
    }

    /// Reads `data.len()` bytes, a multiple of `block_size`, at a block address.
    pub fn read(
        &mut self,
        queue: u16,
        lba: u64,
        block_size: u32,
        data: &mut [u8],
    ) -> Result<(), DriverError> {
        let command = block_command(nvm::READ, lba, data.len(), block_size);
        self.receive(queue, command, data).map(|_| ())
    }

    /// Writes `data`, a multiple of `block_size` bytes, at a block address.
    pub fn write(
        &mut self,
        queue: u16,
        lba: u64,
        block_size: u32,
        data: &[u8],
    ) -> Result<(), DriverError> {
        let command = block_command(nvm::WRITE, lba, data.len(), block_size);
        self.send(queue, command, data).map(|_| ())
    }

    /// Compares `data`, a multiple of `block_size` bytes, with what is stored.
    pub fn compare(
        &mut self,
        queue: u16,
        lba: u64,
        block_size: u32,
        data: &[u8],
    ) -> Result<(), DriverError> {
        let command = block_command(nvm::COMPARE, lba, data.len(), block_size);
        self.send(queue, command, data).map(|_| ())
    }

    /// Makes what was written durable.
    pub fn flush(&mut self, queue: u16) -> Result<(), DriverError> {
        let mut command = SubmissionEntry::new(nvm::FLUSH);
        command.set_nsid(NSID);
        self.command(queue, command).map(|_| ())
    }

    /// Makes blocks read as zero, and gives their space back if told so.
    pub fn write_zeroes(
        &mut self,
        queue: u16,
        lba: u64,
        blocks: u32,
        deallocate: bool,
    ) -> Result<(), DriverError> {
        let mut command = block_command(nvm::WRITE_ZEROES, lba, blocks as usize, 1);
        command.set_dword(12, command.dword(12) | u32::from(deallocate) << 25);
        self.command(queue, command).map(|_| ())
    }

    /// Gives the space of ranges of (block address, number of blocks) back; 1 to 256 ranges.
    pub fn deallocate(&mut self, queue: u16, ranges: &[(u64, u32)]) -> Result<(), DriverError> {
        let mut data = Vec::with_capacity(ranges.len() * 16);
        for (lba, blocks) in ranges {
            data.extend_from_slice(&0u32.to_le_bytes());
            data.extend_from_slice(&blocks.to_le_bytes());
            data.extend_from_slice(&lba.to_le_bytes());
        }
        let mut command = SubmissionEntry::new(nvm::DATASET_MANAGEMENT);
        command.set_nsid(NSID);
        command.set_dword(10, (ranges.len().saturating_sub(1) & 0xff) as u32);
        command.set_dword(11, 1 << 2);
        self.send(queue, command, &data).map(|_| ())
    }
}

/// A command about `len` bytes at a block address of namespace 1.
pub fn block_command(opcode: u8, lba: u64, len: usize, block_size: u32) -> SubmissionEntry {
    let blocks = len / block_size.max(1) as usize;
    let mut command = SubmissionEntry::new(opcode);
    command.set_nsid(NSID);
    command.set_slba(lba);
    command.set_dword(12, (blocks.saturating_sub(1) & 0xffff) as u32);
    command
}
