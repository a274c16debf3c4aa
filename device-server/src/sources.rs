//! Where exports come from, and how they are opened and closed again.
//!
//! A [`Stock`] holds what was opened together with what was changed on the host for it. At
//! its end the functions are closed first; then, and only then, are they given back to their
//! former drivers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use farbus_fabric::wire::ExportName;
use farbus_vfio::kernel::{VfioError, VfioFunction};
use farbus_vfio::soft_nvme::{SoftNvme, SoftNvmeConfig, SoftNvmeError};
use farbus_vfio::sysfs::{Bindings, ClassCode, Host, Inventory, SysfsError};
use farbus_vfio::user::{ClientError, UserFunction};
use farbus_vfio::{Function, PciAddress};
use log::{info, warn};

use crate::exports::{Export, Reopen};

/// How long a vfio-user server may take for one answer. It is as long as the fabric's other
/// side waits before it calls the device hung.
const USER_TIMEOUT: Duration = Duration::from_secs(2);
/// How long functions may stay open at the end, after all attachments had their time to end.
const CLOSING: Duration = Duration::from_secs(3);
const CLOSING_STEP: Duration = Duration::from_millis(10);

/// Where an export comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A PCI function of this host.
    Pci {
        /// Where it sits.
        address: PciAddress,
        /// Whether it may be taken from another driver.
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

/// A source to be opened, and the name of what comes out.
#[derive(Debug)]
pub struct Order {
    source: Source,
    /// The export's name; for virtual functions what their names begin with, if anything.
    name: Option<ExportName>,
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
        Ok(Self { source, name })
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
        let (Source::Pci { address, .. }
        | Source::Sriov {
            physical: address, ..
        }) = &order.source
        else {
            continue;
        };
        if functions.contains(address) {
            return Err(OrderError::SameFunction { address: *address });
        }
        functions.push(*address);
    }
    Ok(())
}

/// A PCI function that is ready to be opened.
struct Lent {
    address: PciAddress,
    name: ExportName,
    /// Whether it may be taken from another driver.
    bind: bool,
}

/// Opened functions, and what was changed on the host for them.
pub struct Stock {
    exports: Vec<Export>,
    open: Arc<Opened>,
    /// Exports share them, and must not keep them.
    bindings: Option<Arc<Bindings>>,
}

/// The PCI functions that this process has opened, as far as they are not closed: to drop one
/// only begins that.
#[derive(Default)]
struct Opened(Mutex<Vec<(PciAddress, Weak<()>)>>);

impl Opened {
    fn open(&self, address: PciAddress) -> Result<Arc<dyn Function>, SourceError> {
        let function = VfioFunction::open(address)?;
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(_, mark)| mark.strong_count() > 0);
        open.push((address, function.open_mark()));
        Ok(Arc::new(function))
    }

    fn still_open(&self) -> Vec<PciAddress> {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let open = open.iter().filter(|(_, mark)| mark.strong_count() > 0);
        open.map(|(address, _)| *address).collect()
    }
}

impl Stock {
    /// Carries orders out. When one fails, what was done for the others is undone.
    pub fn open(orders: &[Order], host: &Host, state_dir: &Path) -> Result<Self, SourceError> {
        let wanted: Vec<PciAddress> = orders
            .iter()
            .filter_map(|order| match order.source {
                Source::Pci { address, .. } => Some(address),
                Source::Sriov { physical, .. } => Some(physical),
                Source::SoftNvme(_) | Source::VfioUser(_) => None,
            })
            .collect();
        let bindings = open_bindings(host, state_dir, &wanted)?;
        let mut stock = Self {
            exports: Vec::new(),
            open: Arc::default(),
            bindings: bindings.map(Arc::new),
        };
        let pci = stock.lend(orders)?;
        refuse_shared_groups(host, &pci)?;
        for Lent {
            address,
            name,
            bind,
        } in pci
        {
            warn_about_class(host, address);
            let bindings = stock.bindings.as_ref().map(Arc::downgrade);
            let open = stock.open.clone();
            let lend_again = move || -> Result<Arc<dyn Function>, SourceError> {
                if let Some(bindings) = bindings.as_ref().and_then(Weak::upgrade) {
                    bindings.lend(address, bind)?;
                }
                open.open(address)
            };
            let function = stock.open.open(address)?;
            stock.add(name, function, lend_again)?;
        }
        for order in orders {
            let Some(name) = order.name.clone() else {
                continue;
            };
            match &order.source {
                Source::SoftNvme(config) => {
                    let config = config.clone();
                    stock.add(name, open_soft(&config)?, move || open_soft(&config))?;
                }
                Source::VfioUser(path) => {
                    let path = path.clone();
                    stock.add(name, open_user(&path)?, move || open_user(&path))?;
                }
                Source::Pci { .. } | Source::Sriov { .. } => {}
            }
        }
        Ok(stock)
    }

    /// Has the host lend the PCI functions, and makes the virtual ones.
    fn lend(&self, orders: &[Order]) -> Result<Vec<Lent>, SourceError> {
        let mut functions = Vec::new();
        let Some(bindings) = &self.bindings else {
            return Ok(functions);
        };
        for order in orders {
            match (&order.source, &order.name) {
                (Source::Pci { address, bind }, Some(name)) => {
                    bindings.lend(*address, *bind)?;
                    functions.push(Lent {
                        address: *address,
                        name: name.clone(),
                        bind: *bind,
                    });
                }
                (Source::Sriov { physical, count }, prefix) => {
                    let made = bindings.create_virtual_functions(*physical, *count)?;
                    for (number, address) in made.into_iter().enumerate() {
                        bindings.lend(address, true)?;
                        functions.push(Lent {
                            address,
                            name: virtual_name(address, number, prefix)?,
                            bind: true,
                        });
                    }
                }
                _ => {}
            }
        }
        Ok(functions)
    }

    /// Adds an export; `reopen` opens its function again after it was gone.
    fn add(
        &mut self,
        name: ExportName,
        function: Arc<dyn Function>,
        reopen: impl Fn() -> Result<Arc<dyn Function>, SourceError> + Send + Sync + 'static,
    ) -> Result<(), SourceError> {
        refuse_without_reset(function.as_ref())?;
        // Names of virtual functions are known only now.
        if self.exports.iter().any(|export| *export.name() == name) {
            return Err(SourceError::Order(OrderError::SameName {
                name: name.as_str().into(),
            }));
        }
        info!("exports {} as {}", function.info().label, name.as_str());
        let reopen: Reopen = Box::new(move || {
            let function = reopen()?;
            refuse_without_reset(function.as_ref())?;
            Ok(function)
        });
        self.exports.push(Export::reopening(name, function, reopen));
        Ok(())
    }

    /// The exports, once. They must be gone by the time the stock is dropped.
    pub fn take_exports(&mut self) -> Vec<Export> {
        std::mem::take(&mut self.exports)
    }
}

impl Drop for Stock {
    /// The kernel takes a function back only when it is closed, and waits for that without
    /// bound; so this waits first, with one, and leaves what is not closed then.
    fn drop(&mut self) {
        self.exports.clear();
        if let Some(bindings) = self.bindings.take() {
            let begin = Instant::now();
            while !self.open.still_open().is_empty() && begin.elapsed() < CLOSING {
                thread::sleep(CLOSING_STEP);
            }
            for address in self.open.still_open() {
                warn!(
                    "{address} is not closed {} s after it was let go of. The kernel waits for it, about \
                     a minute when it does not answer, and until then this process cannot end, whatever \
                     it is sent; all else is given back now",
                    CLOSING.as_secs()
                );
                bindings.leave(address);
            }
            bindings.give_back_all();
        }
    }
}

/// Who exports no PCI functions needs neither the rights for them nor a place for records, and
/// still repairs, where it may, what a process that died has left behind.
fn open_bindings(
    host: &Host,
    state_dir: &Path,
    wanted: &[PciAddress],
) -> Result<Option<Bindings>, SysfsError> {
    if wanted.is_empty() && !Bindings::has_record(state_dir) {
        return Ok(None);
    }
    match Bindings::open(host.clone(), state_dir, wanted) {
        Ok(bindings) => Ok(Some(bindings)),
        Err(error) if wanted.is_empty() => {
            warn!("what an earlier process has lent is left as it is: {error}");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn virtual_name(
    address: PciAddress,
    number: usize,
    prefix: &Option<ExportName>,
) -> Result<ExportName, SourceError> {
    let prefix = prefix.as_ref().map(ExportName::as_str);
    let name = match prefix {
        Some(prefix) => format!("{prefix}-{number}"),
        None => address.to_string().replace(':', "-"),
    };
    ExportName::new(&name).map_err(|_| SourceError::LongName {
        name,
        prefix: prefix.unwrap_or_default().into(),
    })
}

/// A function that cannot be reset would show one tenant's data to the next.
fn refuse_without_reset(function: &dyn Function) -> Result<(), SourceError> {
    let info = function.info();
    if info.resettable {
        return Ok(());
    }
    Err(SourceError::NoReset {
        what: info.label.clone(),
    })
}

fn refuse_shared_groups(host: &Host, functions: &[Lent]) -> Result<(), SourceError> {
    if functions.is_empty() {
        return Ok(());
    }
    let inventory = Inventory::read(host);
    let mut groups: BTreeMap<u32, PciAddress> = BTreeMap::new();
    for Lent {
        address: second, ..
    } in functions
    {
        let group = inventory.find(*second).and_then(|f| f.iommu_group);
        let Some(group) = group else { continue };
        if let Some(first) = groups.insert(group, *second) {
            return Err(SourceError::SameGroup {
                first,
                second: *second,
                group,
            });
        }
    }
    Ok(())
}

fn warn_about_class(host: &Host, address: PciAddress) {
    let inventory = Inventory::read(host);
    let function = inventory.find(address);
    if let Some(function) = function.filter(|function| !has_engine(function.class)) {
        warn!(
            "{address} is of class {} ({}), for which there is no engine yet: claims will be refused",
            function.class, function.class_name
        );
    }
}

/// Whether an engine serves functions of this class.
pub fn has_engine(class: ClassCode) -> bool {
    class == ClassCode::NVME
}

fn open_soft(config: &SoftNvmeConfig) -> Result<Arc<dyn Function>, SourceError> {
    let drive = SoftNvme::open(config).map_err(SourceError::SoftNvme)?;
    Ok(Arc::new(drive))
}

fn open_user(path: &Path) -> Result<Arc<dyn Function>, SourceError> {
    let function =
        UserFunction::connect(path, USER_TIMEOUT).map_err(|source| SourceError::VfioUser {
            path: path.to_owned(),
            source,
        })?;
    Ok(Arc::new(function))
}
