//! Rows beside the limit and beside the peers, under the same workload.

use crate::farbus::{GUEST, GUEST_LOCAL, IN_PROCESS_POLLED};
use crate::limits::{self, How, RECEIVED, SENT, TCP};
use crate::peers::{ISCSI, NBD, NBD_NULL, SPDK_TCP};
use crate::rdma;
use crate::results::{Results, Row, figure};
use crate::workload::is_judged_by_latency;

/// What rows are compared with, beside their limit.
pub(crate) const PEERS: [&str; 4] = [NBD, NBD_NULL, ISCSI, SPDK_TCP];

/// Figures of a whole row.
const WHOLE: [&str; 8] = [
    figure::P50,
    figure::P99,
    figure::P999,
    figure::MEAN,
    figure::IOPS,
    figure::MB_PER_S,
    figure::PACKETS,
    figure::LOOPBACK_BYTES,
];
/// Those of processes, of which the load's is not compared.
const OF_SERVERS: [&str; 3] = [figure::CPU, figure::SWITCHES, figure::SYSCALLS];

/// Whether a row is what an emulated machine saw: compared with nothing outside of it.
pub(crate) fn is_in_guest(row: &Row) -> bool {
    row.part == rdma::PART || [GUEST, GUEST_LOCAL].contains(&row.subject.as_str())
}

/// The ratio that says most: p50 at depth 1, and MB/s otherwise.
pub(crate) fn to_limit(results: &Results, row: &Row) -> Option<f64> {
    let limit = limit_of(results, row)?;
    let name = if is_judged_by_latency(&row.workload) {
        figure::P50
    } else {
        figure::MB_PER_S
    };
    Some(row.median(name)? / limit.median(name)?)
}

/// The ratio that says most: p50 at depth 1, and I/Os per second otherwise.
pub(crate) fn to_peer(results: &Results, row: &Row, peer: &str) -> Option<f64> {
    let peer = peer_of(results, row, peer)?;
    let name = if is_judged_by_latency(&row.workload) {
        figure::P50
    } else {
        figure::IOPS
    };
    Some(row.median(name)? / peer.median(name)?)
}

/// The row of the limit: at depth 1 the raw round trip of a 4 KiB I/O, blocking, or polled for what polls; otherwise
/// one connection's raw throughput in the direction of the data (of a mix: of reads).
pub(crate) fn limit_of<'a>(results: &'a Results, row: &Row) -> Option<&'a Row> {
    if row.part == rdma::PART {
        return rdma::limit_of(results, row);
    }
    if row.part == "limits" || is_in_guest(row) {
        return None;
    }
    let limit = if is_judged_by_latency(&row.workload) {
        let polls = [IN_PROCESS_POLLED, SPDK_TCP].contains(&row.subject.as_str());
        let how = if polls { How::Polled } else { How::Blocking };
        limits::round_trip(limits::READ, how)
    } else if row.workload.contains("write") {
        SENT.to_owned()
    } else {
        RECEIVED.to_owned()
    };
    results.row(TCP, row.awake, &limit)
}

/// The same workload of a peer, which is not the row itself.
pub(crate) fn peer_of<'a>(results: &'a Results, row: &Row, peer: &str) -> Option<&'a Row> {
    if row.part == "limits" || is_in_guest(row) || row.subject == peer {
        return None;
    }
    results.row(peer, row.awake, &row.workload)
}

/// All figures that both rows have, each as a ratio.
pub(crate) fn of_all(row: &Row, other: &Row) -> Vec<(&'static str, f64)> {
    let whole = WHOLE.map(|name| (name, row.median(name), other.median(name)));
    let servers = OF_SERVERS.map(|name| (name, row.servers(name), other.servers(name)));
    whole
        .into_iter()
        .chain(servers)
        .filter_map(|(name, own, other)| Some((name, own? / other?)))
        .filter(|(_, ratio)| ratio.is_finite())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::awake::Awake;
    use crate::farbus::ENDPOINT;
    use crate::results::Figures;
    use crate::workload::{BIG_WRITE, READ_32, READ_32_A8};

    fn results(rows: &[(&'static str, &str, &str, &str, f64)]) -> Results {
        let mut results = Results::default();
        for (part, subject, workload, name, value) in rows {
            let figures = Figures::from([((*name).to_owned(), *value)]);
            results.add(part, subject, Awake::Halting, workload, figures);
        }
        results
    }

    #[test]
    fn peer_is_compared_under_the_same_workload_only() {
        let (plain, many) = (READ_32.to_string(), READ_32_A8.to_string());
        let results = results(&[
            ("farbus", ENDPOINT, &plain, figure::IOPS, 300.0),
            ("farbus", ENDPOINT, &many, figure::IOPS, 100.0),
            ("peers", NBD, &plain, figure::IOPS, 100.0),
            ("peers", ISCSI, &many, figure::IOPS, 50.0),
        ]);
        let ratio = |row: usize, peer| to_peer(&results, &results.rows()[row], peer);
        assert_eq!((ratio(0, NBD), ratio(1, NBD)), (Some(3.0), None));
        assert_eq!((ratio(1, ISCSI), ratio(2, NBD)), (Some(2.0), None));
    }

    #[test]
    fn limit_of_writes_is_what_one_connection_sends() {
        let write = BIG_WRITE.to_string();
        let results = results(&[
            ("limits", TCP, SENT, figure::MB_PER_S, 4000.0),
            ("limits", TCP, RECEIVED, figure::MB_PER_S, 1.0),
            ("farbus", ENDPOINT, &write, figure::MB_PER_S, 3000.0),
        ]);
        assert_eq!(to_limit(&results, &results.rows()[2]), Some(0.75));
        assert_eq!(to_limit(&results, &results.rows()[0]), None);
    }

    #[test]
    fn processes_are_compared_without_the_load() {
        let read = READ_32.to_string();
        let results = results(&[
            ("farbus", ENDPOINT, &read, "cpu_us_per_io.agent", 1.0),
            ("farbus", ENDPOINT, &read, "cpu_us_per_io.server", 2.0),
            ("farbus", ENDPOINT, &read, "cpu_us_per_io.client", 9.0),
            ("peers", NBD, &read, "cpu_us_per_io.qsd", 6.0),
        ]);
        let [own, peer] = [0, 1].map(|at| &results.rows()[at]);
        assert_eq!(of_all(own, peer), [(figure::CPU, 0.5)]);
    }
}
