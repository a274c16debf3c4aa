//! Whether a host can export PCI functions, and what helps where it cannot.
//!
//! Everything is read from the [`Host`] that is given; nothing is changed and nothing opened
//! that a driver would notice.

mod functions;
mod host;
pub(crate) mod rdma;
#[cfg(test)]
mod tests;

use farbus_vfio::PciAddress;
use farbus_vfio::sysfs::{Host, Inventory};
use serde::Serialize;

/// What a claim pins in memory at most: 16 MiB of buffers, its queues, and what it lends to
/// the controller, rounded up. In bytes.
const PINNED_PER_EXPORT: u64 = 64 << 20;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Not as good as it could be, and fine.
    Note,
    /// Costs speed or safety.
    Warning,
    /// An export cannot work.
    Problem,
}

impl Level {
    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Problem => "problem",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at, as one word.
    pub check: &'static str,
    /// How much it matters.
    pub level: Level,
    /// What was found, as a sentence without its full stop.
    #[serde(rename = "finding")]
    pub what: String,
    /// What helps; present unless it is as it should be.
    pub remedy: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, what: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Ok,
            what: what.into(),
            remedy: None,
        }
    }

    fn new(
        check: &'static str,
        level: Level,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            check,
            level,
            what: what.into(),
            remedy: Some(remedy.into()),
        }
    }
}

/// All findings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether an export can work: there is no problem among the findings.
    pub can_export: bool,
    /// What was found.
    pub findings: Vec<Finding>,
}

/// Looks at a host, with regard to certain functions or, when there are none, to whether any
/// function can be exported.
pub fn examine(host: &Host, wanted: &[PciAddress]) -> Report {
    let inventory = Inventory::read(host);
    let iommu = host::iommu(host);
    let has_iommu = iommu.level == Level::Ok;
    let mut findings = vec![iommu];
    if has_iommu {
        findings.push(host::interrupt_remapping(host));
    }
    findings.extend(host::vfio(host));
    findings.extend(functions::groups(host, &inventory, wanted));
    findings.extend(functions::exportable(&inventory, wanted));
    findings.push(host::memlock(host, wanted.len().max(1) as u64));
    findings.push(host::huge_pages(host));
    findings.extend(rdma::devices(host));
    let is_problem = |finding: &Finding| finding.level == Level::Problem;
    Report {
        can_export: !findings.iter().any(is_problem),
        findings,
    }
}
