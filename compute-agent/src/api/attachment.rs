//! What is asked of an attachment, and what it has become.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Selector;

/// Body of `PUT /v1/attachments/{id}`. Exactly one of `device` and `selector`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachmentSpec {
    /// The device, `DEVICE-SERVER/EXPORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "rack1/disk0")]
    pub device: Option<String>,
    /// Or: any free device that is like this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<Selector>,
    /// How the VM gets it.
    pub endpoint: EndpointSpec,
    /// The VM to plug it into.
    #[serde(default)]
    pub vm: Vm,
    /// What it may use of the device at most. The device server's own limits hold besides.
    #[serde(default)]
    pub limits: Limits,
    /// What carries the data.
    #[serde(default)]
    pub fabric: Fabric,
}

/// How the VM gets the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum EndpointSpec {
    /// As the PCIe device that it is, on a vfio-user socket.
    VfioUser {
        /// How its interrupts reach the guest.
        #[serde(default)]
        msix: Msix,
    },
    /// As a virtio block device, on a vhost-user socket.
    VhostUserBlk {
        /// Request queues, 1 to 64; 4 by default.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        num_queues: Option<u16>,
        /// Descriptors of a queue, a power of two from 4 to 1024; 128 by default.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        queue_size: Option<u16>,
        /// The guest may not write.
        #[serde(default)]
        readonly: bool,
        /// The serial number that the guest sees, at most 20 bytes of ASCII.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        serial: Option<String>,
    },
}

/// How MSI-X interrupts reach the guest.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Msix {
    /// Mediated towards a VMM that aborts when a function with the other kind is unplugged; irqfd
    /// towards others.
    #[default]
    Auto,
    /// The agent keeps the MSI-X table and raises vectors by messages.
    Mediated,
    /// The VMM keeps the table; vectors are eventfds.
    Irqfd,
}

/// The VM that a device is plugged into.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Vm {
    /// None: whoever asks connects to the socket himself.
    #[default]
    None,
    /// QEMU.
    Qemu {
        /// Its QMP socket.
        #[schema(value_type = String)]
        qmp: PathBuf,
        /// The bus to plug into, such as a root port's id; by default a free root port.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bus: Option<String>,
    },
    /// cloud-hypervisor.
    CloudHypervisor {
        /// Its API socket.
        #[schema(value_type = String)]
        api: PathBuf,
    },
}

/// What an attachment may use at most; nothing named is unlimited. A burst is what may be used at
/// once after a pause; by default a tenth of a second's worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// I/O commands a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// I/O commands at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops_burst: Option<u64>,
    /// Bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// Bytes at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_burst: Option<u64>,
}

/// What carries the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Fabric {
    /// RDMA if both sides can, else TCP.
    #[default]
    Auto,
    /// RDMA or nothing.
    Verbs,
    /// TCP.
    Tcp,
}

/// Answer of `GET /v1/attachments`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Attachments {
    /// All that the agent knows, by id.
    pub attachments: Vec<Attachment>,
}

/// One attachment as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Attachment {
    /// As it was named when it was asked for.
    pub id: String,
    /// What was asked for.
    pub spec: AttachmentSpec,
    /// The device that it got, `DEVICE-SERVER/EXPORT`.
    pub device: Option<String>,
    /// How far it is.
    pub state: AttachmentState,
    /// Since when, RFC 3339 in UTC.
    pub since: String,
    /// Why it is in this state, where that is not what was asked for.
    pub reason: Option<String>,
    /// The socket that the VM connects to.
    pub socket: Option<String>,
    /// The process that carries its data.
    pub worker: Option<WorkerStatus>,
    /// What it has done.
    pub statistics: Option<Statistics>,
}

/// How far an attachment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AttachmentState {
    /// It is being made.
    Attaching,
    /// The VM can use it.
    Ready,
    /// The VM has it, and what it asks for waits: the fabric, the device server or the worker
    /// is being replaced.
    Degraded,
    /// It is being taken away.
    Detaching,
    /// It is gone. Seen in events and in the last answer only.
    Detached,
    /// It could not be made, or is lost. It stays until it is deleted.
    Failed,
}

/// The process that carries an attachment's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WorkerStatus {
    /// Its process id.
    pub pid: u32,
    /// How often it was replaced.
    pub restarts: u32,
}

/// What an attachment has done since it was made, and what its I/Os took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Statistics {
    /// Read commands completed.
    pub reads: u64,
    /// Write commands completed.
    pub writes: u64,
    /// Other I/O commands completed.
    pub others: u64,
    /// I/O commands that failed.
    pub errors: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// I/O commands under way.
    pub in_flight: u32,
    /// Median of the last seconds' latencies, in microseconds.
    pub latency_p50_us: Option<f64>,
    /// 99th percentile of them, in microseconds.
    pub latency_p99_us: Option<f64>,
    /// Round trip of the fabric, in microseconds.
    pub fabric_rtt_us: Option<f64>,
    /// How often the link to the device server was replaced.
    pub reconnects: u32,
}
