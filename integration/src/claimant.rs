//! Claimants of exports that are no virtual machines: `farbus-vfu-nvme` processes, and what they say.

use serde_json::Value;

use crate::daemon::Daemon;
use crate::deadline::Deadline;
use crate::error::{Error, Result};
use crate::report;

/// Any command here is done well within this, also on a busy machine.
const LIMIT_SECS: u64 = 200;

/// Runs a command of `farbus-vfu-nvme` on one export to its end; the JSON that it prints.
///
/// # Errors
/// When it fails, or says something else.
pub fn run(command: &str, address: &str, export: &str, options: &[&str]) -> Result<Value> {
    let target = [command, "--from", address, "--export", export, "--json"];
    let arguments = [&target[..], options].concat();
    let ended = Daemon::run("farbus-vfu-nvme", &arguments, Deadline::secs(LIMIT_SECS))?;
    let finding = |finding: String| {
        report::note_failure();
        Error::Verification {
            what: format!("farbus-vfu-nvme {}", arguments.join(" ")),
            finding,
        }
    };
    if ended.status.code() != Some(0) {
        return Err(finding(format!("{ended:?}")));
    }
    serde_json::from_str(&ended.stdout).map_err(|error| finding(format!("{error} in {ended:?}")))
}

/// Puts load on an export for a few seconds; the figures.
///
/// # Errors
/// When a command fails.
pub fn bench(address: &str, export: &str, options: &[&str]) -> Result<Value> {
    let time = ["--seconds", "4", "--warmup", "1"];
    let measured = run("bench", address, export, &[&time[..], options].concat())?;
    let total = measured["total"].clone();
    if total["errors"] == 0 {
        return Ok(total);
    }
    report::note_failure();
    Err(Error::Verification {
        what: format!("load on {export}"),
        finding: format!("commands failed: {total}"),
    })
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
    let [first, second] = loads;
    std::thread::scope(|scope| {
        let other = scope.spawn(|| bench(address, second.0, second.1));
        let one = bench(address, first.0, first.1);
        let other = other
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok([one?, other?])
    })
}

/// Puts the same load on two exports at the same time; the commands a second of each. What else a
/// host does falls on one of them or the other, but not on the same one for ever: so three rounds
/// count together, whatever each of them comes to.
///
/// # Errors
/// As [`bench()`].
pub fn share_out(address: &str, exports: [&str; 2], load: &[&str]) -> Result<[f64; 2]> {
    const ROUNDS: u32 = 3;
    let (mut a, mut b) = (0.0, 0.0);
    for _ in 0..ROUNDS {
        let loads = [(exports[0], load), (exports[1], load)];
        let [of_a, of_b] = bench_both(address, loads)?;
        (a, b) = (a + iops(&of_a), b + iops(&of_b));
    }
    let rounds = f64::from(ROUNDS);
    let [a, b] = [a / rounds, b / rounds];
    println!("{load:?}: {a:.0} and {b:.0} IOPS in {ROUNDS} rounds");
    Ok([a, b])
}

/// Whether two are within 20 % of each other.
#[must_use]
pub fn is_even(a: f64, b: f64) -> bool {
    a.min(b) >= 0.8 * a.max(b)
}
