//! What a controller is, asked by the device half itself: once when a claim begins, while no
//! guest command is under way.

use std::time::{Duration, Instant};

use farbus_vfio::nvme::{CompletionEntry, SubmissionEntry, admin, cap, cc};
use log::info;

use super::super::description::{
    MAX_NAMESPACES, MAX_QUEUE_PAIRS, NamespaceFormat, Namespaces, NvmeDescription, guest_cap,
};
use super::super::identify;
use super::super::transfer::feature;
use super::controller::Update;
use super::submit::push;
use super::{DeviceError, DeviceHalf, Identity, Settings};

/// How long one of our own commands may take: less than the silence that a peer puts up with.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(3);
/// How long to wait between two looks, where no interrupt can be relied on.
const POLL: Duration = Duration::from_millis(1);

impl DeviceHalf {
    /// Enables the controller, asks, and disables it again.
    pub(super) fn probe(&mut self, settings: Option<&Settings>) -> Result<(), DeviceError> {
        let cap = self.controller.cap;
        // No controller has a CAP of this kind (NVMe 1.4 §3.1.1: MQES is never 0).
        let silent = match cap {
            0 => Some("registers read as all zeroes (CAP 0x0)"),
            u64::MAX => Some("registers read as all ones"),
            _ => None,
        };
        if let Some(what) = silent {
            return Err(DeviceError::NoAnswer {
                what,
                address: self.function.pci_address(),
            });
        }
        if cap & cap::MPSMIN_MASK != 0 || cap & cap::CSS_NVM == 0 {
            return Err(DeviceError::Controller(format!(
                "has no pages of 4 KiB or no NVM command set (CAP {cap:#x})"
            )));
        }
        // One that could not be reset may still be enabled.
        self.configure(0);
        self.wait_for(|update| matches!(update, Update::Stopped))?;
        self.start_controller(6 << cc::IOSQES_SHIFT | 4 << cc::IOCQES_SHIFT | cc::EN)?;
        self.wait_for(|update| matches!(update, Update::Started))?;
        let controller = self.identify(0, identify::CNS_CONTROLLER)?;
        self.identity = Identity::of_controller(&controller);
        let queue_pairs = self.ask_queue_pairs()?;
        self.description = NvmeDescription {
            cap: guest_cap(self.controller.cap),
            vs: self.controller.version()?,
            max_transfer: identify::max_transfer(&controller, self.limits.max_transfer),
            queue_pairs,
            namespaces: self.ask_namespaces(&controller)?,
        };
        let namespaces = self.description.namespaces.clone();
        let found = self.ask_settings(&namespaces)?;
        if let Some(wanted) = settings {
            self.put_back(wanted, &found)?;
        }
        self.settings = settings.cloned().unwrap_or(found);
        self.prepare_host_memory(&controller)?;
        if let Update::Failed { text, .. } = self.configure(0) {
            return Err(DeviceError::Controller(text));
        }
        self.wait_for(|update| matches!(update, Update::Stopped))?;
        self.outbox.clear();
        Ok(())
    }

    fn wait_for(&mut self, reached: impl Fn(&Update) -> bool) -> Result<(), DeviceError> {
        let until = Instant::now() + self.controller.timeout() + Duration::from_secs(1);
        loop {
            match self.controller.tick(Instant::now()) {
                Update::Failed { text, .. } => return Err(DeviceError::Controller(text)),
                update if reached(&update) => return Ok(()),
                Update::None if self.controller.is_off() => return Ok(()),
                _ if Instant::now() > until => {
                    return Err(DeviceError::Controller("never changed its state".into()));
                }
                _ => std::thread::sleep(POLL),
            }
        }
    }

    /// Runs one admin command of our own, while no other is at the device.
    pub(super) fn run(&mut self, mut sqe: SubmissionEntry) -> Result<CompletionEntry, DeviceError> {
        let wrong = |what: &str| DeviceError::Controller(what.into());
        sqe.set_cid(self.limits.tags);
        sqe.set_prps(self.arena.own_page().0, 0);
        let Some(sq) = self.submission.get_mut(0) else {
            return Err(wrong("is not enabled"));
        };
        let arena = &self.arena;
        push(sq, |index| arena.store_sqe(0, index, &sqe.0));
        let tail = sq.tail;
        sq.released = tail;
        self.controller.ring(0, false, tail)?;
        let until = Instant::now() + COMMAND_TIMEOUT;
        let cqe = loop {
            let Some(cursor) = self.completion.get_mut(0) else {
                return Err(wrong("is not enabled"));
            };
            let (index, phase) = cursor.at();
            if let Some(cqe) = self.arena.load_cqe(0, index, phase) {
                cursor.advance();
                let head = cursor.head();
                self.controller.ring(0, true, head)?;
                break cqe;
            }
            if Instant::now() > until {
                return Err(wrong("does not answer admin commands"));
            }
            std::thread::sleep(POLL);
        };
        if let Some(sq) = self.submission.get_mut(0) {
            sq.outstanding = 0;
        }
        let _ = self.event.read();
        Ok(cqe)
    }

    fn identify(&mut self, nsid: u32, cns: u8) -> Result<Vec<u8>, DeviceError> {
        let mut sqe = SubmissionEntry::new(admin::IDENTIFY);
        sqe.set_nsid(nsid);
        sqe.set_dword(10, cns.into());
        let cqe = self.run(sqe)?;
        if !cqe.status.is_success() {
            return Err(DeviceError::Controller(format!(
                "refuses Identify {cns} for namespace {nsid} with status {:#x}",
                cqe.status.0
            )));
        }
        Ok(self.arena.read_own_page())
    }

    fn ask_queue_pairs(&mut self) -> Result<u16, DeviceError> {
        let wanted = u32::from(MAX_QUEUE_PAIRS) - 1;
        let mut sqe = SubmissionEntry::new(admin::SET_FEATURES);
        sqe.set_dword(10, feature::NUMBER_OF_QUEUES.into());
        sqe.set_dword(11, wanted | wanted << 16);
        let cqe = self.run(sqe)?;
        let granted = match cqe.status.is_success() {
            true => (cqe.result as u32 & 0xffff).min(cqe.result as u32 >> 16),
            false => 0,
        };
        Ok((granted + 1).min(MAX_QUEUE_PAIRS.into()) as u16)
    }

    fn ask_namespaces(&mut self, controller: &[u8]) -> Result<Namespaces, DeviceError> {
        let ids = match self.identify(0, identify::CNS_ACTIVE_NAMESPACES) {
            Ok(list) => list
                .chunks_exact(4)
                .map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]]))
                .take_while(|id| *id != 0)
                .collect(),
            // Controllers before NVMe 1.1 have no list, but a number of namespaces.
            Err(DeviceError::Controller(_)) => (1..=namespace_count(controller)).collect(),
            Err(error) => return Err(error),
        };
        let ids: Vec<u32> = ids;
        let mut formats = Vec::new();
        for nsid in ids.into_iter().take(MAX_NAMESPACES) {
            let data = self.identify(nsid, identify::CNS_NAMESPACE)?;
            match namespace_format(nsid, &data) {
                Some(format) => {
                    self.identity.add_namespace(format, &data);
                    formats.push(format);
                }
                None => info!(
                    "{}: namespace {nsid} is left out: it is formatted with metadata",
                    self.function.info().label
                ),
            }
        }
        Ok(Namespaces::new(formats))
    }
}

/// Number of namespaces (NVMe 1.4 §5.15.2.2, bytes 516 to 519), as many as are looked at.
fn namespace_count(controller: &[u8]) -> u32 {
    match controller.get(516..520) {
        Some(&[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]).min(MAX_NAMESPACES as u32),
        _ => 0,
    }
}

/// The format that is in use (NVMe 1.4 §5.15.2.1, figure 245: FLBAS at 26, LBA formats from
/// 128 on), if the engine can carry it.
fn namespace_format(nsid: u32, data: &[u8]) -> Option<NamespaceFormat> {
    let flbas = *data.get(26)?;
    let at = 128 + usize::from(flbas & 0xf) * 4;
    let &[low, high, block_shift, _] = data.get(at..at + 4)? else {
        return None;
    };
    let metadata = u16::from_le_bytes([low, high]);
    // With metadata, how long a transfer is depends on what the drive does with it.
    ((9..=16).contains(&block_shift) && metadata == 0)
        .then_some(NamespaceFormat { nsid, block_shift })
}
