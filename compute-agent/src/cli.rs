//! The command line: what it accepts, what it starts, and the exit codes.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use farbus_fabric::FabricError;
use farbus_fabric::provider::{self, Wanted};
use farbus_fabric::session::ClaimedLink;
use farbus_fabric::wire::{ExportName, LanePlace};
use farbus_rest::logging::LogFormat;
use farbus_shadow_mem::limits::LimitSpec;
use farbus_shadow_mem::polling::Polling;
use farbus_shadow_mem::remote::RemoteFunction;
use farbus_vfio::Function;
use log::{LevelFilter, debug, error, info};

use crate::api::Msix;
use crate::custody::attend::attend;
use crate::custody::worker::{CONTROLLER, key};
use crate::custody::{Client, Custody};
use crate::daemon;
use crate::daemon::cli::{SERVE_HELP, ServeArgs};
use crate::reconnect::{MIN_PAUSE, Source};
use crate::sandbox::{self, Needs, User};
use crate::vfio_user::Endpoint;
use crate::vhost_user;
use crate::vhost_user::cli::{PRINT_CAPABILITIES, VhostUserArgs};
use crate::vhost_user::socket::Socket;
use crate::worker::Worker;

const EXIT_CODES: &str = "\
Exit codes:
  0  ended in order, by SIGTERM or SIGINT
  1  failed while running
  2  the command line is wrong
  3  the export cannot be claimed
  4  the socket cannot be offered";

/// How long a device server may take to notice that an agent has died, and to reset its drive. It does not
/// tell who waits when that is done, so it is asked again and again.
const PREDECESSOR: Duration = Duration::from_secs(3);

/// Offers PCIe functions of other hosts to the virtual machines of this one.
#[derive(Parser)]
#[command(name = "farbus-compute-agent", version, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to log to standard error: off, error, warn, info, debug or trace.
    #[arg(long, global = true, default_value = "info", value_name = "LEVEL")]
    pub log_level: LevelFilter,
    /// How log lines look: text, or json for an object a line.
    #[arg(long, global = true, default_value_t, value_name = "FORMAT", value_parser = log_format_parser())]
    pub log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Claims one export and offers it on a socket, in the foreground, until SIGTERM.
    #[command(after_help = format!("\
Example:
  farbus-compute-agent attach --from 127.0.0.1:7420 --export disk0 --vfio-user /run/farbus/disk0.sock
  farbus-compute-agent attach --from 127.0.0.1:7420 --export disk0 --vhost-user-blk /run/farbus/disk0.sock

Prints one line that begins with \"ready\" when a VMM can connect. For QEMU, the guest's
memory must be shared (memory-backend-memfd with share=on).

{EXIT_CODES}"))]
    Attach(Box<AttachArgs>),
    /// Gives devices to the VMs of this host, by REST: the agent as a service, until SIGTERM.
    #[command(after_help = SERVE_HELP)]
    Serve(ServeArgs),
    /// Prints the OpenAPI description of the REST interface.
    #[command(after_help = "\
Example:
  farbus-compute-agent openapi > docs/openapi/agent.json

Exit codes:
  0  printed")]
    Openapi,
    /// Says whether this host can use RDMA, and what helps where it cannot.
    #[command(after_help = "\
Example:
  farbus-compute-agent doctor

Each line is a finding: ok; note, which takes nothing away; or warning, which costs speed. TCP works
on any host.

Exit codes:
  0  looked")]
    Doctor,
}

#[derive(Args)]
struct AttachArgs {
    /// The device server that has the export.
    #[arg(long, value_name = "HOST:PORT")]
    from: String,
    /// The export's name there.
    #[arg(long, value_parser = parse_export_name)]
    export: ExportName,
    /// The UNIX socket to offer the function on, for vfio-user VMMs. Its directory is made if
    /// it does not exist.
    #[arg(long, value_name = "PATH", group = "endpoint", required_unless_present_any = ["vhost_user_blk", "fd"])]
    vfio_user: Option<PathBuf>,
    /// With --vfio-user, who keeps the MSI-X table: this agent (mediated) or the VMM (irqfd). auto is
    /// mediated towards QEMU, which otherwise aborts when the device is unplugged, by a guest too, and
    /// irqfd towards others.
    #[arg(long, value_enum, value_name = "WHO", default_value_t = Msix::Auto, requires = "vfio_user")]
    msix: Msix,
    #[command(flatten)]
    vhost_user: VhostUserArgs,
    /// What carries the data: auto (RDMA if both sides have a device and a path between them, else
    /// TCP), verbs (RDMA or nothing), or tcp.
    #[arg(long, value_name = "PROVIDER", default_value_t)]
    provider: Wanted,
    /// With --provider auto: when RDMA was in use and the link was lost, go on over TCP if RDMA cannot
    /// be had. Without this the guest waits for RDMA.
    #[arg(long)]
    allow_tcp_fallback: bool,
    /// Holds this attachment to limits: `[iops=N][,iops-burst=N][,bytes-per-second=SIZE][,bytes-burst=SIZE]`.
    /// Commands beyond them wait. The device server may have lower ones, which hold then.
    #[arg(long, value_name = "SPEC")]
    limit: Option<LimitSpec>,
    /// The RDMA device to use, such as mlx5_0. By default the one that has the address from which
    /// the device server is reached.
    #[arg(long, value_name = "NAME")]
    rdma_device: Option<String>,
    /// The place in the RDMA port's table of addresses. By default that of the address from which the
    /// device server is reached.
    #[arg(long, value_name = "INDEX")]
    gid_index: Option<u8>,
    /// How long the device server may take to answer, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    connect_timeout: u64,
    /// How the attachment's thread waits: adaptive looks for work for a moment before it sleeps,
    /// while that pays; always never sleeps; never sleeps at once.
    #[arg(long, value_name = "POLICY", default_value_t, value_parser = poll_parser())]
    poll: Polling,
    /// Data threads of the attachment, each with its share of the guest's I/O queues and a connection
    /// of its own: a number, or auto (half of this host's processors, 4 at most). The device server
    /// may give fewer. For --vfio-user.
    #[arg(long, value_name = "N", default_value = "1", value_parser = parse_data_threads, conflicts_with_all = ["vhost_user_blk", "fd", "custody"])]
    data_threads: u16,
    /// The daemon's socket, where this process hands over what a successor needs of it.
    #[arg(long, value_name = "PATH", hide = true, requires = "id")]
    custody: Option<PathBuf>,
    /// The attachment's id there.
    #[arg(long, value_name = "ID", hide = true, requires = "custody")]
    id: Option<String>,
    /// Whether to give up privileges, files and system calls once everything is set up. By default a
    /// worker of the daemon does, others do not.
    #[arg(long, value_name = "SWITCH")]
    sandbox: Option<Switch>,
    /// Whom to become then, by numbers.
    #[arg(long, value_name = "UID:GID")]
    user: Option<User>,
    /// Print the ready line as a JSON object; a failure before that, too.
    #[arg(long)]
    json: bool,
}

fn parse_export_name(name: &str) -> Result<ExportName, String> {
    ExportName::new(name).map_err(|error| error.to_string())
}

fn log_format_parser() -> impl TypedValueParser<Value = LogFormat> {
    PossibleValuesParser::new(LogFormat::NAMES).try_map(|name| name.parse())
}

/// Threads that `auto` makes at most: a connection that a core fills carries what most drives can.
const AUTO_THREADS: usize = 4;

fn parse_data_threads(word: &str) -> Result<u16, String> {
    if word == "auto" {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        return Ok((cores / 2).clamp(1, AUTO_THREADS) as u16);
    }
    let most = LanePlace::MAX;
    match word.parse() {
        Ok(threads) if (1..=most).contains(&threads) => Ok(threads),
        _ => Err(format!("use a number from 1 to {most}, or auto")),
    }
}

fn poll_parser() -> impl TypedValueParser<Value = Polling> {
    PossibleValuesParser::new(Polling::NAMES).try_map(|name| name.parse())
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

/// A worker cannot go on where the one before was.
#[derive(Debug, thiserror::Error)]
#[error(
    "what the worker before has left cannot be taken up; an agent of the version that made it can, or \
     delete the attachment and make it again"
)]
struct NotTakenUp(#[source] Box<dyn std::error::Error + Send + Sync>);

/// A failure with the exit code that tells of it.
struct Failure(u8, anyhow::Error);

impl Failure {
    /// Whether somebody else has what is wanted, so that another one may do.
    fn is_busy(&self) -> bool {
        let mut causes = self.1.chain();
        causes.any(|cause| cause.downcast_ref().is_some_and(FabricError::is_busy))
    }
}

impl Cli {
    /// Parses the command line of this process. Where it asks what this vhost-user backend can do,
    /// that is answered, and the rest ignored, as the conventions for backends have it.
    pub fn from_arguments() -> Result<Self, ExitCode> {
        if std::env::args_os().any(|argument| argument == PRINT_CAPABILITIES) {
            println!("{}", vhost_user::cli::capabilities());
            return Err(ExitCode::SUCCESS);
        }
        Ok(Self::parse())
    }

    /// The attachment that this process is the worker of, if it is one's.
    pub fn attachment(&self) -> Option<&str> {
        match &self.command {
            Command::Attach(args) => args.id.as_deref(),
            _ => None,
        }
    }

    /// Runs the command to its end.
    pub fn run(self) -> ExitCode {
        let done = match &self.command {
            Command::Attach(args) => attach(args).inspect_err(|failure| refuse(args, failure)),
            Command::Serve(args) => args
                .run(self.log_level, self.log_format)
                .map_err(|(code, error)| Failure(code, error)),
            Command::Openapi => daemon::cli::openapi().map_err(|error| Failure(1, error.into())),
            Command::Doctor => doctor().map_err(|error| Failure(1, error.into())),
        };
        match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(Failure(code, error)) => {
                error!("{error:#}");
                ExitCode::from(code)
            }
        }
    }
}

fn doctor() -> io::Result<()> {
    let mut out = io::stdout().lock();
    for finding in provider::doctor::examine() {
        let level = match finding.level {
            provider::doctor::Level::Usable => "ok",
            provider::doctor::Level::None => "note",
            provider::doctor::Level::Broken => "warning",
        };
        writeln!(out, "{level:<8} rdma: {}", finding.what)?;
        if let Some(remedy) = finding.remedy {
            writeln!(out, "         -> {remedy}")?;
        }
    }
    out.flush()
}

fn attach(args: &AttachArgs) -> Result<(), Failure> {
    // Before anything is opened that the number could come to mean.
    let inherited = args.vhost_user.fd.map(|fd| {
        Socket::inherit(fd)
            .with_context(|| format!("descriptor {fd} cannot be used as the socket"))
            .map_err(|error| Failure(4, error))
    });
    let inherited = inherited.transpose()?;
    let name = args.export.as_str();
    let mut source = Source {
        address: args.from.clone(),
        export: args.export.clone(),
        providers: provider::Options {
            wanted: args.provider,
            device: args.rdma_device.clone(),
            gid_index: args.gid_index,
        },
        allow_tcp_fallback: args.allow_tcp_fallback,
        limits: args.limit.unwrap_or_default().rates(),
        data_threads: args.data_threads,
    };
    let custody = custody(args)?;
    if let (Some(path), true) = (&args.vfio_user, custody.held(&key(CONTROLLER)).is_some()) {
        return resume(args, path, source, &custody);
    }
    let deadline = Duration::from_secs(args.connect_timeout);
    let remote = claim_at_start(args, &mut source, deadline)
        .map_err(anyhow::Error::new)
        .and_then(|claimed| {
            let label = format!("{name} of {}", args.from);
            let function = if custody.is_some() {
                RemoteFunction::with_record(label, claimed)
            } else {
                RemoteFunction::new(label, claimed)
            };
            Ok(Arc::new(function?))
        })
        .with_context(|| format!("export {name} of {} cannot be claimed", args.from))
        .map_err(|error| Failure(3, error))?;
    let Some(path) = &args.vfio_user else {
        return attach_vhost_user(args, inherited, remote, source, &custody);
    };
    let function: Arc<dyn Function> = remote.clone();
    let bound = || match custody.is_some() {
        true => Endpoint::bind_kept(path, function, custody.clone()),
        false => Endpoint::bind(path, function),
    };
    let endpoint = make_directory(path)
        .and_then(|()| Ok(bound()?.with_msix(args.msix)))
        .with_context(|| not_offered(path))
        .map_err(|error| Failure(4, error))?;
    if let Some(record) = remote.record() {
        // The last of what a successor cannot do without: with it there is something to take up.
        custody.keep(vec![(key(CONTROLLER), record.as_fd())]);
    }
    serve(args, endpoint, remote, source, &custody).map_err(|error| Failure(1, error))
}

/// Connects to the daemon, if this process has one.
fn custody(args: &AttachArgs) -> Result<Custody, Failure> {
    let (Some(path), Some(id)) = (&args.custody, &args.id) else {
        return Ok(Custody::none());
    };
    let client = Client::connect(path, id).map_err(|error| Failure(1, error.into()))?;
    Ok(Custody::new(client))
}

/// Goes on where a predecessor was killed. The VMM is answered at once; what needs the device waits
/// for a new claim.
fn resume(
    args: &AttachArgs,
    path: &Path,
    source: Source,
    custody: &Custody,
) -> Result<(), Failure> {
    let label = format!("{} of {}", args.export.as_str(), args.from);
    let left = custody.held(&key(CONTROLLER));
    let remote = left.map(|memory| RemoteFunction::resume(label, memory));
    let lost = |error: anyhow::Error| NotTakenUp(error.into()).into();
    let remote = remote
        .transpose()
        .map_err(|error| Failure(1, lost(error.into())))?
        .map(Arc::new)
        .ok_or_else(|| Failure(1, anyhow::anyhow!("there is nothing to take up")))?;
    let function: Arc<dyn Function> = remote.clone();
    let endpoint = Endpoint::resume(path, function, args.msix, custody.clone())
        .with_context(|| not_offered(path))
        .map_err(|error| Failure(4, lost(error)))?;
    let recovered = remote.recover();
    recovered.map_err(|error| Failure(1, lost(error.into())))?;
    info!("goes on where another process was");
    serve(args, endpoint, remote, source, custody).map_err(|error| Failure(1, error))
}

/// Claims the export. The device server may still be ending the claim of who had it before, so this
/// waits a little for an export that is busy. A vhost-user endpoint may be started to go on where
/// one was that has just died: its VMM waits, so this does so for other reasons, too.
fn claim_at_start(
    args: &AttachArgs,
    source: &mut Source,
    deadline: Duration,
) -> Result<ClaimedLink, FabricError> {
    let begun = Instant::now();
    loop {
        let claimed = source.claim(deadline);
        match claimed {
            Err(error)
                if (error.is_busy() || args.vfio_user.is_none() && error.should_reconnect())
                    && begun.elapsed() < PREDECESSOR =>
            {
                debug!("not claimed yet: {error}");
                std::thread::sleep(MIN_PAUSE);
            }
            done => return done,
        }
    }
}

fn not_offered(path: &Path) -> String {
    format!("the socket {} cannot be offered", path.display())
}

fn attach_vhost_user(
    args: &AttachArgs,
    inherited: Option<Socket>,
    remote: Arc<RemoteFunction>,
    source: Source,
    custody: &Custody,
) -> Result<(), Failure> {
    let socket = match (inherited, &args.vhost_user.vhost_user_blk) {
        (Some(socket), _) => Ok(socket),
        (None, Some(path)) => make_directory(path)
            .and_then(|()| Ok(Socket::bind(path)?))
            .with_context(|| not_offered(path)),
        (None, None) => Err(anyhow::anyhow!("there is no endpoint to offer")),
    };
    let socket = socket.map_err(|error| Failure(4, error))?;
    if let Some(record) = remote.record() {
        // For the daemon to read what the attachment does. A successor has a record of its own: its VMM
        // comes back to it, and has the inflight record.
        custody.keep(vec![(key(CONTROLLER), record.as_fd())]);
    }
    enter_sandbox(args, custody).map_err(|error| Failure(1, error))?;
    let options = args.vhost_user.options();
    let failed = |error| Failure(1, error);
    attend(custody).map_err(|error| failed(error.into()))?;
    let mut worker =
        vhost_user::worker::Worker::new(remote, source, options, args.poll, custody.clone())
            .map_err(failed)?;
    worker
        .start()
        .context("the drive cannot be used")
        .map_err(|error| Failure(3, error))?;
    announce(args).map_err(|error| failed(error.into()))?;
    if let Some(mut client) = custody.client() {
        client.ready();
    }
    worker.run(socket).map_err(failed)?;
    if let Some(mut client) = custody.client() {
        client.bye();
    }
    info!("ended in order");
    Ok(())
}

fn serve(
    args: &AttachArgs,
    endpoint: Endpoint,
    remote: Arc<RemoteFunction>,
    source: Source,
    custody: &Custody,
) -> anyhow::Result<()> {
    enter_sandbox(args, custody)?;
    let worker = Worker::new(endpoint, remote, source, args.poll, custody.clone())?;
    announce(args)?;
    if let Some(mut client) = custody.client() {
        client.ready();
    }
    worker.run()?;
    info!("ended in order");
    Ok(())
}

/// Gives up what is not needed any more, before other threads are there to keep it.
fn enter_sandbox(args: &AttachArgs, custody: &Custody) -> anyhow::Result<()> {
    let by_default = if custody.is_some() {
        Switch::On
    } else {
        Switch::Off
    };
    if args.sandbox.unwrap_or(by_default) == Switch::On {
        sandbox::enter(&Needs {
            address: args.from.clone(),
            verbs: cfg!(feature = "verbs") && args.provider != Wanted::Tcp,
            user: args.user,
        })?;
    }
    Ok(())
}

fn make_directory(socket: &Path) -> anyhow::Result<()> {
    match socket.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => std::fs::create_dir_all(parent)
            .with_context(|| format!("the directory {} cannot be made", parent.display())),
        _ => Ok(()),
    }
}

/// Tells a program that has asked for JSON why there will be no ready line.
fn refuse(args: &AttachArgs, failure: &Failure) {
    if args.json {
        let error = format!("{:#}", failure.1);
        let line = serde_json::json!({"ready": false, "error": error, "busy": failure.is_busy()});
        // Whoever does not listen finds it in the log.
        let _ = writeln!(io::stdout(), "{line}");
    }
}

fn announce(args: &AttachArgs) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let name = args.export.as_str();
    let path = |path: &PathBuf| path.display().to_string();
    let (kind, place) = match (&args.vfio_user, &args.vhost_user.vhost_user_blk) {
        (Some(socket), _) => ("vfio-user", path(socket)),
        (None, Some(socket)) => ("vhost-user-blk", path(socket)),
        (None, None) => ("fd", args.vhost_user.fd.unwrap_or(-1).to_string()),
    };
    if args.json {
        let key = kind.replace('-', "_");
        let line = serde_json::json!({"ready": true, "export": name, key: place});
        writeln!(out, "{line}")?;
    } else {
        writeln!(out, "ready export={name} {kind}={place}")?;
    }
    out.flush()
}
