//! Worker processes. They outlive the daemon, on purpose: an attachment goes on while the daemon is
//! restarted or replaced. So they are addressed through pidfds, known again by what is written down of them
//! ([`Identity`]) or by the socket in their command line, and belong to a process group of their own, which
//! no terminal's interrupt reaches.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use log::LevelFilter;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Deserialize;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, BufReader, Interest, Lines};
use tokio::process::{Child, ChildStdout, Command};

use super::id::AttachmentId;
use super::identity::Identity;
use super::store::Chosen;
use crate::api::{AttachmentSpec, EndpointSpec, Fabric, Limits, Msix};
use crate::sandbox::User;

/// Request queues of a virtio device, unless asked for otherwise.
pub const NUM_QUEUES: u16 = 4;

/// Descriptors of a queue of a virtio device, unless asked for otherwise.
pub const QUEUE_SIZE: u16 = 128;

/// How long a worker that was asked to end may take: it gives its export back, and waits a moment for
/// a device server that does not answer.
const ORDERLY_END: Duration = Duration::from_secs(5);

/// How a worker is started, whatever it is to do.
#[derive(Clone, Debug)]
pub struct Launcher {
    /// The program.
    pub program: PathBuf,
    /// What it logs.
    pub log_level: LevelFilter,
    /// How its log lines look.
    pub log_format: farbus_rest::logging::LogFormat,
    /// Where it hands over what outlives it.
    pub custody: Option<PathBuf>,
    /// Whom it becomes once it is set up.
    pub user: Option<User>,
    /// How long it may take to claim its export, in seconds.
    pub connect_timeout: u64,
}

/// A process that carries an attachment's data.
#[derive(Debug)]
pub struct Worker {
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
    /// None if an earlier daemon started it.
    child: Option<Child>,
}

impl Worker {
    /// Takes over a process that an earlier daemon has started.
    ///
    /// # Errors
    /// When it has ended.
    pub fn adopt(pid: u32) -> io::Result<Self> {
        let id = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let id = id.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let pidfd = pidfd_open(id, PidfdFlags::NONBLOCK)?;
        #[allow(
            deprecated,
            reason = "sound for what owns its descriptor; the other way is unsafe to call"
        )]
        let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
        Ok(Self {
            pid,
            pidfd,
            child: None,
        })
    }

    /// As [`Self::adopt`], if that process is there yet.
    #[must_use]
    pub fn adopt_known(known: &Identity) -> Option<Self> {
        let worker = Self::adopt(known.pid()).ok()?;
        // Who it is cannot change any more.
        known.is_there().then_some(worker)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its end. Harmless to give up and to call again.
    pub async fn ended(&self) {
        // A pidfd becomes readable once, and stays so.
        if let Err(error) = self.pidfd.readable().await {
            log::error!("worker {} cannot be watched: {error}", self.pid);
            std::future::pending::<()>().await;
        }
    }

    /// How it has ended, in words.
    pub async fn fate(&mut self) -> String {
        match &mut self.child {
            Some(child) => match child.wait().await {
                Ok(status) => status.to_string(),
                Err(error) => format!("an unknown status ({error})"),
            },
            None => "an unknown status".into(),
        }
    }

    /// Ends it: in order, or, if it takes too long, at once.
    pub async fn stop(mut self) {
        self.signal(Signal::TERM);
        if tokio::time::timeout(ORDERLY_END, self.ended())
            .await
            .is_err()
        {
            log::warn!("worker {} does not end in order and is killed", self.pid);
            self.signal(Signal::KILL);
            self.ended().await;
        }
        self.fate().await;
    }

    /// Asks it to end, without waiting.
    pub fn signal(&self, signal: Signal) {
        match pidfd_send_signal(self.pidfd.get_ref(), signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => log::error!("worker {} cannot be signalled: {error}", self.pid),
        }
    }
}

/// What a worker says on its standard output, once.
#[derive(Debug, Deserialize)]
struct Announcement {
    ready: bool,
    error: Option<String>,
    #[serde(default)]
    busy: bool,
}

/// Why a worker was not to be had.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The program cannot be run.
    #[error("a worker cannot be started: {0}")]
    Spawn(#[from] io::Error),
    /// It says why.
    #[error("{error}")]
    Refused {
        /// What it said.
        error: String,
        /// Somebody else has the device; another one may do.
        busy: bool,
    },
    /// It does not say why.
    #[error("the worker has ended with {status} before it was ready; the log has more")]
    Ended {
        /// How it ended.
        status: String,
    },
}

/// A worker that is not ready yet.
#[derive(Debug)]
pub struct Starting {
    worker: Worker,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Launcher {
    /// Starts the worker of an attachment.
    ///
    /// # Errors
    /// When the program cannot be run.
    pub fn start(
        &self,
        id: &AttachmentId,
        spec: &AttachmentSpec,
        device: &Chosen,
        socket: &Path,
    ) -> io::Result<Starting> {
        let mut command = Command::new(&self.program);
        command
            .arg0("farbus-compute-agent")
            .args(["--log-level", self.log_level.as_str()])
            .args(["--log-format", &self.log_format.to_string()])
            .args(["attach", "--json", "--id", id.as_str()])
            .args(["--from", &device.address])
            .arg(format!("--export={}", device.export))
            .args(["--connect-timeout", &self.connect_timeout.to_string()])
            .args(
                self.custody
                    .iter()
                    .flat_map(|path| [OsStr::new("--custody"), path.as_os_str()]),
            )
            .args(
                self.user
                    .into_iter()
                    .flat_map(|user| ["--user".to_owned(), user.to_string()]),
            )
            .args(arguments(spec))
            .arg(option(&spec.endpoint))
            .arg(socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .process_group(0)
            .kill_on_drop(false);
        let mut child = command.spawn()?;
        let gone = || io::Error::other("it has ended at once");
        let lines = child.stdout.take().ok_or_else(gone)?;
        let adopted = child.id().ok_or_else(gone).and_then(Worker::adopt);
        let mut worker = match adopted {
            Ok(worker) => worker,
            Err(error) => {
                // Nobody would know of it.
                let _ = child.start_kill();
                return Err(error);
            }
        };
        worker.child = Some(child);
        Ok(Starting {
            worker,
            lines: BufReader::new(lines).lines(),
        })
    }
}

impl Starting {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.worker.pid()
    }

    /// Waits until it has said whether it is ready; `Ok(Err)` if it is not. Harmless to give up and to
    /// call again.
    pub async fn announced(&mut self) -> Result<(), StartError> {
        let line = self.lines.next_line().await;
        let said = line.ok().flatten();
        let said = said.and_then(|line| serde_json::from_str::<Announcement>(&line).ok());
        match said {
            Some(Announcement { ready: true, .. }) => Ok(()),
            Some(Announcement { error, busy, .. }) => Err(StartError::Refused {
                error: error.unwrap_or_else(|| "the worker does not say why".into()),
                busy,
            }),
            None => {
                self.worker.ended().await;
                let status = self.worker.fate().await;
                Err(StartError::Ended { status })
            }
        }
    }

    /// The worker, ready or not.
    #[must_use]
    pub fn into_worker(self) -> Worker {
        self.worker
    }
}

/// The option that names the socket.
fn option(endpoint: &EndpointSpec) -> &'static str {
    match endpoint {
        EndpointSpec::VfioUser { .. } => "--vfio-user",
        EndpointSpec::VhostUserBlk { .. } => "--vhost-user-blk",
    }
}

/// What of an attachment's specification is a worker's to do.
fn arguments(spec: &AttachmentSpec) -> Vec<String> {
    let provider = match spec.fabric {
        Fabric::Auto => "auto",
        Fabric::Verbs => "verbs",
        Fabric::Tcp => "tcp",
    };
    let mut arguments = vec!["--provider".to_owned(), provider.to_owned()];
    let mut add = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    if let Some(limits) = limits(&spec.limits) {
        add("--limit", limits);
    }
    match &spec.endpoint {
        EndpointSpec::VfioUser { msix } => {
            let who = match msix {
                Msix::Auto => "auto",
                Msix::Mediated => "mediated",
                Msix::Irqfd => "irqfd",
            };
            add("--msix", who.to_owned());
        }
        EndpointSpec::VhostUserBlk {
            num_queues,
            queue_size,
            readonly,
            serial,
        } => {
            add("--num-queues", num_queues.unwrap_or(NUM_QUEUES).to_string());
            add("--queue-size", queue_size.unwrap_or(QUEUE_SIZE).to_string());
            if let Some(serial) = serial {
                arguments.push(format!("--serial={serial}"));
            }
            if *readonly {
                arguments.push("--readonly".into());
            }
        }
    }
    arguments
}

/// Limits as a command line has them; `None` if there are none.
fn limits(limits: &Limits) -> Option<String> {
    let Limits {
        iops,
        iops_burst,
        bytes_per_second,
        bytes_burst,
    } = *limits;
    let named = [
        ("iops", iops),
        ("iops-burst", iops_burst),
        ("bytes-per-second", bytes_per_second),
        ("bytes-burst", bytes_burst),
    ];
    let named = named.into_iter();
    let each: Vec<String> = named
        .filter_map(|(name, value)| Some(format!("{name}={}", value?)))
        .collect();
    (!each.is_empty()).then(|| each.join(","))
}

/// The workers on this host whose sockets are in `sockets`, with these. The kernel knows them all,
/// whatever a daemon that died had come to write down. Only processes of the daemon's own user, and of
/// the workers' one, if they have one, can be workers; anybody may call a process what he likes, so one
/// whose [`Identity`] was written down is known by that.
#[must_use]
pub fn find(sockets: &Path, workers_user: Option<User>) -> Vec<(PathBuf, u32)> {
    let own = rustix::process::geteuid().as_raw();
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let owner = fs::metadata(format!("/proc/{pid}")).ok()?.uid();
        if owner != own && workers_user.is_none_or(|user| owner != user.uid) {
            return None;
        }
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some((socket_of(&line, sockets)?, pid))
    })
    .collect()
}

/// The socket in a worker's command line, whose arguments end with NUL bytes each.
fn socket_of(line: &[u8], sockets: &Path) -> Option<PathBuf> {
    let arguments: Vec<&str> = line
        .split(|byte| *byte == 0)
        .map(|argument| std::str::from_utf8(argument).unwrap_or(""))
        .collect();
    if !arguments.contains(&"attach") || !arguments.contains(&"--id") {
        return None;
    }
    let named = arguments
        .windows(2)
        .find(|pair| matches!(pair[0], "--vfio-user" | "--vhost-user-blk"))?;
    let socket = Path::new(named[1]);
    (socket.parent() == Some(sockets)).then(|| socket.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_are_named_are_passed_on() {
        let some = Limits {
            iops: Some(1000),
            bytes_per_second: Some(1 << 20),
            ..Limits::default()
        };

        assert_eq!(
            limits(&some).as_deref(),
            Some("iops=1000,bytes-per-second=1048576")
        );
        assert_eq!(limits(&Limits::default()), None);
    }

    #[test]
    fn worker_is_known_by_its_socket() {
        let sockets = Path::new("/run/farbus/attachments");
        let line = |socket: &str| {
            format!("agent\0--log-level\0info\0attach\0--id\0a\0--vfio-user\0{socket}\0")
        };

        let found = socket_of(line("/run/farbus/attachments/a.sock").as_bytes(), sockets);

        assert_eq!(found, Some(sockets.join("a.sock")));
        assert_eq!(socket_of(line("/tmp/a.sock").as_bytes(), sockets), None);
        assert_eq!(socket_of(b"attach\0--vfio-user\0", sockets), None);
        assert_eq!(socket_of(b"", sockets), None);
    }
}
