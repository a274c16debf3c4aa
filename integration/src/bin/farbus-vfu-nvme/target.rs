//! What is driven: a controller at a vfio-user socket, behind the fabric, or in this process.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use farbus_fabric::Counters;
use farbus_fabric::provider::{Options, Wanted};
use farbus_fabric::session::client;
use farbus_fabric::wire::ExportName;
use farbus_shadow_mem::remote::{LinkInterest, RemoteFunction};
use farbus_vfio::driver::{DriverConfig, NvmeDriver};
use farbus_vfio::soft_nvme::{SoftNvme, SoftNvmeConfig};
use farbus_vfio::user::UserFunction;
use farbus_vfio::{Around, Function, FunctionError, RegionIndex};
use log::info;

/// How long a peer may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a device server may take to end a claim, and how often it is asked.
const PREDECESSOR: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(20);
/// How often a link is asked for a sign of life.
const TICK_NS: u64 = 1_000_000_000;

/// A driver for whatever it is.
pub(crate) type Driver = NvmeDriver<dyn Function>;

/// What the command line names.
#[derive(Clone, Debug)]
pub(crate) enum TargetSpec {
    VfioUser(PathBuf),
    Fabric {
        address: String,
        export: ExportName,
        provider: Wanted,
    },
    SoftNvme(SoftNvmeConfig),
}

impl fmt::Display for TargetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VfioUser(path) => write!(f, "vfio-user {}", path.display()),
            Self::Fabric {
                address, export, ..
            } => write!(f, "{} of {address}", export.as_str()),
            Self::SoftNvme(config) => write!(f, "soft-nvme {}", config.medium),
        }
    }
}

/// An attachment, and the link under it if there is one.
pub(crate) struct Target {
    pub(crate) function: Arc<dyn Function>,
    pub(crate) link: Option<Arc<Linked>>,
}

impl Target {
    pub(crate) fn open(spec: &TargetSpec) -> anyhow::Result<Self> {
        let local = |function| Self {
            function,
            link: None,
        };
        let target = match spec {
            TargetSpec::VfioUser(path) => {
                local(Arc::new(UserFunction::connect(path, PATIENCE)?) as Arc<dyn Function>)
            }
            TargetSpec::SoftNvme(config) => local(Arc::new(SoftNvme::open(config)?)),
            TargetSpec::Fabric {
                address,
                export,
                provider,
            } => {
                let options = Options {
                    wanted: *provider,
                    ..Options::default()
                };
                let label = "farbus-vfu-nvme";
                // Who had the export before may have ended just now.
                let begun = Instant::now();
                let claimed = loop {
                    match client::claim_by(address, export, label, PATIENCE, &options) {
                        Err(error) if error.is_busy() && begun.elapsed() < PREDECESSOR => {
                            std::thread::sleep(PAUSE);
                        }
                        done => break done?,
                    }
                };
                info!("claimed {spec} over {}", claimed.provider);
                let linked = Arc::new(Linked::new(RemoteFunction::new(spec.to_string(), claimed)?));
                Self {
                    function: linked.clone(),
                    link: Some(linked),
                }
            }
        };
        Ok(target)
    }

    /// A driver with this much DMA memory (bytes), its controller enabled; whether doorbells
    /// are in memory.
    pub(crate) fn drive(&self, memory: usize, dbbuf: bool) -> anyhow::Result<(Driver, bool)> {
        let config = DriverConfig {
            memory,
            timeout: PATIENCE,
            ..DriverConfig::default()
        };
        let mut driver = NvmeDriver::new(Arc::clone(&self.function), config)?;
        driver.enable().context("enabling the controller")?;
        let shadow = dbbuf
            && driver
                .use_shadow_doorbells()
                .context("agreeing on doorbells in memory")?;
        Ok((driver, shadow))
    }
}

/// A function behind the fabric whose link is looked after by whoever drives it: each register
/// that is read lets the link move on, so that a driver that waits does not wait in vain.
pub(crate) struct Linked {
    remote: RemoteFunction,
    start: Instant,
    ticked: AtomicU64,
}

impl Linked {
    fn new(remote: RemoteFunction) -> Self {
        Self {
            remote,
            start: Instant::now(),
            ticked: AtomicU64::new(0),
        }
    }

    /// Receives what is there; whether there was anything.
    pub(crate) fn service(&self) -> bool {
        self.remote.service().any()
    }

    /// [`Self::service`] is called again and again, without a wait between.
    pub(crate) fn keep_looking(&self) {
        self.remote.keep_looking();
    }

    pub(crate) fn interest(&self) -> Option<LinkInterest> {
        self.remote.link_interest()
    }

    pub(crate) fn counters(&self) -> Counters {
        self.remote.counters().unwrap_or_default()
    }

    /// Once a second: shows a sign of life, and looks for those of the peer. To be called often.
    pub(crate) fn tick(&self) -> anyhow::Result<()> {
        let now = self.start.elapsed().as_nanos() as u64;
        if now - self.ticked.load(Ordering::Relaxed) >= TICK_NS {
            self.ticked.store(now, Ordering::Relaxed);
            self.remote.tick();
        }
        match self.remote.take_lost() {
            Some(lost) => bail!("the link is lost: {}", lost.error),
            None => Ok(()),
        }
    }

    /// Lets the link move on, in the course of something else.
    fn attend(&self) -> Result<(), FunctionError> {
        while self.service() {}
        self.tick()
            .map_err(|error| FunctionError::Gone(error.to_string()))
    }
}

impl Drop for Linked {
    fn drop(&mut self) {
        self.remote.release();
    }
}

impl Around for Linked {
    fn inner(&self) -> &dyn Function {
        &self.remote
    }

    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        self.attend()?;
        self.remote.region_read(region, offset, data)
    }
}
