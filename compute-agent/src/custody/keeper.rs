//! The daemon's side of custody.
//!
//! A [`Keeper`] has a thread of its own, which hears the workers and holds their descriptors. What an
//! owner has to know comes as [`Event`]s to the function that it gives; what it wants is done by methods
//! that never wait. A worker is not trusted with more than its own attachment: how many
//! descriptors are held for it is bounded, it must run as a user that may, and nobody gets what is held
//! before the connection of its last worker has ended.
//!
//! ```no_run
//! use farbus_compute_agent::custody::{Event, Keeper};
//!
//! let (send, events) = std::sync::mpsc::channel();
//! let keeper = Keeper::bind("/run/farbus/custody.sock".as_ref(), move |event| {
//!     let _ = send.send(event);
//! })?;
//! keeper.admit("disk0");
//! // Here the supervisor starts `farbus-compute-agent attach … --custody PATH --id disk0`.
//! for event in events {
//!     if let Event::Lost { id, .. } = event {
//!         // Start it again: it gets everything back and goes on.
//! #       let _ = id;
//!     }
//! }
//! # Ok::<(), farbus_compute_agent::custody::KeeperError>(())
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use log::{debug, warn};
use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::fs::{Gid, Mode, chmod, chown, unlink};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{SocketAddrUnix, SocketFlags, accept_with, bind, connect, listen};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::fdstore::{FdStore, Held};
use super::messages::{FromKeeper, FromWorker, Key, Link, MAX_FDS, VERSION};
use super::socket::{Socket, SocketError, unconnected};
use super::statistics::Statistics;
use crate::sandbox::User;

/// Most descriptors held for one attachment: MSI-X has 2048 vectors at most, and guest memory 256
/// files.
const MAX_HELD: usize = 2560;
/// Most connections that have not said who they are.
const MAX_STRANGERS: usize = 16;
/// Datagrams of one worker before another has its turn.
const BURST: usize = 32;

const LISTENER: u64 = 0;
const STOP: u64 = 1;
const FIRST_CONNECTION: u64 = 2;

/// Why there is no keeper.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// Another keeper listens at the path.
    #[error(
        "the custody socket {path} is in use by another daemon; stop that, or choose another runtime-dir"
    )]
    InUse {
        /// The path.
        path: String,
    },
    /// The operating system refused.
    #[error("cannot {what} the custody socket {path}; its directory must exist and be writable")]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// The path.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What has happened to a worker. Of one worker they come in order: `Connected`, then any of the others,
/// at last `Bye` or `Lost`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A worker has said who it is.
    Connected {
        /// The attachment.
        id: String,
        /// The worker's process id.
        pid: u32,
        /// It goes on where another, or itself under another daemon, was.
        resumed: bool,
    },
    /// A VMM can connect, or is served again.
    Ready {
        /// The attachment.
        id: String,
    },
    /// The link to the device server has come or gone.
    State {
        /// The attachment.
        id: String,
        /// Up or down.
        link: Link,
        /// Why it is down.
        reason: Option<String>,
    },
    /// The worker's connection ended without a word: it is dead, or mad and was cut off. What it had
    /// is held until its successor comes. A worker that lives yet must be killed before one is
    /// started.
    Lost {
        /// The attachment.
        id: String,
        /// The worker's process id.
        pid: u32,
    },
    /// The worker ends in order. Nothing is held any more.
    Bye {
        /// The attachment.
        id: String,
    },
}

#[derive(Debug)]
struct Connection {
    socket: Socket,
    /// From the operating system, not from the worker.
    pid: u32,
    id: Option<String>,
    unsent: VecDeque<(FromKeeper, Vec<OwnedFd>)>,
}

#[derive(Debug, Default)]
struct Entry {
    held: Held,
    connection: Option<u64>,
    /// What an earlier daemon held, and the worker has not yet handed over anew.
    stale: BTreeSet<Key>,
    /// The worker has handed over all that it has.
    whole: bool,
}

#[derive(Debug)]
struct State {
    epoll: OwnedFd,
    entries: BTreeMap<String, Entry>,
    connections: BTreeMap<u64, Connection>,
    next: u64,
    /// Has duplicates of all that is held.
    store: FdStore,
    /// Whose processes may be workers, besides root's and the daemon's own user's.
    users: Vec<u32>,
}

/// See the module's own description.
#[derive(Debug)]
pub struct Keeper {
    state: Arc<Mutex<State>>,
    path: PathBuf,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Listens at `path`, which must be free or left behind by a daemon that is no more. `on_event` is
    /// called from the keeper's thread, and must not wait.
    pub fn bind(
        path: &Path,
        on_event: impl FnMut(Event) + Send + 'static,
    ) -> Result<Self, KeeperError> {
        Self::bind_with(path, FdStore::default(), on_event)
    }

    /// As [`Self::bind`]; what is held has duplicates in `store`, and what that has from an earlier
    /// daemon is held for the attachments that are admitted.
    pub fn bind_with(
        path: &Path,
        store: FdStore,
        on_event: impl FnMut(Event) + Send + 'static,
    ) -> Result<Self, KeeperError> {
        let failed = |what| {
            move |error: Errno| KeeperError::Io {
                what,
                path: path.display().to_string(),
                source: error.into(),
            }
        };
        let address = SocketAddrUnix::new(path).map_err(failed("name"))?;
        let probe = unconnected().map_err(failed("create"))?;
        match connect(&probe, &address) {
            Err(Errno::NOENT) => {}
            Err(Errno::CONNREFUSED) => unlink(path).map_err(failed("replace"))?,
            Err(Errno::PROTOTYPE) | Ok(()) => {
                let path = path.display().to_string();
                return Err(KeeperError::InUse { path });
            }
            Err(error) => return Err(failed("probe")(error)),
        }
        let listener = unconnected().map_err(failed("create"))?;
        bind(&listener, &address).map_err(failed("bind"))?;
        chmod(path, Mode::from_raw_mode(0o660)).map_err(failed("set the mode of"))?;
        listen(&listener, 64).map_err(failed("listen at"))?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed("watch"))?;
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| KeeperError::Io {
            what: "watch",
            path: path.display().to_string(),
            source,
        })?;
        let stop = Arc::new(stop);
        let readable = epoll::EventFlags::IN;
        let data = epoll::EventData::new_u64;
        epoll::add(&epoll, &listener, data(LISTENER), readable).map_err(failed("watch"))?;
        let stopping = farbus_vfio::user::event::borrow(&stop);
        epoll::add(&epoll, stopping, data(STOP), readable).map_err(failed("watch"))?;
        let state = Arc::new(Mutex::new(State {
            epoll,
            entries: BTreeMap::new(),
            connections: BTreeMap::new(),
            next: FIRST_CONNECTION,
            store,
            users: Vec::new(),
        }));
        let shared = state.clone();
        let thread = std::thread::Builder::new()
            .name("custody".into())
            .spawn(move || run(&shared, &listener, on_event))
            .map_err(|source| KeeperError::Io {
                what: "serve",
                path: path.display().to_string(),
                source,
            })?;
        Ok(Self {
            state,
            path: path.to_owned(),
            stop,
            thread: Some(thread),
        })
    }

    /// Where workers connect: their `--custody`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Processes of this user may be workers, too, and reach the socket as members of its group.
    pub fn allow_user(&self, user: User) -> Result<(), KeeperError> {
        let group = Some(Gid::from_raw(user.gid));
        chown(&self.path, None, group).map_err(|error| KeeperError::Io {
            what: "give to the group of worker-user",
            path: self.path.display().to_string(),
            source: error.into(),
        })?;
        self.state().users.push(user.uid);
        Ok(())
    }

    /// From now on there is an attachment with this id; workers of others are refused.
    pub fn admit(&self, id: &str) {
        let mut state = self.state();
        if !state.entries.contains_key(id) {
            let held = state.store.take(id);
            let entry = Entry {
                held,
                ..Entry::default()
            };
            state.entries.insert(id.to_owned(), entry);
        }
    }

    /// All attachments that an earlier daemon had are admitted: what is stored of others is not wanted.
    pub fn all_admitted(&self) {
        self.state().store.forget_rest();
    }

    /// The attachment is no more: closes all that is held for it and cuts its worker off, if it has
    /// one. No event comes of that.
    pub fn release(&self, id: &str) {
        let mut state = self.state();
        state.clear(id);
        let gone = state.entries.remove(id).and_then(|entry| entry.connection);
        if let Some(token) = gone {
            state.close(token);
        }
    }

    /// Tells the attachment's worker to end in order, and says whether there is one.
    pub fn stop(&self, id: &str) -> bool {
        let mut state = self.state();
        let token = state.entries.get(id).and_then(|entry| entry.connection);
        token.is_some_and(|token| state.say(token, FromKeeper::Stop, Vec::new()).is_ok())
    }

    /// The process id of the attachment's worker, while it is connected.
    pub fn worker(&self, id: &str) -> Option<u32> {
        let state = self.state();
        let token = state.entries.get(id)?.connection?;
        Some(state.connections.get(&token)?.pid)
    }

    /// Whether the attachment's worker is connected, and has handed over what a successor needs.
    pub fn is_whole(&self, id: &str) -> bool {
        let state = self.state();
        let entry = state.entries.get(id);
        entry.is_some_and(|entry| entry.connection.is_some() && entry.whole)
    }

    /// How many descriptors are held for the attachment.
    pub fn held(&self, id: &str) -> usize {
        self.state()
            .entries
            .get(id)
            .map_or(0, |entry| entry.held.len())
    }

    /// What the attachment has done, whether its worker lives or not; `None` until it has one.
    pub fn statistics(&self, id: &str) -> Option<Statistics> {
        let state = self.state();
        let key = super::worker::key(super::worker::CONTROLLER);
        let fd = state.entries.get(id)?.held.get(&key)?;
        Statistics::read(fd.as_fd())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // A successor must find the path free; workers look there again and again.
        let _ = unlink(&self.path);
    }
}

/// Nothing behind the lock is left half done by what could panic.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(state: &Mutex<State>, listener: &OwnedFd, mut on_event: impl FnMut(Event)) {
    // A descriptor of its own: waiting must not hold the lock.
    let epoll = match lock(state).epoll.try_clone() {
        Ok(epoll) => epoll,
        Err(error) => return warn!("custody ends: {error}"),
    };
    let mut ready = Vec::with_capacity(64);
    loop {
        ready.clear();
        match epoll::wait(&epoll, spare_capacity(&mut ready), None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return warn!("custody ends: {error}"),
        }
        for event in &ready {
            match event.data.u64() {
                LISTENER => lock(state).accept(listener),
                STOP => return,
                token => {
                    let mut events = Vec::new();
                    lock(state).serve(token, &mut events);
                    events.into_iter().for_each(&mut on_event);
                }
            }
        }
    }
}

impl State {
    fn accept(&mut self, listener: &OwnedFd) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = match accept_with(listener, flags) {
            Ok(socket) => socket,
            Err(error) => return debug!("custody: nobody was accepted: {error}"),
        };
        let Ok(peer) = socket_peercred(&socket) else {
            return;
        };
        let uid = peer.uid.as_raw();
        let own = rustix::process::geteuid().as_raw();
        if uid != 0 && uid != own && !self.users.contains(&uid) {
            return warn!("custody: a process of user {uid} was turned away; workers run as {own}");
        }
        let strangers: Vec<u64> = self
            .connections
            .iter()
            .filter_map(|(token, c)| c.id.is_none().then_some(*token))
            .collect();
        if strangers.len() >= MAX_STRANGERS {
            strangers.first().into_iter().for_each(|t| self.close(*t));
        }
        let token = self.next;
        self.next += 1;
        let data = epoll::EventData::new_u64(token);
        if let Err(error) = epoll::add(&self.epoll, &socket, data, epoll::EventFlags::IN) {
            return warn!("custody: a connection cannot be watched: {error}");
        }
        self.connections.insert(
            token,
            Connection {
                socket: Socket::new(socket),
                pid: peer.pid.as_raw_nonzero().get().unsigned_abs(),
                id: None,
                unsent: VecDeque::new(),
            },
        );
    }

    fn serve(&mut self, token: u64, events: &mut Vec<Event>) {
        if self.flush(token).is_err() {
            return self.lost(token, events);
        }
        for _ in 0..BURST {
            let Some(connection) = self.connections.get(&token) else {
                return;
            };
            match connection.socket.receive::<FromWorker>() {
                Ok(None) => return,
                Ok(Some((message, fds))) => {
                    if let Err(why) = self.hear(token, message, fds, events) {
                        self.refuse(token, &why);
                        return self.lost(token, events);
                    }
                }
                Err(error) => {
                    if !matches!(error, SocketError::Closed) {
                        self.refuse(token, &error.to_string());
                    }
                    return self.lost(token, events);
                }
            }
        }
    }

    fn hear(
        &mut self,
        token: u64,
        message: FromWorker,
        fds: Vec<OwnedFd>,
        events: &mut Vec<Event>,
    ) -> Result<(), String> {
        if let FromWorker::Hello {
            version, id, live, ..
        } = message
        {
            return self.hello(token, version, id, live, events);
        }
        let connection = self.connections.get(&token);
        let id = connection.and_then(|connection| connection.id.clone());
        let id = id.ok_or("it must say first who it is")?;
        let entry = self.entries.get_mut(&id).ok_or("it has been released")?;
        match message {
            FromWorker::Hello { .. } => {}
            FromWorker::Keep { keys } => {
                for (key, fd) in keys.into_iter().zip(fds) {
                    if entry.held.contains_key(&key) {
                        self.store.forget(&id, &key);
                    }
                    self.store.keep(&id, &key, &fd);
                    entry.stale.remove(&key);
                    entry.held.insert(key, fd);
                }
                if entry.held.len() > MAX_HELD {
                    return Err(format!("more than {MAX_HELD} descriptors are not held"));
                }
            }
            FromWorker::Forget { keys } => keys.iter().for_each(|key| {
                if entry.held.remove(key).is_some() {
                    self.store.forget(&id, key);
                }
            }),
            FromWorker::Ready => {
                for key in std::mem::take(&mut entry.stale) {
                    entry.held.remove(&key);
                    self.store.forget(&id, &key);
                }
                entry.whole = true;
                events.push(Event::Ready { id });
            }
            FromWorker::State { link, reason } => events.push(Event::State { id, link, reason }),
            FromWorker::Bye => {
                entry.connection = None;
                self.clear(&id);
                self.close(token);
                events.push(Event::Bye { id });
            }
        }
        Ok(())
    }

    fn hello(
        &mut self,
        token: u64,
        version: u32,
        id: String,
        live: bool,
        events: &mut Vec<Event>,
    ) -> Result<(), String> {
        if version != VERSION {
            return Err(format!(
                "version {version} is not spoken here; {VERSION} is"
            ));
        }
        let connection = self.connections.get_mut(&token).ok_or("it has gone")?;
        if connection.id.is_some() {
            return Err("it has said already who it is".into());
        }
        let entry = self.entries.get_mut(&id);
        let entry = entry.ok_or_else(|| format!("there is no attachment {id}"))?;
        if entry.connection.is_some() {
            return Err(format!("attachment {id} has a worker already"));
        }
        entry.connection = Some(token);
        connection.id = Some(id.clone());
        let pid = connection.pid;
        entry.whole = false;
        entry.stale.clear();
        if live {
            // Until it has said all, it may die: what there is of the time before is good for a successor.
            entry.stale = entry.held.keys().cloned().collect();
        }
        // One that lives has it all.
        let held = if live { 0 } else { entry.held.len() };
        let mut handed = Vec::new();
        let mut all = entry.held.iter().take(held).peekable();
        while all.peek().is_some() {
            let (mut keys, mut fds) = (Vec::new(), Vec::new());
            for (key, fd) in all.by_ref().take(MAX_FDS) {
                keys.push(key.clone());
                fds.push(fd.try_clone().map_err(|error| error.to_string())?);
            }
            handed.push((FromKeeper::Held { keys }, fds));
        }
        events.push(Event::Connected {
            id,
            pid,
            resumed: live || held > 0,
        });
        let failed = |error: SocketError| error.to_string();
        self.say(token, FromKeeper::Welcome { held }, Vec::new())
            .map_err(failed)?;
        for (message, fds) in handed {
            self.say(token, message, fds).map_err(failed)?;
        }
        Ok(())
    }

    /// Nothing is held for the attachment any more.
    fn clear(&mut self, id: &str) {
        let held = self.entries.get_mut(id).map(|entry| &mut entry.held);
        for (key, _fd) in held.map(std::mem::take).unwrap_or_default() {
            self.store.forget(id, &key);
        }
    }

    fn say(
        &mut self,
        token: u64,
        message: FromKeeper,
        fds: Vec<OwnedFd>,
    ) -> Result<(), SocketError> {
        if let Some(connection) = self.connections.get_mut(&token) {
            connection.unsent.push_back((message, fds));
        }
        self.flush(token)
    }

    fn flush(&mut self, token: u64) -> Result<(), SocketError> {
        let Some(connection) = self.connections.get_mut(&token) else {
            return Ok(());
        };
        let waited = connection.unsent.len();
        while let Some((message, fds)) = connection.unsent.front() {
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            if !connection.socket.send(message, &fds)? {
                break;
            }
            connection.unsent.pop_front();
        }
        if waited > 0 {
            let mut events = epoll::EventFlags::IN;
            if !connection.unsent.is_empty() {
                events |= epoll::EventFlags::OUT;
            }
            let data = epoll::EventData::new_u64(token);
            epoll::modify(&self.epoll, &connection.socket, data, events)?;
        }
        Ok(())
    }

    fn refuse(&mut self, token: u64, why: &str) {
        let Some(connection) = self.connections.get(&token) else {
            return;
        };
        let who = connection.id.as_deref().unwrap_or("unknown");
        warn!(
            "custody: worker {who} (pid {}) is cut off: {why}",
            connection.pid
        );
        let reason = why.to_owned();
        let _ = connection.socket.send(&FromKeeper::Refused { reason }, &[]);
    }

    fn lost(&mut self, token: u64, events: &mut Vec<Event>) {
        let Some(connection) = self.connections.get(&token) else {
            return;
        };
        let pid = connection.pid;
        if let Some(id) = connection.id.clone() {
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.connection = None;
                events.push(Event::Lost { id, pid });
            }
        }
        self.close(token);
    }

    fn close(&mut self, token: u64) {
        if let Some(connection) = self.connections.remove(&token) {
            let _ = epoll::delete(&self.epoll, &connection.socket);
            debug!(
                "custody: connection {} is closed",
                connection.socket.as_fd().as_raw_fd()
            );
        }
    }
}
