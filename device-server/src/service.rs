//! The device server as a service: exports that follow a configuration file, an admin interface, and
//! an end that waits for claims.
//!
//! Three parts share the [`Exports`] and nothing else: the [`Manager`] accepts peers on a thread of
//! its own, the admin interface answers on the runtime, and one loop there does in turn whatever
//! changes something: reload, drain, the end.

pub mod api;
mod catalogue;
mod metrics;
mod rest;

use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use farbus_rest::listen::{ListenError, SocketFile};
use farbus_rest::notify;
use farbus_rest::server::{self, Shutdown};
use log::{info, warn};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use self::api::{Drain, Reloaded};
use self::catalogue::Catalogue;
use crate::config::{Config, Server};
use crate::exports::Exports;
use crate::manager::Manager;
use crate::sources::Stock;

pub use self::rest::document;

/// Requests of the admin interface that wait for their turn.
const WAITING: usize = 16;
/// What could not be opened is tried again after this.
const RETRY: Duration = Duration::from_secs(10);

/// What the admin interface asks of the service.
enum Request {
    /// Read the configuration again.
    Reload(Option<oneshot::Sender<Result<Reloaded, String>>>),
    /// Give no new claims any more, or give them again.
    Drain(bool, oneshot::Sender<Drain>),
}

/// How a configuration is read; with it go the flags that override it.
pub type Load = Box<dyn Fn() -> Result<Config, String> + Send>;

/// What a service is made of. The addresses are taken already, so that nothing that may still fail
/// comes after the first device is opened.
pub struct Service {
    listener: TcpListener,
    config: Config,
    load: Load,
    runtime: Runtime,
    socket: SocketFile,
}

/// Why a service could not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The operating system refused.
    #[error("{what} failed")]
    Io {
        /// What was tried, as a noun phrase.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The admin interface has no socket.
    #[error(transparent)]
    Socket(#[from] ListenError),
}

fn refused(what: &'static str) -> impl FnOnce(io::Error) -> ServiceError {
    move |source| ServiceError::Io { what, source }
}

impl Service {
    /// Takes the socket of the admin interface.
    pub fn new(listener: TcpListener, config: Config, load: Load) -> Result<Self, ServiceError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(refused("making the runtime"))?;
        let socket = {
            let _guard = runtime.enter();
            SocketFile::bind(&config.server.admin_socket)?
        };
        Ok(Self {
            listener,
            config,
            load,
            runtime,
            socket,
        })
    }

    /// Where the admin interface is.
    pub fn socket(&self) -> PathBuf {
        self.socket.path().to_owned()
    }

    /// Opens what is to be exported from the stock, says so by `announce`, and serves until it is
    /// told to end.
    pub fn run(
        self,
        stock: Stock,
        announce: impl FnOnce(&Exports) -> io::Result<()>,
    ) -> Result<(), ServiceError> {
        let Config {
            server,
            exports: wanted,
        } = self.config;
        let exports = Exports::new(Vec::new());
        let mut catalogue = Catalogue::new(stock, exports.clone());
        catalogue.want(wanted);
        let manager = Manager::new(self.listener, exports.clone(), server.poll)
            .map_err(refused("watching the listener"))?
            .with_providers(server.providers.clone());
        let (stop, stopped) = UnixStream::pair().map_err(refused("making a pair of sockets"))?;
        let stopped = OwnedFd::from(stopped);
        let (ended, manager_ended) = oneshot::channel();
        let accepting = thread::Builder::new()
            .name("manager".into())
            .spawn(move || {
                let result = manager.run(&stopped);
                // Nobody listens any more when it was told to.
                let _ = ended.send(());
                result
            })
            .map_err(refused("starting the manager's thread"))?;
        let (requests, received) = mpsc::channel(WAITING);
        let router = rest::router(exports.clone(), requests);
        let (trigger, shutdown) = Shutdown::new();
        let catalogue = Arc::new(Mutex::new(catalogue));
        let served: Result<(), ServiceError> = self.runtime.block_on(async {
            let rest = tokio::spawn(server::serve(self.socket, router, shutdown));
            tokio::spawn(notify::watchdog());
            let mut signals = Signals::new().map_err(refused("listening for signals"))?;
            announce(&exports).map_err(refused("printing the ready line"))?;
            notify::ready();
            let mut turns = Turns {
                news: exports.subscribe(),
                exports,
                catalogue: catalogue.clone(),
                load: Arc::new(Mutex::new(self.load)),
                server,
                received,
                draining: None,
            };
            turns.take(&mut signals, manager_ended).await;
            notify::stopping();
            trigger.pull();
            // Its end is bounded by itself.
            let _ = rest.await;
            Ok(())
        });
        // The manager takes the end of this for the signal to end.
        drop(stop);
        let result = accepting.join();
        // Only now that all functions are let go of can the host have them back.
        drop(catalogue);
        served?;
        match result {
            Ok(result) => result.map_err(refused("accepting connections")),
            Err(_) => Err(refused("accepting connections")(io::Error::other(
                "its thread panicked",
            ))),
        }
    }
}

struct Signals {
    hang_up: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            hang_up: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }
}

/// Why no new claims are given.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Draining {
    /// An operator wants it, and may change their mind.
    Asked,
    /// The process ends, at the latest then.
    Ending(Instant),
}

/// What changes something, one after the other.
struct Turns {
    exports: Exports,
    news: watch::Receiver<()>,
    catalogue: Arc<Mutex<Catalogue>>,
    load: Arc<Mutex<Load>>,
    server: Server,
    received: mpsc::Receiver<Request>,
    draining: Option<Draining>,
}

impl Turns {
    /// Goes on until the process is to end.
    async fn take(&mut self, signals: &mut Signals, mut manager_ended: oneshot::Receiver<()>) {
        let mut retry = Instant::now() + RETRY;
        loop {
            self.tell_status();
            if self.draining.is_some() && self.exports.claims() == 0 {
                info!("ends: no export is claimed");
                return;
            }
            let deadline = match self.draining {
                Some(Draining::Ending(deadline)) => Some(deadline),
                _ => None,
            };
            tokio::select! {
                biased;
                _ = signals.terminate.recv() => if self.end() { return },
                _ = signals.interrupt.recv() => if self.end() { return },
                () = sleep_until(deadline.unwrap_or(retry)), if deadline.is_some() => {
                    warn!("ends with {} exports still claimed", self.exports.claims());
                    return;
                }
                _ = &mut manager_ended => return,
                _ = signals.hang_up.recv() => {
                    notify::reloading();
                    // Both outcomes are in the log.
                    let _ = self.reload().await;
                    notify::ready();
                }
                Some(request) = self.received.recv() => self.answer(request).await,
                Ok(()) = self.news.changed() => self.look_after(Catalogue::settle).await,
                () = sleep_until(retry) => {
                    retry = Instant::now() + RETRY;
                    self.look_after(|catalogue| {
                        if catalogue.has_failed() {
                            catalogue.retry();
                        }
                    })
                    .await;
                }
            }
        }
    }

    /// A signal asks for the end; whether that is now.
    fn end(&mut self) -> bool {
        if let Some(Draining::Ending(_)) = self.draining {
            info!("ends at once, as it was told to twice");
            return true;
        }
        let claims = self.exports.claims();
        info!(
            "ends when the last of {claims} claims is gone, or after {} s",
            self.server.drain.as_secs()
        );
        self.draining = Some(Draining::Ending(Instant::now() + self.server.drain));
        self.exports.set_draining(true);
        notify::stopping();
        false
    }

    async fn answer(&mut self, request: Request) {
        match request {
            Request::Reload(reply) => {
                let outcome = self.reload().await;
                if let Some(reply) = reply {
                    // Who asked may have gone.
                    let _ = reply.send(outcome);
                }
            }
            Request::Drain(wanted, reply) => {
                match (self.draining, wanted) {
                    (Some(Draining::Ending(_)), _) => {}
                    (_, true) => self.draining = Some(Draining::Asked),
                    (_, false) => self.draining = None,
                }
                let draining = self.draining.is_some();
                self.exports.set_draining(draining);
                let claims = self.exports.claims() as u64;
                info!(
                    "{} with {claims} exports claimed",
                    if draining { "drains" } else { "gives claims" }
                );
                let _ = reply.send(Drain { draining, claims });
            }
        }
    }

    /// Reads the configuration and carries it out. One that is wrong changes nothing.
    async fn reload(&mut self) -> Result<Reloaded, String> {
        let load = self.load.clone();
        let loaded = blocking(&load, |load| load())
            .await
            .and_then(|config| config);
        let config = loaded.inspect_err(|why| {
            warn!("the configuration stays as it was: {why}");
        })?;
        let keys = self.server.differences(&config.server);
        let wanted = config.exports;
        let outcome = blocking(&self.catalogue, |catalogue| catalogue.want(wanted)).await;
        let mut told = outcome.inspect_err(|why| warn!("the reload has failed: {why}"))?;
        told.restart_needed = keys.into_iter().map(Into::into).collect();
        let count = |what: &[String]| match what {
            [] => "none".to_owned(),
            some => some.join(", "),
        };
        info!(
            "configuration read: added {}; removed {}; changed {}; still claimed {}",
            count(&told.added),
            count(&told.removed),
            count(&told.changed),
            count(&told.waiting)
        );
        if !told.restart_needed.is_empty() {
            let keys = told.restart_needed.join(", ");
            warn!("changed in [server], and without effect until a restart: {keys}");
        }
        Ok(told)
    }

    async fn look_after(&self, what: impl FnOnce(&mut Catalogue) + Send + 'static) {
        if let Err(why) = blocking(&self.catalogue, what).await {
            warn!("exports are not looked after: {why}");
        }
    }

    /// One line for `systemctl status`.
    fn tell_status(&self) {
        let (exports, claims) = (self.exports.all().len(), self.exports.claims());
        let draining = if self.draining.is_some() {
            ", draining"
        } else {
            ""
        };
        notify::status(&format!("{exports} exports, {claims} claimed{draining}"));
    }
}

/// Runs what may take long (devices are opened, reset and closed) where it holds nobody up.
async fn blocking<T: Send + 'static, R: Send + 'static>(
    shared: &Arc<Mutex<T>>,
    work: impl FnOnce(&mut T) -> R + Send + 'static,
) -> Result<R, String> {
    let shared = shared.clone();
    let work = move || work(&mut shared.lock().unwrap_or_else(PoisonError::into_inner));
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| error.to_string())
}
