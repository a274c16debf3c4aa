//! Opened functions, and what was changed on the host for them. Orders are carried out one by one,
//! and each can be undone by itself while the others go on.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use farbus_fabric::wire::ExportName;
use farbus_vfio::sysfs::{Bindings, Host, Inventory, SysfsError};
use farbus_vfio::{Function, PciAddress};
use log::{info, warn};

use super::open::{self, Opened, refuse_without_reset};
use super::shared;
use super::{Count, Order, OrderError, Source, SourceError, address_name, has_engine};
use crate::exports::{Export, Reopen, ask};

/// How long functions may stay open at the end, after all attachments had their time to end.
const CLOSING: Duration = Duration::from_secs(3);
/// How often is looked whether they are. A function may be the last thing that any thread lets go of, so there
/// is no one to tell.
const CLOSING_STEP: Duration = Duration::from_millis(10);

/// Opened functions, and what was changed on the host for them.
pub struct Stock {
    host: Host,
    state_dir: PathBuf,
    exports: Vec<Export>,
    open: Arc<Opened>,
    /// Exports share them, and must not keep them.
    bindings: Option<Arc<Bindings>>,
    /// Functions that are lent now.
    lent: Vec<PciAddress>,
    /// Functions that orders name, which no selector finds.
    named: Vec<PciAddress>,
}

/// What an order has brought.
pub struct Brought {
    /// To be claimed.
    pub exports: Vec<Export>,
    /// To be given back once these are closed.
    pub given: Given,
}

/// What was changed on the host for one order.
#[derive(Debug, Default)]
pub struct Given {
    functions: Vec<PciAddress>,
    physical: Option<PciAddress>,
}

impl Stock {
    /// Without any function yet. What a process that died has left on the host is repaired, less
    /// what these orders want.
    pub fn new(host: &Host, state_dir: &Path, orders: &[Order]) -> Result<Self, SysfsError> {
        let mut stock = Self {
            host: host.clone(),
            state_dir: state_dir.to_owned(),
            exports: Vec::new(),
            open: Arc::default(),
            bindings: None,
            lent: Vec::new(),
            named: orders.iter().filter_map(Order::address).collect(),
        };
        let wanted = stock.wanted(orders);
        stock.bindings = open_bindings(host, state_dir, &wanted)?.map(Arc::new);
        Ok(stock)
    }

    /// Carries orders out. When one fails, what was done for the others is undone.
    pub fn open(orders: &[Order], host: &Host, state_dir: &Path) -> Result<Self, SourceError> {
        let mut stock = Self::new(host, state_dir, orders)?;
        refuse_shared_groups(host, orders)?;
        for order in orders {
            let brought = stock.bring(order)?;
            for export in brought.exports {
                // Names of virtual functions are known only now.
                if stock.exports.iter().any(|e| e.name() == export.name()) {
                    return Err(SourceError::Order(OrderError::SameName {
                        name: export.name().as_str().into(),
                    }));
                }
                stock.exports.push(export);
            }
        }
        ask(&stock.exports.iter().collect::<Vec<_>>());
        Ok(stock)
    }

    /// The exports, once. They must be gone by the time the stock is dropped.
    pub fn take_exports(&mut self) -> Vec<Export> {
        std::mem::take(&mut self.exports)
    }

    /// From now on these orders are the ones whose functions no selector finds.
    pub fn expect(&mut self, orders: &[Order]) {
        self.named = orders.iter().filter_map(Order::address).collect();
    }

    /// The functions that orders are about, before any is carried out.
    fn wanted(&self, orders: &[Order]) -> Vec<PciAddress> {
        let mut wanted = self.named.clone();
        let selectors = orders.iter().filter_map(|order| match &order.source {
            Source::Match { selector, .. } => Some(selector),
            _ => None,
        });
        let selectors: Vec<_> = selectors.collect();
        if !selectors.is_empty() {
            let inventory = Inventory::read(&self.host);
            let functions = inventory.functions().iter().filter(|function| {
                let mut selectors = selectors.iter();
                selectors.any(|selector| selector.matches(&self.host, function))
            });
            wanted.extend(functions.map(|function| function.address));
        }
        wanted
    }

    /// Carries one order out. When it fails, nothing of it remains.
    pub fn bring(&mut self, order: &Order) -> Result<Brought, SourceError> {
        let mut given = Given::default();
        match self.carry_out(order, &mut given) {
            Ok(exports) => Ok(Brought { exports, given }),
            Err(error) => {
                self.take_back(given);
                Err(error)
            }
        }
    }

    fn carry_out(&mut self, order: &Order, given: &mut Given) -> Result<Vec<Export>, SourceError> {
        match (&order.source, &order.name) {
            (Source::SoftNvme(config), Some(name)) => {
                let config = config.clone();
                let function = open::soft(&config)?;
                exports(order, name, function, move || open::soft(&config))
            }
            (Source::VfioUser(path), Some(name)) => {
                let path = path.clone();
                let function = open::user(&path)?;
                exports(order, name, function, move || open::user(&path))
            }
            (source, prefix) => {
                let functions = self.find(source, prefix.as_ref(), given)?;
                let bind = match source {
                    Source::Pci { bind, .. } | Source::Match { bind, .. } => *bind,
                    _ => true,
                };
                let mut exports = Vec::new();
                for (address, name) in functions {
                    exports.extend(self.lend(order, (address, name), bind, given)?);
                }
                Ok(exports)
            }
        }
    }

    /// The PCI functions of a source, which virtual ones are made for, and their names.
    fn find(
        &mut self,
        source: &Source,
        prefix: Option<&ExportName>,
        given: &mut Given,
    ) -> Result<Vec<(PciAddress, ExportName)>, SourceError> {
        let (addresses, count) = match source {
            Source::Pci { address, .. } => (vec![*address], Count::Exactly(1)),
            Source::Sriov { physical, count } => {
                let bindings = self.bindings(*physical)?;
                let made = bindings.create_virtual_functions(*physical, *count)?;
                given.physical = Some(*physical);
                // Even a single one has a number: there may be more of them tomorrow.
                (made, Count::Exactly(u16::MAX))
            }
            Source::Match {
                selector, count, ..
            } => {
                let inventory = Inventory::read(&self.host);
                let taken = [&self.named[..], &self.lent].concat();
                let (mut found, obstacles) = selector.find(&self.host, &inventory, &taken);
                let wanted = match count {
                    Count::Exactly(wanted) => usize::from(*wanted),
                    Count::All => found.len().max(1),
                };
                if found.len() < wanted {
                    let obstacles = match &obstacles[..] {
                        [] => String::new(),
                        some => format!(" ({})", some.join("; ")),
                    };
                    return Err(SourceError::NoMatch {
                        selector: selector.clone(),
                        found: found.len(),
                        wanted,
                        obstacles,
                    });
                }
                found.truncate(wanted);
                (found, *count)
            }
            Source::SoftNvme(_) | Source::VfioUser(_) => (Vec::new(), Count::All),
        };
        let named = addresses.into_iter().enumerate().map(|(number, address)| {
            let name = name_of(address, number, count, prefix)?;
            Ok((address, name))
        });
        named.collect()
    }

    /// What this process has changed on the host; opened when it is needed first.
    fn bindings(&mut self, address: PciAddress) -> Result<Arc<Bindings>, SysfsError> {
        if let Some(bindings) = &self.bindings {
            return Ok(bindings.clone());
        }
        let bindings = Bindings::open(self.host.clone(), &self.state_dir, &[address])?;
        let bindings = Arc::new(bindings);
        self.bindings = Some(bindings.clone());
        Ok(bindings)
    }

    /// Has the host lend a function, and opens it.
    fn lend(
        &mut self,
        order: &Order,
        (address, name): (PciAddress, ExportName),
        bind: bool,
        given: &mut Given,
    ) -> Result<Vec<Export>, SourceError> {
        let bindings = self.bindings(address)?;
        bindings.lend(address, bind)?;
        given.functions.push(address);
        let inventory = Inventory::read(&self.host);
        refuse_group_of(&inventory, &self.lent, address)?;
        self.lent.push(address);
        let found = inventory.find(address);
        if let Some(function) = found.filter(|function| !has_engine(function.class)) {
            warn!(
                "{address} is of class {} ({}), for which there is no engine yet: claims will be refused",
                function.class, function.class_name
            );
        }
        let numa_node = found.and_then(|function| function.numa_node);
        let function = self.open.open(address)?;
        let (open, bindings) = (self.open.clone(), Arc::downgrade(&bindings));
        let lend_again = move || -> Result<Arc<dyn Function>, SourceError> {
            if let Some(bindings) = Weak::upgrade(&bindings) {
                bindings.lend(address, bind)?;
            }
            open.open(address)
        };
        let exports = exports(order, &name, function, lend_again)?;
        let node = numa_node.and_then(|node| u16::try_from(node).ok());
        Ok(exports.into_iter().map(|e| e.near_to(node)).collect())
    }

    /// Gives back to the host what was changed for one order. Its exports must have been dropped;
    /// functions whose closing takes too long are left to the kernel, and to the next start.
    pub fn take_back(&mut self, given: Given) {
        let Given {
            functions,
            physical,
        } = given;
        self.lent.retain(|address| !functions.contains(address));
        let Some(bindings) = &self.bindings else {
            return;
        };
        self.wait_for_closing(bindings, Some(&functions));
        for address in &functions {
            match bindings.give_back(*address) {
                Ok(Some(driver)) => info!("gave {address} back to {driver}"),
                Ok(None) => {}
                Err(error) => warn!(
                    "{address} could not be given back, and the next start will try again: {:#}",
                    anyhow::Error::new(error)
                ),
            }
        }
        if let Some(physical) = physical {
            if let Err(error) = bindings.remove_virtual_functions(physical) {
                warn!("{:#}", anyhow::Error::new(error));
            }
        }
    }

    /// The kernel takes a function back only when it is closed, and waits for that without
    /// bound; so this waits first, with one, and leaves what is not closed then.
    fn wait_for_closing(&self, bindings: &Bindings, only: Option<&[PciAddress]>) {
        let still_open = || {
            let mut open = self.open.still_open();
            open.retain(|address| only.is_none_or(|only| only.contains(address)));
            open
        };
        let begin = Instant::now();
        while !still_open().is_empty() && begin.elapsed() < CLOSING {
            thread::sleep(CLOSING_STEP);
        }
        for address in still_open() {
            warn!(
                "{address} is not closed {} s after it was let go of. The kernel waits for it, about \
                 a minute when it does not answer, and until then this process cannot end, whatever \
                 it is sent; all else is given back now",
                CLOSING.as_secs()
            );
            bindings.leave(address);
        }
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        self.exports.clear();
        if let Some(bindings) = self.bindings.take() {
            self.wait_for_closing(&bindings, None);
            bindings.give_back_all();
        }
    }
}

/// Refuses orders that could not all be carried out, before the first is.
fn refuse_shared_groups(host: &Host, orders: &[Order]) -> Result<(), SourceError> {
    let functions = orders.iter().filter_map(|order| match order.source {
        Source::Pci { address, .. } => Some(address),
        _ => None,
    });
    let functions: Vec<_> = functions.collect();
    if functions.len() < 2 {
        return Ok(());
    }
    let inventory = Inventory::read(host);
    for (at, address) in functions.iter().enumerate() {
        refuse_group_of(&inventory, &functions[..at], *address)?;
    }
    Ok(())
}

/// Refuses a function that the IOMMU does not tell apart from one of the others.
fn refuse_group_of(
    inventory: &Inventory,
    others: &[PciAddress],
    second: PciAddress,
) -> Result<(), SourceError> {
    let group_of = |address| inventory.find(address).and_then(|f| f.iommu_group);
    let Some(group) = group_of(second) else {
        return Ok(());
    };
    let mut others = others.iter().filter(|address| **address != second);
    match others.find(|first| group_of(**first) == Some(group)) {
        None => Ok(()),
        Some(first) => Err(SourceError::SameGroup {
            first: *first,
            second,
            group,
        }),
    }
}

/// What is exported of a function: all of it, or its slices. `reopen` opens it again after it was
/// gone.
fn exports(
    order: &Order,
    name: &ExportName,
    function: Arc<dyn Function>,
    reopen: impl Fn() -> Result<Arc<dyn Function>, SourceError> + Send + Sync + 'static,
) -> Result<Vec<Export>, SourceError> {
    if !order.slices.is_empty() {
        return shared::divide(
            name,
            &order.slices,
            order.limits,
            function,
            Box::new(reopen),
        );
    }
    refuse_without_reset(function.as_ref())?;
    info!("exports {} as {}", function.info().label, name.as_str());
    let reopen: Reopen = Box::new(move || {
        let function = reopen()?;
        refuse_without_reset(function.as_ref())?;
        Ok(function)
    });
    let export = Export::reopening(name.clone(), function, reopen);
    Ok(vec![export.limited_to(order.limits.rates())])
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

/// The name of one of `count` functions: `prefix` itself if it is the only one, else `prefix` with
/// its number, or with its address where numbers would not stay the same.
fn name_of(
    address: PciAddress,
    number: usize,
    count: Count,
    prefix: Option<&ExportName>,
) -> Result<ExportName, SourceError> {
    let dashed = || address.to_string().replace(':', "-");
    let Some(prefix) = prefix else {
        return address_name(address).ok_or_else(|| SourceError::LongName {
            name: dashed(),
            prefix: String::new(),
        });
    };
    let name = match count {
        Count::Exactly(1) => return Ok(prefix.clone()),
        Count::Exactly(_) => format!("{prefix}-{number}"),
        Count::All => format!("{prefix}-{}", dashed()),
    };
    ExportName::new(&name).map_err(|_| SourceError::LongName {
        name,
        prefix: prefix.as_str().into(),
    })
}
