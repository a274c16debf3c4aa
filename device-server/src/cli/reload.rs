//! `reload`: has the running service read its configuration again, and tells what came of it.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use farbus_rest::client::{Client, ClientError};

use super::{Failure, failure};
use crate::config::{Config, DEFAULT_PATH};
use crate::service::api::Reloaded;

pub(super) const NOTES: &str = "\
A file that is wrong changes nothing, and ends this with 2. An export that cannot be opened is named; it holds up no
other and is tried again every few seconds. This is what systemctl reload does; SIGHUP does the same, and tells the log.";

/// Devices are opened meanwhile, and some take their time.
const PATIENCE: Duration = Duration::from_secs(75);

#[derive(Args)]
pub(super) struct ReloadArgs {
    /// The service's configuration, which names its socket.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// The socket of the admin interface, in place of the configuration's.
    #[arg(long, value_name = "SOCKET")]
    admin_socket: Option<PathBuf>,
    /// Print what came of it as a JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &ReloadArgs, out: &mut dyn Write) -> Result<u8, Failure> {
    let socket = match &args.admin_socket {
        Some(socket) => socket.clone(),
        None => {
            let config = Config::load(&args.config);
            let config = config.context("nothing has changed").map_err(failure(2))?;
            config.server.admin_socket
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failure(1))?;
    let client = Client::new(&socket, PATIENCE);
    let asked = runtime.block_on(client.post::<(), Reloaded>("/v1/reload", &()));
    let (_status, told) = asked.map_err(|error| {
        let refused = matches!(error, ClientError::Problem(_));
        failure(if refused { 2 } else { 1 })(error)
    })?;
    print(args.json, &told, out).map_err(failure(1))?;
    Ok(0)
}

fn print(json: bool, told: &Reloaded, out: &mut dyn Write) -> std::io::Result<()> {
    if json {
        serde_json::to_writer(&mut *out, told)?;
        return writeln!(out);
    }
    for (what, names) in [
        ("added", &told.added),
        ("removed", &told.removed),
        ("changed", &told.changed),
        ("still claimed", &told.waiting),
        ("takes effect at the next start", &told.restart_needed),
    ] {
        if !names.is_empty() {
            writeln!(out, "{what}: {}", names.join(", "))?;
        }
    }
    for one in &told.failed {
        writeln!(out, "cannot be opened now: {}: {}", one.export, one.why)?;
    }
    if *told == Reloaded::default() {
        writeln!(out, "nothing has changed")?;
    }
    Ok(())
}
