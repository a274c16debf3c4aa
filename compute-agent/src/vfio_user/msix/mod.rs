//! Mediated MSI-X: this server keeps the function's MSI-X table and raises its vectors by messages.
//!
//! QEMU aborts when a vfio-user device with MSI-X is unplugged, which a guest can do by itself, if QEMU
//! knew of the MSI-X capability when the device was made. It learns of capabilities by reading
//! configuration space in pieces longer than any guest's access; such reads are shown a
//! vendor-specific capability instead. The guest's own accesses are passed on by QEMU, to the
//! capability as well as to table and pending bits in the BAR, and are answered here. A vector is a
//! write of four bytes to the address that the guest has put in its entry, which a
//! `VFIO_USER_DMA_WRITE` without reply makes; QEMU does it as the device, so that interrupt remapping
//! works. No eventfd reaches the VMM then.
//!
//! The function knows nothing of it: its vectors are eventfds as ever, which this server waits for.
//! They are made when the guest first unmasks a vector. Several signals of one vector
//! before its message is sent are one message; while the client's socket takes nothing, vectors wait as
//! pending bits, so that the outbox holds one such message at most.

mod table;

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use farbus_vfio::config::{CapabilityId, MsixLayout, find_capability, find_msix};
use farbus_vfio::{Function, FunctionError, InterruptKind, RegionIndex};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub(super) use self::table::Message;
use self::table::{Control, ENTRY_LEN, Table};
use super::record::SessionRecord;

/// A guest reads configuration space in accesses of at most this many bytes.
const LONGEST_GUEST_READ: usize = 8;

/// The id of a vendor-specific capability.
const VENDOR_SPECIFIC: u8 = 0x09;

/// Command register (PCI 3.0 §6.2.2), and its Bus Master Enable.
const COMMAND: u16 = 4;
const BUS_MASTER: u16 = 1 << 2;

/// MSI-X Message Control (PCI 3.0 §6.8.2.3), and its bits.
const MESSAGE_CONTROL: u16 = 2;
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;

/// The second byte of PCI Express Device Control (PCIe 4.0 §7.5.3.4), and its Initiate FLR.
const DEVICE_CONTROL_HIGH: u16 = 9;
const INITIATE_FLR: u8 = 1 << 7;

/// What the endpoint is to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Watch {
    pub(super) vector: u32,
    pub(super) fd: RawFd,
}

/// One client's MSI-X.
#[derive(Debug)]
pub(super) struct Mediator {
    layout: MsixLayout,
    /// Where the capability begins.
    capability: u16,
    express: Option<u16>,
    table: Table,
    /// The vectors that were unmasked once.
    events: BTreeMap<u32, Arc<EventFd>>,
    /// Those of them that the endpoint does not know yet.
    fresh: Vec<Watch>,
    /// Where a successor finds the table, if there is to be one.
    record: Option<SessionRecord>,
}

impl Mediator {
    /// `None` if the function has no MSI-X whose table and pending bits lie within its BARs.
    pub(super) fn new(function: &dyn Function) -> Option<Self> {
        let read = |at: u16, data: &mut [u8]| function.config_read(at, data);
        let (capability, layout) = find_msix(read)?;
        let info = function.info();
        let table = Table::new(layout.vectors);
        let fits = |(region, start): (RegionIndex, u64), len: u64| {
            let has = info.region(region).map_or(0, |region| region.size);
            region < RegionIndex::ROM && start.saturating_add(len) <= has
        };
        let is_sound = u32::from(layout.vectors) <= info.interrupts.msix
            && fits(layout.table, table.len())
            && fits(layout.pba, table.pending_len());
        is_sound.then(|| Self {
            layout,
            capability,
            express: find_capability(CapabilityId::Express, read),
            table,
            events: BTreeMap::new(),
            fresh: Vec::new(),
            record: None,
        })
    }

    /// From now on the table is in the record, too.
    pub(super) fn keep(&mut self, record: &SessionRecord) {
        record.clear_vectors();
        self.record = Some(record.clone());
    }

    /// Takes up the table of a predecessor. What was pending is raised again by the function.
    pub(super) fn resume(
        &mut self,
        function: &dyn Function,
        record: &SessionRecord,
    ) -> Result<(), FunctionError> {
        self.record = Some(record.clone());
        for vector in 0..u32::from(self.layout.vectors) {
            let (address, data, masked) = record.vector(vector);
            self.table
                .set_entry(vector, Message { address, data }, masked);
            if !masked {
                self.listen_to(function, vector)?;
            }
        }
        self.follow(function);
        Ok(())
    }

    fn reset_table(&mut self) {
        self.table.reset();
        if let Some(record) = &self.record {
            record.clear_vectors();
        }
    }

    /// Changes what was read of configuration space from `offset` on, if it is the VMM itself
    /// that reads.
    pub(super) fn disguise(&self, offset: u16, data: &mut [u8]) {
        if data.len() <= LONGEST_GUEST_READ {
            return;
        }
        let id = self.capability.checked_sub(offset).map(usize::from);
        if let Some(id) = id.and_then(|at| data.get_mut(at)) {
            *id = VENDOR_SPECIFIC;
        }
    }

    /// The function's configuration space was written to: follows what that has set off.
    pub(super) fn config_written(&mut self, function: &dyn Function, offset: u16, data: &[u8]) {
        let written = |at: u16| {
            let index = at.checked_sub(offset).map(usize::from);
            index.and_then(|index| data.get(index).copied())
        };
        let high = self
            .express
            .and_then(|at| at.checked_add(DEVICE_CONTROL_HIGH));
        if high
            .and_then(written)
            .is_some_and(|byte| byte & INITIATE_FLR != 0)
        {
            self.reset_table();
        }
        self.follow(function);
    }

    /// The function was reset.
    pub(super) fn reset(&mut self, function: &dyn Function) {
        self.reset_table();
        self.follow(function);
    }

    /// Takes over what configuration space says. A function that cannot be read is off.
    fn follow(&mut self, function: &dyn Function) {
        let word = |at: u16| {
            let mut bytes = [0; 2];
            match function.config_read(at, &mut bytes) {
                Ok(()) => u16::from_le_bytes(bytes),
                Err(_) => 0,
            }
        };
        let control = word(self.capability.saturating_add(MESSAGE_CONTROL));
        self.table.set_control(Control {
            enabled: control & ENABLE != 0,
            masked: control & FUNCTION_MASK != 0,
            bus_master: word(COMMAND) & BUS_MASTER != 0,
        });
    }

    /// Whether an access lies within table or pending bits, which are not the function's.
    pub(super) fn has_all_of(&self, region: RegionIndex, offset: u64, len: usize) -> bool {
        let within = |(place, start): (RegionIndex, u64), size: u64| {
            let end = offset.saturating_add(len as u64);
            place == region && offset >= start && end <= start + size
        };
        within(self.layout.table, self.table.len())
            || within(self.layout.pba, self.table.pending_len())
    }

    /// Puts what table and pending bits say into what was read of a region from `offset` on.
    pub(super) fn read(&self, region: RegionIndex, offset: u64, data: &mut [u8]) {
        let (table, pba) = (self.layout.table, self.layout.pba);
        let ends = (table.1 + self.table.len(), pba.1 + self.table.pending_len());
        for (at, byte) in (offset..).zip(data) {
            if region == table.0 && (table.1..ends.0).contains(&at) {
                *byte = self.table.byte(at - table.1);
            } else if region == pba.0 && (pba.1..ends.1).contains(&at) {
                *byte = self.table.pending_byte(at - pba.1);
            }
        }
    }

    /// Does a write that [`Self::has_all_of`]. Pending bits cannot be written.
    pub(super) fn write(
        &mut self,
        function: &dyn Function,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        let (place, start) = self.layout.table;
        let at = offset.checked_sub(start).filter(|_| place == region);
        let unmasked = at.and_then(|at| self.table.write(at, data));
        if let (Some(at), Some(record)) = (at, &self.record) {
            let vector = (at / ENTRY_LEN) as u32;
            if let Some((Message { address, data }, masked)) = self.table.entry(vector) {
                record.set_vector(vector, address, data, masked);
            }
        }
        match unmasked {
            Some(unmasked) => self.listen_to(function, unmasked),
            None => Ok(()),
        }
    }

    /// Has the function signal a vector to us.
    fn listen_to(&mut self, function: &dyn Function, vector: u32) -> Result<(), FunctionError> {
        if self.events.contains_key(&vector) {
            return Ok(());
        }
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| {
            let what = format!("making an eventfd for interrupt {vector}");
            FunctionError::Io { what, source }
        })?;
        let event = Arc::new(event);
        function.set_interrupts(InterruptKind::Msix, vector, &[Some(event.clone())])?;
        self.fresh.push(Watch {
            vector,
            fd: event.as_raw_fd(),
        });
        self.events.insert(vector, event);
        Ok(())
    }

    /// The function has signalled a vector.
    pub(super) fn fire(&mut self, vector: u32) {
        self.table.fire(vector);
    }

    /// The next message to send.
    pub(super) fn next_message(&mut self) -> Option<Message> {
        self.table.next_message()
    }

    /// An eventfd that is to be watched from now on.
    pub(super) fn take_fresh(&mut self) -> Option<Watch> {
        self.fresh.pop()
    }
}
