//! Whether the agent can be asked.

use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use farbus_compute_agent::peer::pid_of;
use farbus_rest::client::{Client, ClientError};
use serde_json::Value;

use super::{Finding, Level};
use crate::failure::with_causes;

/// Whether only those can open the socket who should.
pub(super) fn socket(path: &Path) -> Option<Finding> {
    const CHECK: &str = "socket";
    // That there is none is told with the attempt to connect.
    let file = std::fs::metadata(path).ok()?;
    let shown = path.display();
    if !file.file_type().is_socket() {
        return Some(Finding::new(
            CHECK,
            Level::Problem,
            format!("{shown} is not a socket"),
            "name the agent's socket with --agent; [agent] in /etc/farbus/agent.toml says where it is",
        ));
    }
    let mode = file.mode() & 0o777;
    if mode & 0o007 != 0 {
        return Some(Finding::new(
            CHECK,
            Level::Warning,
            format!("every user of this host may use {shown} (mode {mode:03o})"),
            format!(
                "chmod o= {shown}; restart the agent, which sets it to 660, and see who has changed it"
            ),
        ));
    }
    Some(Finding::ok(
        CHECK,
        format!(
            "{shown} is for user {} and group {} only",
            file.uid(),
            file.gid()
        ),
    ))
}

/// Whether the agent answers; what it says is added.
pub(super) async fn reached(name: &str, client: &Client, findings: &mut Vec<Finding>) -> bool {
    const CHECK: &str = "agent";
    match client.get::<Value>("/v1/version").await {
        Ok(version) => {
            let version = version.get("version").and_then(Value::as_str);
            let version = version.unwrap_or("of unknown version");
            findings.push(Finding::ok(CHECK, format!("{name} answers: {version}")));
            let own = env!("CARGO_PKG_VERSION");
            if version != own {
                findings.push(Finding::new(
                    CHECK,
                    Level::Note,
                    format!("this farbus is {own}"),
                    "after an upgrade: systemctl restart farbus-compute-agent; attachments go on",
                ));
            }
            true
        }
        Err(error) => {
            findings.push(Finding::new(
                CHECK,
                Level::Problem,
                with_causes(&error),
                remedy(&error),
            ));
            false
        }
    }
}

fn remedy(error: &ClientError) -> &'static str {
    let ClientError::Connect { source, .. } = error else {
        return "see the agent's log: journalctl -u farbus-compute-agent";
    };
    match source.kind() {
        ErrorKind::NotFound => {
            "start the agent: systemctl start farbus-compute-agent; or name its socket with --agent"
        }
        ErrorKind::PermissionDenied => {
            "run farbus as root, or make the user a member of the group farbus: usermod -aG farbus USER"
        }
        ErrorKind::ConnectionRefused => {
            "the agent has ended: systemctl restart farbus-compute-agent, and see journalctl -u \
             farbus-compute-agent"
        }
        _ => "see the agent's log, and whether its address can be reached from here",
    }
}

/// The agent's process, as the kernel names it for who connects.
pub(super) fn process(socket: &Path) -> Option<u32> {
    let stream = UnixStream::connect(socket).ok()?;
    pid_of(&stream)
}
