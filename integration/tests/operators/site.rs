//! A device server and an agent's service, configured by files as packages have them.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use farbus_integration::daemon::{Daemon, Ended, program};
use farbus_integration::error::Result;
use farbus_integration::process::mortal_command;
use farbus_integration::report::Failure;
use farbus_integration::scratch::Scratch;

/// Both daemons.
pub(crate) struct Site {
    pub(crate) server: Daemon,
    pub(crate) agent: Daemon,
    scratch: Scratch,
}

impl Site {
    /// Starts them; the agent knows the device server as `rack1`, with a drive `disk0` in memory, and
    /// another one, `rack2`, that is not there.
    pub(crate) fn start() -> std::result::Result<Self, Failure> {
        let scratch = Scratch::new("site")?;
        let place = |name: &str| scratch.join(name).display().to_string();
        let write = |name: &str, text: String| std::fs::write(scratch.join(name), text);
        let server_config = format!(
            "[server]\nlisten = \"127.0.0.1:0\"\nadmin-socket = \"{}\"\nstate-dir = \"{}\"\n\n\
             [[export]]\nname = \"disk0\"\nsoft-nvme = {{ backing = \"memory\", size = \"64MiB\" }}\n",
            place("server.sock"),
            place("server"),
        );
        write("server.toml", server_config)?;
        let server = Daemon::start(
            "farbus-device-server",
            &["serve", "--config", &place("server.toml")],
        )?;
        let address = server.ready_value("listen").unwrap_or_default();
        // Nobody listens at port 1.
        let agent_config = format!(
            "[agent]\nsocket = \"{}\"\nruntime-dir = \"{}\"\nstate-dir = \"{}\"\n\n\
             [[device-server]]\nname = \"rack1\"\naddress = \"{address}\"\n\n\
             [[device-server]]\nname = \"rack2\"\naddress = \"127.0.0.1:1\"\n",
            place("agent.sock"),
            place("run"),
            place("state"),
        );
        write("agent.toml", agent_config)?;
        let agent = Daemon::start(
            "farbus-compute-agent",
            &["serve", "--config", &place("agent.toml"), "--stop-workers"],
        )?;
        Ok(Self {
            server,
            agent,
            scratch,
        })
    }

    pub(crate) fn agent_socket(&self) -> PathBuf {
        self.scratch.join("agent.sock")
    }

    pub(crate) fn server_socket(&self) -> PathBuf {
        self.scratch.join("server.sock")
    }

    /// Runs `farbus` to its end.
    pub(crate) fn farbus(&self, arguments: &[&str]) -> Result<Ended> {
        let mut command = mortal_command(&program("farbus")?);
        command
            .args(arguments)
            .env("FARBUS_AGENT", self.agent_socket());
        let output = command
            .output()
            .map_err(farbus_integration::error::Error::io("running farbus"))?;
        Ok(Ended {
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Ends both in order.
    pub(crate) fn end(self) -> Result<()> {
        self.agent.terminate()?;
        self.server.terminate()
    }
}

/// What a daemon answers to a request for a path.
pub(crate) fn get(socket: &Path, path: &str) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
