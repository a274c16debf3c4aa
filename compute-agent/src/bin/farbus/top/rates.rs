//! What attachments did between two looks at their counts.

use std::collections::HashMap;
use std::time::Instant;

use farbus_compute_agent::api::{Attachment, AttachmentState, Attachments, Statistics};
use serde::Serialize;

/// One attachment; what is not known is absent.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Row {
    pub(super) id: String,
    pub(super) device: Option<String>,
    pub(super) state: AttachmentState,
    pub(super) reads_per_second: Option<f64>,
    pub(super) writes_per_second: Option<f64>,
    pub(super) read_bytes_per_second: Option<f64>,
    pub(super) written_bytes_per_second: Option<f64>,
    pub(super) in_flight: Option<u32>,
    pub(super) latency_p50_us: Option<f64>,
    pub(super) latency_p99_us: Option<f64>,
    pub(super) fabric_rtt_us: Option<f64>,
}

/// The last look.
#[derive(Debug, Default)]
pub(super) struct Rates {
    before: HashMap<String, (Instant, Statistics)>,
}

impl Rates {
    /// A row for each attachment, with its rates since the last look.
    pub(super) fn rows(&mut self, now: Attachments, at: Instant) -> Vec<Row> {
        let before = std::mem::take(&mut self.before);
        let mut rows = Vec::new();
        for one in now.attachments {
            rows.push(row(&one, before.get(&one.id), at));
            if let Some(statistics) = one.statistics {
                self.before.insert(one.id, (at, statistics));
            }
        }
        rows
    }
}

fn row(one: &Attachment, before: Option<&(Instant, Statistics)>, at: Instant) -> Row {
    let now = one.statistics;
    let rate = |count: fn(&Statistics) -> u64| {
        let (then, before) = before?;
        let seconds = at.saturating_duration_since(*then).as_secs_f64();
        // A count that has gone back is that of another attachment of the same name.
        let done = count(&now?).checked_sub(count(before))?;
        (seconds > 0.0).then(|| done as f64 / seconds)
    };
    Row {
        id: one.id.clone(),
        device: one.device.clone(),
        state: one.state,
        reads_per_second: rate(|s| s.reads),
        writes_per_second: rate(|s| s.writes),
        read_bytes_per_second: rate(|s| s.read_bytes),
        written_bytes_per_second: rate(|s| s.written_bytes),
        in_flight: now.map(|s| s.in_flight),
        latency_p50_us: now.and_then(|s| s.latency_p50_us),
        latency_p99_us: now.and_then(|s| s.latency_p99_us),
        fabric_rtt_us: now.and_then(|s| s.fabric_rtt_us),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends there")]

    use std::time::Duration;

    use serde_json::json;

    use super::*;

    fn attachments(reads: u64) -> Attachments {
        serde_json::from_value(json!({"attachments": [{
            "id": "a",
            "spec": {"device": "rack1/disk0", "endpoint": {"kind": "vfio-user"}},
            "device": "rack1/disk0", "state": "ready", "since": "2026-01-01T00:00:00Z",
            "statistics": {
                "reads": reads, "writes": 0, "others": 0, "errors": 0, "read_bytes": reads * 4096,
                "written_bytes": 0, "in_flight": 3, "reconnects": 0,
            },
        }]}))
        .unwrap()
    }

    #[test]
    fn rates_are_what_was_done_between_two_looks() {
        let begun = Instant::now();
        let mut rates = Rates::default();

        let first = rates.rows(attachments(100), begun);
        let second = rates.rows(attachments(500), begun + Duration::from_secs(2));

        assert_eq!(first[0].reads_per_second, None);
        assert_eq!(second[0].reads_per_second, Some(200.0));
        assert_eq!(second[0].read_bytes_per_second, Some(200.0 * 4096.0));
        assert_eq!(second[0].in_flight, Some(3));
    }

    #[test]
    fn rate_of_a_count_that_went_back_is_unknown() {
        let begun = Instant::now();
        let mut rates = Rates::default();

        rates.rows(attachments(100), begun);
        let second = rates.rows(attachments(5), begun + Duration::from_secs(1));

        assert_eq!(second[0].reads_per_second, None);
    }
}
