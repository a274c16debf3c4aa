//! Where exports come from, and how they are opened and closed again.
//!
//! A [`Stock`] holds what was opened together with what was changed on the host for it. At
//! its end the functions are closed first; then, and only then, are they given back to their
//! former drivers.

mod open;
mod selector;
mod shared;
mod stock;

use std::fmt;
use std::path::PathBuf;

use farbus_fabric::wire::ExportName;
use farbus_vfio::PciAddress;
use farbus_vfio::kernel::VfioError;
use farbus_vfio::shared::SharedError;
use farbus_vfio::soft_nvme::{SoftNvmeConfig, SoftNvmeError};
use farbus_vfio::sysfs::{ClassCode, SysfsError};
use farbus_vfio::user::ClientError;

use crate::slices::{LimitSpec, SliceConfig};

pub use self::selector::{Count, Selector};
pub use self::stock::{Brought, Given, Stock};

/// Where an export comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A PCI function of this host.
    Pci {
        /// Where it sits.
        address: PciAddress,
        /// Whether it may be taken from another driver.
        bind: bool,
    },
    /// Those PCI functions of this host that have what is named.
    Match {
        /// What they have.
        selector: Selector,
        /// How many are wanted.
        count: Count,
        /// Whether they may be taken from another driver.
        bind: bool,
    },
    /// Virtual functions, which a physical one is to make.
    Sriov {
        /// Which makes them.
        physical: PciAddress,
        /// How many.
        count: u16,
    },
    /// A software drive.
    SoftNvme(SoftNvmeConfig),
    /// The socket of a vfio-user server.
    VfioUser(PathBuf),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci { address, .. } => write!(f, "pci {address}"),
            Self::Match { selector, .. } => write!(f, "match {selector}"),
            Self::Sriov { physical, .. } => write!(f, "sriov {physical}"),
            Self::SoftNvme(config) => write!(f, "soft-nvme {}", config.medium),
            Self::VfioUser(path) => write!(f, "vfio-user-device {}", path.display()),
        }
    }
}

/// A source to be opened, and the name of what comes out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    source: Source,
    /// The export's name; for virtual functions what their names begin with, if anything.
    name: Option<ExportName>,
    /// What it is divided into; nothing for an export that is claimed as a whole.
    slices: Vec<SliceConfig>,
    /// What each of its claims is held to, and those of slices that say nothing else.
    limits: LimitSpec,
}

/// An order that makes no sense by itself or with the others.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// There is no name, and none can be made.
    #[error("{what} has no name; add name=NAME to it, or --name when it is the only export")]
    NoName {
        /// What has none.
        what: String,
    },
    /// Two exports of one name.
    #[error("two exports are named {name}; give each its own name=")]
    SameName {
        /// The name.
        name: String,
    },
    /// A slice whose name is too long together with the export's.
    #[error("{export}/{slice} is too long for a name; shorten one of the two")]
    LongSliceName {
        /// The export.
        export: String,
        /// The slice.
        slice: String,
    },
    /// Slices of something that is several functions.
    #[error(
        "{what} may be several functions, which cannot have slices together; name one with pci"
    )]
    SlicesOfMany {
        /// What was to be divided.
        what: String,
    },
    /// One function twice.
    #[error("{address} is given twice; one function is one export")]
    SameFunction {
        /// The function.
        address: PciAddress,
    },
}

/// Why a source gave no function.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// What came out does not go together.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// The host does not lend it.
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
    /// The kernel's VFIO does not open it.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// It cannot be reset between two tenants.
    #[error(
        "{what} cannot be reset, so the next tenant would find what the one before left in it; \
         it is not exported"
    )]
    NoReset {
        /// The function.
        what: String,
    },
    /// Two functions that the IOMMU does not tell apart.
    #[error(
        "{first} and {second} are both in IOMMU group {group}, so one of their tenants could reach \
         the other's memory; export one of them"
    )]
    SameGroup {
        /// The one.
        first: PciAddress,
        /// The other.
        second: PciAddress,
        /// Their group.
        group: u32,
    },
    /// Fewer functions than wanted.
    #[error(
        "{found} of the {wanted} functions that are wanted match {selector} and can be exported\
         {obstacles}; `farbus-device-server list` shows what there is"
    )]
    NoMatch {
        /// What they were to have.
        selector: Selector,
        /// How many there are.
        found: usize,
        /// How many are wanted.
        wanted: usize,
        /// What keeps the others from being exported, as the end of a sentence.
        obstacles: String,
    },
    /// It cannot be divided.
    #[error(transparent)]
    Shared(#[from] SharedError),
    /// A software drive cannot be opened.
    #[error("the software NVMe drive cannot be opened")]
    SoftNvme(#[source] SoftNvmeError),
    /// A vfio-user server does not answer as one.
    #[error("the vfio-user device {} cannot be opened", .path.display())]
    VfioUser {
        /// Its socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: ClientError,
    },
    /// A name for a virtual function does not fit.
    #[error("the name {name} for a virtual function is too long; shorten name={prefix}")]
    LongName {
        /// What it would be.
        name: String,
        /// What it was to begin with.
        prefix: String,
    },
}

impl Order {
    /// An order. Without a `name`, PCI functions are named by their address.
    pub fn new(source: Source, name: Option<ExportName>) -> Result<Self, OrderError> {
        let name = match (&source, name) {
            (Source::Sriov { .. }, name) | (_, name @ Some(_)) => name,
            (Source::Pci { address, .. }, None) => address_name(*address),
            (Source::Match { selector, .. }, None) => {
                return Err(OrderError::NoName {
                    what: format!("what matches {selector}"),
                });
            }
            (Source::SoftNvme(config), None) => {
                return Err(OrderError::NoName {
                    what: format!("the software drive {}", config.medium),
                });
            }
            (Source::VfioUser(path), None) => {
                return Err(OrderError::NoName {
                    what: format!("the vfio-user device {}", path.display()),
                });
            }
        };
        Ok(Self {
            source,
            name,
            slices: Vec::new(),
            limits: LimitSpec::default(),
        })
    }

    /// The same, divided into slices, each of which is claimed by itself.
    pub fn with_slices(self, slices: Vec<SliceConfig>) -> Result<Self, OrderError> {
        let one = Count::Exactly(1);
        let several = match &self.source {
            Source::Sriov { .. } => true,
            Source::Match { count, .. } => *count != one,
            Source::Pci { .. } | Source::SoftNvme(_) | Source::VfioUser(_) => false,
        };
        if several && !slices.is_empty() {
            return Err(OrderError::SlicesOfMany {
                what: self.source.to_string(),
            });
        }
        shared::check(self.name.as_ref(), &slices)?;
        Ok(Self { slices, ..self })
    }

    /// The same, with limits for each claim.
    #[must_use]
    pub fn with_limits(self, limits: LimitSpec) -> Self {
        Self { limits, ..self }
    }

    /// What is to be opened.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The PCI function that it names.
    pub fn address(&self) -> Option<PciAddress> {
        match self.source {
            Source::Pci { address, .. } => Some(address),
            Source::Sriov { physical, .. } => Some(physical),
            Source::Match { .. } | Source::SoftNvme(_) | Source::VfioUser(_) => None,
        }
    }
}

/// An address with what names may have.
fn address_name(address: PciAddress) -> Option<ExportName> {
    ExportName::new(&address.to_string().replace(':', "-")).ok()
}

/// Whether orders can be carried out together, as far as that can be said beforehand.
pub fn check(orders: &[Order]) -> Result<(), OrderError> {
    let mut names = Vec::new();
    let mut functions = Vec::new();
    for order in orders {
        if let Some(name) = &order.name {
            if names.contains(&name) {
                return Err(OrderError::SameName {
                    name: name.as_str().into(),
                });
            }
            names.push(name);
        }
        let Some(address) = order.address() else {
            continue;
        };
        if functions.contains(&address) {
            return Err(OrderError::SameFunction { address });
        }
        functions.push(address);
    }
    Ok(())
}

/// Whether an engine serves functions of this class.
pub fn has_engine(class: ClassCode) -> bool {
    class == ClassCode::NVME
}
