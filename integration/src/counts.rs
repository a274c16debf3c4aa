//! Counts of what a program does, by `strace` and by `valgrind`'s callgrind.
//!
//! Counts differ little between machines and between quiet and busy minutes, so tests can hold a
//! program to them. What they cost it in time is of no interest here.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};

use crate::deadline::Deadline;
use crate::error::{Error, IoContext, Result};
use crate::process::{ORDERLY_END, Process, mortal_command};
use crate::scratch::Scratch;

/// Counts the system calls of a running process, all of its threads.
#[derive(Debug)]
pub struct SystemCalls {
    strace: Process,
    summary: PathBuf,
    _scratch: Scratch,
}

impl SystemCalls {
    /// Begins to count.
    ///
    /// # Errors
    /// When `strace` is missing, or may not attach to the process.
    pub fn of(pid: u32) -> Result<Self> {
        let scratch = Scratch::new("strace")?;
        let summary = scratch.join("summary");
        let mut command = mortal_command(Path::new("strace"));
        command
            .args(["-f", "-c", "-p", &pid.to_string(), "-o"])
            .arg(&summary)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut strace = Process::start("strace", command)?;
        let said = strace.child().stderr.take();
        // It says so once it has attached to every thread that there is.
        let mut first = String::new();
        if let Some(said) = said {
            let mut said = BufReader::new(said);
            said.read_line(&mut first)
                .context(|| "reading what strace says".into())?;
            // What it says later must not block it.
            std::thread::spawn(move || said.lines().for_each(drop));
        }
        if !first.contains("attached") {
            return Err(Error::Tool {
                command: format!("strace -p {pid}"),
                status: "a refusal".into(),
                output: first.trim().to_owned(),
            });
        }
        Ok(Self {
            strace,
            summary,
            _scratch: scratch,
        })
    }

    /// Ends the count.
    ///
    /// # Errors
    /// When `strace` does not say what it has counted.
    pub fn end(mut self) -> Result<u64> {
        let pid = i32::try_from(self.strace.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // Its child is not reaped before `wait`, so the id is its own.
            kill_process(pid, Signal::INT).context(|| "ending strace".into())?;
        }
        self.strace.wait(ORDERLY_END.into())?;
        let text = read(&self.summary)?;
        total_of(&text).ok_or_else(|| missing("a total", &self.summary))
    }
}

/// The calls in the last line of strace's summary: `100.00 0.000266 1 184 total`; with errors, these
/// are a further number before `total`.
fn total_of(summary: &str) -> Option<u64> {
    let line = summary.lines().find(|line| line.ends_with(" total"));
    match line {
        Some(line) => line.split_whitespace().nth(3)?.parse().ok(),
        // No call, no table.
        None => Some(0),
    }
}

/// Instructions that a program has executed from its start to its end, by callgrind.
#[derive(Debug)]
pub struct Instructions {
    out: PathBuf,
    options: Vec<String>,
}

impl Instructions {
    /// A count that is kept in the file `name` of `scratch`.
    #[must_use]
    pub fn kept_in(scratch: &Scratch, name: &str) -> Self {
        let out = scratch.join(name);
        let options = [
            "valgrind".to_owned(),
            "--tool=callgrind".to_owned(),
            "--quiet".to_owned(),
            // No pipes for a debugger, which would be left behind.
            "--vgdb=no".to_owned(),
            // A thread that waits gets its turn as soon as another blocks.
            "--fair-sched=try".to_owned(),
            format!("--callgrind-out-file={}", out.display()),
        ];
        Self {
            out,
            options: options.into(),
        }
    }

    /// What to run the program under.
    #[must_use]
    pub fn wrapper(&self) -> Vec<&str> {
        self.options.iter().map(String::as_str).collect()
    }

    /// The count, once the program has ended in order.
    ///
    /// # Errors
    /// When callgrind has left none.
    pub fn read(&self) -> Result<u64> {
        let text = read(&self.out)?;
        summary_of(&text).ok_or_else(|| missing("a summary", &self.out))
    }
}

/// The number in the line `summary: 12345`, or `totals: 12345` of a file with several threads.
fn summary_of(text: &str) -> Option<u64> {
    let number = |key: &str| -> Option<u64> {
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(key));
        lines.next_back()?.trim().parse().ok()
    };
    number("totals:").or_else(|| number("summary:"))
}

/// Whether a program can be started; the reason if not.
///
/// # Errors
/// [`Error::Tool`] when it is missing or fails to tell its version.
pub fn has_tool(name: &str) -> Result<()> {
    let mut command = mortal_command(Path::new(name));
    crate::process::run_tool(command.arg("--version")).map(drop)
}

/// How long a program may take to end in order under one of these tools.
#[must_use]
pub fn patience() -> Deadline {
    Deadline::secs(60)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).context(|| format!("reading {}", path.display()))
}

fn missing(what: &str, place: &Path) -> Error {
    Error::Missing {
        what: what.to_owned(),
        place: place.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn total_is_found_with_and_without_errors() {
        let plain = "% time     seconds  usecs/call     calls    errors syscall\n\
                     100.00    0.000266           1       184           total\n";
        let errors = "100.00    0.001000           2        29         1 total\n";
        assert_eq!(total_of(plain), Some(184));
        assert_eq!(total_of(errors), Some(29));
        assert_eq!(total_of(""), Some(0));
    }

    #[test]
    fn instructions_are_the_total_of_all_threads() {
        assert_eq!(summary_of("summary: 5\nfn=x\ntotals: 7\n"), Some(7));
        assert_eq!(summary_of("summary: 5\n"), Some(5));
        assert_eq!(summary_of("fn=x\n"), None);
    }
}
