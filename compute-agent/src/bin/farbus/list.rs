//! `list`: the attachments, or all about one.

use clap::Args;
use farbus_compute_agent::api::{Attachment, Attachments, EndpointSpec, Limits, Vm};
use farbus_rest::client::Client;

use crate::attach::parse_id;
use crate::failure::Failure;
use crate::show::{age, json, name, or_dash, printable, table, text};
use crate::units;

#[derive(Args)]
pub(crate) struct ListArgs {
    /// Show all about this one.
    #[arg(value_parser = parse_id)]
    id: Option<String>,
}

pub(crate) async fn run(args: &ListArgs, client: &Client, as_json: bool) -> Result<(), Failure> {
    let Some(id) = &args.id else {
        let all: Attachments = client.get("/v1/attachments").await?;
        return if as_json {
            json(&all)
        } else {
            text(&for_people(&all.attachments))
        };
    };
    let one: Attachment = client.get(&format!("/v1/attachments/{id}")).await?;
    if as_json {
        json(&one)
    } else {
        text(&in_full(&one))
    }
}

fn for_people(attachments: &[Attachment]) -> String {
    let row = |one: &Attachment| {
        [
            one.id.clone(),
            or_dash(one.device.as_ref().or(one.spec.device.as_ref())),
            name(&one.state),
            age(&one.since),
            endpoint(&one.spec.endpoint).into(),
            vm(&one.spec.vm),
            one.reason.clone().unwrap_or_default(),
        ]
    };
    table(
        ["ID", "DEVICE", "STATE", "FOR", "ENDPOINT", "VM", "REASON"],
        attachments.iter().map(row).collect(),
    )
}

fn endpoint(spec: &EndpointSpec) -> &'static str {
    match spec {
        EndpointSpec::VfioUser { .. } => "vfio-user",
        EndpointSpec::VhostUserBlk { .. } => "vhost-user-blk",
    }
}

fn vm(vm: &Vm) -> String {
    match vm {
        Vm::None => "-".into(),
        Vm::Qemu { qmp, .. } => format!("qemu {}", qmp.display()),
        Vm::CloudHypervisor { api } => format!("cloud-hypervisor {}", api.display()),
    }
}

fn limits(limits: &Limits) -> String {
    let rates = [
        (limits.iops, "I/Os a second"),
        (limits.iops_burst, "I/Os at once"),
        (limits.bytes_per_second, "bytes a second"),
        (limits.bytes_burst, "bytes at once"),
    ];
    let named: Vec<String> = rates
        .into_iter()
        .filter_map(|(amount, of)| Some(format!("{} {of}", amount?)))
        .collect();
    if named.is_empty() {
        return "none".into();
    }
    named.join(", ")
}

/// Everything about one attachment, a line for each thing.
fn in_full(one: &Attachment) -> String {
    let mut lines = vec![
        ("id", one.id.clone()),
        ("device", or_dash(one.device.as_ref())),
        (
            "state",
            format!("{} for {}", name(&one.state), age(&one.since)),
        ),
        ("endpoint", endpoint(&one.spec.endpoint).into()),
        ("socket", or_dash(one.socket.as_ref())),
        ("vm", vm(&one.spec.vm)),
        ("limits", limits(&one.spec.limits)),
        ("fabric", name(&one.spec.fabric)),
    ];
    if let Some(reason) = &one.reason {
        lines.insert(3, ("reason", reason.clone()));
    }
    if let Some(worker) = &one.worker {
        let shown = format!("process {}, replaced {} times", worker.pid, worker.restarts);
        lines.push(("worker", shown));
    }
    if let Some(did) = &one.statistics {
        let time = |amount: Option<f64>| or_dash(amount.map(units::microseconds));
        lines.extend([
            (
                "reads",
                format!("{} ({})", did.reads, units::bytes(did.read_bytes as f64)),
            ),
            (
                "writes",
                format!(
                    "{} ({})",
                    did.writes,
                    units::bytes(did.written_bytes as f64)
                ),
            ),
            ("others", did.others.to_string()),
            ("errors", did.errors.to_string()),
            ("in flight", did.in_flight.to_string()),
            (
                "latency",
                format!(
                    "p50 {}, p99 {}",
                    time(did.latency_p50_us),
                    time(did.latency_p99_us)
                ),
            ),
            ("fabric RTT", time(did.fabric_rtt_us)),
            ("reconnects", did.reconnects.to_string()),
        ]);
    }
    lines
        .into_iter()
        .map(|(key, value)| format!("{key:<12} {}\n", printable(&value)))
        .collect()
}
