//! How tests tell a person what happened.
//!
//! A test returns [`TestResult`]; its failure prints as sentences, log excerpts with their line
//! breaks. A test that cannot run on this machine says so with [`skip!`](crate::skip), and is
//! counted as skipped, not as passed.

use std::cell::Cell;
use std::error::Error as StdError;
use std::fmt;
use std::fs::OpenOptions;
use std::io::Write;

/// Environment variable: a file that gets one line per skipped test.
pub const SKIP_LOG_ENV: &str = "FARBUS_SKIP_LOG";

/// What a test function returns.
pub type TestResult = Result<(), Failure>;

/// Any error, shown for people when a test ends with it.
pub struct Failure(Box<dyn StdError + Send + Sync>);

impl<E: Into<Box<dyn StdError + Send + Sync>>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

/// The test harness prints a failed test's error with `Debug`.
impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, "\n  because: {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

thread_local! {
    /// Whether the test of this thread has seen a failure. The harness gives each test a thread.
    static FAILED: Cell<bool> = const { Cell::new(false) };
}

/// Notes that the test of this thread will fail: what it drops from now on leaves its logs.
pub fn note_failure() {
    FAILED.set(true);
}

/// Says that the failure so far was what the test wanted to see: no logs are kept for it.
pub fn failure_was_expected() {
    FAILED.set(false);
}

/// Whether the test of this thread has failed.
#[must_use]
pub fn has_failed() -> bool {
    FAILED.get() || std::thread::panicking()
}

/// Ends a test that cannot run here, with the reason (as for `format!`).
#[macro_export]
macro_rules! skip {
    ($($reason:tt)+) => {{
        $crate::report::note_skip(&format!($($reason)+));
        return Ok(());
    }};
}

/// Records that the test of the current thread was skipped.
pub fn note_skip(reason: &str) {
    let thread = std::thread::current();
    let line = format!("{}: {reason}", thread.name().unwrap_or("a test"));
    println!("SKIPPED {line}");
    if let Some(log) = std::env::var_os(SKIP_LOG_ENV) {
        let written = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
        if let Err(error) = written {
            eprintln!("{}: {error}", log.to_string_lossy());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn failure_shows_the_sentence_and_its_causes() {
        let error = Error::io("reading x")(std::io::Error::other("bad luck"));
        let shown = format!("{:?}", Failure::from(error));
        assert_eq!(shown, "reading x failed\n  because: bad luck");
    }
}
