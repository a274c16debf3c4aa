//! Whether what is asked for can be at all, before anything is looked for or done.

use axum::http::StatusCode;
use farbus_fabric::wire::ExportName;
use farbus_rest::listen::MAX_PATH;
use farbus_rest::problem::Problem;

use super::config::Config;
use crate::api::{AttachmentSpec, EndpointSpec, Limits, Selector, Vm};

/// The longest name of a bus in QEMU that is taken.
const MAX_BUS: usize = 64;

/// A problem with a specification.
fn invalid(detail: impl Into<String>, remedy: &str) -> Problem {
    Problem::new(
        StatusCode::UNPROCESSABLE_ENTITY,
        "invalid-spec",
        "What is asked for cannot be",
        detail,
    )
    .with_remedy(remedy)
}

/// There is no such device, and nothing to wait for.
pub(super) fn no_such_device(detail: impl Into<String>) -> Problem {
    Problem::new(
        StatusCode::NOT_FOUND,
        "no-such-device",
        "There is no such device",
        detail,
    )
    .with_remedy("GET /v1/devices lists what there is")
}

/// Checks a specification by itself.
pub(super) fn check(spec: &AttachmentSpec, config: &Config) -> Result<(), Problem> {
    match (&spec.device, &spec.selector) {
        (Some(device), None) => parse_device(device, config).map(drop)?,
        (None, Some(selector)) => check_selector(selector, config)?,
        (Some(_), Some(_)) => {
            return Err(invalid(
                "both a device and a selector are named",
                "name one of them",
            ));
        }
        (None, None) => {
            return Err(invalid(
                "neither a device nor a selector is named",
                "name a device of GET /v1/devices, or a selector; {} selects any",
            ));
        }
    }
    check_endpoint(&spec.endpoint)?;
    check_vm(&spec.vm)?;
    check_limits(&spec.limits)
}

/// The device server and the export of a device's id.
pub(super) fn parse_device(device: &str, config: &Config) -> Result<(String, String), Problem> {
    let shown: String = device.chars().take(160).collect();
    let wrong = |why: String| {
        invalid(
            format!("{shown:?} is no device: {why}"),
            "a device is named DEVICE-SERVER/EXPORT, as GET /v1/devices has it",
        )
    };
    let (server, export) = device
        .split_once('/')
        .ok_or_else(|| wrong("it has no '/'".into()))?;
    ExportName::new(export).map_err(|error| wrong(error.to_string()))?;
    known_server(server, config)?;
    Ok((server.to_owned(), export.to_owned()))
}

fn known_server(name: &str, config: &Config) -> Result<(), Problem> {
    if config.device_server(name).is_some() {
        return Ok(());
    }
    let known = config.device_servers.iter().map(|server| &server.name[..]);
    let known = known.collect::<Vec<_>>().join(", ");
    let shown: String = name.chars().take(80).collect();
    Err(no_such_device(format!(
        "no device server is named {shown:?}; the agent's configuration has: {known}"
    )))
}

fn check_selector(selector: &Selector, config: &Config) -> Result<(), Problem> {
    if let Some(server) = &selector.device_server {
        known_server(server, config)?;
    }
    for id in [&selector.vendor_id, &selector.device_id]
        .into_iter()
        .flatten()
    {
        if id.len() != 4 || !id.bytes().all(|c| c.is_ascii_hexdigit()) {
            let shown: String = id.chars().take(20).collect();
            return Err(invalid(
                format!("{shown:?} is no PCI id"),
                "a PCI id has four hexadecimal digits, such as 1b36",
            ));
        }
    }
    Ok(())
}

fn check_endpoint(endpoint: &EndpointSpec) -> Result<(), Problem> {
    let EndpointSpec::VhostUserBlk {
        num_queues,
        queue_size,
        serial,
        ..
    } = endpoint
    else {
        return Ok(());
    };
    if num_queues.is_some_and(|queues| !(1..=64).contains(&queues)) {
        return Err(invalid(
            format!("num_queues is {}", num_queues.unwrap_or(0)),
            "a virtio device has 1 to 64 request queues",
        ));
    }
    if queue_size.is_some_and(|size| !size.is_power_of_two() || !(4..=1024).contains(&size)) {
        return Err(invalid(
            format!("queue_size is {}", queue_size.unwrap_or(0)),
            "it must be a power of two from 4 to 1024",
        ));
    }
    let printable = |text: &String| text.len() <= 20 && text.bytes().all(|c| c.is_ascii_graphic());
    if !serial.as_ref().is_none_or(printable) {
        return Err(invalid(
            "the serial number does not fit",
            "it must be up to 20 characters of ASCII, without spaces",
        ));
    }
    Ok(())
}

fn check_vm(vm: &Vm) -> Result<(), Problem> {
    let (path, bus) = match vm {
        Vm::None => return Ok(()),
        Vm::Qemu { qmp, bus } => (qmp, bus.as_ref()),
        Vm::CloudHypervisor { api } => (api, None),
    };
    let text = path.as_os_str().as_encoded_bytes();
    if !path.is_absolute() || text.len() > MAX_PATH || text.contains(&0) {
        let shown: String = path.to_string_lossy().chars().take(160).collect();
        return Err(invalid(
            format!("{shown:?} cannot be a socket's path"),
            "it must begin with / and have at most 107 bytes",
        ));
    }
    let plain = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
    let good = |bus: &String| (1..=MAX_BUS).contains(&bus.len()) && bus.bytes().all(plain);
    if !bus.is_none_or(good) {
        return Err(invalid(
            "the bus has no name that QEMU would take",
            "name a root port by its id, or leave it out for a free one",
        ));
    }
    Ok(())
}

fn check_limits(limits: &Limits) -> Result<(), Problem> {
    let Limits {
        iops,
        iops_burst,
        bytes_per_second,
        bytes_burst,
    } = *limits;
    if [iops, iops_burst, bytes_per_second, bytes_burst].contains(&Some(0)) {
        return Err(invalid(
            "a limit is 0",
            "leave out what is not to be limited",
        ));
    }
    if iops_burst.is_some() && iops.is_none() || bytes_burst.is_some() && bytes_per_second.is_none()
    {
        return Err(invalid(
            "a burst is named without its rate",
            "name iops with iops_burst, bytes_per_second with bytes_burst",
        ));
    }
    Ok(())
}
