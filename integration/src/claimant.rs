//! Claimants of exports that are no virtual machines: `farbus-vfu-nvme` processes, and what they say.

use serde_json::Value;

use crate::daemon::Daemon;
use crate::deadline::Deadline;
use crate::error::{Error, Result};
use crate::report;

/// Any command here is done well within this, also on a busy machine.
const LIMIT_SECS: u64 = 200;
/// How long a load is measured, and how long it runs before that, in seconds.
const TIME: [&str; 2] = ["4", "1"];
/// The same of each of the rounds that count together.
const ROUND: [&str; 2] = ["1.5", "0.5"];
/// Rounds that count together.
const ROUNDS: u32 = 8;

/// Runs a command of `farbus-vfu-nvme` on one export to its end; the JSON that it prints.
///
/// # Errors
/// When it fails, or says something else.
pub fn run(command: &str, address: &str, export: &str, options: &[&str]) -> Result<Value> {
    let target = ["--from", address, "--export", export];
    run_with(command, &[&target[..], options].concat())
}

/// Runs a command of `farbus-vfu-nvme` to its end; the JSON that it prints.
///
/// # Errors
/// When it fails, or says something else.
pub fn run_with(command: &str, options: &[&str]) -> Result<Value> {
    let arguments = [&[command, "--json"], options].concat();
    let ended = Daemon::run("farbus-vfu-nvme", &arguments, Deadline::secs(LIMIT_SECS))?;
    let failed = |why| finding(format!("farbus-vfu-nvme {}", arguments.join(" ")), why);
    if ended.status.code() != Some(0) {
        return Err(failed(format!("{ended:?}")));
    }
    serde_json::from_str(&ended.stdout).map_err(|error| failed(format!("{error} in {ended:?}")))
}

/// Puts load on an export for a few seconds; the figures.
///
/// # Errors
/// When a command fails.
pub fn bench(address: &str, export: &str, options: &[&str]) -> Result<Value> {
    bench_for(TIME, address, export, options)
}

fn bench_for(time: [&str; 2], address: &str, export: &str, options: &[&str]) -> Result<Value> {
    let time = ["--seconds", time[0], "--warmup", time[1]];
    let measured = run("bench", address, export, &[&time[..], options].concat())?;
    let total = measured["total"].clone();
    if total["errors"] == 0 {
        return Ok(total);
    }
    Err(finding(
        format!("load on {export}"),
        format!("commands failed: {total}"),
    ))
}

/// Commands a second, of what [`bench()`] says.
#[must_use]
pub fn iops(total: &Value) -> f64 {
    let number = |key: &str| total[key].as_f64().unwrap_or(f64::NAN);
    number("total_ios") / number("seconds")
}

/// Puts load on two exports at the same time.
///
/// # Errors
/// As [`bench()`].
pub fn bench_both(address: &str, loads: [(&str, &[&str]); 2]) -> Result<[Value; 2]> {
    both_for(TIME, address, loads)
}

fn both_for(time: [&str; 2], address: &str, loads: [(&str, &[&str]); 2]) -> Result<[Value; 2]> {
    let [first, second] = loads;
    std::thread::scope(|scope| {
        let other = scope.spawn(|| bench_for(time, address, second.0, second.1));
        let one = bench_for(time, address, first.0, first.1);
        let other = other
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok([one?, other?])
    })
}

/// Puts the same load on two exports at the same time, and holds them to getting the same, within 20 %. What else
/// a host does falls on one of them or the other, but not on the same one for ever: so many short rounds count
/// together, whatever each of them comes to.
///
/// # Errors
/// When a command fails, or one of the two has got more.
pub fn share_evenly(address: &str, exports: [&str; 2], load: &[&str]) -> Result<()> {
    let (mut a, mut b) = (0.0, 0.0);
    for _ in 0..ROUNDS {
        let loads = [(exports[0], load), (exports[1], load)];
        let [of_a, of_b] = both_for(ROUND, address, loads)?;
        println!("{:.0} and {:.0} IOPS", iops(&of_a), iops(&of_b));
        (a, b) = (a + iops(&of_a), b + iops(&of_b));
    }
    let [a, b] = [a, b].map(|sum| sum / f64::from(ROUNDS));
    let shares = format!("{a:.0} and {b:.0} IOPS in {ROUNDS} rounds");
    println!("{load:?}: {shares}");
    if a.min(b) >= 0.8 * a.max(b) {
        return Ok(());
    }
    Err(finding(format!("{load:?} on {exports:?}"), shares))
}

/// Holds a rate to its limit, within 10 % in both directions.
///
/// # Errors
/// When it is something else.
pub fn keeps_to(limit: f64, rate: f64) -> Result<()> {
    println!("{rate:.0} of {limit:.0}");
    if (rate - limit).abs() <= 0.1 * limit {
        return Ok(());
    }
    Err(finding(
        format!("a limit of {limit:.0}"),
        format!("{rate:.0}"),
    ))
}

fn finding(what: String, finding: String) -> Error {
    report::note_failure();
    Error::Verification { what, finding }
}
