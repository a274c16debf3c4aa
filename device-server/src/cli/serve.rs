//! `serve`: exports what a configuration file says, and follows it.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use farbus_fabric::provider::Wanted;
use farbus_shadow_mem::polling::Polling;
use farbus_vfio::sysfs::Host;
use log::info;

use super::export::{announce, listen, poll_parser};
use super::{Failure, failure};
use crate::config::{Config, ConfigError, DEFAULT_PATH};
use crate::service::{Service, ServiceError};
use crate::sources::{Order, Stock};

pub(super) const EXAMPLES: &str = "\
Example, /etc/farbus/device-server.toml:
  [server]
  listen = \"10.0.0.5:7420\"
  insecure = true

  [[export]]
  name = \"disk0\"
  pci = \"0000:01:00.0\"
  bind = true

  [[export]]
  name = \"soft\"
  soft-nvme = { path = \"/srv/disk.img\", size = \"1GiB\" }

Other sources: match = { class = \"nvme\", vendor-id = \"1b36\", device-id = \"0010\" } with count = N or
\"all\"; sriov = { pci = \"0000:02:00.0\", functions = 4 }; vfio-user-device = \"/run/x.sock\".
Other keys of [server]: admin-socket, state-dir, provider, rdma-device, gid-index, poll, drain-seconds.

SIGHUP, or POST /v1/reload on the admin socket, reads the file again. SIGTERM waits up to drain-seconds
for claims to be given back; a second one does not. Prints one line that begins with \"ready\".";

#[derive(Args)]
pub(super) struct ServeArgs {
    /// What to export, and how to serve it.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// Only checks the configuration: prints what it exports, or what is wrong, and ends.
    #[arg(long)]
    check: bool,
    /// Address and port to listen on, in place of the configuration's.
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<String>,
    /// Allow an address that other hosts can reach, although nobody is authenticated yet.
    #[arg(long)]
    insecure: bool,
    /// The socket of the admin interface, in place of the configuration's.
    #[arg(long, value_name = "SOCKET")]
    admin_socket: Option<PathBuf>,
    /// Where to remember what was changed on the host, in place of the configuration's.
    #[arg(long, value_name = "DIRECTORY")]
    state_dir: Option<PathBuf>,
    /// What carries the data (auto, verbs or tcp), in place of the configuration's.
    #[arg(long, value_name = "PROVIDER")]
    provider: Option<Wanted>,
    /// How an attachment's thread waits, in place of the configuration's.
    #[arg(long, value_name = "POLICY", value_parser = poll_parser())]
    poll: Option<Polling>,
    /// Print the ready line as a JSON object.
    #[arg(long)]
    json: bool,
}

/// What the command line says in place of the file.
#[derive(Clone)]
struct Overrides {
    listen: Option<String>,
    insecure: bool,
    admin_socket: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    provider: Option<Wanted>,
    poll: Option<Polling>,
}

impl Overrides {
    fn load(&self, path: &Path) -> Result<Config, ConfigError> {
        let mut config = Config::load(path)?;
        let server = &mut config.server;
        let replace = |value: &mut PathBuf, flag: &Option<PathBuf>| {
            if let Some(flag) = flag {
                value.clone_from(flag);
            }
        };
        replace(&mut server.admin_socket, &self.admin_socket);
        replace(&mut server.state_dir, &self.state_dir);
        if let Some(listen) = &self.listen {
            server.listen.clone_from(listen);
        }
        server.insecure |= self.insecure;
        server.providers.wanted = self.provider.unwrap_or(server.providers.wanted);
        server.poll = self.poll.unwrap_or(server.poll);
        Ok(config)
    }
}

pub(super) fn run(args: &ServeArgs, host: &Host, out: &mut dyn Write) -> Result<u8, Failure> {
    let overrides = Overrides {
        listen: args.listen.clone(),
        insecure: args.insecure,
        admin_socket: args.admin_socket.clone(),
        state_dir: args.state_dir.clone(),
        provider: args.provider,
        poll: args.poll,
    };
    let config = overrides.load(&args.config).map_err(failure(2))?;
    if args.check {
        check(args, &config, out).map_err(failure(1))?;
        return Ok(0);
    }
    let server = config.server.clone();
    let listener = listen(&server.listen, server.insecure).map_err(failure(4))?;
    let address = listener.local_addr().map_err(failure(4))?;
    let orders: Vec<Order> = config.exports.iter().map(|e| e.order.clone()).collect();
    let path = args.config.clone();
    let load = move || {
        let config = overrides.load(&path);
        config.map_err(|error| format!("{:#}", anyhow::Error::new(error)))
    };
    let service = Service::new(listener, config, Box::new(load)).map_err(not_listening)?;
    let stock = Stock::new(host, &server.state_dir, &orders).map_err(failure(3))?;
    let socket = service.socket();
    service
        .run(stock, |exports| {
            info!("the admin interface is at {}", socket.display());
            announce(args.json, &exports.names(), address, out)
        })
        .map_err(failure(1))?;
    info!("ended in order");
    Ok(0)
}

fn not_listening(error: ServiceError) -> Failure {
    match error {
        ServiceError::Socket(error) => failure(4)(error),
        other @ ServiceError::Io { .. } => failure(1)(other),
    }
}

fn check(args: &ServeArgs, config: &Config, out: &mut dyn Write) -> std::io::Result<()> {
    writeln!(out, "{}: ok", args.config.display())?;
    for entry in &config.exports {
        writeln!(out, "  {}: {}", entry.name, entry.order.source())?;
    }
    out.flush()
}
