//! Keeps a remote function linked to its device server: what an event loop does with the link's
//! events, whatever else it serves.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, mem};

use event_manager::{EventOps, Events};
use farbus_shadow_mem::remote::{Found, LinkInterest, RemoteFunction};
use log::{error, info, warn};
use signal_hook::consts::{SIGINT, SIGTERM};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::custody::Custody;
use crate::custody::messages::Link;
use crate::reconnect::{MAX_PAUSE, MIN_PAUSE, Reconnect, Source};

/// How often the link is asked for a sign of life.
pub const TICK: Duration = Duration::from_secs(1);
/// A link that has lived this long was a good one.
const STABLE: Duration = Duration::from_secs(5);

/// Readable at SIGTERM or SIGINT.
pub fn signals() -> io::Result<OwnedFd> {
    let (reader, writer) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    Ok(reader.into())
}

/// See the module's own description.
pub struct Upkeep {
    remote: Arc<RemoteFunction>,
    source: Source,
    /// Signalled when a new link has been claimed.
    done: Arc<EventFd>,
    reconnect: Option<Reconnect>,
    watched: Option<LinkInterest>,
    /// What the event loop is told with the link's events.
    data: u32,
    /// Something has arrived, or may have.
    ready: bool,
    /// When the link at hand was made.
    linked: Instant,
    /// How long to wait before the next attempt to get one.
    pause: Duration,
    /// Who is told how the link is.
    custody: Custody,
}

impl Upkeep {
    /// For a function that is linked, or is to be. Its events have `data`, and `done`'s are [`Self::claimed`]'s.
    pub fn new(
        remote: Arc<RemoteFunction>,
        source: Source,
        custody: Custody,
        data: u32,
    ) -> io::Result<Self> {
        let is_linked = remote.is_linked();
        let mut upkeep = Self {
            remote,
            source,
            done: Arc::new(EventFd::new(EFD_NONBLOCK)?),
            reconnect: None,
            watched: None,
            data,
            ready: false,
            linked: Instant::now(),
            pause: Duration::ZERO,
            custody,
        };
        if is_linked {
            upkeep.tell(Link::Up, None);
        } else {
            let why = "the process that had it has ended".into();
            upkeep.tell(Link::Down, Some(why));
            upkeep.start()?;
        }
        Ok(upkeep)
    }

    /// The eventfd whose events are for [`Self::claimed`].
    pub fn done(&self) -> &EventFd {
        &self.done
    }

    /// The link has events.
    pub fn ready(&mut self) {
        self.ready = true;
    }

    /// Receives what has arrived, if anything may have or the event loop `looks`; whether there
    /// was anything.
    pub fn receive(&mut self, looks: bool) -> bool {
        if !looks && !self.ready {
            return false;
        }
        let found = self.remote.service();
        self.ready = found == Found::More;
        found.any()
    }

    /// Replaces a link that was lost, and waits for what the link at hand waits for.
    pub fn look_after(&mut self, ops: &mut EventOps<'_>) -> io::Result<()> {
        let lost = self.remote.take_lost();
        if let Some(lost) = &lost {
            warn!(
                "the link to {} is lost ({}); what the guest has asked for waits for a new one",
                self.source.address, lost.error
            );
            self.tell(Link::Down, Some(lost.error.to_string()));
            // A link that dies as soon as it is there would come and go without end.
            self.pause = if self.linked.elapsed() > STABLE {
                Duration::ZERO
            } else {
                (self.pause * 2).clamp(MIN_PAUSE, MAX_PAUSE)
            };
            self.start()?;
        }
        self.watch(ops);
        // Only now, with the event loop past it, may its descriptor be closed.
        drop(lost);
        Ok(())
    }

    /// An attempt to get a new link has ended. Whether the function goes on over it.
    pub fn claimed(&mut self, ops: &mut EventOps<'_>) -> io::Result<bool> {
        // Another wake-up may have emptied it.
        let _ = self.done.read();
        let claimed = loop {
            match self.reconnect.as_ref().and_then(Reconnect::take) {
                Some(Ok(claimed)) => break claimed,
                Some(Err(why)) => self.tell(Link::Down, Some(why)),
                None => return Ok(false),
            }
        };
        self.reconnect = None;
        self.linked = Instant::now();
        let linked = match self.remote.reconnect(claimed) {
            Ok(()) => {
                info!("the drive's controller is rebuilt on the new link");
                self.tell(Link::Up, None);
                true
            }
            Err(error) => {
                let error = format!("{:#}", anyhow::Error::new(error));
                error!("{error}");
                self.tell(Link::Down, Some(error));
                // An operator may give the export its old form again.
                self.pause = MAX_PAUSE;
                self.start()?;
                false
            }
        };
        self.watch(ops);
        Ok(linked)
    }

    fn tell(&self, link: Link, why: Option<String>) {
        if let Some(mut client) = self.custody.client() {
            client.link(link, why);
        }
    }

    fn start(&mut self) -> io::Result<()> {
        let (source, done) = (self.source.clone(), self.done.clone());
        self.reconnect = Some(Reconnect::start(source, self.pause, done)?);
        Ok(())
    }

    /// Makes the event loop wait for what the link waits for now.
    fn watch(&mut self, ops: &mut EventOps<'_>) {
        let wanted = self.remote.link_interest();
        let old = mem::replace(&mut self.watched, wanted);
        if old == wanted {
            return;
        }
        let events = |interest: &LinkInterest| {
            let set = if interest.writable {
                EventSet::IN | EventSet::OUT
            } else {
                EventSet::IN
            };
            Events::with_data_raw(interest.descriptor, self.data, set)
        };
        let done = match (&old, &wanted) {
            (None, None) => Ok(()),
            (None, Some(new)) => ops.add(events(new)),
            (Some(old), None) => ops.remove(events(old)),
            (Some(old), Some(new)) if old.descriptor == new.descriptor => ops.modify(events(new)),
            (Some(old), Some(new)) => ops.remove(events(old)).and_then(|()| ops.add(events(new))),
        };
        if let Err(error) = done {
            error!("the event loop does not take the link: {error}");
        }
    }
}
