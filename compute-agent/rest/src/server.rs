//! Serves a router to the clients of a socket, within limits: so many connections, so long for a
//! request to come and to be answered. An end in order lets requests under way be answered.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{Method, Response, StatusCode};
use axum::middleware::{Next, from_fn};
use axum::response::IntoResponse;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use log::{debug, info, warn};
use rustix::net::sockopt::set_tcp_user_timeout;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, watch};

use crate::handshakes::Handshakes;
use crate::listen::SocketFile;
use crate::problem::Problem;
use crate::tls::TlsListener;

/// Connections served at a time; more wait to be accepted.
pub const MAX_CONNECTIONS: usize = 256;

/// The head of a request comes within this, also the next one on a connection that is kept.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// A request is answered within this. More than the longest `wait` that a client may ask for.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(75);

/// How long requests under way may take when the daemon ends.
const GRACE: Duration = Duration::from_secs(3);

/// A TLS handshake is over within this, and its client served.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);

/// What was sent to a client by TCP, and not acknowledged for so long, shows that it is gone: it holds its
/// connection no longer.
const GONE: Duration = Duration::from_secs(60);

/// How long nothing is accepted after the kernel has refused to, such as for want of descriptors.
/// The listener stays readable meanwhile, and nothing tells that there are descriptors again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who sent a request; an extension of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A process of this host, as the kernel knows it.
    Local {
        /// Its process id, where it can be seen from here.
        pid: Option<i32>,
        /// Its user.
        uid: u32,
    },
    /// A host that has shown a certificate.
    Remote {
        /// Its address.
        address: std::net::SocketAddr,
    },
    /// Nobody knows.
    Unknown,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local { pid, uid } => {
                let pid = pid.unwrap_or(0);
                write!(f, "process {pid} of user {uid}")
            }
            Self::Remote { address } => write!(f, "{address}"),
            Self::Unknown => f.write_str("somebody"),
        }
    }
}

/// Asks everything that has a [`Shutdown`] to end; so does dropping it.
#[derive(Debug)]
pub struct Trigger(watch::Sender<bool>);

impl Trigger {
    /// Asks.
    pub fn pull(&self) {
        self.0.send_replace(true);
    }
}

/// Tells when the daemon is to end.
#[derive(Clone, Debug)]
pub struct Shutdown(watch::Receiver<bool>);

impl Shutdown {
    /// A pair of them.
    #[must_use]
    pub fn new() -> (Trigger, Self) {
        let (sender, receiver) = watch::channel(false);
        (Trigger(sender), Self(receiver))
    }

    /// Waits for it.
    pub async fn requested(mut self) {
        // An error means that the trigger is gone.
        let _ = self.0.wait_for(|asked| *asked).await;
    }
}

/// Gives a router what every one has: problems for what it does not know, a limit of time, a log.
pub fn finish(router: Router) -> Router {
    router
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn(answer_in_time))
        .layer(from_fn(log_request))
}

async fn not_found(request: Request) -> Problem {
    Problem::new(
        StatusCode::NOT_FOUND,
        "no-such-path",
        "There is nothing at this path",
        format!("'{}' is no path of this interface", request.uri().path()),
    )
    .with_remedy("the OpenAPI document at /v1/openapi.json has the paths")
}

async fn method_not_allowed(request: Request) -> Problem {
    Problem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method-not-allowed",
        "This cannot be done with this path",
        format!("'{}' takes no {}", request.uri().path(), request.method()),
    )
    .with_remedy("the Allow header has the methods that it takes")
}

async fn answer_in_time(request: Request, next: Next) -> Response<Body> {
    match tokio::time::timeout(ANSWER_TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_elapsed) => Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "answer-timeout",
            "The request took too long",
            format!("there was no answer after {ANSWER_TIMEOUT:?}"),
        )
        .with_remedy("repeat the request: what it asked for may have been done")
        .into_response(),
    }
}

/// What changes something is worth a line to an operator; what only looks is not.
async fn log_request(request: Request, next: Next) -> Response<Body> {
    let begun = Instant::now();
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let peer = request.extensions().get::<Peer>().cloned();
    let response = next.run(request).await;
    let (status, took) = (response.status().as_u16(), begun.elapsed());
    let peer = peer.unwrap_or(Peer::Unknown);
    if matches!(method, Method::GET | Method::HEAD) {
        debug!("{method} {path} of {peer}: {status} after {took:.1?}");
    } else {
        info!("{method} {path:?} of {peer}: {status} after {took:.1?}");
    }
    response
}

/// Serves the clients of a UNIX socket until the shutdown.
pub async fn serve(socket: SocketFile, router: Router, shutdown: Shutdown) {
    let connections = Connections::new(router, shutdown.clone());
    loop {
        let slot = tokio::select! {
            slot = connections.slot() => slot,
            () = shutdown.clone().requested() => break,
        };
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            () = shutdown.clone().requested() => break,
        };
        match accepted {
            Ok(stream) => {
                let peer = match stream.peer_cred() {
                    Ok(who) => Peer::Local {
                        pid: who.pid(),
                        uid: who.uid(),
                    },
                    Err(_) => Peer::Unknown,
                };
                connections.start(stream, peer, slot);
            }
            Err(error) => {
                warn!("no client can be accepted: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    // Nobody else connects while the last ones are answered.
    drop(socket);
    connections.end().await;
}

/// Serves hosts that show a certificate, until the shutdown. Those that have not shown one yet are in
/// nobody's way: they have places of their own, and not for long.
pub async fn serve_tls(listener: TlsListener, router: Router, shutdown: Shutdown) {
    let connections = Arc::new(Connections::new(router, shutdown.clone()));
    let handshakes = Handshakes::default();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.clone().requested() => break,
        };
        match accepted {
            Ok((stream, address)) => {
                let _ = set_tcp_user_timeout(&stream, GONE.as_millis() as u32);
                let (connections, acceptor) = (connections.clone(), listener.acceptor());
                let mut handshake = handshakes.begin(address.ip());
                tokio::spawn(async move {
                    // Only who is known takes a place of those that are served.
                    let shaken = async {
                        let stream = acceptor.accept(stream).await?;
                        Ok::<_, io::Error>((stream, connections.slot().await))
                    };
                    tokio::select! {
                        shaken = tokio::time::timeout(HANDSHAKE_TIMEOUT, shaken) => match shaken {
                            Ok(Ok((stream, slot))) => {
                                connections.start(stream, Peer::Remote { address }, slot);
                            }
                            Ok(Err(error)) => warn!("{address} is refused: {error}"),
                            Err(_elapsed) => debug!("{address} is not served: it was too slow, or {MAX_CONNECTIONS} others are"),
                        },
                        () = handshake.displaced() => {
                            debug!("{address} is too slow while many others come");
                        }
                    }
                });
            }
            Err(error) => {
                warn!("no client can be accepted: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    if let Ok(connections) = Arc::try_unwrap(connections) {
        connections.end().await;
    }
}

/// A right to one connection.
type Slot = Option<tokio::sync::OwnedSemaphorePermit>;

/// The connections of one listener.
struct Connections {
    router: Router,
    slots: Arc<Semaphore>,
    graceful: GracefulShutdown,
    shutdown: Shutdown,
}

impl Connections {
    /// None yet.
    fn new(router: Router, shutdown: Shutdown) -> Self {
        Self {
            router,
            slots: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            graceful: GracefulShutdown::new(),
            shutdown,
        }
    }

    /// Waits until there may be one more.
    async fn slot(&self) -> Slot {
        self.slots.clone().acquire_owned().await.ok()
    }

    /// Serves one more client.
    fn start<S>(&self, stream: S, peer: Peer, slot: Slot)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let inner = TowerToHyperService::new(self.router.clone());
        let shown = peer.to_string();
        let service = service_fn(move |mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(peer.clone());
            let inner = inner.clone();
            async move {
                let response: Result<Response<Body>, Infallible> =
                    hyper::service::Service::call(&inner, request).await;
                response
            }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service);
        let connection = self.graceful.watch(connection);
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            let _slot = slot;
            let cut = async {
                shutdown.requested().await;
                tokio::time::sleep(GRACE).await;
            };
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    debug!("the connection of {shown} has ended: {error}");
                },
                () = cut => debug!("the connection of {shown} is cut"),
            }
        });
    }

    /// Waits until requests under way are answered, or long enough.
    async fn end(self) {
        let _ = tokio::time::timeout(GRACE, self.graceful.shutdown()).await;
    }
}
