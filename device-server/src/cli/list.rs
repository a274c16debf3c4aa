//! `list`: the PCI functions of this host.

use std::io::Write;

use clap::Args;
use farbus_vfio::sysfs::{Host, Inventory, Obstacle, PciFunction};
use serde::Serialize;

use super::table::table;
use super::{Failure, failure};
use crate::sources::has_engine;

pub(super) const NOTES: &str = "\
Columns: GROUP is the IOMMU group, NUMA the node next to the device, RESET how the kernel can reset it,
VFS the virtual functions that there are of those that there can be. ENGINE says what serves the
device's class; without one it can be opened, but a claim is refused. EXPORTABLE \"yes\" means that
export --bind --pci ADDRESS would work now.";

#[derive(Args)]
pub(super) struct ListArgs {
    /// Print a JSON array with everything that is known of each function.
    #[arg(long)]
    json: bool,
}

/// A function as it is printed in JSON.
#[derive(Serialize)]
struct Listed<'a> {
    exportable: bool,
    engine: Option<&'static str>,
    #[serde(flatten)]
    function: &'a PciFunction,
}

pub(super) fn run(args: &ListArgs, host: &Host, out: &mut dyn Write) -> Result<u8, Failure> {
    let inventory = Inventory::read(host);
    let text = if args.json {
        let listed: Vec<Listed<'_>> = inventory.functions().iter().map(listed).collect();
        serde_json::to_string_pretty(&listed).map_err(failure(1))? + "\n"
    } else {
        for_people(&inventory)
    };
    out.write_all(text.as_bytes()).map_err(failure(1))?;
    Ok(0)
}

fn listed(function: &PciFunction) -> Listed<'_> {
    Listed {
        exportable: function.is_exportable(),
        engine: engine(function),
        function,
    }
}

fn engine(function: &PciFunction) -> Option<&'static str> {
    has_engine(function.class).then_some("nvme")
}

fn for_people(inventory: &Inventory) -> String {
    if inventory.functions().is_empty() {
        return "This host has no PCI functions.\n".into();
    }
    let header = [
        "ADDRESS",
        "CLASS",
        "ID",
        "DRIVER",
        "GROUP",
        "NUMA",
        "RESET",
        "VFS",
        "ENGINE",
        "EXPORTABLE",
    ];
    let rows: Vec<Vec<String>> = inventory.functions().iter().map(row).collect();
    let mut text = table(&header, &rows);
    for (obstacle, addresses) in obstacles(inventory) {
        let (kind, remedy) = (obstacle.kind(), obstacle.remedy());
        let addresses = addresses.join(" ");
        text.push_str(&format!(
            "\n{kind}: {addresses}\n  {obstacle}\n  -> {remedy}\n"
        ));
    }
    text
}

/// What is in the way, and of which functions. Every host has bridges, and nobody wants to
/// lend one.
fn obstacles(inventory: &Inventory) -> Vec<(&Obstacle, Vec<String>)> {
    let mut found: Vec<(&Obstacle, Vec<String>)> = Vec::new();
    for function in inventory.functions() {
        let in_the_way = function.obstacles.iter();
        for obstacle in in_the_way.filter(|obstacle| **obstacle != Obstacle::Bridge) {
            let address = function.address.to_string();
            match found.iter_mut().find(|(other, _)| *other == obstacle) {
                Some((_, addresses)) => addresses.push(address),
                None => found.push((obstacle, vec![address])),
            }
        }
    }
    found
}

fn row(function: &PciFunction) -> Vec<String> {
    let dash = || "-".to_owned();
    let number = |number: Option<u32>| number.map_or_else(dash, |number| number.to_string());
    let virtual_functions = match (&function.sriov, function.physical_function) {
        (Some(sriov), _) => format!("{} of {}", sriov.functions.len(), sriov.total),
        (None, Some(physical)) => format!("of {physical}"),
        (None, None) => dash(),
    };
    let resets = match &function.reset_methods[..] {
        [] => dash(),
        methods => methods.join(","),
    };
    let kinds: Vec<&str> = function.obstacles.iter().map(Obstacle::kind).collect();
    vec![
        function.address.to_string(),
        format!("{} {}", function.class, function.class_name),
        function.id.clone(),
        function.driver.clone().unwrap_or_else(dash),
        number(function.iommu_group),
        number(function.numa_node),
        resets,
        virtual_functions,
        engine(function).map_or_else(dash, Into::into),
        match &kinds[..] {
            [] => "yes".into(),
            kinds => format!("no: {}", kinds.join(", ")),
        },
    ]
}
