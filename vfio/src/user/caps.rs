//! The JSON that the two ends exchange in `VFIO_USER_VERSION`.

use std::collections::BTreeMap;

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::wire::WireError;

/// The longest version data that is read, in bytes. VMMs send about 200.
pub const MAX_VERSION_DATA: usize = 16 << 10;

/// What an end can do (specification, `VFIO_USER_VERSION`). An absent member has the
/// specification's default. Members that are not listed here, such as `twin_socket`, are
/// ignored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// File descriptors that the sender takes in one message; 1 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_msg_fds: Option<u64>,
    /// The most data in one read or write, in bytes; 1 MiB when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_data_xfer_size: Option<u64>,
    /// DMA windows at once; 65535 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_dma_maps: Option<u64>,
    /// Page sizes for DMA windows, or'ed together; 4096 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pgsizes: Option<u64>,
    /// Whether `VFIO_USER_REGION_WRITE_MULTI` is understood; false when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_multiple: Option<bool>,
    /// Whether the sender has anything to say of migration; what, is not looked at, and nothing is
    /// ever said of it here.
    #[serde(default, skip_serializing, deserialize_with = "is_there")]
    pub migration: bool,
}

impl Capabilities {
    /// What both ends can do: the members of `self` that `proposed` has too. The reply's
    /// "capability list must be a subset of those proposed".
    pub fn answer_to(&self, proposed: &Self) -> Self {
        Self {
            max_msg_fds: self.max_msg_fds.filter(|_| proposed.max_msg_fds.is_some()),
            max_data_xfer_size: self
                .max_data_xfer_size
                .filter(|_| proposed.max_data_xfer_size.is_some()),
            max_dma_maps: self
                .max_dma_maps
                .filter(|_| proposed.max_dma_maps.is_some()),
            pgsizes: self.pgsizes.filter(|_| proposed.pgsizes.is_some()),
            write_multiple: self
                .write_multiple
                .filter(|_| proposed.write_multiple.is_some()),
            migration: false,
        }
    }

    /// Whether the sender is QEMU, as far as can be told. Of the VMMs it alone proposes coalesced
    /// writes together with a word on migration: cloud-hypervisor has the second only, the client of
    /// this crate the first.
    pub fn are_qemus(&self) -> bool {
        self.write_multiple == Some(true) && self.migration
    }

    /// Reads version data: nothing at all, or JSON that ends in a NUL byte.
    pub fn decode(data: &[u8]) -> Result<Self, WireError> {
        let Some((last, json)) = data.split_last() else {
            return Ok(Self::default());
        };
        if data.len() > MAX_VERSION_DATA {
            return Err(WireError::BadVersionData(format!(
                "it has {} bytes, and at most {MAX_VERSION_DATA} are read",
                data.len()
            )));
        }
        if *last != 0 {
            return Err(WireError::BadVersionData(format!(
                "its last byte is {last:#04x} and not NUL"
            )));
        }
        if json.is_empty() {
            return Ok(Self::default());
        }
        // Deserialised directly, a struct could also be written as an array.
        let parsed = serde_json::from_slice::<BTreeMap<String, Value>>(json);
        match parsed.map(|mut data| data.remove("capabilities")) {
            Ok(None) => Ok(Self::default()),
            Ok(Some(Value::Object(members))) => {
                Self::deserialize(Value::Object(members)).map_err(|error| unreadable(&error))
            }
            Ok(Some(_)) => Err(WireError::BadVersionData(
                "its capabilities are not an object".into(),
            )),
            Err(error) => Err(unreadable(&error)),
        }
    }

    /// Writes version data, the final NUL byte included.
    pub fn encode(&self) -> Vec<u8> {
        // A struct of numbers and booleans always serialises; the empty object is what a
        // reader would take a missing one for.
        let mut bytes = serde_json::to_vec(&BTreeMap::from([("capabilities", self)]))
            .unwrap_or_else(|_| b"{}".to_vec());
        bytes.push(0);
        bytes
    }
}

fn is_there<'de, D: Deserializer<'de>>(member: D) -> Result<bool, D::Error> {
    IgnoredAny::deserialize(member).map(|_| true)
}

fn unreadable(error: &serde_json::Error) -> WireError {
    WireError::BadVersionData(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(json: &str) -> Capabilities {
        Capabilities::decode(format!("{json}\0").as_bytes()).unwrap()
    }

    #[test]
    fn qemu_is_told_from_other_clients_by_what_it_proposes() {
        let qemu = decode(
            r#"{"capabilities": {"migration": {"pgsize": 4096, "max_bitmap_size": 65536}, "max_msg_fds": 8,
                "write_multiple": true, "max_dma_maps": 65535, "pgsizes": 4096, "max_data_xfer_size": 1048576}}"#,
        );
        let cloud_hypervisor =
            decode(r#"{"capabilities": {"max_msg_fds": 1, "migration": {"pgsize": 4096}}}"#);
        let ours = decode(r#"{"capabilities": {"max_msg_fds": 16, "write_multiple": true}}"#);
        assert!(qemu.are_qemus());
        assert!(!cloud_hypervisor.are_qemus());
        assert!(!ours.are_qemus());
        assert!(!Capabilities::default().are_qemus());
    }
}
