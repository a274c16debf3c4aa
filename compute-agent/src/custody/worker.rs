//! The worker's side of custody: says who it is, gets what is held in its name, hands over what is
//! new. A keeper that has gone is looked for again; until then nothing is lost as long as the worker
//! lives, since it has everything itself.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use log::{info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::messages::{FromKeeper, FromWorker, Key, Link, MAX_FDS, VERSION, shorten};
use super::socket::{Socket, SocketError};

/// The key of the memory that the controller's state is in.
pub const CONTROLLER: &str = "controller";
/// The key of the memory that the conversation with the VMM is in.
pub const SESSION: &str = "session";
/// The key of the socket that VMMs connect to.
pub const LISTENER: &str = "listener";
/// The key of the VMM's connection.
pub const CONNECTION: &str = "connection";
/// The keys of the pipe that answers to the VMM go through.
pub const PIPE_IN: &str = "pipe-in";
/// See [`PIPE_IN`].
pub const PIPE_OUT: &str = "pipe-out";

/// How long a keeper may take to answer, or to take what is said.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a worker waits that was refused, at first and at most: a new daemon may not yet know of
/// its attachment.
const MIN_PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// Why a worker cannot start.
#[derive(Debug, thiserror::Error)]
pub enum CustodyError {
    /// Nobody listens.
    #[error("the custody socket {path} cannot be reached; is the daemon running?")]
    Unreachable {
        /// The path.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The keeper does not want this worker.
    #[error("the daemon refuses this worker: {0}")]
    Refused(String),
    /// The keeper does not answer.
    #[error("the daemon does not answer at the custody socket")]
    Silent,
    /// The connection broke.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A descriptor cannot be duplicated.
    #[error("a descriptor cannot be duplicated")]
    Duplicate(#[source] io::Error),
}

/// One worker's connection to its keeper.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    id: String,
    socket: Option<Socket>,
    /// Duplicates of what the keeper has or is to have, for the next one.
    kept: BTreeMap<Key, OwnedFd>,
    ready: bool,
    link: Option<(Link, Option<String>)>,
    /// Keepers so far.
    keepers: u64,
    /// When one may be asked again that has refused this worker, and how long that pause is.
    not_before: Option<Instant>,
    pause: Duration,
}

/// What the keeper wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Nothing.
    Nothing,
    /// An orderly end.
    Stop,
}

impl Client {
    /// Connects, and takes back what is held for the attachment.
    pub fn connect(path: &Path, id: &str) -> Result<Self, CustodyError> {
        let mut client = Self {
            path: path.to_owned(),
            id: id.to_owned(),
            socket: None,
            kept: BTreeMap::new(),
            ready: false,
            link: None,
            keepers: 1,
            not_before: None,
            pause: MIN_PAUSE,
        };
        let socket = client.greet(false)?;
        let mut left = match answer(&socket)? {
            (FromKeeper::Welcome { held }, _) => held,
            (FromKeeper::Refused { reason }, _) => return Err(CustodyError::Refused(reason)),
            _ => return Err(CustodyError::Silent),
        };
        while left > 0 {
            let (FromKeeper::Held { keys }, fds) = answer(&socket)? else {
                return Err(CustodyError::Silent);
            };
            left = left.saturating_sub(keys.len());
            client.kept.extend(keys.into_iter().zip(fds));
        }
        client.socket = Some(socket);
        Ok(client)
    }

    fn greet(&self, live: bool) -> Result<Socket, CustodyError> {
        let socket = Socket::connect(&self.path).map_err(|source| CustodyError::Unreachable {
            path: self.path.display().to_string(),
            source: source.into(),
        })?;
        let hello = FromWorker::Hello {
            version: VERSION,
            id: self.id.clone(),
            pid: std::process::id(),
            live,
        };
        say(&socket, &hello, &[])?;
        Ok(socket)
    }

    /// The keeper's socket, to be watched for events; `None` while there is no keeper.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Which keeper this is, counted from the first; `None` while there is none.
    pub fn keepers(&self) -> Option<u64> {
        self.socket.as_ref().map(|_| self.keepers)
    }

    /// A duplicate of what is held under this key.
    pub fn held(&self, key: &Key) -> Option<OwnedFd> {
        self.kept.get(key)?.try_clone().ok()
    }

    /// The keys of all that is held.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.kept.keys()
    }

    /// Hands descriptors over, in place of those of the same keys. When this returns, the keeper has
    /// them, even if this process dies; if there is no keeper now, the next one gets them.
    pub fn keep(&mut self, fds: Vec<(Key, BorrowedFd<'_>)>) -> Result<(), CustodyError> {
        let mut keys = Vec::with_capacity(fds.len());
        for (key, fd) in fds {
            let fd = fd.try_clone_to_owned().map_err(CustodyError::Duplicate)?;
            self.kept.insert(key.clone(), fd);
            keys.push(key);
        }
        self.hand_over(&keys);
        Ok(())
    }

    fn hand_over(&mut self, keys: &[Key]) {
        for keys in keys.chunks(MAX_FDS) {
            let fds: Vec<_> = keys.iter().filter_map(|key| self.kept.get(key)).collect();
            let fds: Vec<_> = fds.into_iter().map(AsFd::as_fd).collect();
            let keys = keys.to_vec();
            let Some(socket) = &self.socket else { return };
            if let Err(error) = say(socket, &FromWorker::Keep { keys }, &fds) {
                self.keeper_lost(&error);
            }
        }
    }

    /// These need no longer be held.
    pub fn forget(&mut self, keys: &[Key]) {
        for keys in keys.chunks(MAX_FDS) {
            for key in keys {
                self.kept.remove(key);
            }
            let keys = keys.to_vec();
            self.tell(&FromWorker::Forget { keys });
        }
    }

    /// A VMM can connect, or is served again.
    pub fn ready(&mut self) {
        self.ready = true;
        self.tell(&FromWorker::Ready);
    }

    /// The link has come or gone.
    pub fn link(&mut self, link: Link, mut reason: Option<String>) {
        reason.iter_mut().for_each(shorten);
        self.link = Some((link, reason.clone()));
        self.tell(&FromWorker::State { link, reason });
    }

    /// The worker ends in order: nothing is to be held.
    pub fn bye(&mut self) {
        self.kept.clear();
        self.tell(&FromWorker::Bye);
    }

    fn tell(&mut self, message: &FromWorker) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = say(socket, message, &[]) {
            self.keeper_lost(&error);
        }
    }

    /// The keeper's socket has events: what it wants. Afterwards [`Self::descriptor`] may be
    /// another or none.
    pub fn listen(&mut self) -> Asked {
        loop {
            let Some(socket) = &self.socket else {
                return Asked::Nothing;
            };
            match socket.receive::<FromKeeper>() {
                Ok(None) => return Asked::Nothing,
                Ok(Some((FromKeeper::Stop, _))) => return Asked::Stop,
                Ok(Some((FromKeeper::Refused { reason }, _))) => {
                    warn!("the daemon does not take this worker back: {reason}");
                    self.not_before = Some(Instant::now() + self.pause);
                    self.pause = (self.pause * 2).min(MAX_PAUSE);
                }
                Ok(Some(_)) => {
                    self.pause = MIN_PAUSE;
                    self.not_before = None;
                }
                Err(error) => self.keeper_lost(&error),
            }
        }
    }

    fn keeper_lost(&mut self, error: &SocketError) {
        warn!("the daemon has gone ({error}); the attachment goes on, and waits for it to return");
        self.socket = None;
    }

    /// To be called now and then: looks for a new keeper if the last one has gone, and hands everything
    /// over to it. Whether there is a new one.
    pub fn look_for_keeper(&mut self) -> bool {
        let waits = self.not_before.is_some_and(|then| Instant::now() < then);
        if self.socket.is_some() || waits {
            return false;
        }
        let Ok(socket) = self.greet(true) else {
            return false;
        };
        self.socket = Some(socket);
        self.keepers += 1;
        let keys: Vec<_> = self.kept.keys().cloned().collect();
        self.hand_over(&keys);
        if self.ready {
            self.tell(&FromWorker::Ready);
        }
        if let Some((link, reason)) = self.link.clone() {
            self.tell(&FromWorker::State { link, reason });
        }
        if self.socket.is_some() {
            info!("the daemon is back, and keeps what this attachment needs");
        }
        self.socket.is_some()
    }
}

/// Waits for the keeper's next words.
fn answer(socket: &Socket) -> Result<(FromKeeper, Vec<OwnedFd>), CustodyError> {
    let begun = Instant::now();
    loop {
        if let Some(said) = socket.receive()? {
            return Ok(said);
        }
        wait(socket, PollFlags::IN, begun)?;
    }
}

/// Sends, and waits for room if there is none. Descriptors are handed over so rarely that there
/// is, unless the keeper hangs.
fn say(socket: &Socket, message: &FromWorker, fds: &[BorrowedFd<'_>]) -> Result<(), SocketError> {
    let begun = Instant::now();
    while !socket.send(message, fds)? {
        wait(socket, PollFlags::OUT, begun).map_err(|_| SocketError::Closed)?;
    }
    Ok(())
}

fn wait(socket: &Socket, flags: PollFlags, begun: Instant) -> Result<(), CustodyError> {
    let left = PATIENCE.saturating_sub(begun.elapsed());
    if left.is_zero() {
        return Err(CustodyError::Silent);
    }
    let left = Timespec {
        tv_sec: left.as_secs() as i64,
        tv_nsec: left.subsec_nanos().into(),
    };
    match poll(&mut [PollFd::new(socket, flags)], Some(&left)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(SocketError::from(error).into()),
    }
}

/// A worker's connection to its keeper as the parts of the worker share it; or none, for an attachment
/// that nobody keeps. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Custody(Option<Arc<Mutex<Client>>>);

impl Custody {
    /// With a keeper.
    pub fn new(client: Client) -> Self {
        Self(Some(Arc::new(Mutex::new(client))))
    }

    /// Without.
    pub fn none() -> Self {
        Self(None)
    }

    /// Whether there is a keeper, or there is to be one.
    pub fn is_some(&self) -> bool {
        self.0.is_some()
    }

    /// The client, if there is one.
    pub fn client(&self) -> Option<MutexGuard<'_, Client>> {
        let client = self.0.as_ref()?;
        // What could panic leaves nothing half done.
        Some(client.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// See [`Client::keep`]; one that fails is logged, since the attachment works all the same.
    pub fn keep(&self, fds: Vec<(Key, BorrowedFd<'_>)>) {
        if let Some(mut client) = self.client() {
            if let Err(error) = client.keep(fds) {
                warn!("this attachment would not survive its worker: {error}");
            }
        }
    }

    /// See [`Client::forget`].
    pub fn forget(&self, keys: &[Key]) {
        if let Some(mut client) = self.client() {
            client.forget(keys);
        }
    }

    /// The VMM has gone: nothing of it is held any more. What outlives it is.
    pub fn forget_session(&self) {
        if let Some(mut client) = self.client() {
            let outlives = [CONTROLLER, SESSION, LISTENER];
            let gone = client
                .keys()
                .filter(|key| !outlives.contains(&key.as_str()));
            let gone: Vec<_> = gone.cloned().collect();
            client.forget(&gone);
        }
    }

    /// See [`Client::held`].
    pub fn held(&self, key: &Key) -> Option<OwnedFd> {
        self.client()?.held(key)
    }

    /// What is held under a name and numbers, by number.
    pub fn held_all(&self, name: &str) -> BTreeMap<u64, OwnedFd> {
        let Some(client) = self.client() else {
            return BTreeMap::new();
        };
        let numbered = client
            .kept
            .iter()
            .filter_map(|(key, fd)| Some((key.number_of(name)?, fd.try_clone().ok()?)));
        numbered.collect()
    }
}

/// A key whose name is right by construction.
pub fn key(name: &'static str) -> Key {
    Key::fixed(name)
}
