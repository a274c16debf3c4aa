//! One attachment's event loop with a vfio-user endpoint: the endpoint on one side, the link on
//! the other, everything on one thread. Nothing here waits for anything but the event loop
//! itself.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use farbus_shadow_mem::polling::{Polling, Waiter};
use farbus_shadow_mem::remote::{Found, RemoteFunction};
use log::error;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::custody::Custody;
use crate::custody::worker::Asked;
use crate::lanes::LaneThreads;
use crate::reconnect::Source;
use crate::timer::Timer;
use crate::upkeep::{TICK, Upkeep, signals};
use crate::vfio_user::Endpoint;

/// Looks at the link and the guest's doorbells between two at everything else.
const LOOKS_PER_WAIT: u32 = 4;

/// How often a new keeper is looked for while there is none: a worker that dies meanwhile has no
/// successor. A path cannot be waited for in the sandbox, which has no inotify.
const LOOK_FOR_KEEPER: Duration = Duration::from_millis(20);

/// What the event loop serves.
enum Subscriber {
    Endpoint(Box<Endpoint>),
    /// What an event leaves for the end of its round.
    Flag(Flag),
}

impl MutEventSubscriber for Subscriber {
    fn init(&mut self, ops: &mut EventOps) {
        if let Self::Endpoint(endpoint) = self {
            endpoint.init(ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match self {
            Self::Endpoint(endpoint) => endpoint.process(events, ops),
            Self::Flag(flag) => flag.raise(),
        }
    }
}

/// Whether something has happened. The event loop owns its subscribers, and to look them up
/// after every round would cost more than what most rounds are about.
#[derive(Clone, Default)]
struct Flag(Arc<AtomicBool>);

impl Flag {
    fn raise(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_raised(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn take(&self) -> bool {
        self.is_raised() && self.0.swap(false, Ordering::Relaxed)
    }
}

/// See the module's own description.
pub struct Worker {
    manager: EventManager<Subscriber>,
    endpoint: SubscriberId,
    link: SubscriberId,
    upkeep: Upkeep,
    remote: Arc<RemoteFunction>,
    waiter: Waiter,
    looks: u32,
    /// Readable at SIGTERM or SIGINT.
    _signals: OwnedFd,
    ended: Flag,
    /// A new link has been claimed.
    claimed: Flag,
    link_ready: Flag,
    /// Another lane has something for this thread.
    _lanes_event: EventFd,
    /// The other data threads.
    _threads: LaneThreads,
    /// Goes off when an interrupt has been held back for long enough.
    timer: Timer,
    custody: Custody,
    /// The keeper has said something, or gone.
    keeper_ready: Flag,
    keeper: SubscriberId,
    /// What the event loop watches for that.
    keeper_watched: Option<(u64, OwnedFd)>,
}

impl Worker {
    /// Joins an endpoint and the remote function that it offers.
    pub fn new(
        endpoint: Endpoint,
        remote: Arc<RemoteFunction>,
        source: Source,
        polling: Polling,
        custody: Custody,
    ) -> anyhow::Result<Self> {
        remote.look_for_doorbells();
        let timer = Timer::new()?;
        let lanes = remote.lanes_event()?;
        let threads = LaneThreads::start(&remote, polling).context("no data thread can be made")?;
        let signals = signals()?;
        let upkeep = Upkeep::new(remote.clone(), source, custody.clone(), 0)?;
        let [link_ready, ended, claimed, woken, keeper_ready] = <[Flag; 5]>::default();
        let mut manager = EventManager::new().context("the event loop cannot be made")?;
        // Each time that the timer goes off is an event, so that nobody has to read it.
        let once = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (fd, flag, set) in [
            (signals.as_raw_fd(), &ended, EventSet::IN),
            (upkeep.done().as_raw_fd(), &claimed, EventSet::IN),
            (timer.as_raw_fd(), &woken, once),
            (lanes.as_raw_fd(), &woken, once),
        ] {
            let id = manager.add_subscriber(Subscriber::Flag(flag.clone()));
            let added = manager.event_ops(id)?.add(Events::new_raw(fd, set));
            added.context("the event loop does not take a descriptor")?;
        }
        let mut worker = Self {
            endpoint: manager.add_subscriber(Subscriber::Endpoint(Box::new(endpoint))),
            link: manager.add_subscriber(Subscriber::Flag(link_ready.clone())),
            keeper: manager.add_subscriber(Subscriber::Flag(keeper_ready.clone())),
            keeper_ready,
            keeper_watched: None,
            custody,
            manager,
            upkeep,
            remote,
            waiter: Waiter::new(polling),
            looks: 0,
            _signals: signals,
            ended,
            claimed,
            link_ready,
            timer,
            _lanes_event: lanes,
            _threads: threads,
        };
        worker.look_after_link()?;
        worker.look_after_keeper()?;
        Ok(worker)
    }

    /// Runs until SIGTERM or SIGINT; then closes the VMM's socket and gives the export back.
    pub fn run(mut self) -> anyhow::Result<()> {
        let mut due = Instant::now() + TICK;
        // Whether to look at the link without an event of it.
        let mut at_link = false;
        loop {
            // Also for the doorbells that the endpoint has taken in the last round.
            let mut more = false;
            let busy = if self.link_ready.take() || at_link {
                let found = self.remote.service();
                more = found == Found::More;
                found.any()
            } else {
                self.remote.pump()
            };
            if busy {
                self.waiter.found();
            }
            let looks = self.waiter.looks_again();
            let awake = !busy && !looks && !self.remote.may_sleep();
            at_link = more || looks || awake;
            let looking = busy || at_link;
            self.looks += 1;
            if looking && self.looks % LOOKS_PER_WAIT != 0 {
                continue;
            }
            // Before a sleep, which would otherwise not end when the network takes more again.
            self.look_after_link()?;
            let orphaned = self.custody.is_some() && self.keeper_watched.is_none();
            let until = if orphaned {
                due.min(Instant::now() + LOOK_FOR_KEEPER)
            } else {
                due
            };
            if self.wait(looking, until)? > 0 {
                self.waiter.found();
            }
            if orphaned && Instant::now() >= until {
                self.keeper_ready.raise();
            }
            if Instant::now() >= due {
                due = Instant::now() + TICK;
                self.remote.tick();
                self.keeper_ready.raise();
            }
            if self.keeper_ready.take() {
                self.look_after_keeper()?;
            }
            if self.ended.is_raised() {
                self.end();
                return Ok(());
            }
        }
    }

    /// One round of the event loop: for what there is already, or asleep until `due` at most.
    fn wait(&mut self, looking: bool, due: Instant) -> anyhow::Result<usize> {
        let failed = "the event loop failed";
        if looking {
            return self.manager.run_with_timeout(0).context(failed);
        }
        self.timer.set(self.remote.due())?;
        let asleep = Instant::now();
        let left = due.saturating_duration_since(asleep);
        let events = self.manager.run_with_timeout(left.as_millis() as i32 + 1);
        self.waiter.slept(asleep.elapsed());
        events.context(failed)
    }

    /// Replaces a link that was lost, and goes on over the new one.
    fn look_after_link(&mut self) -> anyhow::Result<()> {
        let mut ops = self.manager.event_ops(self.link)?;
        self.upkeep.look_after(&mut ops)?;
        if self.claimed.take() {
            self.upkeep.claimed(&mut ops)?;
        }
        Ok(())
    }

    /// Hears the keeper, and looks for a new one if it has gone.
    fn look_after_keeper(&mut self) -> anyhow::Result<()> {
        let Some(mut client) = self.custody.client() else {
            return Ok(());
        };
        if client.listen() == Asked::Stop {
            self.ended.raise();
        }
        client.look_for_keeper();
        let number = client.keepers();
        if self.keeper_watched.as_ref().map(|(of, _)| *of) == number {
            return Ok(());
        }
        let mut ops = self.manager.event_ops(self.keeper)?;
        let failed = "the event loop does not take the daemon's socket";
        if let Some((_, old)) = self.keeper_watched.take() {
            ops.remove(Events::empty_raw(old.as_raw_fd()))
                .context(failed)?;
        }
        if let (Some(number), Some(fd)) = (number, client.descriptor()) {
            // Its own, which stays open until the event loop has forgotten it.
            let fd = fd.try_clone_to_owned().context(failed)?;
            ops.add(Events::new_raw(fd.as_raw_fd(), EventSet::IN))
                .context(failed)?;
            self.keeper_watched = Some((number, fd));
        }
        Ok(())
    }

    fn end(&mut self) {
        match self.manager.subscriber_mut(self.endpoint) {
            Ok(Subscriber::Endpoint(endpoint)) => endpoint.shutdown(),
            Ok(Subscriber::Flag(_)) => {}
            Err(error) => error!("the endpoint is not shut down: {error}"),
        }
        self.remote.release();
        if let Some(mut client) = self.custody.client() {
            client.bye();
        }
    }
}
