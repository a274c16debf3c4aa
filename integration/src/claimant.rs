//! Claimants of exports that are no virtual machines: `farbus-vfu-nvme` processes, and what they say.

use serde_json::Value;

use crate::daemon::Daemon;
use crate::deadline::Deadline;
use crate::error::{Error, Result};
use crate::report;

/// Any command here is done well within this, also on a busy machine.
const LIMIT_SECS: u64 = 200;
/// So often is looked at what a busy host may spoil.
const ATTEMPTS: u32 = 3;
/// Rounds of a load that count together.
const ROUNDS: u32 = 3;

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
    let time = ["--seconds", "4", "--warmup", "1"];
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

/// Puts the same load on two exports at the same time, and holds them to getting the same, within 20 %.
/// What else a host does falls on one of them or the other, but not on the same one for ever: so three
/// rounds count together, and one of three times is enough. A scheduler that prefers one does so each time.
///
/// # Errors
/// When a command fails, or one of the two has got more each time.
pub fn share_evenly(address: &str, exports: [&str; 2], load: &[&str]) -> Result<()> {
    let mut found = Vec::new();
    for _ in 0..ATTEMPTS {
        let (mut a, mut b) = (0.0, 0.0);
        for _ in 0..ROUNDS {
            let loads = [(exports[0], load), (exports[1], load)];
            let [of_a, of_b] = bench_both(address, loads)?;
            (a, b) = (a + iops(&of_a), b + iops(&of_b));
        }
        let [a, b] = [a, b].map(|sum| sum / f64::from(ROUNDS));
        println!("{load:?}: {a:.0} and {b:.0} IOPS in {ROUNDS} rounds");
        if a.min(b) >= 0.8 * a.max(b) {
            return Ok(());
        }
        found.push(format!("{a:.0} and {b:.0} IOPS"));
    }
    Err(finding(
        format!("{load:?} on {exports:?}"),
        found.join(", "),
    ))
}

/// Holds what is measured to limits, within 10 %: it is never more, and on a host that has something else
/// to do it may be less, but not three times.
///
/// # Errors
/// When measuring fails, or something is not as its limit says.
pub fn keep_to<const N: usize>(
    limits: [f64; N],
    mut measure: impl FnMut() -> Result<[f64; N]>,
) -> Result<()> {
    let mut found = Vec::new();
    for _ in 0..ATTEMPTS {
        let measured = measure()?;
        println!("{measured:.0?} of {limits:.0?}");
        let each = || measured.iter().zip(&limits);
        let enough = each().all(|(measured, limit)| *measured >= 0.9 * limit);
        let exceeded = each().any(|(measured, limit)| *measured > 1.1 * limit);
        found.push(format!("{measured:.0?}"));
        if exceeded {
            break;
        }
        if enough {
            return Ok(());
        }
    }
    Err(finding(format!("limits of {limits:.0?}"), found.join(", ")))
}

fn finding(what: String, finding: String) -> Error {
    report::note_failure();
    Error::Verification { what, finding }
}
