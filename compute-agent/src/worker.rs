//! One attachment's event loop: the endpoint on one side, the link on the other, everything
//! on one thread. Nothing here waits for anything but the event loop itself.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use farbus_shadow_mem::polling::{Polling, Waiter};
use farbus_shadow_mem::remote::{LinkInterest, RemoteFunction};
use log::{error, info, warn};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use signal_hook::consts::{SIGINT, SIGTERM};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::reconnect::{MAX_PAUSE, MIN_PAUSE, Reconnect, Source};
use crate::vfio_user::Endpoint;

/// How often the link is asked for a sign of life.
const TICK: Duration = Duration::from_secs(1);
/// Looks at the link and the guest's doorbells between two at everything else.
const LOOKS_PER_WAIT: u32 = 4;
/// A link that has lived this long was a good one.
const STABLE: Duration = Duration::from_secs(5);

/// What the event loop serves.
enum Subscriber {
    Endpoint(Box<Endpoint>),
    /// What has arrived is received after every round: see [`Worker::run`].
    Link(Flag),
    /// Goes off when an interrupt has been held back for long enough.
    Timer(OwnedFd),
    /// Readable at SIGTERM or SIGINT.
    Signals {
        pipe: OwnedFd,
        raised: Flag,
    },
    /// Signalled when a new link has been claimed.
    Reconnected {
        event: Arc<EventFd>,
        raised: Flag,
    },
}

/// What the event loop waits for on the link at hand; links come and go.
#[derive(Clone, Copy, Default)]
struct LinkWatch(Option<LinkInterest>);

impl MutEventSubscriber for Subscriber {
    fn init(&mut self, ops: &mut EventOps) {
        let added = match self {
            Self::Endpoint(endpoint) => return endpoint.init(ops),
            // Watched by the worker, once there is a link to watch.
            Self::Link(_) => return,
            // Each time that it goes off is an event, so that nobody has to read it.
            Self::Timer(timer) => {
                let once = EventSet::IN | EventSet::EDGE_TRIGGERED;
                ops.add(Events::new(timer, once))
            }
            Self::Signals { pipe, .. } => ops.add(Events::new(pipe, EventSet::IN)),
            Self::Reconnected { event, .. } => ops.add(Events::new(&**event, EventSet::IN)),
        };
        if let Err(error) = added {
            error!("the event loop does not take a descriptor: {error}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match self {
            Self::Endpoint(endpoint) => endpoint.process(events, ops),
            Self::Link(ready) => ready.raise(),
            // Interrupts are seen to after every round.
            Self::Timer(_) => {}
            Self::Signals { raised, .. } => raised.raise(),
            Self::Reconnected { event, raised } => {
                let _ = event.read();
                raised.raise();
            }
        }
    }
}

/// What an event leaves for the end of its round. The event loop owns its subscribers, and to
/// look them up after every round would cost more than what most rounds are about.
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

impl LinkWatch {
    /// Makes the event loop wait for what the link waits for now.
    fn update(&mut self, wanted: Option<LinkInterest>, ops: &mut EventOps) {
        let events = |interest: &LinkInterest| {
            let set = if interest.writable {
                EventSet::IN | EventSet::OUT
            } else {
                EventSet::IN
            };
            Events::new_raw(interest.descriptor, set)
        };
        let done = match (&self.0, &wanted) {
            (None, None) => Ok(()),
            (None, Some(new)) => ops.add(events(new)),
            (Some(old), None) => ops.remove(events(old)),
            (Some(old), Some(new)) if old.descriptor == new.descriptor => ops.modify(events(new)),
            (Some(old), Some(new)) => ops.remove(events(old)).and_then(|()| ops.add(events(new))),
        };
        if let Err(error) = done {
            error!("the event loop does not take the link: {error}");
        }
        self.0 = wanted;
    }
}

/// See the module's own description.
pub struct Worker {
    manager: EventManager<Subscriber>,
    endpoint: SubscriberId,
    link: SubscriberId,
    timer: SubscriberId,
    link_ready: Flag,
    ended: Flag,
    reconnected: Flag,
    remote: Arc<RemoteFunction>,
    source: Source,
    done: Arc<EventFd>,
    reconnect: Option<Reconnect>,
    watched: LinkWatch,
    /// When the link at hand was made.
    linked: Instant,
    /// How long to wait before the next attempt to get one.
    pause: Duration,
    waiter: Waiter,
    looks: u32,
    /// When the timer goes off.
    timer_set: Option<Instant>,
}

impl Worker {
    /// Joins an endpoint and the remote function that it offers.
    pub fn new(
        endpoint: Endpoint,
        remote: Arc<RemoteFunction>,
        source: Source,
        polling: Polling,
    ) -> anyhow::Result<Self> {
        remote.look_for_doorbells();
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )
        .context("a timer cannot be made")?;
        let mut manager = EventManager::new().context("the event loop cannot be made")?;
        let done = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let [link_ready, ended, reconnected] = <[Flag; 3]>::default();
        manager.add_subscriber(Subscriber::Signals {
            pipe: signals()?,
            raised: ended.clone(),
        });
        manager.add_subscriber(Subscriber::Reconnected {
            event: done.clone(),
            raised: reconnected.clone(),
        });
        Ok(Self {
            endpoint: manager.add_subscriber(Subscriber::Endpoint(Box::new(endpoint))),
            link: manager.add_subscriber(Subscriber::Link(link_ready.clone())),
            timer: manager.add_subscriber(Subscriber::Timer(timer)),
            link_ready,
            ended,
            reconnected,
            manager,
            remote,
            source,
            done,
            reconnect: None,
            watched: LinkWatch::default(),
            linked: Instant::now(),
            pause: Duration::ZERO,
            waiter: Waiter::new(polling),
            looks: 0,
            timer_set: None,
        })
    }

    /// Runs until SIGTERM or SIGINT; then closes the VMM's socket and gives the export back.
    pub fn run(mut self) -> anyhow::Result<()> {
        let mut due = Instant::now() + TICK;
        let mut looking = false;
        self.update_watch()?;
        loop {
            // Also for the doorbells that the endpoint has taken in the last round.
            let busy = if self.link_ready.take() || looking {
                self.remote.service()
            } else {
                self.remote.pump()
            };
            if busy {
                self.waiter.found();
            }
            looking = busy || self.waiter.looks_again() || !self.remote.may_sleep();
            self.looks += 1;
            if looking && self.looks % LOOKS_PER_WAIT != 0 {
                continue;
            }
            if self.wait(looking, due)? > 0 {
                self.waiter.found();
            }
            if Instant::now() >= due {
                due = Instant::now() + TICK;
                self.remote.tick();
            }
            self.look_after_link()?;
            if self.ended.is_raised() {
                return self.end();
            }
        }
    }

    /// One round of the event loop: for what there is already, or asleep until `due` at most.
    fn wait(&mut self, looking: bool, due: Instant) -> anyhow::Result<usize> {
        let failed = "the event loop failed";
        if looking {
            return self.manager.run_with_timeout(0).context(failed);
        }
        self.set_timer()?;
        let asleep = Instant::now();
        let left = due.saturating_duration_since(asleep);
        let events = self.manager.run_with_timeout(left.as_millis() as i32 + 1);
        self.waiter.slept(asleep.elapsed());
        events.context(failed)
    }

    /// Has the timer go off when an interrupt that is held back is due.
    fn set_timer(&mut self) -> anyhow::Result<()> {
        let due = self.remote.due();
        if due == self.timer_set {
            return Ok(());
        }
        self.timer_set = due;
        let left = due.map(|due| due.saturating_duration_since(Instant::now()));
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let value = left.map_or(zero, |left| Timespec {
            tv_sec: left.as_secs() as i64,
            // No time at all would stop the timer.
            tv_nsec: i64::from(left.subsec_nanos()).max(1),
        });
        let once = Itimerspec {
            it_interval: zero,
            it_value: value,
        };
        if let Subscriber::Timer(timer) = self.manager.subscriber_mut(self.timer)? {
            timerfd_settime(timer, TimerfdTimerFlags::empty(), &once)
                .context("the timer cannot be set")?;
        }
        Ok(())
    }

    /// Replaces a link that was lost, and waits for what the link at hand waits for.
    fn look_after_link(&mut self) -> anyhow::Result<()> {
        let lost = self.remote.take_lost();
        if let Some(lost) = &lost {
            warn!(
                "the link to {} is lost ({}); the guest's commands wait for a new one",
                self.source.address, lost.error
            );
            // A link that dies as soon as it is there would come and go without end.
            self.pause = if self.linked.elapsed() > STABLE {
                Duration::ZERO
            } else {
                (self.pause * 2).clamp(MIN_PAUSE, MAX_PAUSE)
            };
            self.start_reconnecting()?;
        }
        self.update_watch()?;
        // Only now, with the event loop past it, may its descriptor be closed.
        drop(lost);
        if let (true, Some(reconnect)) = (self.reconnected.take(), &self.reconnect) {
            if let Some(claimed) = reconnect.take() {
                self.reconnect = None;
                self.linked = Instant::now();
                match self.remote.reconnect(claimed) {
                    Ok(()) => info!("the guest's controller is rebuilt on the new link"),
                    Err(error) => {
                        error!("{:#}", anyhow::Error::new(error));
                        // An operator may give the export its old form again.
                        self.pause = MAX_PAUSE;
                        self.start_reconnecting()?;
                    }
                }
                self.update_watch()?;
            }
        }
        Ok(())
    }

    fn start_reconnecting(&mut self) -> anyhow::Result<()> {
        let (source, done) = (self.source.clone(), self.done.clone());
        self.reconnect = Some(Reconnect::start(source, self.pause, done)?);
        Ok(())
    }

    fn update_watch(&mut self) -> anyhow::Result<()> {
        let wanted = self.remote.link_interest();
        if self.watched.0 != wanted {
            let mut ops = self.manager.event_ops(self.link)?;
            self.watched.update(wanted, &mut ops);
        }
        Ok(())
    }

    fn end(mut self) -> anyhow::Result<()> {
        if let Subscriber::Endpoint(endpoint) = self.manager.subscriber_mut(self.endpoint)? {
            endpoint.shutdown();
        }
        self.remote.release();
        Ok(())
    }
}

fn signals() -> io::Result<OwnedFd> {
    let (reader, writer) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    Ok(reader.into())
}
