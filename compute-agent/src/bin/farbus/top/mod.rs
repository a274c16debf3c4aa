//! `top`: what the attachments do, again and again.

mod rates;

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::Args;
use farbus_compute_agent::api::Attachments;
use farbus_rest::client::Client;

use crate::failure::Failure;
use crate::show::{json_line, name, or_dash, table, text};
use crate::units;
use rates::{Rates, Row};

/// Goes to the upper left corner and empties the screen (ECMA-48: CUP, ED).
const CLEAR: &str = "\x1b[H\x1b[J";

#[derive(Args)]
pub(crate) struct TopArgs {
    /// Between two looks, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// Show the first interval and end.
    #[arg(long)]
    once: bool,
}

pub(crate) async fn run(args: &TopArgs, client: &Client, as_json: bool) -> Result<(), Failure> {
    let clears = !args.once && !as_json && std::io::stdout().is_terminal();
    let mut rates = Rates::default();
    rates.rows(look(client).await?, Instant::now());
    loop {
        // Rates are of time that has passed.
        tokio::time::sleep(Duration::from_secs(args.interval)).await;
        let rows = rates.rows(look(client).await?, Instant::now());
        if as_json {
            json_line(&rows)?;
        } else {
            let clear = if clears { CLEAR } else { "" };
            text(&format!("{clear}{}", for_people(&rows)))?;
        }
        if args.once {
            return Ok(());
        }
    }
}

async fn look(client: &Client) -> Result<Attachments, Failure> {
    Ok(client.get("/v1/attachments").await?)
}

fn for_people(rows: &[Row]) -> String {
    let row = |row: &Row| {
        let time = |amount: Option<f64>| or_dash(amount.map(units::microseconds));
        let count = |amount: Option<f64>| or_dash(amount.map(units::count));
        let bandwidth = |amount: Option<f64>| {
            or_dash(amount.map(|amount| format!("{}/s", units::bytes(amount))))
        };
        [
            row.id.clone(),
            or_dash(row.device.as_ref()),
            name(&row.state),
            count(row.reads_per_second),
            count(row.writes_per_second),
            bandwidth(row.read_bytes_per_second),
            bandwidth(row.written_bytes_per_second),
            or_dash(row.in_flight),
            time(row.latency_p50_us),
            time(row.latency_p99_us),
            time(row.fabric_rtt_us),
        ]
    };
    table(
        [
            "ID",
            "DEVICE",
            "STATE",
            "READS/s",
            "WRITES/s",
            "READ",
            "WRITTEN",
            "IN FLIGHT",
            "P50",
            "P99",
            "FABRIC RTT",
        ],
        rows.iter().map(row).collect(),
    )
}
