//! The JSON document of a run: everything that the tables show, with the figure of every repeat.
//!
//! ```json
//! {
//!   "schema": 2,
//!   "host": {"cpu", "cores", "memory_mib", "kernel", "system", "virtual_machine", "date", "commit", "peers"},
//!   "plan": {"repeats", "seconds", "brief_seconds", "warmup_seconds", "quick"},
//!   "rows": [{
//!     "part": "limits" | "peers" | "farbus" | "rdma", "subject", "workload",
//!     "cpus": "halting" | "spinning",
//!     "figures": {"p50_us": {"median", "min", "max", "samples": […]}, …},
//!     "ratios": {"limit": {"p50_us", …}, "NBD": {…}, "NBD null": {…}, "iSCSI": {…}, "SPDK NVMe/TCP": {…}},
//!     "remark": why there are no figures
//!   }],
//!   "model": [{"rtt_factor", "hop_factor", "drive_us", "points": […]}],
//!   "budgets": [{"budget", "ratio", "awake", "value", "bound", "claim", "holds"}],
//!   "gaps": [{"subject", "reason", "failed"}]
//! }
//! ```
//!
//! Names of figures are those of [`figure`](crate::results::figure); where a figure belongs to one process, the
//! process follows after a dot (`cpu_us_per_io.agent`). Ratios of these are between the sums over all processes but the
//! load's.

use serde_json::{Map, Value, json};

use crate::budgets::Verdict;
use crate::host::Host;
use crate::model::Fit;
use crate::ratios::{self, PEERS};
use crate::results::{Results, Row};
use crate::session::Plan;

/// Rises when a reader of older documents would misread a new one.
const SCHEMA: u32 = 2;

pub(crate) fn compose(
    host: &Host,
    plan: &Plan,
    results: &Results,
    fits: &[Fit],
    verdicts: &[Verdict],
) -> Value {
    let rows: Vec<Value> = results.rows().iter().map(|r| row(results, r)).collect();
    json!({
        "schema": SCHEMA,
        "host": host,
        "plan": {
            "repeats": plan.repeats,
            "seconds": plan.time.as_secs_f64(),
            "brief_seconds": plan.brief().time.as_secs_f64(),
            "warmup_seconds": plan.warmup.as_secs_f64(),
            "quick": plan.quick,
        },
        "rows": rows,
        "model": fits,
        "budgets": verdicts,
        "gaps": results.gaps(),
    })
}

fn row(results: &Results, row: &Row) -> Value {
    let figures: Map<String, Value> = row
        .figures()
        .map(|(name, spread)| {
            let value = json!({
                "median": spread.median(),
                "min": spread.min(),
                "max": spread.max(),
                "samples": spread.samples(),
            });
            (name.clone(), value)
        })
        .collect();
    let limit = ("limit", ratios::limit_of(results, row));
    let peers = PEERS.map(|peer| (peer, ratios::peer_of(results, row, peer)));
    let compared = [limit].into_iter().chain(peers);
    let ratios: Map<String, Value> = compared
        .filter_map(|(name, other)| {
            let all = ratios::of_all(row, other?).into_iter();
            let all: Map<_, _> = all
                .map(|(name, ratio)| (name.to_owned(), json!(ratio)))
                .collect();
            (!all.is_empty()).then(|| (name.to_owned(), all.into()))
        })
        .collect();
    json!({
        "part": row.part,
        "subject": row.subject,
        "workload": row.workload,
        "cpus": row.awake,
        "figures": figures,
        "ratios": ratios,
        "remark": row.remark(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::awake::Awake;
    use crate::peers::{ISCSI, NBD};
    use crate::results::{Figures, figure};
    use std::time::Duration;

    #[test]
    fn document_holds_every_repeat_and_ratios_of_each_figure() {
        let mut results = Results::default();
        for p50 in [10.0, 20.0] {
            let figures = Figures::from([(figure::P50.to_owned(), p50)]);
            results.add("peers", NBD, Awake::Halting, "4k randread x1", figures);
        }
        let figures = Figures::from([(figure::P50.to_owned(), 30.0)]);
        results.add("peers", ISCSI, Awake::Halting, "4k randread x1", figures);
        let plan = Plan {
            warmup: Duration::from_millis(100),
            time: Duration::from_secs(1),
            repeats: 2,
            quick: false,
        };
        let document = compose(&Host::look(Vec::new()), &plan, &results, &[], &[]);
        let figure = &document["rows"][0]["figures"]["p50_us"];
        assert_eq!(figure["median"], 15.0);
        assert_eq!(figure["samples"], json!([10.0, 20.0]));
        assert_eq!(document["rows"][0]["cpus"], "halting");
        assert_eq!(document["rows"][1]["ratios"]["NBD"]["p50_us"], 2.0);
    }
}
