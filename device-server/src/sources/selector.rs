//! Choosing PCI functions by what they are instead of where they sit, so that one configuration
//! serves many hosts.

use std::fmt;

use farbus_vfio::PciAddress;
use farbus_vfio::sysfs::{ClassCode, Host, Inventory, PciFunction};

/// What a function must have. What is not named may be anything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// PCI class code.
    pub class: Option<ClassCode>,
    /// PCI vendor id.
    pub vendor: Option<u16>,
    /// PCI device id.
    pub device: Option<u16>,
    /// The drive's serial number, as its driver on this host tells it.
    pub serial: Option<String>,
}

/// How many functions a selector is to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// So many; those with the lowest addresses.
    Exactly(u16),
    /// All that there are.
    All,
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = |id: Option<u16>| id.map(|id| format!("{id:04x}"));
        let parts = [
            ("class", self.class.map(|class| class.to_string())),
            ("vendor-id", hex(self.vendor)),
            ("device-id", hex(self.device)),
            ("serial", self.serial.clone()),
        ];
        let mut first = true;
        for (key, value) in parts {
            let Some(value) = value else { continue };
            let comma = if first { "" } else { ", " };
            write!(f, "{comma}{key} {value}")?;
            first = false;
        }
        Ok(())
    }
}

impl Selector {
    /// Whether a function of the host has all that is named.
    pub fn matches(&self, host: &Host, function: &PciFunction) -> bool {
        let (vendor, device) = function.id.split_once(':').unwrap_or_default();
        let is = |wanted: Option<u16>, id: &str| {
            wanted.is_none_or(|wanted| u16::from_str_radix(id, 16) == Ok(wanted))
        };
        self.class.is_none_or(|class| class == function.class)
            && is(self.vendor, vendor)
            && is(self.device, device)
            && self
                .serial
                .as_ref()
                .is_none_or(|serial| serial_of(host, function.address).as_ref() == Some(serial))
    }

    /// The functions that match and of which nothing else is said, in order of their addresses;
    /// and what is in the way of those that cannot be exported.
    pub(super) fn find(
        &self,
        host: &Host,
        inventory: &Inventory,
        taken: &[PciAddress],
    ) -> (Vec<PciAddress>, Vec<String>) {
        // Virtual functions are exported by the order that has them made.
        let is_taken = |function: &PciFunction| {
            let owner = function.physical_function;
            taken.contains(&function.address) || owner.is_some_and(|owner| taken.contains(&owner))
        };
        let matching = inventory
            .functions()
            .iter()
            .filter(|function| !is_taken(function) && self.matches(host, function));
        let (mut found, mut obstacles) = (Vec::new(), Vec::new());
        for function in matching {
            match function.obstacles.first() {
                None => found.push(function.address),
                Some(obstacle) => obstacles.push(format!("{}: {obstacle}", function.address)),
            }
        }
        (found, obstacles)
    }
}

/// The serial number that the host's NVMe driver has read. A drive that another driver has does
/// not tell it.
fn serial_of(host: &Host, address: PciAddress) -> Option<String> {
    let controllers = host.function(address).join("nvme");
    let name = host.names(&controllers).into_iter().next()?;
    let serial = host.attribute(controllers.join(name).join("serial"))?;
    Some(serial.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use farbus_vfio::sysfs::fake::{FakeFunction, FakeHost};

    use super::*;

    fn selector(vendor: Option<u16>, serial: Option<&str>) -> Selector {
        Selector {
            class: Some(ClassCode::NVME),
            vendor,
            device: None,
            serial: serial.map(Into::into),
        }
    }

    #[test]
    fn functions_are_found_by_what_they_are_and_not_twice() {
        let fake = FakeHost::new();
        let nvme = || FakeFunction {
            group: Some(1),
            ..FakeFunction::default()
        };
        fake.function(
            "0000:02:00.0",
            &FakeFunction {
                group: Some(2),
                ..nvme()
            },
        );
        fake.function("0000:01:00.0", &nvme());
        let bridge = FakeFunction {
            class: 0x06_04_00,
            ..FakeFunction::default()
        };
        fake.function("0000:00:01.0", &bridge);
        fake.file(
            "sys/bus/pci/devices/0000:02:00.0/nvme/nvme1/serial",
            "S2  \n",
        );
        let (host, inventory) = (fake.host(), Inventory::read(&fake.host()));
        let found = |selector: &Selector, taken: &[PciAddress]| {
            let found = selector.find(&host, &inventory, taken).0;
            found.iter().map(ToString::to_string).collect::<Vec<_>>()
        };

        let any = selector(Some(0x1b36), None);
        assert_eq!(found(&any, &[]), ["0000:01:00.0", "0000:02:00.0"]);
        let taken = ["0000:01:00.0".parse().unwrap()];
        assert_eq!(found(&any, &taken), ["0000:02:00.0"]);
        assert_eq!(found(&selector(None, Some("S2")), &[]), ["0000:02:00.0"]);
        assert!(found(&selector(Some(0x8086), None), &[]).is_empty());
        assert_eq!(any.to_string(), "class 010802, vendor-id 1b36");
    }
}
