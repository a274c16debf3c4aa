//! What the daemon shows to Prometheus.

use std::sync::Weak;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry as Metrics;

use super::attachment::name;
use super::registry::Registry;
use crate::api::{Attachment, AttachmentState};

/// What is counted as it happens.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Workers that were started in place of dead ones.
    pub worker_restarts: Counter,
}

impl Counts {
    /// Shows them.
    pub fn register(&self, metrics: &mut Metrics) {
        metrics.register(
            "worker_restarts",
            "Workers that were started in place of ones that had died",
            self.worker_restarts.clone(),
        );
    }
}

/// What is read off when somebody asks.
#[derive(Debug)]
pub struct Snapshot(pub Weak<Registry>);

/// One number of an attachment.
struct Shown {
    name: &'static str,
    help: &'static str,
    counter: bool,
    value: fn(&Attachment) -> Option<f64>,
}

const EACH: &[Shown] = &[
    Shown {
        name: "attachment_worker_restarts",
        help: "Workers of the attachment that were replaced",
        counter: true,
        value: |it| it.worker.map(|worker| f64::from(worker.restarts)),
    },
    Shown {
        name: "attachment_reads",
        help: "Read commands completed",
        counter: true,
        value: |it| it.statistics.map(|all| all.reads as f64),
    },
    Shown {
        name: "attachment_writes",
        help: "Write commands completed",
        counter: true,
        value: |it| it.statistics.map(|all| all.writes as f64),
    },
    Shown {
        name: "attachment_other_commands",
        help: "Other I/O commands completed",
        counter: true,
        value: |it| it.statistics.map(|all| all.others as f64),
    },
    Shown {
        name: "attachment_errors",
        help: "I/O commands that failed",
        counter: true,
        value: |it| it.statistics.map(|all| all.errors as f64),
    },
    Shown {
        name: "attachment_read_bytes",
        help: "Bytes read",
        counter: true,
        value: |it| it.statistics.map(|all| all.read_bytes as f64),
    },
    Shown {
        name: "attachment_written_bytes",
        help: "Bytes written",
        counter: true,
        value: |it| it.statistics.map(|all| all.written_bytes as f64),
    },
    Shown {
        name: "attachment_reconnects",
        help: "Links to the device server that were replaced",
        counter: true,
        value: |it| it.statistics.map(|all| f64::from(all.reconnects)),
    },
    Shown {
        name: "attachment_in_flight_commands",
        help: "I/O commands under way",
        counter: false,
        value: |it| it.statistics.map(|all| f64::from(all.in_flight)),
    },
    Shown {
        name: "attachment_latency_p50_seconds",
        help: "Median latency of the last seconds' I/O commands",
        counter: false,
        value: |it| it.statistics?.latency_p50_us.map(|us| us / 1e6),
    },
    Shown {
        name: "attachment_latency_p99_seconds",
        help: "99th percentile of the latency of the last seconds' I/O commands",
        counter: false,
        value: |it| it.statistics?.latency_p99_us.map(|us| us / 1e6),
    },
    Shown {
        name: "attachment_fabric_round_trip_seconds",
        help: "Round trip of the fabric",
        counter: false,
        value: |it| it.statistics?.fabric_rtt_us.map(|us| us / 1e6),
    },
];

const STATES: [AttachmentState; 5] = [
    AttachmentState::Attaching,
    AttachmentState::Ready,
    AttachmentState::Degraded,
    AttachmentState::Detaching,
    AttachmentState::Failed,
];

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Some(registry) = self.0.upgrade() else {
            return Ok(());
        };
        let attachments = registry.list();
        let gauge = ConstGauge::<f64>::new(0.0).metric_type();
        let help = "Attachments in a state";
        let mut family = encoder.encode_descriptor("attachments", help, None, gauge)?;
        for state in STATES {
            let count = attachments.iter().filter(|it| it.state == state).count();
            let labels = [("state", name(state))];
            let member = family.encode_family(&labels)?;
            ConstGauge::new(count as f64).encode(member)?;
        }
        let help = "Whether the device server has answered when it was asked last";
        let mut family = encoder.encode_descriptor("device_server_reachable", help, None, gauge)?;
        for (server, reachable) in registry.reachable() {
            let labels = [("device_server", server)];
            let member = family.encode_family(&labels)?;
            ConstGauge::new(f64::from(u8::from(reachable))).encode(member)?;
        }
        for shown in EACH {
            encode_each(&mut encoder, shown, &attachments)?;
        }
        Ok(())
    }
}

fn encode_each(
    encoder: &mut DescriptorEncoder<'_>,
    shown: &Shown,
    attachments: &[Attachment],
) -> Result<(), std::fmt::Error> {
    use prometheus_client::metrics::MetricType;
    let kind = if shown.counter {
        MetricType::Counter
    } else {
        MetricType::Gauge
    };
    let mut family = encoder.encode_descriptor(shown.name, shown.help, None, kind)?;
    for attachment in attachments {
        let Some(value) = (shown.value)(attachment) else {
            continue;
        };
        let labels = [
            ("attachment", attachment.id.as_str()),
            ("device", attachment.device.as_deref().unwrap_or("")),
        ];
        let mut member = family.encode_family(&labels)?;
        if shown.counter {
            member
                .encode_counter::<prometheus_client::encoding::NoLabelSet, _, f64>(&value, None)?;
        } else {
            member.encode_gauge(&value)?;
        }
    }
    Ok(())
}
