//! What the device server shows to Prometheus, read off when somebody asks.

use std::fmt;
use std::sync::atomic::Ordering::Relaxed;

use farbus_fabric::wire::ListedState;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::exports::{Exports, Tally, state_name};

/// The exports as they are when somebody asks.
pub(super) struct Snapshot(pub(super) Exports);

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Snapshot")
    }
}

/// A number of each export that only rises.
struct Shown {
    name: &'static str,
    help: &'static str,
    value: fn(&Tally) -> u64,
}

const EACH: [Shown; 4] = [
    Shown {
        name: "claims",
        help: "Claims that were granted",
        value: |tally| tally.claims.load(Relaxed),
    },
    Shown {
        name: "commands",
        help: "Commands received from claimants",
        value: |tally| tally.commands.load(Relaxed),
    },
    Shown {
        name: "received_bytes",
        help: "Bytes received from claimants by TCP",
        value: |tally| tally.bytes_received.load(Relaxed),
    },
    Shown {
        name: "sent_bytes",
        help: "Bytes sent to claimants by TCP",
        value: |tally| tally.bytes_sent.load(Relaxed),
    },
];

const STATES: [ListedState; 4] = [
    ListedState::Free,
    ListedState::Claimed,
    ListedState::Failed,
    ListedState::Draining,
];

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let draining = self.0.is_draining();
        let all = self.0.all();
        let help = "Whether no new claims are given";
        let gauge = encoder.encode_descriptor("draining", help, None, MetricType::Gauge)?;
        ConstGauge::new(u64::from(draining)).encode(gauge)?;

        let help = "Whether the export is in the state";
        let mut family =
            encoder.encode_descriptor("export_state", help, None, MetricType::Gauge)?;
        for export in &all {
            let now = export.status(draining).state;
            for state in STATES {
                let labels = [
                    ("export", export.name().as_str()),
                    ("state", state_name(state)),
                ];
                let member = family.encode_family(&labels)?;
                ConstGauge::new(u64::from(state == now)).encode(member)?;
            }
        }
        let help = "Whether somebody has the export";
        let mut family =
            encoder.encode_descriptor("export_claimed", help, None, MetricType::Gauge)?;
        for export in &all {
            let labels = [("export", export.name().as_str())];
            let member = family.encode_family(&labels)?;
            ConstGauge::new(u64::from(export.is_claimed())).encode(member)?;
        }
        for Shown { name, help, value } in EACH {
            let name = format!("export_{name}");
            let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
            for export in &all {
                let labels = [("export", export.name().as_str())];
                let mut member = family.encode_family(&labels)?;
                member.encode_counter::<NoLabelSet, _, f64>(&value(export.tally()), None)?;
            }
        }
        let help = "Peers that were sent away";
        let mut family = encoder.encode_descriptor("refusals", help, None, MetricType::Counter)?;
        for (reason, count) in self.0.refused().counts() {
            let labels = [("reason", reason)];
            let mut member = family.encode_family(&labels)?;
            member.encode_counter::<NoLabelSet, _, f64>(&count, None)?;
        }
        Ok(())
    }
}
