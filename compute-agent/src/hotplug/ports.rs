//! Which root ports of a QEMU machine are free.
//!
//! Asked of QEMU's object tree, not of the PCI hierarchy: that is made by the firmware's enumeration,
//! before which every port looks empty.

use serde_json::{Value, json};

use super::HotplugError;
use super::qmp::Qmp;
use super::wait::Until;

/// Where QEMU keeps the devices that have names.
pub(super) const PERIPHERAL: &str = "/machine/peripheral";

/// The device types that have one slot, which takes hot-plug.
const PORT_TYPES: [&str; 3] = ["pcie-root-port", "ioh3420", "xio3130-downstream"];

/// The children of an object: their names and types. An object that does not exist has none.
pub(super) fn children(
    qmp: &mut Qmp,
    path: &str,
    until: Until,
) -> Result<Vec<(String, String)>, HotplugError> {
    let listed = match qmp.ask("qom-list", &json!({ "path": path }), until)? {
        Ok(listed) => listed,
        Err(refusal) if refusal.class == "DeviceNotFound" => return Ok(Vec::new()),
        Err(refusal) => return Err(refusal.into_error("qom-list", "")),
    };
    let properties = listed.as_array().map(Vec::as_slice).unwrap_or_default();
    let child = |property: &Value| {
        let name = property.get("name")?.as_str()?;
        let kind = property.get("type")?.as_str()?;
        Some((name.to_owned(), kind.to_owned()))
    };
    Ok(properties.iter().filter_map(child).collect())
}

/// What is between the brackets of `child<...>`.
pub(super) fn child_type(kind: &str) -> Option<&str> {
    kind.strip_prefix("child<")?.strip_suffix('>')
}

/// A property that is a boolean; one that does not exist is false.
pub(super) fn flag(
    qmp: &mut Qmp,
    path: &str,
    property: &str,
    until: Until,
) -> Result<bool, HotplugError> {
    let ask = json!({"path": path, "property": property});
    let answer = qmp.ask("qom-get", &ask, until)?;
    Ok(answer.is_ok_and(|value| value == Value::Bool(true)))
}

/// A port that takes hot-plug and holds nothing: the first by name, where `rp2` comes before `rp10`.
pub(super) fn free_port(qmp: &mut Qmp, until: Until) -> Result<String, HotplugError> {
    let mut ports: Vec<String> = children(qmp, PERIPHERAL, until)?
        .into_iter()
        .filter(|(_, kind)| child_type(kind).is_some_and(|kind| PORT_TYPES.contains(&kind)))
        .map(|(name, _)| name)
        .collect();
    ports.sort_by_key(|name| (name.len(), name.clone()));
    for port in &ports {
        if is_free(qmp, port, until)? {
            return Ok(port.clone());
        }
    }
    Err(HotplugError::NoFreePort { ports: ports.len() })
}

fn is_free(qmp: &mut Qmp, port: &str, until: Until) -> Result<bool, HotplugError> {
    let path = format!("{PERIPHERAL}/{port}");
    if !flag(qmp, &path, "hotplug", until)? {
        return Ok(false);
    }
    // The bus of a port has its name.
    let on_bus = children(qmp, &format!("{path}/{port}"), until)?;
    Ok(!on_bus.iter().any(|(name, _)| name.starts_with("child[")))
}
