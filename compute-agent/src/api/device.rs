//! What the pool has.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Answer of `GET /v1/devices`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Devices {
    /// Every export of every device server that answered.
    pub devices: Vec<Device>,
    /// The device servers that did not.
    pub unreachable: Vec<Unreachable>,
}

/// One export of one device server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Device {
    /// `DEVICE-SERVER/EXPORT`, which is what an attachment asks for.
    #[schema(example = "rack1/disk0")]
    pub id: String,
    /// The device server's name in the agent's configuration.
    pub device_server: String,
    /// Where it listens, `HOST:PORT`.
    pub address: String,
    /// The export's name there.
    pub export: String,
    /// What kind of device it is.
    pub class: DeviceClass,
    /// PCI vendor id, four hexadecimal digits.
    #[schema(example = "1b36")]
    pub vendor_id: String,
    /// PCI device id, four hexadecimal digits.
    #[schema(example = "0010")]
    pub device_id: String,
    /// The device's model, if it says so.
    pub model: Option<String>,
    /// The device's serial number, if it has one.
    pub serial: Option<String>,
    /// Bytes that it holds, for storage.
    pub capacity_bytes: Option<u64>,
    /// Bytes of a logical block, for storage.
    pub block_size_bytes: Option<u32>,
    /// The NUMA node of the device server that it is near to.
    pub numa_node: Option<u32>,
    /// Whether it can be had.
    pub state: DeviceState,
    /// Who has claimed it.
    pub holder: Option<String>,
    /// Why it cannot be had, if it has failed.
    pub why: Option<String>,
}

/// What kind of device an export is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceClass {
    /// An NVMe controller.
    Nvme,
    /// Anything else.
    Other,
}

/// Whether an export can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// Nobody has claimed it.
    Free,
    /// Somebody has.
    Claimed,
    /// It has no working function.
    Failed,
    /// Its device server takes no new claims.
    Draining,
}

/// A device server that did not answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Unreachable {
    /// Its name in the agent's configuration.
    pub device_server: String,
    /// Where it should listen, `HOST:PORT`.
    pub address: String,
    /// What happened.
    pub error: String,
}

/// Asks for any free device that has all that is named.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Selector {
    /// Of this device server.
    pub device_server: Option<String>,
    /// Of this kind.
    pub class: Option<DeviceClass>,
    /// Of this PCI vendor, four hexadecimal digits.
    pub vendor_id: Option<String>,
    /// Of this PCI device id, four hexadecimal digits.
    pub device_id: Option<String>,
    /// Of exactly this model.
    pub model: Option<String>,
    /// Of at least so many bytes.
    pub min_capacity_bytes: Option<u64>,
    /// Near to this NUMA node of its device server.
    pub numa_node: Option<u32>,
}
