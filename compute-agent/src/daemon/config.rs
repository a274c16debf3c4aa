//! What the daemon is to do: a TOML file, and what the command line says otherwise.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::sandbox::user::{self, User, WorkerUserError};

/// Where the configuration is looked for when the command line names none.
pub const DEFAULT_PATH: &str = "/etc/farbus/agent.toml";

/// The longest name of a device server.
const MAX_NAME: usize = 63;

/// What is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("the configuration {path} cannot be read")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It is not TOML, or says what is not known here.
    #[error("the configuration {path} is wrong")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What and where.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A device server's name cannot be part of a device's.
    #[error(
        "the device server's name {name:?} is wrong; it must be 1 to {MAX_NAME} of A-Z a-z 0-9 . _ -"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// A device server's address has not both of its parts.
    #[error("the address {address:?} of device server {name} is wrong; it must be HOST:PORT")]
    Address {
        /// The device server.
        name: String,
        /// What was given.
        address: String,
    },
    /// Two device servers have one name.
    #[error("there are two device servers named {name}; give each a name of its own")]
    Twice {
        /// The name.
        name: String,
    },
    /// A path depends on where the daemon was started.
    #[error("{what} {path} is not absolute; begin it with /")]
    Relative {
        /// Which one.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// Workers cannot be who they are to be.
    #[error(transparent)]
    WorkerUser(#[from] WorkerUserError),
}

/// A device server that this agent may use.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceServer {
    /// What it is called here.
    pub name: String,
    /// Where it listens, `HOST:PORT`.
    pub address: String,
}

impl std::str::FromStr for DeviceServer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, address) = text
            .split_once('=')
            .ok_or_else(|| format!("{text:?} is not NAME=HOST:PORT"))?;
        let server = Self {
            name: name.to_owned(),
            address: address.to_owned(),
        };
        server.check().map_err(|error| error.to_string())?;
        Ok(server)
    }
}

impl DeviceServer {
    fn check(&self) -> Result<(), ConfigError> {
        let known = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
        let name = self.name.clone();
        if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(known) {
            return Err(ConfigError::Name { name });
        }
        let port = self.address.rsplit_once(':').filter(|(host, port)| {
            !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0)
        });
        if port.is_none() {
            let address = self.address.clone();
            return Err(ConfigError::Address { name, address });
        }
        Ok(())
    }
}

/// REST on TCP.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct TlsTable {
    /// Address and port.
    pub listen: String,
    /// The daemon's certificate, and those between it and its authority's, in PEM.
    pub certificate: PathBuf,
    /// Its key, in PEM.
    pub key: PathBuf,
    /// The certificates of the authorities that clients' certificates are signed by, in PEM.
    pub client_ca: PathBuf,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct AgentTable {
    socket: Option<PathBuf>,
    runtime_dir: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    worker_user: Option<String>,
    tls: Option<TlsTable>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    #[serde(default)]
    agent: AgentTable,
    #[serde(default)]
    device_server: Vec<DeviceServer>,
}

/// What the command line says of it.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// The socket of the REST interface.
    pub socket: Option<PathBuf>,
    /// Where the attachments' sockets are.
    pub runtime_dir: Option<PathBuf>,
    /// Where the daemon remembers what it has.
    pub state_dir: Option<PathBuf>,
    /// Device servers besides, or in place of, those of the same name.
    pub device_servers: Vec<DeviceServer>,
}

/// What the daemon is to do, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The socket of the REST interface.
    pub socket: PathBuf,
    /// Where the attachments' sockets are.
    pub runtime_dir: PathBuf,
    /// Where the daemon remembers what it has.
    pub state_dir: PathBuf,
    /// Whom workers become; without, they stay the daemon's user.
    pub worker_user: Option<User>,
    /// REST on TCP, if wanted.
    pub tls: Option<TlsTable>,
    /// The device servers, each name once.
    pub device_servers: Vec<DeviceServer>,
}

impl Config {
    /// Reads the file at `path`, or, if none is named, the usual one if there is one.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(path: Option<&Path>, overrides: Overrides) -> Result<Self, ConfigError> {
        let usual = Path::new(DEFAULT_PATH);
        let file = match (path, std::fs::read_to_string(path.unwrap_or(usual))) {
            (_, Ok(text)) => parse(&text, path.unwrap_or(usual))?,
            (None, Err(error)) if error.kind() == io::ErrorKind::NotFound => File::default(),
            (_, Err(source)) => {
                let path = path.unwrap_or(usual).to_owned();
                return Err(ConfigError::Read { path, source });
            }
        };
        Self::join(file, overrides)
    }

    fn join(file: File, overrides: Overrides) -> Result<Self, ConfigError> {
        let mut names = BTreeSet::new();
        for server in &file.device_server {
            server.check()?;
            if !names.insert(&server.name) {
                let name = server.name.clone();
                return Err(ConfigError::Twice { name });
            }
        }
        let mut device_servers = file.device_server;
        for server in overrides.device_servers {
            device_servers.retain(|other| other.name != server.name);
            device_servers.push(server);
        }
        let path = |first: Option<PathBuf>, second: Option<PathBuf>, default: &str, what| {
            let path = first.or(second).unwrap_or_else(|| default.into());
            if path.is_absolute() {
                Ok(path)
            } else {
                Err(ConfigError::Relative { what, path })
            }
        };
        let AgentTable {
            socket,
            runtime_dir,
            state_dir,
            worker_user,
            tls,
        } = file.agent;
        let worker_user = worker_user.as_deref().map(user::resolve);
        let worker_user = worker_user.transpose()?;
        let socket = path(
            overrides.socket,
            socket,
            "/run/farbus/agent.sock",
            "the socket",
        )?;
        let runtime = "the runtime directory";
        let runtime_dir = path(overrides.runtime_dir, runtime_dir, "/run/farbus", runtime)?;
        let state = "the state directory";
        let state_dir = path(overrides.state_dir, state_dir, "/var/lib/farbus", state)?;
        Ok(Self {
            socket,
            runtime_dir,
            state_dir,
            worker_user,
            tls,
            device_servers,
        })
    }

    /// The device server of this name.
    #[must_use]
    pub fn device_server(&self, name: &str) -> Option<&DeviceServer> {
        self.device_servers
            .iter()
            .find(|server| server.name == name)
    }

    /// Where the attachments' sockets are.
    #[must_use]
    pub fn sockets(&self) -> PathBuf {
        self.runtime_dir.join("attachments")
    }
}

fn parse(text: &str, path: &Path) -> Result<File, ConfigError> {
    toml::from_str(text).map_err(|source| ConfigError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    fn join(text: &str, overrides: Overrides) -> Result<Config, ConfigError> {
        Config::join(parse(text, Path::new("agent.toml"))?, overrides)
    }

    #[test]
    fn file_of_nothing_gives_the_usual_paths() {
        let config = join("", Overrides::default()).unwrap();

        assert_eq!(config.socket, Path::new("/run/farbus/agent.sock"));
        assert_eq!(config.sockets(), Path::new("/run/farbus/attachments"));
        assert_eq!(config.state_dir, Path::new("/var/lib/farbus"));
        assert_eq!((config.tls, config.device_servers), (None, vec![]));
    }

    #[test]
    fn command_line_goes_before_the_file() {
        let text = r#"
            [agent]
            socket = "/a/agent.sock"
            worker-user = "12:34"
            [[device-server]]
            name = "rack1"
            address = "10.0.0.5:7420"
            [[device-server]]
            name = "rack2"
            address = "[::1]:7420"
        "#;
        let overrides = Overrides {
            socket: Some("/b/agent.sock".into()),
            device_servers: vec!["rack1=host:1".parse().unwrap()],
            ..Overrides::default()
        };

        let config = join(text, overrides).unwrap();

        assert_eq!(config.socket, Path::new("/b/agent.sock"));
        assert_eq!(config.worker_user, Some(User { uid: 12, gid: 34 }));
        assert_eq!(config.device_server("rack1").unwrap().address, "host:1");
        assert_eq!(config.device_server("rack2").unwrap().address, "[::1]:7420");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let server = |name: &str, address: &str| {
            format!("[[device-server]]\nname = \"{name}\"\naddress = \"{address}\"\n")
        };
        let cases = [
            ("[agent]\ncolour = 1".to_owned(), "agent.toml"),
            ("[agent]\nsocket = \"agent.sock\"".to_owned(), "agent.sock"),
            ("[agent]\nworker-user = \"7\"".to_owned(), "\"7\""),
            (server("a/b", "host:1"), "a/b"),
            (server("a", "host"), "HOST:PORT"),
            (server("a", "host:0"), "HOST:PORT"),
            (server("a", ":1"), "HOST:PORT"),
            (server("a", "h:1") + &server("a", "h:2"), "two"),
        ];

        for (text, word) in cases {
            let error = join(&text, Overrides::default()).unwrap_err().to_string();
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
    }
}
