//! The daemon's life: what is opened in which order, what it waits for, how it ends.

use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use farbus_rest::listen::{ListenError, SocketFile};
use farbus_rest::logging::LogFormat;
use farbus_rest::server::{Shutdown, serve};
use farbus_rest::tls::{TlsError, TlsListener};
use farbus_rest::{notify, server};
use log::{LevelFilter, info, warn};
use tokio::signal::unix::{SignalKind, signal};

use super::attachment::Context;
use super::choose::Chooser;
use super::config::Config;
use super::custody::Custody;
use super::events::Events;
use super::hot_plug::Vmms;
use super::metrics::Counts;
use super::pool::Pool;
use super::process::Launcher;
use super::registry::Registry;
use super::rest;
use super::store::{Store, StoreError};
use crate::custody::KeeperError;
use crate::sandbox::user::{self, WorkerUserError};

/// How long calls to VMMs that are under way may take at the end. What is cut off is finished, or undone,
/// by the next daemon.
const LAST_CALLS: Duration = Duration::from_secs(2);

/// Why there is no daemon.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The operating system refuses what every daemon needs.
    #[error("the daemon cannot run")]
    Runtime(#[source] io::Error),
    /// A directory cannot be used.
    #[error("the directory {path} cannot be made; choose another one, or make it")]
    Directory {
        /// Which one.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Nothing can be remembered.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Nothing can be kept for workers.
    #[error(transparent)]
    Custody(#[from] KeeperError),
    /// Workers cannot be who they are to be.
    #[error(transparent)]
    WorkerUser(#[from] WorkerUserError),
    /// REST on TCP cannot be.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// A daemon that is to run.
pub struct Service {
    /// What it is to do.
    pub config: Config,
    /// What it and its workers log.
    pub log_level: LevelFilter,
    /// How their log lines look.
    pub log_format: LogFormat,
    /// How long a device server may take to give a device, in seconds.
    pub connect_timeout: u64,
    /// Whether its workers end with it.
    pub stop_workers: bool,
    /// Whether the ready line is JSON.
    pub json: bool,
}

impl Service {
    /// Runs until SIGTERM or SIGINT.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub fn run(self) -> Result<(), ServeError> {
        // Requests are few: one thread serves them, others wait for device servers and VMMs.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_name("blocking")
            .build()
            .map_err(ServeError::Runtime)?;
        let done = runtime.block_on(self.serve());
        runtime.shutdown_timeout(LAST_CALLS);
        done
    }

    async fn serve(self) -> Result<(), ServeError> {
        let mut ends = Ends::watch().map_err(ServeError::Runtime)?;
        let config = Arc::new(self.config);
        // Workers of another user find the daemon's new socket here; what is in it is shut by itself.
        make_directory(&config.runtime_dir, 0o755)?;
        make_directory(&config.sockets(), 0o750)?;
        if let Some(user) = config.worker_user {
            user::check_way(user, &config.runtime_dir)?;
        }
        let store = Store::open(&config.state_dir)?;
        let socket = SocketFile::bind(&config.socket)?;
        let tls = match &config.tls {
            Some(table) => {
                let files = farbus_rest::tls::Files {
                    certificate: table.certificate.clone(),
                    key: table.key.clone(),
                    client_ca: table.client_ca.clone(),
                };
                Some(TlsListener::bind(&table.listen, &files).await?)
            }
            None => None,
        };
        let pool = Pool::new(&config.device_servers);
        if config.device_servers.is_empty() {
            warn!("no device server is configured: there is nothing to attach");
        }
        let custody = Custody::bind(&config.runtime_dir, config.worker_user)?;
        let context = Arc::new(Context {
            chooser: Chooser::new(config.clone(), pool.clone()),
            store: Arc::new(store),
            hot_plug: Arc::new(Vmms),
            launcher: Launcher {
                program: "/proc/self/exe".into(),
                log_level: self.log_level,
                log_format: self.log_format,
                custody: Some(custody.path().to_owned()),
                user: config.worker_user,
                connect_timeout: self.connect_timeout,
            },
            custody: Arc::new(custody),
            events: Events::default(),
            counts: Counts::default(),
            config: config.clone(),
        });
        let registry = Registry::recover(context, pool).await?;
        let (trigger, shutdown) = Shutdown::new();
        let router = rest::router(&registry, shutdown.clone());
        let mut servers = tokio::task::JoinSet::new();
        let tls_address = tls.as_ref().map(TlsListener::address);
        if let Some(tls) = tls {
            servers.spawn(server::serve_tls(tls, router.clone(), shutdown.clone()));
        }
        servers.spawn(serve(socket, router, shutdown));
        tokio::spawn(notify::watchdog());
        announce(self.json, &config.socket, tls_address).map_err(ServeError::Runtime)?;
        notify::ready();
        let end = ends.next().await;
        notify::stopping();
        trigger.pull();
        while servers.join_next().await.is_some() {}
        if self.stop_workers || end == End::WithWorkers {
            let count = registry.stop_workers();
            info!("{count} workers are asked to end");
        }
        info!("ended in order");
        Ok(())
    }
}

/// What the daemon is told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Alone,
    WithWorkers,
}

/// The signals that end it.
struct Ends {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
    usr1: tokio::signal::unix::Signal,
}

impl Ends {
    fn watch() -> io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            usr1: signal(SignalKind::user_defined1())?,
        })
    }

    async fn next(&mut self) -> End {
        tokio::select! {
            // Who sends both wants the workers ended.
            biased;
            _ = self.usr1.recv() => End::WithWorkers,
            _ = self.term.recv() => End::Alone,
            _ = self.int.recv() => End::Alone,
        }
    }
}

fn make_directory(path: &Path, mode: u32) -> Result<(), ServeError> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(mode);
    builder
        .create(path)
        .map_err(|source| ServeError::Directory {
            path: path.to_owned(),
            source,
        })
}

fn announce(json: bool, socket: &Path, tls: Option<std::net::SocketAddr>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let socket = socket.display();
    if json {
        let tls = tls.map(|address| address.to_string());
        let line = serde_json::json!({"ready": true, "socket": socket.to_string(), "tls": tls});
        writeln!(out, "{line}")?;
    } else {
        write!(out, "ready socket={socket}")?;
        if let Some(address) = tls {
            write!(out, " tls={address}")?;
        }
        writeln!(out)?;
    }
    out.flush()
}
