//! A faulty function, which does when told to what QEMU's cannot: it has reported an error, its host
//! wants it back, and it never completes a command.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use farbus_device_server::exports::{Export, Reopen, Unopened};
use farbus_fabric::FabricError;
use farbus_fabric::wire::RefusalCode;
use farbus_integration::scratch::Scratch;
use farbus_vfio::driver::{DriverError, block_command};
use farbus_vfio::nvme::{DOORBELL_BASE, csts, nvm, reg};
use farbus_vfio::soft_nvme::SoftNvme;
use farbus_vfio::{Around, Function, FunctionError, Notice, PciAddress, RegionIndex};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::bed::{BLOCK, Bed, eventually, export_name};

/// The doorbell of the first I/O submission queue (NVMe 1.4 §3.1.24, a stride of 4 bytes).
const FIRST_IO_TAIL: u64 = DOORBELL_BASE + 8;

/// No byte that registers of a dead function read as.
const REGISTERS_WORK: u8 = 1;

/// What the tests have of a function, even while it is closed.
struct Signals {
    error: EventFd,
    unplug: EventFd,
    resets: AtomicUsize,
    is_away: AtomicBool,
    /// The first I/O queue's commands are never begun.
    is_deaf: AtomicBool,
    /// What each byte of the registers reads as, unless it is [`REGISTERS_WORK`].
    registers: AtomicU8,
    /// Configuration space reads as all ones.
    is_absent: AtomicBool,
}

/// A software drive that gives notices.
struct Noticing {
    drive: SoftNvme,
    signals: Arc<Signals>,
}

impl Around for Noticing {
    fn inner(&self) -> &dyn Function {
        &self.drive
    }

    fn pci_address(&self) -> Option<PciAddress> {
        PciAddress::new(0, 1, 0, 0)
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        if self.signals.is_absent.load(Ordering::Relaxed) {
            data.fill(0xff);
            return Ok(());
        }
        self.drive.config_read(offset, data)
    }

    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        let byte = self.signals.registers.load(Ordering::Relaxed);
        if byte != REGISTERS_WORK {
            data.fill(byte);
            return Ok(());
        }
        self.drive.region_read(region, offset, data)
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        if offset == FIRST_IO_TAIL && self.signals.is_deaf.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.drive.region_write(region, offset, data)
    }

    fn reset(&self) -> Result<(), FunctionError> {
        self.signals.resets.fetch_add(1, Ordering::Relaxed);
        self.drive.reset()
    }

    fn notices(&self) -> Vec<(Notice, &EventFd)> {
        vec![
            (Notice::ErrorReported, &self.signals.error),
            (Notice::UnplugRequested, &self.signals.unplug),
        ]
    }
}

fn open(disk: &Path, signals: &Arc<Signals>) -> Result<Arc<dyn Function>, Unopened> {
    let spec = format!("path={},size=1MiB", disk.display());
    let drive = SoftNvme::open(&spec.parse()?)?;
    Ok(Arc::new(Noticing {
        drive,
        signals: signals.clone(),
    }))
}

fn bed() -> (Bed, Arc<Signals>) {
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let signals = Arc::new(Signals {
        error: event(),
        unplug: event(),
        resets: AtomicUsize::new(0),
        is_away: AtomicBool::new(false),
        is_deaf: AtomicBool::new(false),
        registers: AtomicU8::new(REGISTERS_WORK),
        is_absent: AtomicBool::new(false),
    });
    let scratch = Scratch::new("notices").unwrap();
    let disk = scratch.join("disk.img");
    let function = open(&disk, &signals).unwrap();
    let again = signals.clone();
    let reopen: Reopen = Box::new(move || match again.is_away.load(Ordering::Relaxed) {
        true => Err("the slot is empty".into()),
        false => open(&disk, &again),
    });
    let export = Export::reopening(export_name(), function, reopen);
    (Bed::with_export(scratch, export), signals)
}

/// The refusal of a claim, which must not succeed.
fn refusal(bed: &Bed) -> (RefusalCode, String) {
    match bed.claim() {
        Err(FabricError::Refused { code, text }) => (code, text.as_str().to_owned()),
        other => panic!("{:?}", other.map(|claimed| claimed.epoch)),
    }
}

#[test]
fn reported_error_is_a_fatal_status_until_the_function_is_reset() {
    let (bed, signals) = bed();
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    driver.write(1, 8, BLOCK, &[7; 4096]).unwrap();
    let resets = signals.resets.load(Ordering::Relaxed);

    signals.error.write(1).unwrap();

    eventually("the fatal status", || {
        (driver.read32(reg::CSTS).unwrap() & csts::CFS != 0).then_some(())
    });
    assert_eq!(signals.resets.load(Ordering::Relaxed), resets);
    driver.enable().unwrap();
    driver.create_queue_pair(1, 64, Some(1)).unwrap();
    let mut read = [0; 4096];
    driver.read(1, 8, BLOCK, &mut read).unwrap();
    assert_eq!(read, [7; 4096]);
    assert_eq!(signals.resets.load(Ordering::Relaxed), resets + 1);
}

/// What a card shows that lost its power behind the kernel's back: nothing, or registers that the
/// kernel has not set up since.
#[test]
fn claim_of_a_function_that_does_not_answer_says_so_and_names_the_remedy() {
    let (bed, signals) = bed();
    let dark = |registers, is_absent, what: &str| {
        signals.registers.store(registers, Ordering::Relaxed);
        signals.is_absent.store(is_absent, Ordering::Relaxed);
        // The claim before may not be over yet.
        let (code, text) = eventually("the claim is refused for its own reason", || {
            Some(refusal(&bed)).filter(|(code, _)| *code != RefusalCode::Busy)
        });
        assert_eq!(code, RefusalCode::Internal);
        for words in [
            "the function does not answer",
            what,
            "`echo 1 >/sys/bus/pci/devices/0000:01:00.0/remove`",
            "`echo 1 >/sys/bus/pci/rescan`",
        ] {
            assert!(text.contains(words), "{words:?} is not in: {text}");
        }
    };

    dark(0, false, "registers read as all zeroes");
    dark(0xff, false, "registers read as all ones");
    dark(0xff, true, "configuration space reads as all ones");

    signals.registers.store(REGISTERS_WORK, Ordering::Relaxed);
    signals.is_absent.store(false, Ordering::Relaxed);
    bed.attach().driver(1);
}

#[test]
fn function_that_its_host_wants_back_is_closed_and_opened_again_when_it_is_back() {
    let (bed, signals) = bed();
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    driver.write(1, 8, BLOCK, &[7; 4096]).unwrap();
    signals.is_away.store(true, Ordering::Relaxed);

    signals.unplug.write(1).unwrap();

    let error = eventually("the read fails", || {
        driver.read(1, 8, BLOCK, &mut [0; 4096]).err()
    });
    assert!(matches!(error, DriverError::Fatal { .. }), "{error}");
    // Closed: who has the file of a software drive open has it alone.
    let disk = bed.scratch.join("disk.img");
    drop(eventually("the function is closed", || {
        open(&disk, &signals).ok()
    }));
    let text = eventually("the slot is found empty", || match refusal(&bed) {
        (RefusalCode::NotReady, text) if text.contains("the slot is empty") => Some(text),
        _ => None,
    });
    assert!(text.contains("export disk0 has failed"), "{text}");

    signals.is_away.store(false, Ordering::Relaxed);
    let next = bed.attach();
    let mut read = [0; 4096];
    next.driver(1).read(1, 8, BLOCK, &mut read).unwrap();
    assert_eq!(read, [7; 4096]);
}

#[test]
fn function_that_nobody_has_claimed_is_let_go_of_as_well() {
    let (bed, signals) = bed();
    signals.is_away.store(true, Ordering::Relaxed);

    signals.error.write(1).unwrap();
    signals.unplug.write(1).unwrap();

    let disk = bed.scratch.join("disk.img");
    drop(eventually("the function is closed", || {
        open(&disk, &signals).ok()
    }));
    signals.is_away.store(false, Ordering::Relaxed);
    // And so again, once it was opened anew.
    drop(bed.attach());
    eventually("it is closed again", || {
        signals.unplug.write(1).unwrap();
        open(&disk, &signals).ok()
    });
}

#[test]
fn command_that_never_completes_holds_up_no_other_and_ends_with_a_reset() {
    let (bed, signals) = bed();
    let attached = bed.attach();
    let mut driver = attached.driver(2);
    driver.write(2, 8, BLOCK, &[7; 4096]).unwrap();
    signals.is_deaf.store(true, Ordering::Relaxed);

    let flush = block_command(nvm::FLUSH, 0, BLOCK as usize, BLOCK);
    driver.submit(1, flush).unwrap();
    let begun = Instant::now();
    // Longer than either side waits for a sign of life of the other.
    while begun.elapsed() < Duration::from_secs(6) {
        let mut read = [0; 4096];
        driver.read(2, 8, BLOCK, &mut read).unwrap();
        assert_eq!(read, [7; 4096]);
        assert!(driver.poll(1).unwrap().is_none());
        std::thread::sleep(Duration::from_millis(20));
    }

    signals.is_deaf.store(false, Ordering::Relaxed);
    driver.enable().unwrap();
    driver.create_queue_pair(1, 64, Some(1)).unwrap();
    driver.flush(1).unwrap();
    let mut read = [0; 4096];
    driver.read(1, 8, BLOCK, &mut read).unwrap();
    assert_eq!(read, [7; 4096]);
}
