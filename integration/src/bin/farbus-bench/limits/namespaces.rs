//! A network namespace that is joined to this one by a pair of virtual Ethernet devices.

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use farbus_integration::process::{mortal_command, run_tool};

/// Names begin with this, then comes the process that made them.
const PREFIX: &str = "fbbench";
/// Addresses of RFC 2544, which are set aside for measuring networks.
const OWN: &str = "198.18.77.1/30";
const OTHER: &str = "198.18.77.2/30";
const LISTEN: &str = "198.18.77.2:0";

/// A namespace, removed when dropped, and with it the devices.
#[derive(Debug)]
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    pub(crate) fn create() -> Result<Self> {
        remove_orphans();
        let id = std::process::id();
        let namespace = Self {
            name: format!("{PREFIX}{id}"),
        };
        let name = &namespace.name;
        // Interface names have 15 characters at most; a process id has 7.
        let (own, other) = (format!("fbb{id}a"), format!("fbb{id}b"));
        ip(&["netns", "add", name])?;
        ip(&[
            "link", "add", &own, "type", "veth", "peer", "name", &other, "netns", name,
        ])?;
        ip(&["addr", "add", OWN, "dev", &own])?;
        ip(&["link", "set", &own, "up"])?;
        ip(&["-n", name, "addr", "add", OTHER, "dev", &other])?;
        ip(&["-n", name, "link", "set", &other, "up"])?;
        Ok(namespace)
    }

    /// Where to listen in it.
    #[allow(clippy::unused_self, reason = "the address exists only while it does")]
    pub(crate) fn address(&self) -> &'static str {
        LISTEN
    }

    /// A command that runs `program` in it.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = mortal_command(Path::new("ip"));
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "delete", &self.name]) {
            eprintln!("farbus-bench: {error}");
        }
    }
}

/// Removes namespaces of processes that were killed.
fn remove_orphans() {
    let Ok(listed) = run_tool(Command::new("ip").args(["netns", "list"])) else {
        return;
    };
    let listed = String::from_utf8_lossy(&listed);
    let names = listed
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    for name in names {
        let maker = name
            .strip_prefix(PREFIX)
            .and_then(|id| id.parse::<u32>().ok());
        let gone = maker.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
        if gone {
            // Somebody else may have removed it just now.
            let _ = ip(&["netns", "delete", name]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    run_tool(Command::new("ip").args(arguments))?;
    Ok(())
}
