//! The command line: what it accepts, what it starts, and the exit codes.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use farbus_fabric::wire::ExportName;
use farbus_vfio::Function;
use farbus_vfio::soft_nvme::{SoftNvme, SoftNvmeConfig};
use log::{LevelFilter, error, info, warn};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::exports::{Export, Exports};
use crate::manager::Manager;

const EXIT_CODES: &str = "\
Exit codes:
  0  ended in order, by SIGTERM or SIGINT
  1  failed while running
  2  the command line is wrong
  3  the device cannot be opened
  4  the address cannot be listened on";

/// Lends the PCIe functions of this host to virtual machines on other hosts.
#[derive(Parser)]
#[command(name = "farbus-device-server", version, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to log to standard error: off, error, warn, info, debug or trace.
    #[arg(long, global = true, default_value = "info", value_name = "LEVEL")]
    pub log_level: LevelFilter,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Exports one function, in the foreground, until SIGTERM.
    #[command(after_help = format!("\
Example:
  farbus-device-server export --soft-nvme path=disk.img,size=1GiB --name disk0 --listen 127.0.0.1:7420

Prints one line that begins with \"ready\" when the export can be claimed.

{EXIT_CODES}"))]
    Export(ExportArgs),
}

#[derive(Args)]
struct ExportArgs {
    /// A software NVMe drive on a file or block device:
    /// `path=PATH[,size=SIZE][,block-size=512|4096][,serial=TEXT]`. With size= a missing file
    /// is made; an existing one is never shrunk or overwritten.
    #[arg(long, value_name = "SPEC")]
    soft_nvme: SoftNvmeConfig,
    /// The export's name, which compute agents claim it by: 1 to 64 of A-Z a-z 0-9 . _ -
    #[arg(long, value_parser = parse_export_name)]
    name: ExportName,
    /// Address and port to listen on; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:7420")]
    listen: String,
    /// Allow an address that other hosts can reach, although nobody is authenticated yet.
    #[arg(long)]
    insecure: bool,
    /// Print the ready line as a JSON object.
    #[arg(long)]
    json: bool,
}

fn parse_export_name(name: &str) -> Result<ExportName, String> {
    ExportName::new(name).map_err(|error| error.to_string())
}

/// A failure with the exit code that tells of it.
struct Failure(u8, anyhow::Error);

impl Cli {
    /// Runs the command to its end.
    pub fn run(self) -> ExitCode {
        let Command::Export(args) = self.command;
        match export(&args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(Failure(code, error)) => {
                error!("{error:#}");
                ExitCode::from(code)
            }
        }
    }
}

fn export(args: &ExportArgs) -> Result<(), Failure> {
    let signals = signals().map_err(|error| Failure(1, error))?;
    let listener = listen(&args.listen, args.insecure).map_err(|error| Failure(4, error))?;
    let function = SoftNvme::open(&args.soft_nvme)
        .context("the software NVMe drive cannot be opened")
        .map_err(|error| Failure(3, error))?;
    let function: Arc<dyn Function> = Arc::new(function);
    info!(
        "exports {} as {}",
        function.info().label,
        args.name.as_str()
    );
    let exports = Exports::new(vec![Export::new(args.name.clone(), function)]);
    run(args, listener, exports, &signals).map_err(|error| Failure(1, error))
}

fn run(
    args: &ExportArgs,
    listener: TcpListener,
    exports: Exports,
    signals: &OwnedFd,
) -> anyhow::Result<()> {
    let address = listener.local_addr()?;
    let manager = Manager::new(listener, exports)?;
    announce(args, address)?;
    manager.run(signals)?;
    info!("ended in order");
    Ok(())
}

fn announce(args: &ExportArgs, address: SocketAddr) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let name = args.name.as_str();
    if args.json {
        let line =
            serde_json::json!({"ready": true, "export": name, "listen": address.to_string()});
        writeln!(out, "{line}")?;
    } else {
        writeln!(out, "ready export={name} listen={address}")?;
    }
    out.flush()
}

fn listen(address: &str, insecure: bool) -> anyhow::Result<TcpListener> {
    let addresses: Vec<SocketAddr> = address
        .to_socket_addrs()
        .with_context(|| format!("--listen {address} is not an address and port"))?
        .collect();
    if let Some(open) = addresses.iter().find(|address| !address.ip().is_loopback()) {
        if !insecure {
            bail!(
                "--listen {address}: {} can be reached by other hosts and nobody is authenticated yet; \
                 listen on 127.0.0.1, or add --insecure on a network that you trust",
                open.ip()
            );
        }
        warn!("{open} is open to every host that can reach it");
    }
    TcpListener::bind(&addresses[..])
        .with_context(|| format!("cannot listen on {address} (is the port in use?)"))
}

/// A descriptor that becomes readable at SIGTERM or SIGINT.
fn signals() -> anyhow::Result<OwnedFd> {
    let (reader, writer) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    Ok(reader.into())
}
