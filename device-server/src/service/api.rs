//! What the admin interface and its clients exchange.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::exports::{Export, state_name};

/// Answer of `GET /v1/exports`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExportList {
    /// Every export.
    pub exports: Vec<ExportInfo>,
    /// Whether no new claims are given.
    pub draining: bool,
}

/// One export.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExportInfo {
    /// The name that it is claimed by.
    #[schema(example = "disk0")]
    pub name: String,
    /// PCI class code, six hexadecimal digits; all zero if unknown, as the ids.
    #[schema(example = "010802")]
    pub class_code: String,
    /// PCI vendor id, four hexadecimal digits.
    #[schema(example = "1b36")]
    pub vendor_id: String,
    /// PCI device id, four hexadecimal digits.
    #[schema(example = "0010")]
    pub device_id: String,
    /// The device's model, if it says so.
    pub model: Option<String>,
    /// The device's serial number, if it says so.
    pub serial: Option<String>,
    /// Bytes that it holds, for storage.
    pub capacity_bytes: Option<u64>,
    /// Bytes of a logical block, for storage.
    pub block_size_bytes: Option<u32>,
    /// The NUMA node of this host that it is near to.
    pub numa_node: Option<u16>,
    /// `free`, `claimed`, `failed` (it has no working function) or `draining` (it takes no new claims;
    /// somebody may still have it).
    #[schema(example = "claimed")]
    pub state: String,
    /// Why it cannot be claimed.
    pub why: Option<String>,
    /// Who has it.
    pub claim: Option<ClaimInfo>,
    /// Claims that were granted since it is exported.
    pub claims: u64,
    /// Commands that came from claimants.
    pub commands: u64,
    /// Bytes that came from claimants by TCP.
    pub received_bytes: u64,
    /// Bytes that went to claimants by TCP.
    pub sent_bytes: u64,
}

/// The claim of an export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClaimInfo {
    /// Who has the export, as it names itself, and its address.
    pub holder: String,
    /// The claim's number, which is higher than those of all claims before.
    pub epoch: u64,
    /// Since when, RFC 3339.
    #[schema(example = "2026-01-01T00:00:00.000Z")]
    pub since: String,
}

/// Answer of `POST /v1/reload`: names of entries of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reloaded {
    /// New ones.
    pub added: Vec<String>,
    /// Those that were taken out. They take no new claims and go with the last one.
    pub removed: Vec<String>,
    /// Those that are opened anew as soon as nobody has them.
    pub changed: Vec<String>,
    /// Those, removed or changed, that somebody still has.
    pub waiting: Vec<String>,
    /// Those that cannot be opened now. They are tried again every few seconds.
    pub failed: Vec<Unopened>,
    /// Keys of `[server]` that have changed, and take effect at the next start.
    pub restart_needed: Vec<String>,
}

/// An entry of the configuration that cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Unopened {
    /// Its name.
    pub export: String,
    /// Why, and what helps.
    pub why: String,
}

/// Answer of `POST` and `DELETE /v1/drain`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Drain {
    /// Whether no new claims are given.
    pub draining: bool,
    /// Exports that somebody has.
    pub claims: u64,
}

impl ExportInfo {
    /// An export as it is now.
    pub(super) fn of(export: &Export, draining: bool) -> Self {
        use std::sync::atomic::Ordering::Relaxed;
        let status = export.status(draining);
        let known = &status.known;
        let (capacity_bytes, block_size_bytes) = known.size();
        let identity = known.identity.clone().unwrap_or_default();
        let said = |text: String| (!text.is_empty()).then_some(text);
        let tally = export.tally();
        Self {
            name: export.name().to_string(),
            class_code: format!("{:06x}", known.class),
            vendor_id: format!("{:04x}", known.vendor),
            device_id: format!("{:04x}", known.device),
            model: said(identity.model),
            serial: said(identity.serial),
            capacity_bytes,
            block_size_bytes,
            numa_node: known.numa_node,
            state: state_name(status.state).into(),
            why: status.why,
            claim: status.claim.map(|claim| ClaimInfo {
                holder: printable(&claim.holder),
                epoch: claim.epoch.0,
                since: timestamp(claim.since),
            }),
            claims: tally.claims.load(Relaxed),
            commands: tally.commands.load(Relaxed),
            received_bytes: tally.bytes_received.load(Relaxed),
            sent_bytes: tally.bytes_sent.load(Relaxed),
        }
    }
}

fn timestamp(time: SystemTime) -> String {
    farbus_rest::timestamp(time)
}

/// A claimant chose these characters; none of them may steer a terminal.
fn printable(text: &str) -> String {
    let escaped = text.chars().map(|c| match c.is_control() {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    });
    escaped.collect()
}
