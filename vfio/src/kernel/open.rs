//! From an address to open descriptors, with an error for everything that can be in the way.

#![forbid(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::path::Path;

use super::VfioError;
use super::device::{Container, Device, Group};
use super::iommufd::AddressSpace;
use super::space::Space;
use crate::PciAddress;
use crate::sysfs::{Host, IOMMUFD, Inventory, PciFunction, User};

/// The descriptors of a function. The order is that in which they have to be closed.
pub(super) struct Opened {
    pub(super) device: Device,
    /// Its group, unless it was opened by its own node.
    pub(super) group: Option<Group>,
    pub(super) space: Space,
}

/// Opens a function: alone in an address space of its own, so that no other function reaches the
/// memory that is mapped for this one.
pub(super) fn open(host: &Host, address: PciAddress) -> Result<Opened, VfioError> {
    let inventory = Inventory::read(host);
    let function = inventory
        .find(address)
        .ok_or(VfioError::NotFound { address })?;
    let number = check(function)?;
    match &function.device_node {
        Some(node) => by_device(host, function, number, &host.path(node)),
        None => by_group(host, function, number),
    }
}

/// By the function's own node, with iommufd.
fn by_device(
    host: &Host,
    function: &PciFunction,
    number: u32,
    node: &Path,
) -> Result<Opened, VfioError> {
    let address = function.address;
    let iommufd = host.path(IOMMUFD);
    let space = AddressSpace::new(&iommufd).map_err(|e| no_node(address, &iommufd, e))?;
    let device = Device::open(node).map_err(|e| no_node(address, node, e))?;
    let bound = space.bind(&device).and_then(|()| space.attach(&device));
    bound.map_err(|source| match source.raw_os_error() {
        Some(libc::EPERM) => VfioError::NotIsolated {
            address,
            group: number,
            source,
        },
        // Some member of the group belongs to a driver of this host, or the function to someone
        // else: the kernel says EINVAL where that is by the same node.
        Some(libc::EBUSY | libc::EINVAL) => match in_the_way(function) {
            others if others.is_empty() => VfioError::GroupBusy {
                address,
                group: number,
                holder: holder(function, &node.display().to_string()),
            },
            others => VfioError::GroupNotViable {
                address,
                group: number,
                others,
            },
        },
        _ => VfioError::Io {
            address,
            what: "giving the function an address space of iommufd",
            source,
        },
    })?;
    Ok(Opened {
        device,
        group: None,
        space: Space::Iommufd(space),
    })
}

/// By its group's node, with a container.
fn by_group(host: &Host, function: &PciFunction, number: u32) -> Result<Opened, VfioError> {
    let address = function.address;
    let container = container(host, address)?;
    let group = group(host, function, number)?;
    let failed = |what| {
        move |source| VfioError::Io {
            address,
            what,
            source,
        }
    };
    if !group
        .is_viable()
        .map_err(failed("asking for the group's status"))?
    {
        return Err(VfioError::GroupNotViable {
            address,
            group: number,
            others: in_the_way(function),
        });
    }
    group
        .enter(&container)
        .map_err(failed("putting the group into a container"))?;
    container.set_iommu().map_err(|source| {
        if source.raw_os_error() == Some(libc::EPERM) {
            VfioError::NotIsolated {
                address,
                group: number,
                source,
            }
        } else {
            failed("setting up the IOMMU")(source)
        }
    })?;
    // An address has no zero byte, so the default is never used.
    let name = CString::new(address.to_string()).unwrap_or_default();
    let device = group
        .device(&name)
        .map_err(|source| match source.raw_os_error() {
            Some(libc::EACCES) => VfioError::NeedsToken { address },
            _ => failed("opening the function in its group")(source),
        })?;
    Ok(Opened {
        device,
        group: Some(group),
        space: Space::Container(container),
    })
}

/// What can be known without VFIO; returns the function's group.
fn check(function: &PciFunction) -> Result<u32, VfioError> {
    let address = function.address;
    // First, since vfio-pci refuses a function without one.
    let group = function.iommu_group.ok_or(VfioError::NoIommu { address })?;
    match &function.driver {
        None => Err(VfioError::NoDriver { address }),
        Some(driver) if !function.is_bound_to_vfio() => Err(VfioError::OtherDriver {
            address,
            driver: driver.clone(),
        }),
        Some(_) => Ok(group),
    }
}

/// The functions that keep a function's group from being used.
fn in_the_way(function: &PciFunction) -> Vec<String> {
    let members = function.group_members.iter();
    let others = members.filter(|member| member.in_the_way);
    others
        .map(|member| {
            let driver = member.driver.as_deref().unwrap_or("none");
            format!("{} (driver {driver})", member.address)
        })
        .collect()
}

/// Who has a group's node open. This process is not among the users, but has it when nobody
/// else does.
fn holder(function: &PciFunction, node: &str) -> String {
    let users = function.users.iter();
    let mut holders =
        users.filter(|user| matches!(user, User::Open { node: open, .. } if open == node));
    let holder = holders.next().map(ToString::to_string);
    holder.unwrap_or_else(|| "this process uses another function of it".to_owned())
}

fn container(host: &Host, address: PciAddress) -> Result<Container, VfioError> {
    let node = host.path("dev/vfio/vfio");
    let container = Container::open(&node).map_err(|source| no_node(address, &node, source))?;
    let lacks = container.lacks().map_err(|source| VfioError::Io {
        address,
        what: "asking for VFIO's version",
        source,
    })?;
    match lacks {
        None => Ok(container),
        Some(what) => Err(VfioError::TooOld { address, what }),
    }
}

fn group(host: &Host, function: &PciFunction, group: u32) -> Result<Group, VfioError> {
    let address = function.address;
    let node = host.path(format!("dev/vfio/{group}"));
    Group::open(&node).map_err(|source| {
        if source.raw_os_error() == Some(libc::EBUSY) {
            let holder = holder(function, &node.display().to_string());
            return VfioError::GroupBusy {
                address,
                group,
                holder,
            };
        }
        no_node(address, &node, source)
    })
}

fn no_node(address: PciAddress, node: &Path, source: io::Error) -> VfioError {
    let remedy = match source.kind() {
        io::ErrorKind::PermissionDenied => {
            "run as root, or let a udev rule give your group access to /dev/vfio"
        }
        io::ErrorKind::NotFound => "load the module vfio-pci, and vfio_iommu_type1 with it",
        _ => "see the kernel's log",
    };
    VfioError::Node {
        address,
        path: node.display().to_string(),
        remedy,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sysfs::fake::{FakeFunction, FakeHost};

    const ADDRESS: &str = "0000:01:00.0";

    /// A host with one function, as far as sysfs shows it.
    fn host(driver: Option<&'static str>, group: Option<u32>) -> FakeHost {
        let host = FakeHost::new();
        let function = FakeFunction {
            driver,
            group,
            ..FakeFunction::default()
        };
        host.function(ADDRESS, &function);
        host
    }

    #[test]
    fn function_with_a_node_of_its_own_is_opened_by_it_and_others_by_their_group() {
        let host = host(Some("vfio-pci"), Some(7));
        host.directory(&format!("sys/bus/pci/devices/{ADDRESS}/vfio-dev/vfio3"));
        host.file("dev/vfio/devices/vfio3", "");
        // There is no iommufd: the node is of no use.
        let text = refusal(&host).to_string();
        assert!(text.contains("dev/vfio/vfio "), "{text}");
        host.file("dev/iommu", "");
        assert!(matches!(refusal(&host), VfioError::Node { .. }));
        let text = refusal(&host).to_string();
        assert!(text.contains("dev/iommu "), "{text}");
    }

    fn refusal(host: &FakeHost) -> VfioError {
        match open(&host.host(), ADDRESS.parse().unwrap()) {
            Ok(_) => panic!("there is nothing to open"),
            Err(error) => error,
        }
    }

    #[test]
    fn function_that_does_not_exist_is_named() {
        let error = refusal(&FakeHost::new());
        assert!(matches!(error, VfioError::NotFound { .. }));
        assert!(error.to_string().contains(ADDRESS), "{error}");
    }

    #[test]
    fn driver_in_the_way_is_named() {
        let text = refusal(&host(Some("nvme"), Some(7))).to_string();
        assert!(
            text.contains("driver nvme") && text.contains("vfio-pci"),
            "{text}"
        );
        let error = refusal(&host(None, Some(7)));
        assert!(matches!(error, VfioError::NoDriver { .. }), "{error}");
    }

    #[test]
    fn missing_iommu_and_missing_module_have_their_remedies() {
        let text = refusal(&host(Some("vfio-pci"), None)).to_string();
        assert!(text.contains("intel_iommu=on"), "{text}");
        let text = refusal(&host(Some("vfio-pci"), Some(7))).to_string();
        assert!(text.contains("load the module vfio-pci"), "{text}");
    }

    #[test]
    fn file_that_is_not_vfio_is_an_error_and_no_panic() {
        let host = host(Some("vfio-pci"), Some(7));
        host.file("dev/vfio/vfio", "");
        assert!(matches!(refusal(&host), VfioError::Io { .. }));
    }

    #[test]
    fn others_of_a_group_are_listed_with_their_drivers() {
        let host = host(Some("vfio-pci"), Some(7));
        for (address, driver) in [("0000:01:00.1", "e1000e"), ("0000:00:01.0", "vfio-pci")] {
            let function = FakeFunction {
                class: 0x02_00_00,
                driver: Some(driver),
                group: Some(7),
                ..FakeFunction::default()
            };
            host.function(address, &function);
        }
        let inventory = Inventory::read(&host.host());
        let function = inventory.find(ADDRESS.parse().unwrap()).unwrap();
        assert_eq!(in_the_way(function), ["0000:01:00.1 (driver e1000e)"]);
    }

    #[test]
    fn holder_of_a_group_is_named() {
        let host = host(Some("vfio-pci"), Some(7));
        host.process(4242, "qemu", "/dev/vfio/7");
        let inventory = Inventory::read(&host.host());
        let function = inventory.find(ADDRESS.parse().unwrap()).unwrap();
        let text = holder(function, "/dev/vfio/7");
        assert!(text.contains("4242") && text.contains("qemu"), "{text}");
        assert!(holder(function, "/dev/vfio/8").contains("this process"));
    }
}
