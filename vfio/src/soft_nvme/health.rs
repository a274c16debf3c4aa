//! What the controller counts about itself, and the log pages made of it: Error Information,
//! SMART / Health Information and Firmware Slot Information (NVMe 1.4 §5.14.1.1 to 3).

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::lock;
use crate::nvme::{Status, SubmissionEntry};

/// Entries of the Error Information log.
pub(super) const ERROR_ENTRIES: usize = 64;
/// Size of an entry in bytes.
const ERROR_ENTRY_SIZE: usize = 64;
/// What the controller's thermometer would show, in Kelvin: there is none.
pub(super) const TEMPERATURE: u16 = 310;
/// Reported for the part of an error entry that does not apply.
const NOT_APPLICABLE: u16 = 0xffff;

/// Bits of the SMART log's critical warning (NVMe 1.4 figure 194).
pub(super) mod warning {
    pub(crate) const TEMPERATURE: u8 = 1 << 1;
    pub(crate) const RELIABILITY: u8 = 1 << 2;
    pub(crate) const READ_ONLY: u8 = 1 << 3;
}

/// One failed command, or one doorbell write that made no sense.
#[derive(Clone, Copy, Debug)]
struct ErrorEntry {
    number: u64,
    sq_id: u16,
    cid: u16,
    status: Status,
    lba: u64,
    nsid: u32,
}

impl ErrorEntry {
    /// The entry as it is in the log (NVMe 1.4 figure 193).
    fn encode(&self) -> [u8; ERROR_ENTRY_SIZE] {
        let mut bytes = [0; ERROR_ENTRY_SIZE];
        bytes[0..8].copy_from_slice(&self.number.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.sq_id.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.cid.to_le_bytes());
        bytes[12..14].copy_from_slice(&(self.status.0 << 1).to_le_bytes());
        bytes[14..16].copy_from_slice(&NOT_APPLICABLE.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.lba.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.nsid.to_le_bytes());
        bytes
    }
}

/// The counters of one controller, since it was opened.
pub(super) struct Health {
    opened: Instant,
    /// In units of 512 bytes.
    read_sectors: AtomicU64,
    written_sectors: AtomicU64,
    read_commands: AtomicU64,
    write_commands: AtomicU64,
    media_errors: AtomicU64,
    errors: Mutex<Errors>,
}

#[derive(Default)]
struct Errors {
    total: u64,
    /// The newest first.
    recent: VecDeque<ErrorEntry>,
}

impl Health {
    pub(super) fn new() -> Self {
        Self {
            opened: Instant::now(),
            read_sectors: AtomicU64::new(0),
            written_sectors: AtomicU64::new(0),
            read_commands: AtomicU64::new(0),
            write_commands: AtomicU64::new(0),
            media_errors: AtomicU64::new(0),
            errors: Mutex::default(),
        }
    }

    /// Counts a read of this many bytes.
    pub(super) fn count_read(&self, bytes: u64) {
        self.read_sectors.fetch_add(bytes / 512, Ordering::Relaxed);
        self.read_commands.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a write of this many bytes.
    pub(super) fn count_write(&self, bytes: u64) {
        self.written_sectors
            .fetch_add(bytes / 512, Ordering::Relaxed);
        self.write_commands.fetch_add(1, Ordering::Relaxed);
    }

    /// Records a command that failed.
    pub(super) fn record_failure(&self, sq_id: u16, entry: &SubmissionEntry, status: Status) {
        // Media and data integrity errors, but not what Compare finds out.
        if status.0 >> 8 & 7 == 2 && status != Status::COMPARE_FAILURE {
            self.media_errors.fetch_add(1, Ordering::Relaxed);
        }
        let lba = if sq_id == 0 { 0 } else { entry.slba() };
        self.record(sq_id, entry.cid(), status, lba, entry.nsid());
    }

    /// Records a doorbell write that made no sense.
    pub(super) fn record_doorbell(&self, queue: u16) {
        self.record(queue, NOT_APPLICABLE, Status::INVALID_FIELD, 0, 0);
    }

    fn record(&self, sq_id: u16, cid: u16, status: Status, lba: u64, nsid: u32) {
        let mut errors = lock(&self.errors);
        errors.total += 1;
        errors.recent.truncate(ERROR_ENTRIES - 1);
        let number = errors.total;
        errors.recent.push_front(ErrorEntry {
            number,
            sq_id,
            cid,
            status,
            lba,
            nsid,
        });
    }

    /// The Error Information log, all entries.
    pub(super) fn error_log(&self) -> Vec<u8> {
        let mut page: Vec<u8> = lock(&self.errors)
            .recent
            .iter()
            .flat_map(ErrorEntry::encode)
            .collect();
        page.resize(ERROR_ENTRIES * ERROR_ENTRY_SIZE, 0);
        page
    }

    /// The SMART log, 512 bytes (NVMe 1.4 figure 194). Its counters have 128 bits, of which
    /// the high ones stay zero.
    pub(super) fn smart_log(&self, critical_warning: u8) -> Vec<u8> {
        let mut page = vec![0; 512];
        page[0] = critical_warning;
        page[1..3].copy_from_slice(&TEMPERATURE.to_le_bytes());
        // Available spare and its threshold, in percent.
        page[3] = if critical_warning & warning::RELIABILITY == 0 {
            100
        } else {
            0
        };
        page[4] = 10;
        let mut put = |at: usize, value: u64| {
            page[at..at + 8].copy_from_slice(&value.to_le_bytes());
        };
        // Data units are thousands of 512 bytes, rounded up.
        put(32, self.read_sectors.load(Ordering::Relaxed).div_ceil(1000));
        put(
            48,
            self.written_sectors.load(Ordering::Relaxed).div_ceil(1000),
        );
        put(64, self.read_commands.load(Ordering::Relaxed));
        put(80, self.write_commands.load(Ordering::Relaxed));
        // It was switched on once.
        put(112, 1);
        put(128, self.opened.elapsed().as_secs() / 3600);
        put(160, self.media_errors.load(Ordering::Relaxed));
        put(176, lock(&self.errors).total);
        page
    }
}

/// The Firmware Slot log, 512 bytes (NVMe 1.4 figure 196): slot 1 is all there is.
pub(crate) fn firmware_log(revision: [u8; 8]) -> Vec<u8> {
    let mut page = vec![0; 512];
    page[0] = 1;
    page[8..16].copy_from_slice(&revision);
    page
}
