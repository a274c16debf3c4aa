//! What a keeper knows of each attachment: what is held for it, which process its worker is, and how
//! what workers say changes that.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;

use super::super::fdstore::{FdStore, Held};
use super::super::messages::{FromKeeper, FromWorker, Key, MAX_FDS, VERSION};
use super::super::socket::SocketError;
use super::connections::{Connections, Peer, Token};
use super::event::Event;

/// Most descriptors held for one attachment: MSI-X has 2048 vectors at most, and guest memory 256
/// files.
const MAX_HELD: usize = 2560;
/// Datagrams of one worker before another has its turn.
const BURST: usize = 32;

/// One attachment.
#[derive(Debug, Default)]
pub(super) struct Entry {
    pub(super) held: Held,
    /// The process that may be its worker.
    appointed: Option<u32>,
    pub(super) connection: Option<Token>,
    /// What an earlier daemon held, and the worker has not yet handed over anew.
    stale: BTreeSet<Key>,
    /// The worker has handed over all that it has.
    pub(super) whole: bool,
}

impl Entry {
    /// Whether this process may be the worker; if not, why.
    fn check(&self, id: &str, peer: Peer) -> Result<(), String> {
        let Peer { pid, uid } = peer;
        match self.appointed {
            Some(appointed) if appointed == pid => {}
            Some(appointed) => {
                return Err(format!(
                    "it is process {pid} of user {uid}, and the worker of attachment {id} is process \
                     {appointed}"
                ));
            }
            None => {
                return Err(format!(
                    "it is process {pid} of user {uid}, and the daemon has started no worker of \
                     attachment {id}"
                ));
            }
        }
        if self.connection.is_some() {
            return Err(format!("attachment {id} has a worker already"));
        }
        Ok(())
    }
}

/// See the module's own description.
#[derive(Debug)]
pub(super) struct State {
    pub(super) connections: Connections,
    pub(super) entries: BTreeMap<String, Entry>,
    /// Has duplicates of all that is held.
    store: FdStore,
}

impl State {
    pub(super) fn new(connections: Connections, store: FdStore) -> Self {
        Self {
            connections,
            entries: BTreeMap::new(),
            store,
        }
    }

    /// There is an attachment of this id, perhaps with what an earlier daemon has stored.
    pub(super) fn admit(&mut self, id: &str) -> &mut Entry {
        let store = &mut self.store;
        self.entries.entry(id.to_owned()).or_insert_with(|| Entry {
            held: store.take(id),
            ..Entry::default()
        })
    }

    /// The process that may be its worker from now on, or that none may.
    pub(super) fn appoint(&mut self, id: &str, pid: Option<u32>) {
        self.admit(id).appointed = pid;
    }

    /// What is stored of attachments that were not admitted is not wanted.
    pub(super) fn forget_rest(&mut self) {
        self.store.forget_rest();
    }

    /// The attachment is no more.
    pub(super) fn release(&mut self, id: &str) {
        self.clear(id);
        let gone = self.entries.remove(id).and_then(|entry| entry.connection);
        if let Some(token) = gone {
            self.connections.close(token);
        }
    }

    /// A connection has events.
    pub(super) fn serve(&mut self, token: Token, events: &mut Vec<Event>) {
        if self.connections.flush(token).is_err() {
            return self.lost(token, events);
        }
        for _ in 0..BURST {
            match self.connections.receive(token) {
                Ok(None) => return,
                Ok(Some((message, fds))) => {
                    if let Err(why) = self.hear(token, message, fds, events) {
                        self.connections.refuse(token, &why);
                        return self.lost(token, events);
                    }
                }
                Err(error) => {
                    if !matches!(error, SocketError::Closed) {
                        self.connections.refuse(token, &error.to_string());
                    }
                    return self.lost(token, events);
                }
            }
        }
    }

    fn hear(
        &mut self,
        token: Token,
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
        let id = self.connections.id(token).map(ToOwned::to_owned);
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
                self.connections.close(token);
                events.push(Event::Bye { id });
            }
        }
        Ok(())
    }

    fn hello(
        &mut self,
        token: Token,
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
        let peer = self.connections.peer(token).ok_or("it has gone")?;
        if self.connections.id(token).is_some() {
            return Err("it has said already who it is".into());
        }
        let entry = self.entries.get_mut(&id);
        let entry = entry.ok_or_else(|| format!("there is no attachment {id}"))?;
        entry.check(&id, peer)?;
        entry.connection = Some(token);
        self.connections.set_id(token, &id);
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
            pid: peer.pid,
            resumed: live || held > 0,
        });
        let failed = |error: SocketError| error.to_string();
        self.connections
            .say(token, FromKeeper::Welcome { held }, Vec::new())
            .map_err(failed)?;
        for (message, fds) in handed {
            self.connections.say(token, message, fds).map_err(failed)?;
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

    fn lost(&mut self, token: Token, events: &mut Vec<Event>) {
        let Some(peer) = self.connections.peer(token) else {
            return;
        };
        if let Some(id) = self.connections.id(token).map(ToOwned::to_owned) {
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.connection = None;
                events.push(Event::Lost { id, pid: peer.pid });
            }
        }
        self.connections.close(token);
    }
}
