//! The endpoint: a socket in an event loop, which serves one VMM after the other.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use farbus_vfio::Function;
use farbus_vfio::user::wire::{HEADER_LEN, Header};
use log::{error, info, warn};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::connection::{Connection, Left};
use super::listener::{EndpointError, Listener};
use super::msix::Watch;
use super::record::SessionRecord;
use super::refusal::End;
use super::session::Session;
use crate::api::Msix;
use crate::custody::Custody;
use crate::custody::worker::{CONNECTION, LISTENER, key};
use crate::peer::pid_of;

/// How many clients can be in the course of being turned away.
const MAX_TURNED_AWAY: usize = 4;

/// An event whose data is this or more is a signal of the vector with that number, less this.
const FIRST_VECTOR: u32 = 1;

/// Offers a function to VMMs at a UNIX socket.
///
/// It works as a subscriber of an [`event_manager::EventManager`]. One client is served at a
/// time; another one that connects meanwhile is told `EBUSY`. When the client has gone, the
/// function is reset and the next one may connect.
///
/// ```no_run
/// # fn offer(function: std::sync::Arc<dyn farbus_vfio::Function>) -> anyhow::Result<()> {
/// use event_manager::{EventManager, SubscriberOps};
/// use farbus_compute_agent::vfio_user::Endpoint;
///
/// let endpoint = Endpoint::bind("/run/farbus/disk0.sock".as_ref(), function)?;
/// let mut events = EventManager::new()?;
/// let id = events.add_subscriber(endpoint);
/// events.run()?;
/// events.remove_subscriber(id)?.shutdown();
/// # Ok(())
/// # }
/// ```
pub struct Endpoint {
    listener: Listener,
    /// The listener's path, for log lines.
    name: String,
    function: Arc<dyn Function>,
    msix: Msix,
    /// Wakes us up for what no socket does: received messages that wait for their turn, and
    /// guest memory that broke.
    wake: Arc<EventFd>,
    client: Option<Connection>,
    /// Eventfds of the client's interrupts that are watched.
    interrupts: Vec<RawFd>,
    /// Messages of the client wait for their turn, which comes with `wake`.
    has_backlog: bool,
    turned_away: Vec<TurnedAway>,
    turned_away_during_client: u64,
    /// The listener is not watched, since nothing can be accepted until the client leaves.
    is_listener_paused: bool,
    /// The last attempt to accept failed, and that was logged.
    is_accept_failing: bool,
    is_shut_down: bool,
    /// Where a successor finds what it needs of the client, if there is to be one.
    kept: Option<(SessionRecord, Custody)>,
}

impl Endpoint {
    /// Listens at `path`, which must be free or left behind by a server that is no more. The
    /// socket file has mode 0660 from the beginning.
    pub fn bind(path: &Path, function: Arc<dyn Function>) -> Result<Self, EndpointError> {
        Self::new(Listener::bind(path)?, function)
    }

    /// As [`Self::bind`], for a process that may be killed: what another one needs to go on is in
    /// custody.
    pub fn bind_kept(
        path: &Path,
        function: Arc<dyn Function>,
        custody: Custody,
    ) -> Result<Self, EndpointError> {
        let mut endpoint = Self::bind(path, function)?;
        let record = SessionRecord::create(&custody).map_err(|source| EndpointError::Memory {
            path: endpoint.name.clone(),
            source,
        })?;
        custody.keep(vec![(key(LISTENER), endpoint.listener.as_fd())]);
        endpoint.kept = Some((record, custody));
        Ok(endpoint)
    }

    /// Goes on where a predecessor was killed: `function` is given the memory and the interrupts
    /// that the client had given to that one's. Messages are handled from the first round of the event
    /// loop on.
    pub fn resume(
        path: &Path,
        function: Arc<dyn Function>,
        msix: Msix,
        custody: Custody,
    ) -> Result<Self, EndpointError> {
        let left = custody.held(&key(LISTENER));
        let left = left.and_then(|fd| Some((fd, SessionRecord::open(&custody)?)));
        let (listener, record) = left.ok_or_else(|| EndpointError::NothingLeft {
            path: path.display().to_string(),
        })?;
        let endpoint = Self::new(Listener::resume(listener, path), function)?;
        let mut endpoint = endpoint.with_msix(msix);
        let resumed = match custody.held(&key(CONNECTION)) {
            Some(client) => endpoint.resume_client(client.into(), &record, &custody),
            None => Ok(()),
        };
        if let Err(why) = &resumed {
            warn!("vfio-user {}: the client is dropped: {why}", endpoint.name);
        }
        if endpoint.client.is_none() {
            custody.forget_session();
            endpoint.reset_function();
            record.clear();
        }
        endpoint.kept = Some((record, custody));
        Ok(endpoint)
    }

    /// Takes up the client that the predecessor had.
    fn resume_client(
        &mut self,
        stream: UnixStream,
        record: &SessionRecord,
        custody: &Custody,
    ) -> Result<(), String> {
        let peer = pid_of(&stream);
        let make = |progress, first: Option<(Header, &[u8])>| {
            let (function, wake) = (self.function.clone(), self.wake.clone());
            Session::new(function, &self.name, peer, self.msix, wake)
                .keep(record, custody)
                .resume(record, progress, first)
        };
        self.client = Some(Connection::resume(stream, record, custody, make)?);
        // Messages may be in the inbox already, and answers in the outbox.
        let _ = self.wake.write(1);
        Ok(())
    }

    /// As when a client has gone.
    fn reset_function(&self) {
        if let Err(error) = self.function.reset() {
            warn!("vfio-user {}: reset: {error}", self.name);
        }
    }

    fn new(listener: Listener, function: Arc<dyn Function>) -> Result<Self, EndpointError> {
        let name = listener.path().display().to_string();
        let wake =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| EndpointError::EventFd {
                path: name.clone(),
                source,
            })?;
        Ok(Self {
            listener,
            name,
            function,
            msix: Msix::Auto,
            wake: Arc::new(wake),
            client: None,
            interrupts: Vec::new(),
            has_backlog: false,
            turned_away: Vec::new(),
            turned_away_during_client: 0,
            is_listener_paused: false,
            is_accept_failing: false,
            is_shut_down: false,
            kept: None,
        })
    }

    /// The same, with MSI-X kept as `msix` says from the next client on.
    #[must_use]
    pub fn with_msix(mut self, msix: Msix) -> Self {
        self.msix = msix;
        self
    }

    /// Where VMMs connect.
    pub fn path(&self) -> &Path {
        self.listener.path()
    }

    /// Closes down in order: removes the socket file, ends the client's connection so that
    /// it notices, and brings the function to its initial state. To be called when the
    /// event loop is over or the endpoint was removed from it, since descriptors are closed
    /// only when the endpoint is dropped.
    pub fn shutdown(&mut self) {
        if std::mem::replace(&mut self.is_shut_down, true) {
            return;
        }
        self.listener.unlink();
        if let Some(client) = &mut self.client {
            client.end(&End::Shutdown);
        }
    }

    fn on_listener(&mut self, ops: &mut EventOps<'_>) {
        // A VMM that restarts connects again while the end of its first connection is still
        // to be read. That comes first; the listener stays ready meanwhile.
        if self.client.as_ref().is_some_and(Connection::is_hung_up) {
            self.serve_client(ops);
            if self.client.is_some() {
                return;
            }
        }
        let accepted = self.listener.accept();
        let was_failing = std::mem::replace(&mut self.is_accept_failing, accepted.is_err());
        match accepted {
            Ok(Some(stream)) if self.client.is_some() => self.turn_away(stream, ops),
            Ok(Some(stream)) => self.take_client(stream, ops),
            Ok(None) => {}
            Err(error) => {
                if !was_failing {
                    error!(
                        "vfio-user {}: cannot accept a connection: {error}",
                        self.name
                    );
                }
                // Most likely no descriptor is free. The listener would wake us up again at
                // once; it is left alone until the client gives back what it has.
                if self.client.is_some() {
                    self.watch_listener(false, ops);
                }
            }
        }
    }

    fn watch_listener(&mut self, watch: bool, ops: &mut EventOps<'_>) {
        let events = if watch {
            EventSet::IN
        } else {
            EventSet::empty()
        };
        log_failure(&self.name, ops.modify(Events::new(&self.listener, events)));
        self.is_listener_paused = !watch;
    }

    fn take_client(&mut self, stream: UnixStream, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&stream, EventSet::IN)) {
            error!(
                "vfio-user {}: cannot watch a connection: {error}",
                self.name
            );
            return;
        }
        let peer = pid_of(&stream);
        let (function, wake) = (self.function.clone(), self.wake.clone());
        let connection = match &self.kept {
            None => {
                let session = Session::new(function, &self.name, peer, self.msix, wake);
                Ok(Connection::new(stream, session))
            }
            Some((record, custody)) => {
                let session = Session::new(function, &self.name, peer, self.msix, wake);
                let session = session.keep(record, custody);
                Connection::keep(stream, session, record, custody)
            }
        };
        match connection {
            Ok(connection) => self.client = Some(connection),
            // Its descriptor goes, and with it the event loop's interest.
            Err(error) => {
                return error!("vfio-user {}: cannot keep a connection: {error}", self.name);
            }
        }
        self.turned_away_during_client = 0;
        self.has_backlog = false;
        // Its first request is most likely there already.
        self.serve_client(ops);
    }

    /// One wake-up's worth of work for the client.
    fn serve_client(&mut self, ops: &mut EventOps<'_>) {
        let Some(client) = &mut self.client else {
            return;
        };
        let had_unsent = client.has_unsent();
        let served = if client.memory_lost() {
            Err(End::MemoryLost)
        } else {
            client.serve()
        };
        let left = match served {
            Ok(left) => left,
            Err(why) => return self.drop_client(&why, ops),
        };
        self.watch_output(had_unsent, ops);
        self.watch_interrupts(ops);
        self.has_backlog = left == Left::Messages;
        if self.has_backlog {
            // A full counter means that we are to be woken up anyway.
            let _ = self.wake.write(1);
        }
    }

    /// The function has signalled a vector of the client's.
    fn on_interrupt(&mut self, vector: u32, ops: &mut EventOps<'_>) {
        let Some(client) = &mut self.client else {
            return;
        };
        let had_unsent = client.has_unsent();
        match client.fire(vector) {
            Ok(()) => self.watch_output(had_unsent, ops),
            Err(why) => self.drop_client(&why, ops),
        }
    }

    /// Waits for room in the client's socket, or no more.
    fn watch_output(&mut self, had_unsent: bool, ops: &mut EventOps<'_>) {
        let Some(client) = &self.client else { return };
        let has_unsent = client.has_unsent();
        if has_unsent != had_unsent {
            let out = if has_unsent {
                EventSet::OUT
            } else {
                EventSet::empty()
            };
            let events = Events::new(client.stream(), EventSet::IN | out);
            log_failure(&self.name, ops.modify(events));
        }
    }

    /// Watches the eventfds of vectors that the client has begun to use. Each signal is an event, so
    /// that nobody has to read them.
    fn watch_interrupts(&mut self, ops: &mut EventOps<'_>) {
        let Some(client) = &mut self.client else {
            return;
        };
        while let Some(Watch { vector, fd }) = client.take_watch() {
            let once = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let added = ops.add(Events::with_data_raw(fd, vector + FIRST_VECTOR, once));
            if added.is_ok() {
                self.interrupts.push(fd);
            }
            log_failure(&self.name, added);
        }
    }

    fn drop_client(&mut self, why: &End, ops: &mut EventOps<'_>) {
        let Some(mut client) = self.client.take() else {
            return;
        };
        log_failure(&self.name, ops.remove(Events::empty(client.stream())));
        for fd in self.interrupts.drain(..) {
            log_failure(
                &self.name,
                ops.remove(Events::new_raw(fd, EventSet::empty())),
            );
        }
        client.end(why);
        if self.turned_away_during_client > 0 {
            let count = self.turned_away_during_client;
            info!(
                "vfio-user {}: {count} others were turned away meanwhile",
                self.name
            );
        }
        if self.is_listener_paused {
            self.watch_listener(true, ops);
        }
    }

    /// A client while there is one already. QEMU takes five seconds to see that a connection
    /// was closed on it, and gives the reason at once when it gets an error reply; that needs
    /// the id of its first message.
    fn turn_away(&mut self, stream: UnixStream, ops: &mut EventOps<'_>) {
        if self.turned_away_during_client == 0 {
            let pid = pid_of(&stream).map_or("unknown".to_owned(), |pid| pid.to_string());
            warn!(
                "vfio-user {}: turned away pid {pid}: another client is served",
                self.name
            );
        }
        self.turned_away_during_client = self.turned_away_during_client.saturating_add(1);
        if self.turned_away.len() >= MAX_TURNED_AWAY {
            let oldest = self.turned_away.remove(0);
            log_failure(&self.name, ops.remove(Events::empty(&oldest.stream)));
        }
        let mut turned_away = TurnedAway {
            stream,
            head: [0; HEADER_LEN],
            received: 0,
        };
        if turned_away.is_told() {
            return;
        }
        match ops.add(Events::new(&turned_away.stream, EventSet::IN)) {
            Ok(()) => self.turned_away.push(turned_away),
            Err(error) => error!(
                "vfio-user {}: cannot watch a connection: {error}",
                self.name
            ),
        }
    }

    fn on_turned_away(&mut self, fd: RawFd, ops: &mut EventOps<'_>) {
        let Some(index) = self
            .turned_away
            .iter()
            .position(|t| t.stream.as_raw_fd() == fd)
        else {
            return;
        };
        if self
            .turned_away
            .get_mut(index)
            .is_some_and(TurnedAway::is_told)
        {
            let told = self.turned_away.remove(index);
            log_failure(&self.name, ops.remove(Events::empty(&told.stream)));
        }
    }
}

impl MutEventSubscriber for Endpoint {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if self.is_shut_down {
            return;
        }
        if let Some(vector) = events.data().checked_sub(FIRST_VECTOR) {
            return self.on_interrupt(vector, ops);
        }
        let fd = events.fd();
        if fd == self.listener.as_raw_fd() {
            self.on_listener(ops);
        } else if fd == self.wake.as_raw_fd() {
            // Another wake-up may have emptied it.
            let _ = self.wake.read();
            self.serve_client(ops);
        } else if self
            .client
            .as_ref()
            .is_some_and(|client| client.stream().as_raw_fd() == fd)
        {
            // With a backlog, the client's turn has been set; another one in the same round
            // of the event loop would be at the expense of others.
            if !self.has_backlog {
                self.serve_client(ops);
            }
        } else {
            self.on_turned_away(fd, ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        log_failure(
            &self.name,
            ops.add(Events::new(&self.listener, EventSet::IN)),
        );
        log_failure(
            &self.name,
            ops.add(Events::new(self.wake.as_ref(), EventSet::IN)),
        );
        if let Some(client) = &self.client {
            let out = if client.has_unsent() {
                EventSet::OUT
            } else {
                EventSet::empty()
            };
            let events = Events::new(client.stream(), EventSet::IN | out);
            log_failure(&self.name, ops.add(events));
        }
        self.watch_interrupts(ops);
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// The event loop refuses a descriptor only when it is out of memory or of watches.
fn log_failure(name: &str, result: Result<(), event_manager::Error>) {
    if let Err(error) = result {
        error!("vfio-user {name}: the event loop refused a descriptor: {error}");
    }
}

/// A client that is not served and has to be told.
struct TurnedAway {
    stream: UnixStream,
    head: [u8; HEADER_LEN],
    received: usize,
}

impl TurnedAway {
    /// Goes on telling it; whether that is done, or cannot be.
    fn is_told(&mut self) -> bool {
        let room = self.head.get_mut(self.received..).unwrap_or_default();
        match recv(&self.stream, room, RecvFlags::DONTWAIT) {
            Ok((_, len @ 1..)) => self.received += len,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return false,
            Ok(_) | Err(_) => return true,
        }
        if self.received < HEADER_LEN {
            return false;
        }
        let reply = Header::decode(&self.head).error_reply(libc::EBUSY).encode();
        // A fresh socket has room for 16 bytes; a client that has gone needs none.
        let _ = send(
            &self.stream,
            &reply,
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        );
        true
    }
}
