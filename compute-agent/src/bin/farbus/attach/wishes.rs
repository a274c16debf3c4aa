//! What the options of `attach` ask for, as the interface's JSON has it.

use std::path::{Path, PathBuf};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgGroup, Args, ValueEnum};
use farbus_compute_agent::api::{
    AttachmentSpec, DeviceClass, EndpointSpec, Fabric, Limits, Msix, Selector, Vm,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::devices::CLASSES;
use crate::failure::Failure;
use crate::units;

const DEVICE: &str = "Device: one by its name, or any free one that is like this";
const VM: &str = "Virtual machine: the one to plug it into, or none";
const ENDPOINT: &str = "How the guest gets it";

#[derive(Args)]
#[command(group(ArgGroup::new("which").required(true).multiple(true)))]
pub(super) struct Wishes {
    /// This device.
    #[arg(long, value_name = "SERVER/EXPORT", group = "which", help_heading = DEVICE, conflicts_with_all = [
        "device_server", "class", "vendor_id", "device_id", "model", "min_capacity", "numa_node",
    ])]
    device: Option<String>,
    /// One of this device server.
    #[arg(long, value_name = "NAME", group = "which", help_heading = DEVICE)]
    device_server: Option<String>,
    /// One of this kind.
    #[arg(long, group = "which", help_heading = DEVICE, value_parser = named::<DeviceClass>(&CLASSES))]
    class: Option<DeviceClass>,
    /// One with this PCI vendor id.
    #[arg(long, value_name = "HEX", group = "which", help_heading = DEVICE)]
    vendor_id: Option<String>,
    /// One with this PCI device id.
    #[arg(long, value_name = "HEX", group = "which", help_heading = DEVICE)]
    device_id: Option<String>,
    /// One of exactly this model.
    #[arg(long, group = "which", help_heading = DEVICE)]
    model: Option<String>,
    /// One that holds at least this, such as 1TiB.
    #[arg(long, value_name = "SIZE", group = "which", help_heading = DEVICE, value_parser = units::parse)]
    min_capacity: Option<u64>,
    /// One near to this NUMA node of its host.
    #[arg(long, value_name = "NODE", group = "which", help_heading = DEVICE)]
    numa_node: Option<u32>,

    /// QEMU, by its QMP socket.
    #[arg(long, value_name = "PATH", help_heading = VM, conflicts_with = "cloud_hypervisor")]
    qmp: Option<PathBuf>,
    /// The bus of QEMU to plug it into, such as the id of a root port; by default a free one.
    #[arg(long, value_name = "ID", help_heading = VM, requires = "qmp")]
    bus: Option<String>,
    /// cloud-hypervisor, by its API socket.
    #[arg(long, value_name = "PATH", help_heading = VM)]
    cloud_hypervisor: Option<PathBuf>,

    /// As the PCIe device that it is, or as a virtio block device.
    #[arg(long, value_enum, default_value_t = Endpoint::VfioUser, help_heading = ENDPOINT)]
    endpoint: Endpoint,
    /// With vfio-user: how interrupts reach the guest. auto lets the agent choose what is safe.
    #[arg(long, value_name = "KIND", help_heading = ENDPOINT, value_parser = named::<Msix>(&["auto", "mediated", "irqfd"]))]
    msix: Option<Msix>,
    /// With vhost-user-blk: most request queues.
    #[arg(long, value_name = "N", help_heading = ENDPOINT)]
    num_queues: Option<u16>,
    /// With vhost-user-blk: most entries of a queue, a power of two.
    #[arg(long, value_name = "N", help_heading = ENDPOINT)]
    queue_size: Option<u16>,
    /// With vhost-user-blk: the guest may not write.
    #[arg(long, help_heading = ENDPOINT)]
    readonly: bool,
    /// With vhost-user-blk: the serial number that the guest sees.
    #[arg(long, value_name = "TEXT", help_heading = ENDPOINT)]
    serial: Option<String>,

    /// What it may use at most, as NAME=AMOUNT of iops, iops-burst, bytes-per-second and bytes-burst;
    /// several with commas, or by giving this again. A burst is what may be used at once after a pause.
    #[arg(long = "limit", value_name = "NAME=AMOUNT", value_delimiter = ',', value_parser = parse_limit)]
    limits: Vec<(Limit, u64)>,
    /// What carries the data: RDMA where both sides can, RDMA or nothing, or TCP.
    #[arg(long, default_value = "auto", value_parser = named::<Fabric>(&["auto", "verbs", "tcp"]))]
    fabric: Fabric,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Endpoint {
    VfioUser,
    VhostUserBlk,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Limit {
    Iops,
    IopsBurst,
    BytesPerSecond,
    BytesBurst,
}

/// Takes the names that a type has in the interface's JSON.
fn named<T>(names: &[&'static str]) -> impl TypedValueParser<Value = T> + use<T>
where
    T: DeserializeOwned + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names.to_vec())
        .try_map(|name| serde_json::from_value(Value::String(name)))
}

fn parse_limit(text: &str) -> Result<(Limit, u64), String> {
    let (name, amount) = text
        .split_once('=')
        .ok_or_else(|| format!("`{text}` has no `=`; write NAME=AMOUNT, such as iops=10k"))?;
    let limit = Limit::from_str(name, false).map_err(|_| {
        format!(
            "`{name}` is no limit; there are iops, iops-burst, bytes-per-second and bytes-burst"
        )
    })?;
    Ok((limit, units::parse(amount)?))
}

/// The agent works in another directory.
fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    Ok(std::path::absolute(path)?)
}

impl Wishes {
    /// All of it.
    pub(super) fn spec(&self) -> Result<AttachmentSpec, Failure> {
        let selector = Selector {
            device_server: self.device_server.clone(),
            class: self.class,
            vendor_id: self.vendor_id.clone(),
            device_id: self.device_id.clone(),
            model: self.model.clone(),
            min_capacity_bytes: self.min_capacity,
            numa_node: self.numa_node,
        };
        Ok(AttachmentSpec {
            device: self.device.clone(),
            selector: self.device.is_none().then_some(selector),
            endpoint: self.endpoint()?,
            vm: self.vm()?,
            limits: self.limits(),
            fabric: self.fabric,
        })
    }

    fn endpoint(&self) -> Result<EndpointSpec, Failure> {
        let foreign = match self.endpoint {
            Endpoint::VhostUserBlk => [("--msix", self.msix.is_some()); 1].to_vec(),
            Endpoint::VfioUser => vec![
                ("--num-queues", self.num_queues.is_some()),
                ("--queue-size", self.queue_size.is_some()),
                ("--readonly", self.readonly),
                ("--serial", self.serial.is_some()),
            ],
        };
        if let Some((option, _)) = foreign.into_iter().find(|(_, given)| *given) {
            let other = match self.endpoint {
                Endpoint::VfioUser => "vhost-user-blk",
                Endpoint::VhostUserBlk => "vfio-user",
            };
            return Err(Failure::usage(format!(
                "{option} means something with --endpoint {other} only"
            )));
        }
        Ok(match self.endpoint {
            Endpoint::VfioUser => EndpointSpec::VfioUser {
                msix: self.msix.unwrap_or_default(),
            },
            Endpoint::VhostUserBlk => EndpointSpec::VhostUserBlk {
                num_queues: self.num_queues,
                queue_size: self.queue_size,
                readonly: self.readonly,
                serial: self.serial.clone(),
            },
        })
    }

    fn vm(&self) -> Result<Vm, Failure> {
        Ok(match (&self.qmp, &self.cloud_hypervisor) {
            (Some(qmp), _) => Vm::Qemu {
                qmp: absolute(qmp)?,
                bus: self.bus.clone(),
            },
            (None, Some(api)) => Vm::CloudHypervisor {
                api: absolute(api)?,
            },
            (None, None) => Vm::None,
        })
    }

    fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        for (limit, amount) in &self.limits {
            let place = match limit {
                Limit::Iops => &mut limits.iops,
                Limit::IopsBurst => &mut limits.iops_burst,
                Limit::BytesPerSecond => &mut limits.bytes_per_second,
                Limit::BytesBurst => &mut limits.bytes_burst,
            };
            *place = Some(*amount);
        }
        limits
    }
}
