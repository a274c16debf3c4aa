//! What was measured, and how it is shown.

use farbus_fabric::Counters;
use farbus_integration::thread_usage::Usage;
use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};

use crate::cli::BenchArgs;

/// Latencies up to this are told apart; longer ones count as this (nanoseconds).
const LONGEST: u64 = 60_000_000_000;
/// Decimal digits of a latency that are kept.
const DIGITS: u8 = 3;

/// What one thread has measured, or several.
pub(crate) struct Figures {
    /// In nanoseconds.
    pub(crate) latency: Histogram<u64>,
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) errors: u64,
    pub(crate) elapsed_ns: u64,
    pub(crate) usage: Usage,
    pub(crate) doorbells: u64,
    pub(crate) link: Option<Counters>,
    pub(crate) shadow_doorbells: bool,
}

impl Figures {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            latency: Histogram::new_with_bounds(1, LONGEST, DIGITS)?,
            reads: 0,
            writes: 0,
            errors: 0,
            elapsed_ns: 0,
            usage: Usage::default(),
            doorbells: 0,
            link: None,
            shadow_doorbells: false,
        })
    }

    /// Begins anew, with the memory that it has.
    pub(crate) fn clear(&mut self) {
        self.latency.reset();
        (self.reads, self.writes, self.errors) = (0, 0, 0);
    }

    pub(crate) fn count(&mut self, ns: u64, is_read: bool, succeeded: bool) {
        if !succeeded {
            self.errors += 1;
            return;
        }
        self.latency.saturating_record(ns);
        if is_read {
            self.reads += 1;
        } else {
            self.writes += 1;
        }
    }

    pub(crate) fn ios(&self) -> u64 {
        self.reads + self.writes
    }

    /// Adds what was measured at the same time.
    pub(crate) fn add(&mut self, other: &Self) -> anyhow::Result<()> {
        self.latency.add(&other.latency)?;
        self.reads += other.reads;
        self.writes += other.writes;
        self.errors += other.errors;
        self.elapsed_ns = self.elapsed_ns.max(other.elapsed_ns);
        self.usage = self.usage.and(other.usage);
        self.doorbells += other.doorbells;
        self.shadow_doorbells |= other.shadow_doorbells;
        if let Some(link) = &other.link {
            self.link = Some(combine(
                &self.link.unwrap_or_default(),
                link,
                u64::saturating_add,
            ));
        }
        Ok(())
    }

    pub(crate) fn json(&self, target: &str, args: &BenchArgs) -> Value {
        let seconds = self.elapsed_ns as f64 / 1e9;
        let ios = self.ios().max(1) as f64;
        let iops = self.ios() as f64 / seconds.max(1e-9);
        let us = |ns: u64| ns as f64 / 1e3;
        let mut object = Map::new();
        let mut put = |key: &str, value: Value| object.insert(key.to_owned(), value);
        put("target", target.into());
        put("rw", format!("{:?}", args.rw).to_lowercase().into());
        put("block_size_bytes", args.bs.into());
        put("iodepth", args.iodepth.into());
        put("queues", args.queues.into());
        put("poll", args.poll.into());
        put("shadow_doorbells", self.shadow_doorbells.into());
        put("seconds", seconds.into());
        put("total_ios", self.ios().into());
        put("read_ios", self.reads.into());
        put("write_ios", self.writes.into());
        put("errors", self.errors.into());
        put("iops", iops.into());
        put(
            "mib_per_s",
            (iops * args.bs as f64 / f64::from(1 << 20)).into(),
        );
        put(
            "latency_us",
            json!({
                "min": us(self.latency.min()),
                "mean": self.latency.mean() / 1e3,
                "p10": us(self.latency.value_at_quantile(0.1)),
                "p50": us(self.latency.value_at_quantile(0.5)),
                "p99": us(self.latency.value_at_quantile(0.99)),
                "p99.9": us(self.latency.value_at_quantile(0.999)),
                "max": us(self.latency.max()),
            }),
        );
        put(
            "cpu_us_per_io",
            (self.usage.cpu_ns as f64 / 1e3 / ios).into(),
        );
        let per_io = |count: u64| Value::from(count as f64 / ios);
        put(
            "voluntary_context_switches_per_io",
            per_io(self.usage.voluntary),
        );
        put(
            "involuntary_context_switches_per_io",
            per_io(self.usage.involuntary),
        );
        put("doorbells_per_io", per_io(self.doorbells));
        let link = |count: fn(&Counters) -> u64| {
            self.link
                .as_ref()
                .map_or(Value::Null, |link| per_io(count(link)))
        };
        put("messages_sent_per_io", link(|l| l.messages_sent));
        put("messages_received_per_io", link(|l| l.messages_received));
        put("payload_bytes_sent_per_io", link(|l| l.payload_sent));
        put(
            "payload_bytes_received_per_io",
            link(|l| l.payload_received),
        );
        put("bytes_sent_per_io", link(|l| l.bytes_sent));
        put("bytes_received_per_io", link(|l| l.bytes_received));
        put("send_calls_per_io", link(|l| l.send_calls));
        put("receive_calls_per_io", link(|l| l.receive_calls));
        put("rdma_doorbells_per_io", link(|l| l.doorbells));
        Value::Object(object)
    }

    /// A few lines for people.
    pub(crate) fn print(&self, target: &str, args: &BenchArgs) {
        let json = self.json(target, args);
        let number = |key: &str| json.get(key).and_then(Value::as_f64).unwrap_or(0.0);
        let latency = |key: &str| json["latency_us"][key].as_f64().unwrap_or(0.0);
        println!(
            "{target}: {} I/Os in {:.2} s, {} failed",
            self.ios(),
            number("seconds"),
            self.errors
        );
        println!(
            "  {:.0} IOPS, {:.1} MiB/s, {:.2} CPU-us per I/O",
            number("iops"),
            number("mib_per_s"),
            number("cpu_us_per_io")
        );
        println!(
            "  latency in us: mean {:.1}, p50 {:.1}, p99 {:.1}, p99.9 {:.1}, max {:.1}",
            latency("mean"),
            latency("p50"),
            latency("p99"),
            latency("p99.9"),
            latency("max")
        );
        println!(
            "  per I/O: {:.3} voluntary and {:.3} involuntary context switches, {:.3} doorbells",
            number("voluntary_context_switches_per_io"),
            number("involuntary_context_switches_per_io"),
            number("doorbells_per_io")
        );
        if self.link.is_some() {
            println!(
                "  per I/O: {:.3} messages sent, {:.3} received; {:.0} bytes sent, {:.0} received; \
                 {:.3} send calls, {:.3} receive calls",
                number("messages_sent_per_io"),
                number("messages_received_per_io"),
                number("bytes_sent_per_io"),
                number("bytes_received_per_io"),
                number("send_calls_per_io"),
                number("receive_calls_per_io")
            );
        }
    }
}

/// Two sets of counters, field by field.
pub(crate) fn combine(a: &Counters, b: &Counters, with: fn(u64, u64) -> u64) -> Counters {
    Counters {
        messages_sent: with(a.messages_sent, b.messages_sent),
        messages_received: with(a.messages_received, b.messages_received),
        payload_sent: with(a.payload_sent, b.payload_sent),
        payload_received: with(a.payload_received, b.payload_received),
        bytes_received: with(a.bytes_received, b.bytes_received),
        bytes_sent: with(a.bytes_sent, b.bytes_sent),
        send_calls: with(a.send_calls, b.send_calls),
        receive_calls: with(a.receive_calls, b.receive_calls),
        doorbells: with(a.doorbells, b.doorbells),
    }
}
