//! Making and removing SR-IOV virtual functions.

use std::error::Error;
use std::io;

use log::{info, warn};

use super::bindings::chain;
use super::host::{link_name, names};
use super::inventory::Inventory;
use super::record::Created;
use super::{Bindings, Obstacle, SysfsError, User, virtualization};
use crate::PciAddress;
use crate::nvme_port::AdminPort;

impl Bindings {
    /// Has the physical function make `count` virtual ones, which no driver of this host
    /// takes, and returns their addresses. As many as there are already are used as they are,
    /// and not removed at the end.
    pub fn create_virtual_functions(
        &self,
        physical: PciAddress,
        count: u16,
    ) -> Result<Vec<PciAddress>, SysfsError> {
        let refused = |why: String| SysfsError::Sriov {
            address: physical,
            wanted: count,
            why,
        };
        let inventory = Inventory::read(&self.host);
        let function = inventory
            .find(physical)
            .ok_or(SysfsError::NoFunction { address: physical })?;
        if let Some(owner) = function.physical_function {
            return Err(refused(format!(
                "it is a virtual function itself; name its physical function {owner}"
            )));
        }
        let Some(sriov) = &function.sriov else {
            return Err(refused(
                "it does not offer SR-IOV; some devices and firmwares need it switched on".into(),
            ));
        };
        if count == 0 || count > sriov.total {
            return Err(refused(format!(
                "it offers 1 to {}; write vfs={}",
                sriov.total, sriov.total
            )));
        }
        if sriov.functions.len() == usize::from(count) {
            let record = self.record.read()?;
            // A process whose functions these were may have died before they had what they need.
            if record.sriov.iter().any(|made| self.is_mine(made, physical)) {
                self.equip(physical, count)
                    .map_err(|error| refused(chain(error.as_ref())))?;
            }
            return Ok(sriov.functions.clone());
        }
        if !sriov.functions.is_empty() {
            return Err(refused(format!(
                "it has {} already; write vfs={}, or remove them first (echo 0 to its sriov_numvfs)",
                sriov.functions.len(),
                sriov.functions.len()
            )));
        }
        let Some(driver) = function.driver.as_deref() else {
            return Err(refused(
                "no driver has it, and only its driver can make them; bind it first".into(),
            ));
        };
        let created = Created {
            physical,
            count,
            owner: self.me.clone(),
            secondaries: Vec::new(),
        };
        self.record.change(|record| {
            record.sriov.retain(|made| made.physical != physical);
            record.sriov.push(created);
            Ok(())
        })?;
        let made = self.make(physical, count).and_then(|()| {
            let inventory = Inventory::read(&self.host);
            let sriov = inventory.find(physical).and_then(|f| f.sriov.clone());
            let functions = sriov.map_or(Vec::new(), |sriov| sriov.functions);
            if functions.len() == usize::from(count) {
                self.equip(physical, count)
                    .map_err(|error| refused(chain(error.as_ref())))?;
                return Ok(functions);
            }
            Err(refused(format!(
                "{} came; the kernel's log (dmesg) may say why",
                functions.len()
            )))
        });
        match made {
            Ok(functions) => {
                info!("{physical} has made {count} virtual functions");
                Ok(functions)
            }
            Err(error) => {
                // Whatever there is of them goes; what failed first is what is told.
                let _ = self.remove_virtual_functions(physical);
                Err(match error {
                    // ENOENT stands for a driver without support (Linux, `sriov_numvfs_store`).
                    SysfsError::Write { ref source, .. }
                        if source.kind() == io::ErrorKind::NotFound =>
                    {
                        refused(format!("its driver {driver} cannot make them"))
                    }
                    other => other,
                })
            }
        }
    }

    fn is_mine(&self, made: &Created, physical: PciAddress) -> bool {
        made.physical == physical && made.owner == self.me
    }

    /// Gives virtual functions of an NVMe controller what they need to work. What is to be given
    /// back is on record first.
    fn equip(&self, physical: PciAddress, count: u16) -> Result<(), Box<dyn Error>> {
        let Some(port) = self.admin_port(physical)? else {
            return Ok(());
        };
        let ids = virtualization::needy(&port, count)?;
        self.record.change(|record| {
            let mut all = record.sriov.iter_mut();
            if let Some(made) = all.find(|made| self.is_mine(made, physical)) {
                made.secondaries.extend(&ids);
                made.secondaries.sort_unstable();
                made.secondaries.dedup();
            }
            Ok(())
        })?;
        Ok(virtualization::provide(&port, &ids)?)
    }

    /// The character device of a function that the NVMe driver has.
    fn admin_port(&self, physical: PciAddress) -> io::Result<Option<AdminPort>> {
        let directory = self.host.function(physical);
        if link_name(&directory.join("driver")).as_deref() != Some("nvme") {
            return Ok(None);
        }
        let names = names(&directory.join("nvme"));
        let node = names.first().map(|name| self.host.path("dev").join(name));
        node.map(|node| AdminPort::open(&node)).transpose()
    }

    fn make(&self, physical: PciAddress, count: u16) -> Result<(), SysfsError> {
        let directory = self.host.function(physical);
        let autoprobe = directory.join("sriov_drivers_autoprobe");
        // Looked at only while functions are made: a driver of this host must not find them.
        let has_autoprobe = autoprobe.exists();
        if has_autoprobe {
            self.host.write(&autoprobe, "0")?;
        }
        let made = self
            .host
            .write(&directory.join("sriov_numvfs"), &count.to_string());
        if has_autoprobe {
            self.host.write(&autoprobe, "1")?;
        }
        made
    }

    /// Removes virtual functions that this process made, and those it took over. Refused while
    /// someone uses one of them.
    pub fn remove_virtual_functions(&self, physical: PciAddress) -> Result<(), SysfsError> {
        let record = self.record.read()?;
        let mine = |made: &Created| self.is_mine(made, physical);
        if !record.sriov.iter().any(mine) {
            return Ok(());
        }
        let inventory = Inventory::read(&self.host);
        let sriov = inventory.find(physical).and_then(|f| f.sriov.as_ref());
        let functions = sriov.map_or(&[][..], |sriov| &sriov.functions);
        for address in functions {
            self.refuse_closing(*address)?;
        }
        let mut users: Vec<User> = Vec::new();
        for function in functions
            .iter()
            .filter_map(|address| inventory.find(*address))
        {
            users.extend(function.users.iter().cloned());
        }
        if !users.is_empty() {
            return Err(SysfsError::Obstacle {
                address: physical,
                obstacle: Obstacle::InUse(users),
            });
        }
        for made in record.sriov.iter().filter(|made| mine(made)) {
            if made.secondaries.is_empty() {
                continue;
            }
            match self.admin_port(physical) {
                Ok(Some(port)) => virtualization::take_back(&port, &made.secondaries),
                Ok(None) => {}
                Err(error) => warn!("{physical}: queues are not given back: {error}"),
            }
        }
        if !functions.is_empty() {
            let number = self.host.function(physical).join("sriov_numvfs");
            self.host.write(&number, "0")?;
        }
        self.record.change(|record| {
            record.sriov.retain(|made| !mine(made));
            Ok(())
        })
    }
}
