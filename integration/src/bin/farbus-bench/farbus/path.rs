//! Device server and compute agents, as an operator starts them.

use std::path::PathBuf;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use farbus_integration::daemon::Daemon;
use farbus_integration::deadline::Deadline;
use farbus_integration::scratch::Scratch;

use crate::sides::Side;
use crate::usage::Watched;

const SERVER: &str = "farbus-device-server";
const AGENT: &str = "farbus-compute-agent";

/// How a daemon waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Poll {
    Never,
    Adaptive,
    Always,
}

impl Poll {
    fn name(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::Adaptive => "adaptive",
            Self::Always => "always",
        }
    }

    /// The option for a daemon; none when this build of it has no such option.
    fn arguments(self, daemon: &str, command: &str, known: &OnceLock<bool>) -> Vec<String> {
        let known = *known.get_or_init(|| {
            let help = Daemon::run(daemon, &[command, "--help"], Deadline::secs(10));
            help.is_ok_and(|help| help.stdout.contains("--poll"))
        });
        if known {
            vec!["--poll".into(), self.name().into()]
        } else {
            Vec::new()
        }
    }
}

/// What the drives are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backing {
    Memory,
    Null,
}

impl Backing {
    /// As `--soft-nvme` takes it.
    pub(crate) fn spec(self, size: u64) -> String {
        let kind = match self {
            Self::Memory => "memory",
            Self::Null => "null",
        };
        format!("backing={kind},size={size}")
    }
}

/// A running device server with one or more exports.
#[derive(Debug)]
pub(crate) struct Server {
    daemon: Daemon,
    address: String,
    exports: Vec<String>,
}

impl Server {
    /// Starts it with `count` drives of `size` bytes each.
    pub(crate) fn start(backing: Backing, size: u64, count: u32, poll: Poll) -> Result<Self> {
        static POLL: OnceLock<bool> = OnceLock::new();
        let exports: Vec<String> = (0..count).map(|index| format!("disk{index}")).collect();
        let mut arguments = vec!["export".to_owned()];
        for name in &exports {
            let spec = format!("{},name={name}", backing.spec(size));
            arguments.extend(["--soft-nvme".to_owned(), spec]);
        }
        arguments.extend(["--listen".to_owned(), "127.0.0.1:0".to_owned()]);
        arguments.extend(poll.arguments(SERVER, "export", &POLL));
        let daemon = start(SERVER, &arguments)?;
        let address = daemon.ready_value("listen").context("no address")?;
        Ok(Self {
            address: address.to_owned(),
            daemon,
            exports,
        })
    }

    /// Where it listens, and the names of its exports.
    pub(crate) fn lent(&self) -> (&str, &[String]) {
        (&self.address, &self.exports)
    }

    pub(crate) fn watched(&self) -> Watched {
        Watched {
            name: "server",
            pid: self.daemon.pid(),
            side: Side::Device,
        }
    }
}

/// What an agent offers to a VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    VfioUser,
    VhostUserBlk,
}

impl Endpoint {
    /// The agent's option for it.
    fn option(self) -> &'static str {
        match self {
            Self::VfioUser => "--vfio-user",
            Self::VhostUserBlk => "--vhost-user-blk",
        }
    }
}

/// What is started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) backing: Backing,
    /// Of all drives together.
    pub(crate) size: u64,
    pub(crate) attachments: u32,
    pub(crate) poll: Poll,
    /// Data threads on each side.
    pub(crate) threads: u16,
    pub(crate) endpoint: Endpoint,
}

impl Setup {
    /// One attachment as an operator gets it, with a drive in memory.
    pub(crate) fn default_of(size: u64) -> Self {
        Self {
            backing: Backing::Memory,
            size,
            attachments: 1,
            poll: Poll::Adaptive,
            threads: 1,
            endpoint: Endpoint::VfioUser,
        }
    }
}

/// A device server, and an agent for each of its exports.
#[derive(Debug)]
pub(crate) struct Attached {
    /// The agents go first, as they would otherwise wait for their server.
    agents: Vec<Daemon>,
    server: Server,
    pub(crate) sockets: Vec<PathBuf>,
    _scratch: Scratch,
}

impl Attached {
    pub(crate) fn start(setup: Setup) -> Result<Self> {
        static POLL: OnceLock<bool> = OnceLock::new();
        let Setup {
            backing,
            size,
            attachments,
            poll,
            threads,
            endpoint,
        } = setup;
        let server = Server::start(backing, size / u64::from(attachments), attachments, poll)?;
        let scratch = Scratch::new("farbus")?;
        let mut agents = Vec::new();
        let mut sockets = Vec::new();
        for name in &server.exports {
            let socket = scratch.join(format!("{name}.sock"));
            let mut arguments: Vec<String> = [
                "attach",
                "--from",
                &server.address,
                "--export",
                name,
                endpoint.option(),
            ]
            .map(str::to_owned)
            .into();
            arguments.push(socket.display().to_string());
            arguments.extend(poll.arguments(AGENT, "attach", &POLL));
            if threads > 1 {
                arguments.extend(["--data-threads".into(), threads.to_string()]);
            }
            agents.push(start(AGENT, &arguments)?);
            sockets.push(socket);
        }
        Ok(Self {
            agents,
            server,
            sockets,
            _scratch: scratch,
        })
    }

    pub(crate) fn watched(&self) -> Vec<Watched> {
        let agents = self.agents.iter().map(|agent| Watched {
            name: "agent",
            pid: agent.pid(),
            side: Side::Compute,
        });
        agents.chain([self.server.watched()]).collect()
    }

    /// An error unless all of it is running.
    pub(crate) fn check(&mut self) -> Result<()> {
        for daemon in self.agents.iter_mut().chain([&mut self.server.daemon]) {
            daemon.check_running()?;
        }
        Ok(())
    }
}

/// Starts one of the workspace's programs, with little to log.
pub(crate) fn start(name: &str, arguments: &[String]) -> Result<Daemon> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Daemon::start(name, &arguments).with_context(|| format!("starting {name}"))
}
