//! One look at all PCI functions of a host.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use super::host::{attribute, link_name, names, number};
use super::obstacles::obstacles;
use super::users::Usage;
use super::{ClassCode, Host, IOMMUFD, Obstacle, User};
use crate::PciAddress;

/// All functions, ascending by address.
#[derive(Debug)]
pub struct Inventory {
    functions: Vec<PciFunction>,
}

/// One function, as it was when the inventory was taken.
#[derive(Clone, Debug, Serialize)]
pub struct PciFunction {
    /// Where it sits.
    pub address: PciAddress,
    /// What it is, as a number.
    pub class: ClassCode,
    /// What it is, for people.
    pub class_name: &'static str,
    /// Vendor and device id, such as `8086:10ca`.
    pub id: String,
    /// The subsystem's vendor and device id.
    pub subsystem_id: String,
    /// The driver that has it.
    pub driver: Option<String>,
    /// The IOMMU group that it is in: the least that an IOMMU can tell apart.
    pub iommu_group: Option<u32>,
    /// Its own node below the root (`dev/vfio/devices/vfioN`), while VFIO has it, where the kernel
    /// has such nodes and iommufd. It is opened by that then, and by its group's node otherwise.
    pub device_node: Option<String>,
    /// The other functions of that group.
    pub group_members: Vec<Member>,
    /// The NUMA node that it is next to, if the host says so.
    pub numa_node: Option<u32>,
    /// How the kernel can reset it, best first; `unknown` on kernels that do not tell.
    pub reset_methods: Vec<String>,
    /// Present for a physical function that can have virtual ones.
    pub sriov: Option<Sriov>,
    /// Present for a virtual function: the one that it belongs to.
    pub physical_function: Option<PciAddress>,
    /// Who uses it now.
    pub users: Vec<User>,
    /// What keeps it from being lent; empty when nothing does.
    pub obstacles: Vec<Obstacle>,
}

/// Another function of the same IOMMU group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Member {
    /// Where it sits.
    pub address: PciAddress,
    /// The driver that has it.
    pub driver: Option<String>,
    /// Whether it keeps the group from being used through VFIO.
    pub in_the_way: bool,
}

/// What a physical function says about virtual ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sriov {
    /// How many it can have.
    pub total: u16,
    /// Those that there are.
    pub functions: Vec<PciAddress>,
}

impl PciFunction {
    /// Whether it can be lent now, binding it to VFIO included.
    pub fn is_exportable(&self) -> bool {
        self.obstacles.is_empty()
    }

    /// Whether a driver of the VFIO family has it.
    pub fn is_bound_to_vfio(&self) -> bool {
        self.driver.as_deref().is_some_and(is_vfio)
    }
}

/// Whether a driver hands its device to programs through VFIO. Variant drivers, such as
/// `mlx5_vfio_pci`, have it in their names too.
pub(super) fn is_vfio(driver: &str) -> bool {
    driver.contains("vfio")
}

impl Inventory {
    /// Takes a look.
    pub fn read(host: &Host) -> Self {
        let directory = host.path("sys/bus/pci/devices");
        let usage = Usage::read(host);
        let mut functions: Vec<PciFunction> = names(&directory)
            .iter()
            .filter_map(|name| function(&directory.join(name), name.parse().ok()?))
            .collect();
        functions.sort_by_key(|function| function.address);

        let mut groups: BTreeMap<u32, Vec<Member>> = BTreeMap::new();
        for function in &functions {
            if let Some(group) = function.iommu_group {
                groups.entry(group).or_default().push(member(function));
            }
        }
        for function in &mut functions {
            let group = function.iommu_group.and_then(|group| groups.get(&group));
            function.group_members = group
                .into_iter()
                .flatten()
                .filter(|member| member.address != function.address)
                .cloned()
                .collect();
            function.device_node = device_node(host, function.address);
            if !function.class.is_bridge() {
                function.users = usage.of(&host.function(function.address), function);
            }
            function.obstacles = obstacles(host, function);
        }
        Self { functions }
    }

    /// The functions, ascending by address.
    pub fn functions(&self) -> &[PciFunction] {
        &self.functions
    }

    /// The function at this address.
    pub fn find(&self, address: PciAddress) -> Option<&PciFunction> {
        self.functions.iter().find(|f| f.address == address)
    }
}

fn function(directory: &Path, address: PciAddress) -> Option<PciFunction> {
    let class = ClassCode(u32::try_from(number(&directory.join("class"))?).ok()?);
    let group = directory.join("iommu_group");
    // A group of VFIO's mode without IOMMU isolates nothing.
    let isolates = attribute(&group.join("name")).as_deref() != Some("vfio-noiommu");
    Some(PciFunction {
        address,
        class,
        class_name: class.name(),
        id: id(directory, "vendor", "device"),
        subsystem_id: id(directory, "subsystem_vendor", "subsystem_device"),
        driver: link_name(&directory.join("driver")),
        iommu_group: link_name(&group)
            .filter(|_| isolates)
            .and_then(|name| name.parse().ok()),
        device_node: None,
        group_members: Vec::new(),
        // -1 stands for none.
        numa_node: number(&directory.join("numa_node")).and_then(|node| u32::try_from(node).ok()),
        reset_methods: reset_methods(directory),
        sriov: sriov(directory),
        physical_function: link_name(&directory.join("physfn")).and_then(|name| name.parse().ok()),
        users: Vec::new(),
        obstacles: Vec::new(),
    })
}

fn device_node(host: &Host, address: PciAddress) -> Option<String> {
    let name = names(&host.function(address).join("vfio-dev"))
        .into_iter()
        .next()?;
    let node = format!("dev/vfio/devices/{name}");
    let exists = |path: &str| host.path(path).exists();
    (exists(&node) && exists(IOMMUFD)).then_some(node)
}

fn id(directory: &Path, vendor: &str, device: &str) -> String {
    let part = |name| number(&directory.join(name)).unwrap_or(0);
    format!("{:04x}:{:04x}", part(vendor), part(device))
}

/// `reset_method` exists since Linux 5.15; `reset` exists when there is any method.
fn reset_methods(directory: &Path) -> Vec<String> {
    match attribute(&directory.join("reset_method")) {
        Some(methods) => methods.split_ascii_whitespace().map(Into::into).collect(),
        None if directory.join("reset_method").exists() => Vec::new(),
        None if directory.join("reset").exists() => vec!["unknown".into()],
        None => Vec::new(),
    }
}

fn sriov(directory: &Path) -> Option<Sriov> {
    let total = u16::try_from(number(&directory.join("sriov_totalvfs"))?).ok()?;
    let there = number(&directory.join("sriov_numvfs")).map_or(0, |n| n.clamp(0, total.into()));
    let functions = (0..there)
        .filter_map(|n| {
            link_name(&directory.join(format!("virtfn{n}")))?
                .parse()
                .ok()
        })
        .collect();
    Some(Sriov { total, functions })
}

/// The kernel lends a group only while no driver that does DMA on its own has a member.
/// Those named here do not (`driver_managed_dma` in Linux).
fn member(function: &PciFunction) -> Member {
    let driver = function.driver.clone();
    let harmless = |driver: &str| is_vfio(driver) || matches!(driver, "pcieport" | "pci-stub");
    Member {
        address: function.address,
        in_the_way: driver.as_deref().is_some_and(|driver| !harmless(driver)),
        driver,
    }
}
