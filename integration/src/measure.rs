//! How fast a guest's disk is, measured by fio in the guest.
//!
//! Numbers from an emulated CPU say nothing about hardware; two drives measured in the same run can
//! be compared.

use std::fmt;

use serde_json::Value;

use crate::deadline::Deadline;
use crate::error::{Error, Result};
use crate::guest::Guest;

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// I/O operations per second.
    pub iops: f64,
    /// Throughput in bytes per second.
    pub bytes_per_second: f64,
    /// Median completion latency in microseconds.
    pub p50_us: f64,
    /// 99th percentile of the completion latency in microseconds.
    pub p99_us: f64,
    /// 99.9th percentile of the completion latency in microseconds.
    pub p999_us: f64,
    /// I/O operations in all.
    pub ios: f64,
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:>8.0} IOPS  {:>8.1} MB/s  p50 {:>7.0} us  p99 {:>7.0} us",
            self.iops,
            self.bytes_per_second / 1e6,
            self.p50_us,
            self.p99_us
        )
    }
}

/// What to measure.
#[derive(Debug, Clone, Copy)]
pub struct Workload<'a> {
    /// fio's name of the pattern: `randread`, `write`, and so on.
    pub pattern: &'a str,
    /// fio's notation of the block size.
    pub block: &'a str,
    /// I/O operations in flight.
    pub depth: u32,
    /// For how long.
    pub seconds: u32,
}

/// Runs a workload on the raw device (writes overwrite it). Needs the large userland.
///
/// # Errors
/// When fio fails or says what cannot be understood.
pub fn measure(guest: &Guest, device: &str, workload: &Workload<'_>) -> Result<Measured> {
    let Workload {
        pattern,
        block,
        depth,
        seconds,
    } = workload;
    let command = format!(
        "fio --name=m --filename={device} --direct=1 --ioengine=libaio --rw={pattern} --bs={block} \
         --iodepth={depth} --runtime={seconds} --time_based \
         --unified_rw_reporting=1 --output-format=json"
    );
    let text = guest.check_within(&command, Deadline::secs(u64::from(*seconds) + 60))?;
    let document = text.find('{').map_or("", |at| &text[at..]);
    let report: Value = serde_json::from_str(document).map_err(|e| Error::Protocol {
        peer: "fio".into(),
        answer: format!("{e} in: {text}"),
    })?;
    // Reads and writes together.
    let numbers = &report["jobs"][0]["mixed"];
    let latency = &numbers["clat_ns"]["percentile"];
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    Ok(Measured {
        iops: number(&numbers["iops"]),
        bytes_per_second: number(&numbers["bw_bytes"]),
        p50_us: number(&latency["50.000000"]) / 1e3,
        p99_us: number(&latency["99.000000"]) / 1e3,
        p999_us: number(&latency["99.900000"]) / 1e3,
        ios: number(&numbers["total_ios"]),
    })
}
