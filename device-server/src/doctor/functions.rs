//! What holds for single functions: their groups, and what keeps them from being exported.

use farbus_vfio::PciAddress;
use farbus_vfio::sysfs::acs::ports_without_acs;
use farbus_vfio::sysfs::{Host, Inventory, Obstacle, PciFunction, User};

use super::{Finding, Level};
use crate::sources::has_engine;

/// Groups that cannot be used, and which ports make them as large as they are. Of functions
/// that nobody asked for, those count that an engine serves.
pub(super) fn groups(host: &Host, inventory: &Inventory, wanted: &[PciAddress]) -> Vec<Finding> {
    const CHECK: &str = "groups";
    let level = if wanted.is_empty() {
        Level::Warning
    } else {
        Level::Problem
    };
    let mut findings = Vec::new();
    for function in looked_at(inventory, wanted) {
        for obstacle in &function.obstacles {
            if let Obstacle::SharedGroup { .. } = obstacle {
                let ports = ports_without_acs(host, function.address);
                let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
                let why = match &ports[..] {
                    [] => String::new(),
                    ports => format!(" (no ACS in {})", ports.join(", ")),
                };
                findings.push(Finding::new(
                    CHECK,
                    level,
                    format!("{}: {obstacle}{why}", function.address),
                    obstacle.remedy(),
                ));
            }
        }
    }
    if findings.is_empty() && looked_at(inventory, wanted).any(|f| f.iommu_group.is_some()) {
        findings.push(Finding::ok(CHECK, "every group can be used by itself"));
    }
    findings
}

/// What else keeps functions from being exported. Without wanted ones, one that can be is
/// enough.
pub(super) fn exportable(inventory: &Inventory, wanted: &[PciAddress]) -> Vec<Finding> {
    const CHECK: &str = "functions";
    if wanted.is_empty() {
        let served = looked_at(inventory, wanted).count();
        let addresses = |holds: fn(&PciFunction) -> bool| -> Vec<String> {
            let functions = looked_at(inventory, wanted).filter(|f| holds(f));
            functions.map(|f| f.address.to_string()).collect()
        };
        let ready = addresses(PciFunction::is_exportable);
        let exported = addresses(is_exported);
        return vec![match (&ready[..], served) {
            ([], _) if !exported.is_empty() => {
                Finding::ok(CHECK, format!("are exported now: {}", exported.join(", ")))
            }
            ([], 0) => Finding::new(
                CHECK,
                Level::Problem,
                "this host has no NVMe controller, and other devices have no engine yet",
                "put one in, or export a software drive (--soft-nvme)",
            ),
            ([], _) => Finding::new(
                CHECK,
                Level::Problem,
                format!("none of the {served} NVMe controllers can be exported now"),
                "see farbus-device-server list for each one's reason",
            ),
            (ready, _) => Finding::ok(CHECK, format!("can be exported: {}", ready.join(", "))),
        }];
    }
    wanted
        .iter()
        .flat_map(|address| match inventory.find(*address) {
            Some(function) => of_function(function),
            None => vec![Finding::new(
                CHECK,
                Level::Problem,
                format!("there is no PCI function {address}"),
                "see farbus-device-server list for those there are",
            )],
        })
        .collect()
}

/// Whether a device server has it open, and nobody else.
fn is_exported(function: &PciFunction) -> bool {
    let is_ours = |user: &User| {
        matches!(user, User::Open { program, node, .. }
        if node.starts_with("/dev/vfio/") && program == "farbus-device-server")
    };
    !function.users.is_empty() && function.users.iter().all(is_ours)
}

fn of_function(function: &PciFunction) -> Vec<Finding> {
    const CHECK: &str = "functions";
    let address = function.address;
    if is_exported(function) {
        return vec![Finding::ok(CHECK, format!("{address} is exported now"))];
    }
    let mut findings: Vec<Finding> = function
        .obstacles
        .iter()
        // The check of groups has told.
        .filter(|obstacle| !matches!(obstacle, Obstacle::SharedGroup { .. }))
        .map(|obstacle| {
            let what = format!("{address}: {obstacle}");
            Finding::new(CHECK, Level::Problem, what, obstacle.remedy())
        })
        .collect();
    if !has_engine(function.class) {
        findings.push(Finding::new(
            CHECK,
            Level::Problem,
            format!(
                "{address}: there is no engine for its class {} ({}) yet",
                function.class, function.class_name
            ),
            "export an NVMe controller",
        ));
    }
    if findings.is_empty() && function.is_exportable() {
        findings.push(Finding::ok(CHECK, format!("{address} can be exported")));
    }
    findings
}

fn looked_at<'a>(
    inventory: &'a Inventory,
    wanted: &'a [PciAddress],
) -> impl Iterator<Item = &'a PciFunction> {
    inventory.functions().iter().filter(move |function| {
        if wanted.is_empty() {
            has_engine(function.class)
        } else {
            wanted.contains(&function.address)
        }
    })
}
