//! `devices`: what the device servers offer.

use clap::Args;
use clap::builder::PossibleValuesParser;
use farbus_compute_agent::api::{Device, DeviceState, Devices};
use farbus_rest::client::Client;

use crate::failure::{Failure, remark};
use crate::show::{json, name, or_dash, printable, table, text};
use crate::units;

/// Names of the classes, as the interface has them.
pub(crate) const CLASSES: [&str; 2] = ["nvme", "other"];

#[derive(Args)]
pub(crate) struct DevicesArgs {
    /// Only those of this device server.
    #[arg(long, value_name = "NAME", value_parser = query_value)]
    device_server: Option<String>,
    /// Only those of this kind.
    #[arg(long, value_parser = PossibleValuesParser::new(CLASSES))]
    class: Option<String>,
    /// Only those in this state.
    #[arg(long, value_parser = PossibleValuesParser::new(["free", "claimed", "failed", "draining"]))]
    state: Option<String>,
}

/// What is a name of a device server needs no escapes in a query.
fn query_value(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if !text.is_empty() && text.chars().all(fits) {
        return Ok(text.to_owned());
    }
    Err("a name of a device server has letters, digits, `.`, `_` and `-`".into())
}

pub(crate) async fn run(args: &DevicesArgs, client: &Client, as_json: bool) -> Result<(), Failure> {
    let filters = [
        ("device_server", &args.device_server),
        ("class", &args.class),
        ("state", &args.state),
    ];
    let query: Vec<String> = filters
        .into_iter()
        .filter_map(|(key, value)| Some(format!("{key}={}", value.as_ref()?)))
        .collect();
    let found: Devices = client
        .get(&format!("/v1/devices?{}", query.join("&")))
        .await?;
    if as_json {
        return json(&found);
    }
    text(&for_people(&found.devices))?;
    for server in &found.unreachable {
        remark(&printable(&format!(
            "device server {} at {} does not answer: {}",
            server.device_server, server.address, server.error
        )));
    }
    Ok(())
}

fn for_people(devices: &[Device]) -> String {
    let row = |device: &Device| {
        let capacity = device
            .capacity_bytes
            .map(|amount| units::bytes(amount as f64));
        let remark = match device.state {
            DeviceState::Claimed => device.holder.clone(),
            _ => device.why.clone(),
        };
        [
            device.id.clone(),
            name(&device.class),
            format!("{}:{}", device.vendor_id, device.device_id),
            or_dash(device.model.as_deref().map(str::trim)),
            or_dash(capacity),
            or_dash(device.numa_node),
            name(&device.state),
            remark.unwrap_or_default(),
        ]
    };
    table(
        [
            "DEVICE",
            "CLASS",
            "PCI ID",
            "MODEL",
            "CAPACITY",
            "NUMA",
            "STATE",
            "HELD BY, OR WHY",
        ],
        devices.iter().map(row).collect(),
    )
}
