//! The command line of the daemon.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::config::{Config, DeviceServer, Overrides};
use super::rest;
use super::serve::{ServeError, Service};

/// Options of `serve`.
#[derive(Args, Debug)]
pub struct ServeArgs {
    /// The configuration. Without this option, /etc/farbus/agent.toml if there is one.
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
    /// The UNIX socket of the REST interface.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Where the attachments' sockets are made, in a directory of their own.
    #[arg(long, value_name = "DIRECTORY")]
    runtime_dir: Option<PathBuf>,
    /// Where attachments are remembered over a restart.
    #[arg(long, value_name = "DIRECTORY")]
    state_dir: Option<PathBuf>,
    /// A device server to use, such as rack1=10.0.0.5:7420. May be given several times; goes before
    /// one of the same name in the configuration.
    #[arg(long = "device-server", value_name = "NAME=HOST:PORT")]
    device_servers: Vec<DeviceServer>,
    /// How long a device server may take to give a device, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=3600))]
    connect_timeout: u64,
    /// At the end, also end the workers: for the shutdown of the host. Without this, attachments go on
    /// while the daemon is away, and the next one takes them over.
    #[arg(long)]
    stop_workers: bool,
    /// Print the ready line as a JSON object.
    #[arg(long)]
    json: bool,
}

/// The help that is the same for each daemon.
pub const SERVE_HELP: &str = "\
Example:
  farbus-compute-agent serve --device-server rack1=10.0.0.5:7420
  curl --unix-socket /run/farbus/agent.sock http://localhost/v1/devices

Prints one line that begins with \"ready\" when clients can connect, and runs until SIGTERM. Attachments
go on without it, each carried by a process of its own, and are taken over when it is started
again. SIGUSR1 ends those processes at once, and the daemon with them; so does --stop-workers at
SIGTERM.

Exit codes:
  0  ended in order, by SIGTERM or SIGINT
  1  failed while running
  2  the command line or the configuration is wrong
  4  the socket or a directory cannot be used";

impl ServeArgs {
    /// Serves until SIGTERM. A failure has its exit code.
    ///
    /// # Errors
    /// With the exit code that tells of it.
    pub fn run(
        &self,
        log_level: log::LevelFilter,
        log_format: farbus_rest::logging::LogFormat,
    ) -> Result<(), (u8, anyhow::Error)> {
        let overrides = Overrides {
            socket: self.socket.clone(),
            runtime_dir: self.runtime_dir.clone(),
            state_dir: self.state_dir.clone(),
            device_servers: self.device_servers.clone(),
        };
        let config = Config::load(self.config.as_deref(), overrides)
            .map_err(|error| (2, anyhow::Error::new(error)))?;
        let service = Service {
            config,
            log_level,
            log_format,
            connect_timeout: self.connect_timeout,
            stop_workers: self.stop_workers,
            json: self.json,
        };
        service.run().map_err(|error| {
            let code = match &error {
                ServeError::Tls(_) => 2,
                ServeError::Listen(_)
                | ServeError::Store(_)
                | ServeError::Custody(_)
                | ServeError::WorkerUser(_)
                | ServeError::Directory { .. } => 4,
                ServeError::Runtime(_) => 1,
            };
            (code, anyhow::Error::new(error))
        })
    }
}

/// Prints the interface's description.
///
/// # Errors
/// When standard output cannot be written.
pub fn openapi() -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{:#}", rest::document())?;
    out.flush()
}
