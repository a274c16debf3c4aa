//! The configuration of `serve`: a TOML file that says what is exported and where to listen.
//!
//! A file is taken as a whole or not at all. What is wrong is told with its line, the line's text
//! and what helps.

mod export;
#[cfg(test)]
mod tests;
mod values;

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use farbus_fabric::provider::{self, Wanted};
use farbus_fabric::wire::ExportName;
use farbus_shadow_mem::polling::Polling;
use serde::Deserialize;

use self::export::ExportTable;
use self::values::Parsed;
use crate::sources::Order;

/// Where the configuration is, unless the command line says otherwise.
pub const DEFAULT_PATH: &str = "/etc/farbus/device-server.toml";
/// The most bytes of a configuration: a thousand exports take a tenth of it.
const MAX_LEN: u64 = 1 << 20;
/// The longest that an end in order may be put off for claims that are left.
const MAX_DRAIN: u64 = 3600;

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("the configuration {} cannot be read; --config names another", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It is too long.
    #[error(
        "the configuration {} has more than {MAX_LEN} bytes; is it the right file?", .path.display()
    )]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// Something in it is wrong.
    #[error("{}:{line}: `{text}`: {what}", .path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What the line says.
        text: String,
        /// What is wrong with it, and what helps.
        what: String,
    },
}

/// What a device server is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What needs a restart to change.
    pub server: Server,
    /// What is exported.
    pub exports: Vec<Entry>,
}

/// One `[[export]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name, which the names of several exports may begin with.
    pub name: ExportName,
    /// What to open.
    pub order: Order,
}

/// `[server]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// Address and port of the fabric.
    pub listen: String,
    /// That address may be one that other hosts can reach.
    pub insecure: bool,
    /// The socket of the admin interface.
    pub admin_socket: PathBuf,
    /// Where to remember what was changed on the host.
    pub state_dir: PathBuf,
    /// What carries claims.
    pub providers: provider::Options,
    /// How attachments wait.
    pub poll: Polling,
    /// How long an end in order waits for claims to be given back.
    pub drain: Duration,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:7420".into(),
            insecure: false,
            admin_socket: "/run/farbus/device-server.sock".into(),
            state_dir: "/run/farbus".into(),
            providers: provider::Options::default(),
            poll: Polling::default(),
            drain: Duration::from_secs(5),
        }
    }
}

impl Server {
    /// The keys in which two differ: a running device server does not change them.
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        let keys = [
            ("listen", self.listen != other.listen),
            ("insecure", self.insecure != other.insecure),
            ("admin-socket", self.admin_socket != other.admin_socket),
            ("state-dir", self.state_dir != other.state_dir),
            ("provider", self.providers.wanted != other.providers.wanted),
            (
                "rdma-device",
                self.providers.device != other.providers.device,
            ),
            (
                "gid-index",
                self.providers.gid_index != other.providers.gid_index,
            ),
            ("poll", self.poll != other.poll),
            ("drain-seconds", self.drain != other.drain),
        ];
        let keys = keys.into_iter().filter(|(_, differs)| *differs);
        keys.map(|(key, _)| key).collect()
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    #[serde(default)]
    server: ServerTable,
    #[serde(default)]
    export: Vec<ExportTable>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ServerTable {
    listen: Option<Parsed<values::Listen>>,
    insecure: Option<bool>,
    admin_socket: Option<Parsed<values::AbsolutePath>>,
    state_dir: Option<Parsed<values::AbsolutePath>>,
    provider: Option<Parsed<Wanted>>,
    rdma_device: Option<String>,
    gid_index: Option<u8>,
    poll: Option<Parsed<Polling>>,
    drain_seconds: Option<values::Seconds<MAX_DRAIN>>,
}

impl ServerTable {
    fn check(self) -> Server {
        let usual = Server::default();
        Server {
            listen: self.listen.map_or(usual.listen, |listen| listen.0.0),
            insecure: self.insecure.unwrap_or(usual.insecure),
            admin_socket: self
                .admin_socket
                .map_or(usual.admin_socket, |path| path.0.0),
            state_dir: self.state_dir.map_or(usual.state_dir, |path| path.0.0),
            providers: provider::Options {
                wanted: self
                    .provider
                    .map_or(usual.providers.wanted, |wanted| wanted.0),
                device: self.rdma_device,
                gid_index: self.gid_index,
            },
            poll: self.poll.map_or(usual.poll, |poll| poll.0),
            drain: self.drain_seconds.map_or(usual.drain, |drain| drain.0),
        }
    }
}

/// What is wrong, and where in the text.
struct Wrong {
    span: Range<usize>,
    what: String,
}

impl Config {
    /// Reads and checks a file. Nothing on the host is touched.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        let metadata = std::fs::metadata(path).map_err(read)?;
        if metadata.len() > MAX_LEN {
            let path = path.to_owned();
            return Err(ConfigError::TooLong { path });
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        Self::parse(&text, path)
    }

    /// Checks what the file at `path` says.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        Self::check(text).map_err(|Wrong { span, what }| {
            let start = span.start.min(text.len());
            let before = text.get(..start).unwrap_or_default();
            let line = before.matches('\n').count();
            ConfigError::Wrong {
                path: path.to_owned(),
                line: line + 1,
                text: text.lines().nth(line).unwrap_or_default().trim().to_owned(),
                what,
            }
        })
    }

    fn check(text: &str) -> Result<Self, Wrong> {
        let file: File = toml::from_str(text).map_err(|error| Wrong {
            span: error.span().unwrap_or_default(),
            what: error.message().to_owned(),
        })?;
        let mut exports: Vec<Entry> = Vec::new();
        for table in file.export {
            let span = table.name.span();
            exports.push(table.check()?);
            // The last one is at fault: those before it went together.
            let orders: Vec<Order> = exports.iter().map(|entry| entry.order.clone()).collect();
            crate::sources::check(&orders).map_err(|error| Wrong {
                span,
                what: error.to_string(),
            })?;
        }
        Ok(Self {
            server: file.server.check(),
            exports,
        })
    }
}
