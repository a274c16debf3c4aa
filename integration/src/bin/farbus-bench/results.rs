//! Figures, and what repeats of a measurement come to.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::awake::Awake;

/// Names of figures. Where a figure is one process', the name goes on with `.` and the process.
pub(crate) mod figure {
    /// Latency in microseconds: median, and so on. Of limits: the round trip.
    pub(crate) const P50: &str = "p50_us";
    pub(crate) const P99: &str = "p99_us";
    pub(crate) const P999: &str = "p999_us";
    pub(crate) const MEAN: &str = "mean_us";
    pub(crate) const IOPS: &str = "iops";
    /// 10^6 bytes of payload per second.
    pub(crate) const MB_PER_S: &str = "mb_per_s";
    /// [`MB_PER_S`] of one raw TCP connection, measured right before and after, that this is a part of.
    pub(crate) const OF_RAW: &str = "of_raw_connection";
    pub(crate) const CPU: &str = "cpu_us_per_io";
    pub(crate) const SWITCHES: &str = "switches_per_io";
    pub(crate) const SYSCALLS: &str = "syscalls_per_io";
    /// Doorbell registers that the load has written.
    pub(crate) const DOORBELLS: &str = "doorbells_per_io";
    /// Those of the load's own process, which has the compute half in it.
    pub(crate) const MESSAGES_SENT: &str = "messages_sent_per_io";
    pub(crate) const MESSAGES_RECEIVED: &str = "messages_received_per_io";
    pub(crate) const BYTES_SENT: &str = "bytes_sent_per_io";
    pub(crate) const BYTES_RECEIVED: &str = "bytes_received_per_io";
    /// What crosses the loopback device, headers and acknowledgements with it; seen from outside, so that it can
    /// be had of everybody.
    pub(crate) const PACKETS: &str = "loopback_packets_per_io";
    pub(crate) const LOOPBACK_BYTES: &str = "loopback_bytes_per_io";
    /// Private resident memory in MiB, per attachment.
    pub(crate) const RESIDENT: &str = "resident_mib_per_attachment";
    /// The share of the CPUs' time that the hypervisor gave to others meanwhile.
    pub(crate) const STOLEN: &str = "stolen_cpu_share";
    /// The process that makes the load, where a figure is one process'.
    pub(crate) const CLIENT: &str = "client";
}

/// What one measurement found, by name.
pub(crate) type Figures = BTreeMap<String, f64>;

/// The repeats of one figure.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Spread {
    samples: Vec<f64>,
}

impl Spread {
    /// The middle one; of an even number, between the two in the middle.
    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = ((sorted.len().saturating_sub(1)) / 2, sorted.len() / 2);
        match (sorted.get(low), sorted.get(high)) {
            (Some(low), Some(high)) => f64::midpoint(*low, *high),
            _ => f64::NAN,
        }
    }

    pub(crate) fn min(&self) -> f64 {
        self.samples.iter().copied().fold(f64::NAN, f64::min)
    }

    pub(crate) fn max(&self) -> f64 {
        self.samples.iter().copied().fold(f64::NAN, f64::max)
    }

    pub(crate) fn samples(&self) -> &[f64] {
        &self.samples
    }
}

/// One line of the table: a subject under a workload.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) part: &'static str,
    pub(crate) subject: String,
    pub(crate) awake: Awake,
    pub(crate) workload: String,
    figures: BTreeMap<String, Spread>,
    remark: Option<String>,
}

impl Row {
    /// The repeats of a figure.
    pub(crate) fn spread(&self, name: &str) -> Option<&Spread> {
        self.figures.get(name)
    }

    /// The median of a figure.
    pub(crate) fn median(&self, name: &str) -> Option<f64> {
        self.spread(name).map(Spread::median)
    }

    /// The medians of a figure, process by process.
    pub(crate) fn per_process(&self, name: &str) -> impl Iterator<Item = (&str, f64)> {
        self.figures.iter().filter_map(move |(key, spread)| {
            let process = key.strip_prefix(name)?.strip_prefix('.')?;
            Some((process, spread.median()))
        })
    }

    /// Why there are no figures, if there are none.
    pub(crate) fn remark(&self) -> Option<&str> {
        self.remark.as_deref().filter(|_| self.figures.is_empty())
    }

    /// The sum of a figure over all processes but that which makes the load.
    pub(crate) fn servers(&self, name: &str) -> Option<f64> {
        let each: Vec<f64> = self
            .per_process(name)
            .filter(|(process, _)| *process != figure::CLIENT)
            .map(|(_, value)| value)
            .collect();
        (!each.is_empty()).then(|| each.iter().sum())
    }

    pub(crate) fn figures(&self) -> impl Iterator<Item = (&String, &Spread)> {
        self.figures.iter()
    }
}

/// What could not be measured, and why.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Gap {
    pub(crate) subject: String,
    pub(crate) reason: String,
    /// It should have worked.
    pub(crate) failed: bool,
}

/// Everything that was measured.
#[derive(Debug, Default)]
pub(crate) struct Results {
    rows: Vec<Row>,
    gaps: Vec<Gap>,
}

impl Results {
    /// Adds one measurement to its row.
    pub(crate) fn add(
        &mut self,
        part: &'static str,
        subject: &str,
        awake: Awake,
        workload: &str,
        figures: Figures,
    ) {
        let row = self.at(part, subject, awake, workload);
        for (name, value) in figures {
            row.figures.entry(name).or_default().samples.push(value);
        }
    }

    /// Says in a row why it has no figures; it may get some later.
    pub(crate) fn remark(
        &mut self,
        part: &'static str,
        subject: &str,
        awake: Awake,
        workload: &str,
        remark: String,
    ) {
        self.at(part, subject, awake, workload).remark = Some(remark);
    }

    /// The row, which is made if there is none yet.
    fn at(&mut self, part: &'static str, subject: &str, awake: Awake, workload: &str) -> &mut Row {
        let at = self
            .rows
            .iter()
            .position(|row| row.is(subject, awake, workload));
        let at = at.unwrap_or_else(|| {
            self.rows.push(Row {
                part,
                subject: subject.to_owned(),
                awake,
                workload: workload.to_owned(),
                figures: BTreeMap::new(),
                remark: None,
            });
            self.rows.len() - 1
        });
        &mut self.rows[at]
    }

    /// Notes what is missing; the same gap is noted once.
    pub(crate) fn gap(&mut self, subject: &str, reason: String, failed: bool) -> bool {
        let known = |gap: &Gap| gap.subject == subject && gap.reason == reason;
        if self.gaps.iter().any(known) {
            return false;
        }
        self.gaps.push(Gap {
            subject: subject.to_owned(),
            reason,
            failed,
        });
        true
    }

    /// Puts the rows into the order in which they are read: in that of their measurement, but the states of the
    /// CPUs side by side, all of a subject's workloads together, and what was not measured after what was.
    pub(crate) fn arrange(&mut self) {
        let mut order: Vec<(String, String)> = Vec::new();
        let mut subjects: Vec<String> = Vec::new();
        let (measured, others): (Vec<&Row>, Vec<&Row>) =
            self.rows.iter().partition(|row| !row.figures.is_empty());
        for row in measured.into_iter().chain(others) {
            let key = (row.subject.clone(), row.workload.clone());
            if !order.contains(&key) {
                order.push(key);
            }
            if !subjects.contains(&row.subject) {
                subjects.push(row.subject.clone());
            }
        }
        self.rows.sort_by_cached_key(|row| {
            let key = (row.subject.clone(), row.workload.clone());
            (
                subjects.iter().position(|subject| *subject == row.subject),
                order.iter().position(|known| *known == key),
                row.awake.letter(),
            )
        });
    }

    pub(crate) fn rows(&self) -> &[Row] {
        &self.rows
    }

    pub(crate) fn gaps(&self) -> &[Gap] {
        &self.gaps
    }

    pub(crate) fn row(&self, subject: &str, awake: Awake, workload: &str) -> Option<&Row> {
        self.rows
            .iter()
            .find(|row| row.is(subject, awake, workload))
    }

    /// The median of one figure.
    pub(crate) fn median(
        &self,
        subject: &str,
        awake: Awake,
        workload: &str,
        name: &str,
    ) -> Option<f64> {
        self.row(subject, awake, workload)?.median(name)
    }
}

impl Row {
    fn is(&self, subject: &str, awake: Awake, workload: &str) -> bool {
        self.subject == subject && self.awake == awake && self.workload == workload
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(values: &[f64]) -> Results {
        let mut results = Results::default();
        for value in values {
            let figures = Figures::from([
                (figure::P50.to_owned(), *value),
                (format!("{}.server", figure::CPU), 1.0),
                (format!("{}.agent", figure::CPU), 2.0),
            ]);
            results.add("farbus", "x", Awake::Halting, "w", figures);
        }
        results
    }

    #[test]
    fn repeats_come_to_their_median_and_range() {
        let results = results(&[3.0, 1.0, 10.0, 2.0]);
        let row = results.row("x", Awake::Halting, "w").unwrap();
        let spread = row.spread(figure::P50).unwrap();
        assert_eq!(
            (spread.min(), spread.median(), spread.max()),
            (1.0, 2.5, 10.0)
        );
    }

    #[test]
    fn processes_are_told_apart() {
        let results = results(&[1.0]);
        let each: Vec<_> = results.rows()[0].per_process(figure::CPU).collect();
        assert_eq!(each, [("agent", 2.0), ("server", 1.0)]);
    }

    #[test]
    fn load_is_not_among_the_servers() {
        let mut results = results(&[1.0]);
        let figures = Figures::from([(format!("{}.client", figure::CPU), 5.0)]);
        results.add("farbus", "x", Awake::Halting, "w", figures);
        assert_eq!(results.rows()[0].servers(figure::CPU), Some(3.0));
        assert_eq!(results.rows()[0].servers(figure::SWITCHES), None);
    }

    #[test]
    fn remark_gives_way_to_figures() {
        let mut results = Results::default();
        results.remark("peers", "x", Awake::Halting, "w", "cannot".into());
        assert_eq!(results.rows()[0].remark(), Some("cannot"));
        let figures = Figures::from([(figure::P50.to_owned(), 1.0)]);
        results.add("peers", "x", Awake::Halting, "w", figures);
        assert_eq!(
            (results.rows().len(), results.rows()[0].remark()),
            (1, None)
        );
    }

    #[test]
    fn states_of_a_row_are_side_by_side() {
        let mut results = Results::default();
        for awake in Awake::BOTH {
            for (subject, workload) in [("a", "1"), ("b", "1"), ("a", "2")] {
                results.add("farbus", subject, awake, workload, one());
            }
        }
        results.arrange();
        let shown: Vec<String> = results
            .rows()
            .iter()
            .map(|row| format!("{}{}{}", row.subject, row.workload, row.awake))
            .collect();
        assert_eq!(shown, ["a1H", "a1S", "a2H", "a2S", "b1H", "b1S"]);
    }

    #[test]
    fn row_without_figures_is_the_last_of_its_subject() {
        let mut results = Results::default();
        results.remark("peers", "a", Awake::Halting, "1", "cannot".into());
        for (subject, workload) in [("a", "2"), ("b", "1")] {
            results.add("peers", subject, Awake::Halting, workload, one());
        }
        results.arrange();
        let rows = results.rows().iter();
        let shown: Vec<String> = rows
            .map(|row| format!("{}{}", row.subject, row.workload))
            .collect();
        assert_eq!(shown, ["a2", "a1", "b1"]);
    }

    fn one() -> Figures {
        Figures::from([(figure::P50.to_owned(), 1.0)])
    }

    #[test]
    fn same_gap_is_noted_once() {
        let mut results = Results::default();
        assert!(results.gap("spdk", "not there".into(), false));
        assert!(!results.gap("spdk", "not there".into(), false));
    }
}
