//! The keeper's connections: who may make one, how many there are, and what is still to be sent on
//! each. What is said on them is for [`super::state`] to understand.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use log::{debug, warn};
use rustix::event::epoll;
use rustix::net::{SocketFlags, accept_with};

use super::super::messages::{FromKeeper, FromWorker};
use super::super::socket::{Socket, SocketError};
use crate::peer;

/// Most connections that have not said who they are.
const MAX_STRANGERS: usize = 16;

/// Names a connection among the events of the keeper's thread.
pub(super) type Token = u64;

#[derive(Debug)]
struct Connection {
    socket: Socket,
    /// From the operating system, not from the worker.
    peer: Peer,
    id: Option<String>,
    unsent: VecDeque<(FromKeeper, Vec<OwnedFd>)>,
}

/// Who has connected.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer {
    pub(super) pid: u32,
    pub(super) uid: u32,
}

/// See the module's own description.
#[derive(Debug)]
pub(super) struct Connections {
    epoll: OwnedFd,
    all: BTreeMap<Token, Connection>,
    next: Token,
    /// Whose processes may be workers, besides root's and the daemon's own user's.
    users: Vec<u32>,
}

impl Connections {
    /// None yet; they are watched with `epoll`, and named from `first` on.
    pub(super) fn new(epoll: OwnedFd, first: Token) -> Self {
        Self {
            epoll,
            all: BTreeMap::new(),
            next: first,
            users: Vec::new(),
        }
    }

    pub(super) fn allow_user(&mut self, uid: u32) {
        self.users.push(uid);
    }

    pub(super) fn accept(&mut self, listener: &OwnedFd) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = match accept_with(listener, flags) {
            Ok(socket) => socket,
            Err(error) => return debug!("custody: nobody was accepted: {error}"),
        };
        let credentials = match peer::credentials(socket.as_fd()) {
            Ok(credentials) => credentials,
            Err(error) => return warn!("custody: somebody was turned away: {error}"),
        };
        let uid = credentials.uid;
        let own = rustix::process::geteuid().as_raw();
        if uid != 0 && uid != own && !self.users.contains(&uid) {
            return warn!("custody: a process of user {uid} was turned away; workers run as {own}");
        }
        // Workers are children of a daemon of this host: one from another pid namespace is none.
        let Some(pid) = credentials.pid else {
            return warn!(
                "custody: a process of another pid namespace (user {uid}) was turned away"
            );
        };
        let strangers: Vec<Token> = self
            .all
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
        self.all.insert(
            token,
            Connection {
                socket: Socket::new(socket),
                peer: Peer { pid, uid },
                id: None,
                unsent: VecDeque::new(),
            },
        );
    }

    /// Who is at the other end; `None` if the connection is no more.
    pub(super) fn peer(&self, token: Token) -> Option<Peer> {
        Some(self.all.get(&token)?.peer)
    }

    /// The attachment whose worker it is, if it has said so.
    pub(super) fn id(&self, token: Token) -> Option<&str> {
        self.all.get(&token)?.id.as_deref()
    }

    /// It is this attachment's worker.
    pub(super) fn set_id(&mut self, token: Token, id: &str) {
        if let Some(connection) = self.all.get_mut(&token) {
            connection.id = Some(id.to_owned());
        }
    }

    /// What has come, if something has.
    pub(super) fn receive(
        &self,
        token: Token,
    ) -> Result<Option<(FromWorker, Vec<OwnedFd>)>, SocketError> {
        match self.all.get(&token) {
            Some(connection) => connection.socket.receive(),
            None => Ok(None),
        }
    }

    /// Sends, now or when there is room.
    pub(super) fn say(
        &mut self,
        token: Token,
        message: FromKeeper,
        fds: Vec<OwnedFd>,
    ) -> Result<(), SocketError> {
        if let Some(connection) = self.all.get_mut(&token) {
            connection.unsent.push_back((message, fds));
        }
        self.flush(token)
    }

    /// Sends what waits for room, as far as there is some.
    pub(super) fn flush(&mut self, token: Token) -> Result<(), SocketError> {
        let Some(connection) = self.all.get_mut(&token) else {
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

    /// Tells it, and the log, why it is about to be closed.
    pub(super) fn refuse(&self, token: Token, why: &str) {
        let Some(connection) = self.all.get(&token) else {
            return;
        };
        let who = connection.id.as_deref().unwrap_or("unknown");
        let Peer { pid, uid } = connection.peer;
        warn!("custody: worker {who} (pid {pid}, user {uid}) is cut off: {why}");
        let reason = why.to_owned();
        let _ = connection.socket.send(&FromKeeper::Refused { reason }, &[]);
    }

    pub(super) fn close(&mut self, token: Token) {
        if let Some(connection) = self.all.remove(&token) {
            let _ = epoll::delete(&self.epoll, &connection.socket);
            debug!(
                "custody: connection {} is closed",
                connection.socket.as_fd().as_raw_fd()
            );
        }
    }
}
