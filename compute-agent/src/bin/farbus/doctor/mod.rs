//! `doctor`: what keeps attachments from working, and what helps.

mod agent_side;
mod host;

use farbus_compute_agent::api::Devices;
use farbus_rest::client::{Client, ClientError};
use serde::Serialize;

use crate::agent::AgentArgs;
use crate::failure::{Failure, with_causes};
use crate::show::{json, printable, text};

pub(crate) const NOTES: &str = "\
Example:
  farbus doctor

Each line is a finding: ok; note, which takes nothing away; warning, which costs speed or safety; or
problem, with which attachments cannot work. Below it stands what helps.";

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Level {
    Ok,
    Note,
    Warning,
    Problem,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    check: &'static str,
    level: Level,
    finding: String,
    remedy: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, finding: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Ok,
            finding: finding.into(),
            remedy: None,
        }
    }

    fn new(
        check: &'static str,
        level: Level,
        finding: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            check,
            level,
            finding: finding.into(),
            remedy: Some(remedy.into()),
        }
    }
}

#[derive(Serialize)]
struct Report {
    /// Whether attachments can work: there is no problem.
    can_attach: bool,
    findings: Vec<Finding>,
}

pub(crate) async fn run(args: &AgentArgs, client: &Client, as_json: bool) -> Result<(), Failure> {
    let mut findings = Vec::new();
    if let Some(socket) = args.socket() {
        findings.extend(agent_side::socket(socket));
    }
    let is_reached = agent_side::reached(args.name(), client, &mut findings).await;
    if is_reached {
        findings.extend(device_servers(client.get("/v1/devices").await));
    }
    // What is on this host says nothing of an agent on another.
    if let Some(socket) = args.socket() {
        findings.push(host::memlock(agent_side::process(socket)));
        findings.extend(host::rdma());
        findings.push(host::kernel());
    }
    let can_attach = findings.iter().all(|f| f.level != Level::Problem);
    let report = Report {
        can_attach,
        findings,
    };
    if as_json {
        json(&report)?;
    } else {
        text(&for_people(&report))?;
    }
    if can_attach {
        Ok(())
    } else {
        Err(Failure::unwell())
    }
}

fn device_servers(asked: Result<Devices, ClientError>) -> Vec<Finding> {
    const CHECK: &str = "device-servers";
    let found = match asked {
        Ok(found) => found,
        Err(error) => {
            return vec![Finding::new(
                CHECK,
                Level::Problem,
                format!(
                    "the agent cannot say what there is: {}",
                    with_causes(&error)
                ),
                "see the agent's log: journalctl -u farbus-compute-agent",
            )];
        }
    };
    let mut findings: Vec<Finding> = found
        .unreachable
        .iter()
        .map(|server| {
            Finding::new(
                CHECK,
                Level::Problem,
                format!(
                    "{} at {} does not answer: {}",
                    server.device_server, server.address, server.error
                ),
                "start farbus-device-server there, and let its address and port through firewalls; \
                 or mend [[device-server]] in /etc/farbus/agent.toml",
            )
        })
        .collect();
    let mut names: Vec<&str> = found.devices.iter().map(|d| &*d.device_server).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let exports = found.devices.iter().filter(|d| d.device_server == name);
        findings.push(Finding::ok(
            CHECK,
            format!("{name} answers and offers {} devices", exports.count()),
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::new(
            CHECK,
            Level::Warning,
            "no device server offers anything",
            "name device servers in /etc/farbus/agent.toml, a [[device-server]] section each, and \
             exports in theirs",
        ));
    }
    findings
}

fn for_people(report: &Report) -> String {
    let mut shown = String::new();
    for finding in &report.findings {
        let level = crate::show::name(&finding.level);
        let Finding {
            check,
            finding,
            remedy,
            ..
        } = finding;
        shown.push_str(&format!("{level:<8} {check}: {}\n", printable(finding)));
        if let Some(remedy) = remedy {
            shown.push_str(&format!("         -> {remedy}\n"));
        }
    }
    shown.push_str(if report.can_attach {
        "\nAttachments can work.\n"
    } else {
        "\nAttachments cannot work; see the problems above.\n"
    });
    shown
}
