//! A drive that is attached across the network: a device server that exports it and a compute
//! agent that offers it, both as an operator starts them.

use std::path::{Path, PathBuf};

use crate::daemon::Daemon;
use crate::error::Result;
use crate::scratch::Scratch;

/// The export's name.
pub const EXPORT: &str = "disk0";

/// Starts a device server that exports a software NVMe drive on a free port of the loopback
/// address. `spec` is what `--soft-nvme` takes.
///
/// # Errors
/// When it does not become ready.
pub fn serve(spec: &str) -> Result<Daemon> {
    serve_at("127.0.0.1:0", spec)
}

/// As [`serve`], on a given address.
///
/// # Errors
/// When it does not become ready.
pub fn serve_at(address: &str, spec: &str) -> Result<Daemon> {
    Daemon::start(
        "farbus-device-server",
        &[
            "export",
            "--soft-nvme",
            spec,
            "--name",
            EXPORT,
            "--listen",
            address,
        ],
    )
}

/// Where a device server that [`serve`] started listens.
#[must_use]
pub fn address(server: &Daemon) -> String {
    server.ready_value("listen").unwrap_or_default().to_owned()
}

/// Starts a compute agent that offers the export at `address` on `socket`.
///
/// # Errors
/// When it does not become ready.
pub fn attach(address: &str, socket: &Path) -> Result<Daemon> {
    attach_export(address, EXPORT, socket)
}

/// As [`attach`], for the export of this name.
///
/// # Errors
/// When it does not become ready.
pub fn attach_export(address: &str, export: &str, socket: &Path) -> Result<Daemon> {
    start_agent(address, export, "--vfio-user", socket, &[])
}

/// As [`attach`], with a vhost-user endpoint that has these further options.
///
/// # Errors
/// When it does not become ready.
pub fn attach_vhost_user(address: &str, socket: &Path, options: &[&str]) -> Result<Daemon> {
    start_agent(address, EXPORT, "--vhost-user-blk", socket, options)
}

/// As [`attach`], with these further options of the agent's.
///
/// # Errors
/// When it does not become ready.
pub fn attach_with(address: &str, socket: &Path, options: &[&str]) -> Result<Daemon> {
    start_agent(address, EXPORT, "--vfio-user", socket, options)
}

fn start_agent(
    address: &str,
    export: &str,
    kind: &str,
    socket: &Path,
    options: &[&str],
) -> Result<Daemon> {
    let socket = socket.display().to_string();
    let mut arguments = vec![
        "--log-level",
        "debug",
        "attach",
        "--from",
        address,
        "--export",
        export,
        kind,
        &socket,
    ];
    arguments.extend(options);
    Daemon::start("farbus-compute-agent", &arguments)
}

/// Both daemons, the drive between them, and where everything is.
#[derive(Debug)]
pub struct AttachedDrive {
    /// The device server.
    pub server: Daemon,
    /// The compute agent.
    pub agent: Daemon,
    /// The file behind the drive.
    pub disk: PathBuf,
    /// The socket for the VMM.
    pub socket: PathBuf,
}

impl AttachedDrive {
    /// Attaches a software drive whose file is `disk.img` in `scratch`; `options` are further
    /// ones of `--soft-nvme`, such as `size=1GiB`.
    ///
    /// # Errors
    /// When either daemon does not become ready.
    pub fn start(scratch: &Scratch, options: &str) -> Result<Self> {
        Self::start_with(scratch, options, &[])
    }

    /// As [`Self::start`], with these further options of the agent's.
    ///
    /// # Errors
    /// When either daemon does not become ready.
    pub fn start_with(scratch: &Scratch, options: &str, agent: &[&str]) -> Result<Self> {
        let disk = scratch.join("disk.img");
        let socket = scratch.join("disk0.sock");
        let server = serve(&format!("path={},{options}", disk.display()))?;
        let agent = attach_with(&address(&server), &socket, agent)?;
        Ok(Self {
            server,
            agent,
            disk,
            socket,
        })
    }

    /// As [`Self::start`], with a vhost-user endpoint that has the agent's options `agent`.
    ///
    /// # Errors
    /// When either daemon does not become ready.
    pub fn start_vhost_user(scratch: &Scratch, options: &str, agent: &[&str]) -> Result<Self> {
        let disk = scratch.join("disk.img");
        let socket = scratch.join("disk0.sock");
        let server = serve(&format!("path={},{options}", disk.display()))?;
        let agent = attach_vhost_user(&address(&server), &socket, agent)?;
        Ok(Self {
            server,
            agent,
            disk,
            socket,
        })
    }

    /// Ends both daemons in order; each must end with exit status 0.
    ///
    /// # Errors
    /// When one of them does not.
    pub fn end(self) -> Result<()> {
        self.agent.terminate()?;
        self.server.terminate()
    }
}
