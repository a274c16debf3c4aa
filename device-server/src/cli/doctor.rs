//! `doctor`: whether this host can export PCI functions.

use std::io::Write;
use std::path::Path;

use clap::Args;
use farbus_vfio::PciAddress;
use farbus_vfio::sysfs::Host;

use super::{Failure, failure};
use crate::doctor::{Report, examine, rdma};

/// Exit code for a host, or functions, that cannot be exported.
const CANNOT_EXPORT: u8 = 5;

pub(super) const NOTES: &str = "\
Each line is a finding: ok; note, which takes nothing away; warning, which costs speed or safety; or
problem, with which an export cannot work. Software drives and vfio-user devices work on any host.";

#[derive(Args)]
pub(super) struct DoctorArgs {
    /// Look at this function, such as 0000:01:00.0, and not at whether there is any that can
    /// be exported. May be given several times.
    #[arg(long, value_name = "ADDRESS")]
    pci: Vec<PciAddress>,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &DoctorArgs, host: &Host, out: &mut dyn Write) -> Result<u8, Failure> {
    let mut report = examine(host, &args.pci);
    // What libibverbs sees is of the real host only.
    if host.path("") == Path::new("/") {
        report.findings.extend(rdma::as_seen_by_verbs());
    }
    let text = if args.json {
        serde_json::to_string_pretty(&report).map_err(failure(1))? + "\n"
    } else {
        for_people(&report)
    };
    out.write_all(text.as_bytes()).map_err(failure(1))?;
    Ok(if report.can_export { 0 } else { CANNOT_EXPORT })
}

fn for_people(report: &Report) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let (level, check) = (finding.level.name(), finding.check);
        text.push_str(&format!("{level:<8} {check}: {}\n", finding.what));
        if let Some(remedy) = &finding.remedy {
            text.push_str(&format!("         -> {remedy}\n"));
        }
    }
    text.push_str(if report.can_export {
        "\nAn export of PCI functions can work.\n"
    } else {
        "\nAn export of PCI functions cannot work; see the problems above.\n"
    });
    text
}
