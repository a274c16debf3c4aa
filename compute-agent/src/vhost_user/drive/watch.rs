//! Hears of changes of the drive's size (NVMe 1.4 §5.2): one Asynchronous Event Request is kept
//! outstanding, and when a namespace has changed, or a lost drive has come back, its size is asked
//! for.

#![forbid(unsafe_code)]

use farbus_vfio::driver::{DmaBuffer, DriverError};
use farbus_vfio::nvme::{CompletionEntry, PAGE_SIZE, SubmissionEntry, admin, cns};
use log::{debug, info};

use super::Drive;

/// Asynchronous Event Configuration: namespace attribute notices (NVMe 1.4 figure 289).
pub(super) const NAMESPACE_NOTICES: u32 = 1 << 8;
/// The Changed Namespace List (NVMe 1.4 §5.14.1.4).
const CHANGED_NAMESPACES: u8 = 4;
const ALL_NAMESPACES: u32 = 0xffff_ffff;

/// What was asked of the admin queue.
pub(super) struct Watch {
    page: DmaBuffer,
    event: Option<u16>,
    /// Reads the log that ends an event's silence.
    log: Option<u16>,
    identify: Option<u16>,
    look_again: bool,
}

impl Watch {
    pub(super) fn new(page: DmaBuffer) -> Self {
        Self {
            page,
            event: None,
            log: None,
            identify: None,
            look_again: false,
        }
    }
}

/// Asks for the first event.
pub(super) fn begin(drive: &mut Drive) -> Result<(), DriverError> {
    let command = SubmissionEntry::new(admin::ASYNC_EVENT);
    drive.watch.event = Some(drive.driver.submit(0, command)?);
    Ok(())
}

/// Asks for the size, after whatever is being asked for already.
pub(super) fn look_again(drive: &mut Drive) -> Result<(), DriverError> {
    drive.watch.look_again = true;
    ask(drive)
}

fn ask(drive: &mut Drive) -> Result<(), DriverError> {
    let watch = &mut drive.watch;
    // Both would use the same page.
    if !watch.look_again || watch.identify.is_some() || watch.log.is_some() {
        return Ok(());
    }
    watch.look_again = false;
    let mut command = SubmissionEntry::new(admin::IDENTIFY);
    command.set_nsid(drive.shape.nsid);
    command.set_dword(10, u32::from(cns::NAMESPACE));
    command.set_prps(watch.page.iova().0, 0);
    watch.identify = Some(drive.driver.submit(0, command)?);
    Ok(())
}

/// Takes completions of admin commands. Whether the size has changed.
pub(super) fn listen(drive: &mut Drive) -> Result<bool, DriverError> {
    let mut changed = false;
    while let Some(entry) = drive.driver.poll(0)? {
        let cid = Some(entry.cid);
        if drive.watch.event == cid {
            drive.watch.event = None;
            heard(drive, entry)?;
        } else if drive.watch.log == cid {
            drive.watch.log = None;
            begin(drive)?;
            ask(drive)?;
        } else if drive.watch.identify == cid {
            drive.watch.identify = None;
            changed |= entry.status.is_success() && is_resized(drive)?;
            ask(drive)?;
        }
    }
    Ok(changed)
}

/// An event: its kind is silent from now on, until its log has been read.
fn heard(drive: &mut Drive, entry: CompletionEntry) -> Result<(), DriverError> {
    if !entry.status.is_success() {
        debug!("the drive takes no request for events: {:?}", entry.status);
        return Ok(());
    }
    let log = (entry.result >> 16) as u8;
    drive.watch.look_again |= log == CHANGED_NAMESPACES;
    let len = match log {
        CHANGED_NAMESPACES => PAGE_SIZE,
        1 => 64,
        _ => 512,
    };
    let mut command = SubmissionEntry::new(admin::GET_LOG_PAGE);
    command.set_nsid(ALL_NAMESPACES);
    command.set_dword(10, u32::from(log) | (len as u32 / 4 - 1) << 16);
    command.set_prps(drive.watch.page.iova().0, 0);
    // While the size is being asked for, the page is in use: the log is read over it all the same,
    // and the size asked for again.
    drive.watch.look_again |= drive.watch.identify.is_some();
    drive.watch.log = Some(drive.driver.submit(0, command)?);
    Ok(())
}

fn is_resized(drive: &mut Drive) -> Result<bool, DriverError> {
    let mut size = [0; 8];
    let page = drive.watch.page;
    drive.driver.memory().read(page, 0, &mut size)?;
    let blocks = u64::from_le_bytes(size);
    if blocks == drive.shape.blocks || drive.watch.log.is_some() {
        return Ok(false);
    }
    info!(
        "the drive's size has changed from {} to {blocks} blocks of {} bytes",
        drive.shape.blocks, drive.shape.block_size
    );
    drive.shape.blocks = blocks;
    Ok(true)
}
