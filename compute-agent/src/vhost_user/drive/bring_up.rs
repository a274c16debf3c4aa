//! Brings a drive up: enables the controller, asks what it is, makes queues. Each step waits for
//! the drive, so a thread does it while the event loop carries the link's messages.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use farbus_vfio::Function;
use farbus_vfio::driver::{DriverConfig, DriverError, NvmeDriver};
use farbus_vfio::nvme::{PAGE_SIZE, cap, cns, feature, reg};
use log::debug;
use vmm_sys_util::eventfd::EventFd;

use super::shape::first_namespace;
use super::watch::{NAMESPACE_NOTICES, Watch};
use super::{BOUNCE, BOUNCES, BadShape, BounceId, Drive, ENTRIES, MAX_PAIRS, Pair, Shape};
use crate::vhost_user::memory::PRIVATE_IOVA;

/// How long any one step may take. A link that is lost meanwhile is waited for.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Why there is no drive.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// It does not do what it should.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// It is nothing that can be offered.
    #[error(transparent)]
    Shape(#[from] BadShape),
}

impl Drive {
    /// Brings a drive up, with up to `queues` I/O queue pairs. The function must have been reset.
    pub fn bring_up(function: Arc<dyn Function>, queues: u16) -> Result<Self, DriveError> {
        let wanted = queues.clamp(1, MAX_PAIRS);
        let config = DriverConfig {
            iova: PRIVATE_IOVA,
            memory: (2 << 20) * (1 + usize::from(wanted)),
            timeout: TIMEOUT,
        };
        let mut driver = NvmeDriver::new(function, config)?;
        driver.enable()?;
        let controller = driver.identify(cns::CONTROLLER, 0)?;
        let nsid = first_namespace(&driver.identify(cns::NAMESPACE_LIST, 0)?)?;
        let namespace = driver.identify(cns::NAMESPACE, nsid)?;
        let shape = Shape::new(&controller, nsid, &namespace)?;
        if let Err(error) = driver.set_feature(feature::ASYNC_EVENTS, NAMESPACE_NOTICES) {
            debug!("the drive does not tell of changes of its namespaces: {error}");
        }
        let granted = driver.request_queues(wanted)?.min(wanted);
        let depth = (driver.read64(reg::CAP)? & cap::MQES_MASK) + 1;
        let entries = ENTRIES.min(u16::try_from(depth).unwrap_or(ENTRIES));
        let list = shape.max_transfer as usize / PAGE_SIZE * 8;
        let mut pairs = Vec::with_capacity(granted.into());
        for id in 1..=granted {
            driver.create_queue_pair(id, entries, None)?;
            let slots = entries - 1;
            pairs.push(Pair {
                id,
                slots: vec![0; slots.into()],
                free: (0..slots).rev().collect(),
                by_cid: vec![0; entries.into()],
                lists: driver.memory().allocate(usize::from(slots) * list)?,
                unrung: false,
            });
        }
        let page = driver.memory().allocate(PAGE_SIZE)?;
        let bounces = driver
            .memory()
            .allocate(usize::from(BOUNCES) * BOUNCE as usize)?;
        let mut drive = Self {
            driver,
            shape,
            pairs,
            list,
            bounces,
            free_bounces: (0..BOUNCES).map(BounceId).collect(),
            watch: Watch::new(page),
            in_flight: 0,
            entries: Vec::with_capacity(PAGE_SIZE),
            completions: Vec::with_capacity(ENTRIES.into()),
        };
        super::watch::begin(&mut drive)?;
        Ok(drive)
    }
}

/// A drive that is being brought up.
pub struct BringUp {
    outcome: Receiver<Result<Drive, DriveError>>,
}

impl BringUp {
    /// Starts after `pause`; `done` is signalled at the end.
    pub fn start(
        function: Arc<dyn Function>,
        queues: u16,
        pause: Duration,
        done: Arc<EventFd>,
    ) -> std::io::Result<Self> {
        let (send, outcome) = mpsc::channel();
        thread::Builder::new()
            .name("bring-up".into())
            .spawn(move || {
                thread::sleep(pause);
                // Nobody listens when the process is about to end.
                let _ = send.send(Drive::bring_up(function, queues));
                let _ = done.write(1);
            })?;
        Ok(Self { outcome })
    }

    /// What came of it, once `done` was signalled.
    pub fn take(&self) -> Option<Result<Drive, DriveError>> {
        self.outcome.try_recv().ok()
    }
}
