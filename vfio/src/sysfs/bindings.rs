//! Lending functions to the VFIO driver, and giving them back.
//!
//! A loan is on record before the first thing is changed, and leaves the record after the
//! last thing is as it was. So whatever moment a process dies at, [`Bindings::open`] of the
//! next one finds what is still lent: it takes over what is to be lent again, so that no
//! driver of this host sees a tenant's data in between, and gives back the rest.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use log::{info, warn};

use super::host::{attribute, link_name, names};
use super::inventory::{Inventory, is_vfio};
use super::obstacles::answers;
use super::process::{Process, program};
use super::record::{Created, Loan, RecordFile};
use super::users::{claim_disks, holders_of_node};
use super::{Host, Obstacle, PciFunction, SysfsError, User, VFIO_DRIVER};
use crate::PciAddress;

/// The functions that this process has lent. Dropping it gives all of them back, and removes
/// the virtual functions that it made; whoever uses a function must have closed it before.
pub struct Bindings {
    pub(super) host: Host,
    pub(super) record: RecordFile,
    pub(super) me: Process,
    /// Functions that are let go of but not closed.
    closing: Mutex<Vec<PciAddress>>,
}

impl Bindings {
    /// Reads the record in `state_dir`, and repairs what processes that died have left
    /// behind: functions in `keep` (and the virtual functions of physical ones in it) become
    /// this process's, all others are given back.
    pub fn open(host: Host, state_dir: &Path, keep: &[PciAddress]) -> Result<Self, SysfsError> {
        let me = Process::this(&host);
        Self::open_as(host, state_dir, keep, me)
    }

    /// Whether anything has been recorded in `state_dir`.
    pub fn has_record(state_dir: &Path) -> bool {
        RecordFile::exists(state_dir)
    }

    pub(super) fn open_as(
        host: Host,
        state_dir: &Path,
        keep: &[PciAddress],
        me: Process,
    ) -> Result<Self, SysfsError> {
        let bindings = Self {
            record: RecordFile::open(state_dir)?,
            host,
            me,
            closing: Mutex::default(),
        };
        bindings.repair(keep)?;
        Ok(bindings)
    }

    /// Makes this process the owner of what dead ones have left on record, and returns that.
    fn inherit(&self) -> Result<(Vec<Loan>, Vec<Created>), SysfsError> {
        self.record.change(|record| {
            // A reboot has undone everything.
            record
                .functions
                .retain(|loan| loan.owner.is_of_this_boot(&self.host));
            record
                .sriov
                .retain(|made| made.owner.is_of_this_boot(&self.host));
            let mut loans = Vec::new();
            for loan in &mut record.functions {
                if !loan.owner.lives(&self.host) {
                    loan.owner = self.me.clone();
                    loans.push(loan.clone());
                }
            }
            let mut created = Vec::new();
            for made in &mut record.sriov {
                if !made.owner.lives(&self.host) {
                    made.owner = self.me.clone();
                    created.push(made.clone());
                }
            }
            Ok((loans, created))
        })
    }

    fn repair(&self, keep: &[PciAddress]) -> Result<(), SysfsError> {
        let (loans, created) = self.inherit()?;
        for loan in loans {
            let physical = self.physical_function(loan.address);
            let kept = |address: &PciAddress| keep.contains(address);
            if kept(&loan.address) || physical.as_ref().is_some_and(kept) {
                info!(
                    "takes over {}, which a process that died had lent",
                    loan.address
                );
            } else {
                self.report(loan.address, self.give_back(loan.address), "repaired: ");
            }
        }
        let still_used: Vec<PciAddress> = keep
            .iter()
            .filter_map(|address| self.physical_function(*address))
            .collect();
        for made in created {
            if !keep.contains(&made.physical) && !still_used.contains(&made.physical) {
                match self.remove_virtual_functions(made.physical) {
                    Ok(()) => info!(
                        "repaired: removed the {} virtual functions of {}, whose maker had died",
                        made.count, made.physical
                    ),
                    Err(error) => warn!("{error}"),
                }
            }
        }
        Ok(())
    }

    /// Makes a function ready to be opened through VFIO: checks that nobody uses it, and binds
    /// it to VFIO if it is not and `bind` says so.
    pub fn lend(&self, address: PciAddress, bind: bool) -> Result<(), SysfsError> {
        let inventory = Inventory::read(&self.host);
        let function = inventory
            .find(address)
            .ok_or(SysfsError::NoFunction { address })?;
        let on_record = self.loan(address)?;
        if let Some(loan) = on_record.as_ref().filter(|loan| loan.owner != self.me) {
            return Err(SysfsError::Lent {
                address,
                pid: loan.owner.pid,
            });
        }
        self.refuse_obstacles(function, bind)?;
        // The kernel would try for a minute to reset it.
        if !answers(&self.host, address) {
            return Err(SysfsError::Obstacle {
                address,
                obstacle: Obstacle::NoAnswer(address),
            });
        }
        if function.is_bound_to_vfio() {
            return Ok(());
        }
        if !bind {
            let driver = function.driver.clone();
            return Err(SysfsError::NotBound {
                address,
                driver: driver.unwrap_or_else(|| "no driver".into()),
            });
        }
        let claims = claim_disks(&self.host, &self.host.function(address));
        let _claims = claims.map_err(|user| SysfsError::Obstacle {
            address,
            obstacle: Obstacle::InUse(vec![user]),
        })?;
        if on_record.is_none() {
            self.remember(function)?;
        }
        if let Err(error) = self.bind(address) {
            self.report(address, self.give_back(address), "after a failure: ");
            return Err(error);
        }
        info!(
            "{address} is bound to {VFIO_DRIVER}; {} had it before",
            function.driver.as_deref().unwrap_or("no driver")
        );
        Ok(())
    }

    /// Whether it can be reset is for whoever opens it to find out; the rest is refused here.
    fn refuse_obstacles(&self, function: &PciFunction, bind: bool) -> Result<(), SysfsError> {
        for obstacle in &function.obstacles {
            let applies = match obstacle {
                Obstacle::NoReset => false,
                Obstacle::NoDriver => bind,
                _ => true,
            };
            if applies {
                return Err(SysfsError::Obstacle {
                    address: function.address,
                    obstacle: obstacle.clone(),
                });
            }
        }
        Ok(())
    }

    fn loan(&self, address: PciAddress) -> Result<Option<Loan>, SysfsError> {
        let record = self.record.read()?;
        let mut loans = record.functions.into_iter();
        Ok(loans.find(|loan| loan.address == address))
    }

    fn remember(&self, function: &PciFunction) -> Result<(), SysfsError> {
        let address = function.address;
        let former_override = attribute(&self.host.function(address).join("driver_override"));
        let loan = Loan {
            address,
            former_driver: function.driver.clone(),
            // What the kernel prints when there is none.
            former_override: former_override.filter(|name| name != "(null)"),
            owner: self.me.clone(),
        };
        self.record.change(|record| {
            // Another process may have been faster since the record was read.
            if let Some(other) = record.functions.iter().find(|l| l.address == address) {
                return Err(SysfsError::Lent {
                    address,
                    pid: other.owner.pid,
                });
            }
            record.functions.push(loan);
            Ok(())
        })
    }

    fn bind(&self, address: PciAddress) -> Result<(), SysfsError> {
        let directory = self.host.function(address);
        self.host
            .write(&directory.join("driver_override"), VFIO_DRIVER)?;
        if link_name(&directory.join("driver")).is_some() {
            let unbind = directory.join("driver/unbind");
            self.host.write(&unbind, &address.to_string())?;
        }
        self.probe(address, Some(VFIO_DRIVER))
    }

    /// Lets the kernel look for a driver, which should be `wanted`.
    fn probe(&self, address: PciAddress, wanted: Option<&str>) -> Result<(), SysfsError> {
        let Some(wanted) = wanted else {
            return Ok(());
        };
        let probe = self.host.path("sys/bus/pci/drivers_probe");
        let probed = self.host.write(&probe, &address.to_string());
        let driver = self.host.function(address).join("driver");
        let mut found = link_name(&driver);
        if found.is_none() && wanted != VFIO_DRIVER {
            // The driver may not know the device's id by itself, and have been told.
            let bind = self.host.driver(wanted).join("bind");
            let _ = self.host.write(&bind, &address.to_string());
            found = link_name(&driver);
        }
        if found.as_deref() == Some(wanted) {
            return Ok(());
        }
        probed?;
        Err(SysfsError::Probe {
            address,
            wanted: wanted.into(),
            found: found.unwrap_or_else(|| "no driver".into()),
        })
    }

    /// Gives a function back to the driver that it was lent from, and returns that. A function
    /// that is not on record as this process's is left alone.
    ///
    /// While someone still has it open this is refused, since the kernel would wait for them
    /// without bound; it then stays on record.
    pub fn give_back(&self, address: PciAddress) -> Result<Option<String>, SysfsError> {
        let Some(loan) = self.loan(address)?.filter(|loan| loan.owner == self.me) else {
            return Ok(None);
        };
        let directory = self.host.function(address);
        if directory.is_dir() {
            self.refuse_open(address)?;
            let former = loan.former_override.as_deref().unwrap_or("\n");
            self.host
                .write(&directory.join("driver_override"), former)?;
            let driver = link_name(&directory.join("driver"));
            if driver.as_deref().is_some_and(is_vfio) {
                let unbind = directory.join("driver/unbind");
                self.host.write(&unbind, &address.to_string())?;
            }
            if driver.as_deref().is_none_or(is_vfio) {
                self.probe(address, loan.former_driver.as_deref())?;
            }
        }
        self.record.change(|record| {
            record.functions.retain(|other| *other != loan);
            Ok(())
        })?;
        Ok(loan.former_driver)
    }

    /// Leaves a function as it is from now on, and on record: the kernel is still closing it,
    /// and whoever gave it back would wait for that.
    pub fn leave(&self, address: PciAddress) {
        let mut closing = self.closing.lock().unwrap_or_else(PoisonError::into_inner);
        closing.push(address);
    }

    pub(super) fn refuse_closing(&self, address: PciAddress) -> Result<(), SysfsError> {
        let closing = self.closing.lock().unwrap_or_else(PoisonError::into_inner);
        match closing.contains(&address) {
            true => Err(SysfsError::Closing { address }),
            false => Ok(()),
        }
    }

    fn refuse_open(&self, address: PciAddress) -> Result<(), SysfsError> {
        self.refuse_closing(address)?;
        let directory = self.host.function(address);
        let group = link_name(&directory.join("iommu_group"));
        let devices = names(&directory.join("vfio-dev"));
        let nodes = group
            .map(|group| format!("/dev/vfio/{group}"))
            .into_iter()
            .chain(devices.iter().map(|d| format!("/dev/vfio/devices/{d}")));
        let mut users = Vec::new();
        for node in nodes {
            for pid in holders_of_node(&self.host, &node) {
                users.push(User::Open {
                    node: node.clone(),
                    program: program(&self.host, &pid),
                    pid,
                });
            }
        }
        if users.is_empty() {
            return Ok(());
        }
        Err(SysfsError::Obstacle {
            address,
            obstacle: Obstacle::InUse(users),
        })
    }

    /// Gives back everything that this process has lent, and removes the virtual functions
    /// that it made. What fails is logged and stays on record.
    pub fn give_back_all(&self) {
        let record = match self.record.read() {
            Ok(record) => record,
            Err(error) => {
                warn!("{error}");
                return;
            }
        };
        for loan in record.functions.iter().filter(|l| l.owner == self.me) {
            self.report(loan.address, self.give_back(loan.address), "");
        }
        for made in record.sriov.iter().filter(|made| made.owner == self.me) {
            if let Err(error) = self.remove_virtual_functions(made.physical) {
                warn!("{error}");
            }
        }
    }

    fn report(
        &self,
        address: PciAddress,
        result: Result<Option<String>, SysfsError>,
        prefix: &str,
    ) {
        match result {
            Ok(Some(driver)) => info!("{prefix}gave {address} back to {driver}"),
            Ok(None) => info!("{prefix}gave {address} back; it had no driver before"),
            Err(error) => warn!(
                "{prefix}{address} could not be given back, and the next start will try again: {}",
                chain(&error)
            ),
        }
    }

    fn physical_function(&self, address: PciAddress) -> Option<PciAddress> {
        link_name(&self.host.function(address).join("physfn"))?
            .parse()
            .ok()
    }
}

impl Drop for Bindings {
    fn drop(&mut self) {
        self.give_back_all();
    }
}

/// An error and its causes, as one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text.push_str(": ");
        text.push_str(&source.to_string());
        cause = source.source();
    }
    text
}
