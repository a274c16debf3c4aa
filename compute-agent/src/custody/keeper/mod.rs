//! The daemon's side of custody.
//!
//! A [`Keeper`] has a thread of its own, which hears the workers and holds their descriptors. What an
//! owner has to know comes as [`Event`]s to the function that it gives; what it wants is done by methods
//! that never wait. A worker is not trusted with more than its own attachment: how many
//! descriptors are held for it is bounded, it must be the process that the owner has appointed and run as
//! a user that may, and nobody gets what is held before the connection of its last worker has ended.
//!
//! | module | knows |
//! |---|---|
//! | `listen` | the socket that workers connect to |
//! | `connections` | who has connected, and what is still to be sent |
//! | `state` | what is held for each attachment, and what workers say |
//! | `event` | what the owner is told |
//!
//! ```no_run
//! use farbus_compute_agent::custody::{Event, Keeper};
//!
//! let (send, events) = std::sync::mpsc::channel();
//! let keeper = Keeper::bind("/run/farbus/custody.sock".as_ref(), move |event| {
//!     let _ = send.send(event);
//! })?;
//! let worker = keeper.appoint_started("disk0", || {
//!     let mut command = std::process::Command::new("farbus-compute-agent");
//!     command.args(["attach", "--custody", "/run/farbus/custody.sock", "--id", "disk0"]);
//!     command.spawn().map(|child| (child.id(), child))
//! })?;
//! # let _ = worker;
//! for event in events {
//!     if let Event::Lost { id, .. } = event {
//!         // Start it again: it gets everything back and goes on.
//! #       let _ = id;
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod connections;
mod event;
mod listen;
mod state;

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use log::warn;
use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::fs::unlink;
use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::connections::{Connections, Token};
pub use self::event::Event;
pub use self::listen::KeeperError;
use self::listen::failed;
use self::state::State;
use super::fdstore::FdStore;
use super::messages::FromKeeper;
use super::statistics::Statistics;
use crate::sandbox::User;

const LISTENER: Token = 0;
const STOP: Token = 1;
const FIRST_CONNECTION: Token = 2;

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
        let listener = listen::open(path)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed("watch", path))?;
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed("watch", path))?;
        let stop = Arc::new(stop);
        let readable = epoll::EventFlags::IN;
        let data = epoll::EventData::new_u64;
        epoll::add(&epoll, &listener, data(LISTENER), readable).map_err(failed("watch", path))?;
        let stopping = farbus_vfio::user::event::borrow(&stop);
        epoll::add(&epoll, stopping, data(STOP), readable).map_err(failed("watch", path))?;
        // The thread's own: waiting must not hold the lock.
        let watched = epoll.try_clone().map_err(failed("watch", path))?;
        let connections = Connections::new(epoll, FIRST_CONNECTION);
        let state = Arc::new(Mutex::new(State::new(connections, store)));
        let shared = state.clone();
        let thread = std::thread::Builder::new()
            .name("custody".into())
            .spawn(move || run(&watched, &shared, &listener, on_event))
            .map_err(failed("serve", path))?;
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
        listen::give_to_group(&self.path, user)?;
        self.state().connections.allow_user(user.uid);
        Ok(())
    }

    /// From now on there is an attachment with this id; workers of others are refused.
    pub fn admit(&self, id: &str) {
        self.state().admit(id);
    }

    /// From now on there is an attachment with this id, and this process may be its worker; any other is
    /// refused, whatever it says. One that an earlier daemon has started is appointed anew by the next.
    pub fn appoint(&self, id: &str, pid: u32) {
        self.state().appoint(id, Some(pid));
    }

    /// Appoints the process that `start` starts, however fast that connects; nobody is heard meanwhile.
    /// `start` returns its process id, and must not call the keeper.
    pub fn appoint_started<T, E>(
        &self,
        id: &str,
        start: impl FnOnce() -> Result<(u32, T), E>,
    ) -> Result<T, E> {
        let mut state = self.state();
        let (pid, started) = start()?;
        state.appoint(id, Some(pid));
        Ok(started)
    }

    /// The process that was appointed is dead: another one of the same number is not the worker.
    pub fn dismiss(&self, id: &str) {
        self.state().appoint(id, None);
    }

    /// All attachments that an earlier daemon had are admitted: what is stored of others is not wanted.
    pub fn all_admitted(&self) {
        self.state().forget_rest();
    }

    /// The attachment is no more: closes all that is held for it and cuts its worker off, if it has
    /// one. No event comes of that.
    pub fn release(&self, id: &str) {
        self.state().release(id);
    }

    /// Tells the attachment's worker to end in order, and says whether there is one.
    pub fn stop(&self, id: &str) -> bool {
        let mut state = self.state();
        let token = state.entries.get(id).and_then(|entry| entry.connection);
        let stop = |token| {
            let said = state.connections.say(token, FromKeeper::Stop, Vec::new());
            said.is_ok()
        };
        token.is_some_and(stop)
    }

    /// The process id of the attachment's worker, while it is connected.
    pub fn worker(&self, id: &str) -> Option<u32> {
        let state = self.state();
        let token = state.entries.get(id)?.connection?;
        Some(state.connections.peer(token)?.pid)
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

fn run(epoll: &OwnedFd, state: &Mutex<State>, listener: &OwnedFd, mut on_event: impl FnMut(Event)) {
    let mut ready = Vec::with_capacity(64);
    loop {
        ready.clear();
        match epoll::wait(epoll, spare_capacity(&mut ready), None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return warn!("custody ends: {error}"),
        }
        for event in &ready {
            match event.data.u64() {
                LISTENER => lock(state).connections.accept(listener),
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
