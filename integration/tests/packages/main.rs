//! The Debian packages: in a fresh tree, and on a machine that runs systemd. `ci/package` makes them.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod booted;
mod tree;

use std::path::{Path, PathBuf};
use std::process::Command;

use farbus_integration::error::Error;
use farbus_integration::report::Failure;

const AGENT: &str = "farbus-compute-agent";
const SERVER: &str = "farbus-device-server";

/// What `ci/package` has made.
fn packages() -> Result<Vec<PathBuf>, Failure> {
    // target/PROFILE/deps/test
    let own = std::env::current_exe()?;
    let place = own
        .ancestors()
        .nth(3)
        .unwrap_or(Path::new("/"))
        .join("debian");
    let mut found = Vec::new();
    for name in [AGENT, SERVER] {
        let made = std::fs::read_dir(&place).into_iter().flatten().flatten();
        let package = made.map(|entry| entry.path()).find(|path| {
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            file.starts_with(&format!("{name}_")) && file.ends_with(".deb")
        });
        found.push(package.ok_or_else(|| Error::Missing {
            what: format!("package {name} (ci/package makes it)"),
            place: place.clone(),
        })?);
    }
    Ok(found)
}

/// Why no tree can be made here, if so.
fn obstacle() -> Option<&'static str> {
    let can = |program: &str, arguments: &[&str]| {
        let done = Command::new(program).args(arguments).output();
        done.is_ok_and(|output| output.status.success())
    };
    if !rustix::process::geteuid().is_root() {
        Some("only root can install packages")
    } else if !can("mmdebstrap", &["--version"]) {
        Some("mmdebstrap is not installed")
    } else if !can("unshare", &["--mount", "--pid", "--fork", "true"]) {
        Some("this machine lets nobody make namespaces")
    } else {
        None
    }
}
