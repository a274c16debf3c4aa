//! Waits for events, and hands them over: an event manager whose one subscriber keeps what it
//! hears, so that the event loop can act on it with all of its state at hand.

#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::Context as _;
use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use log::debug;
use vmm_sys_util::epoll::EventSet;

/// The events of one turn.
#[derive(Default)]
struct Inbox(Vec<Events>);

impl MutEventSubscriber for Inbox {
    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        self.0.push(events);
    }

    fn init(&mut self, _: &mut EventOps<'_>) {}
}

/// Waits for events, and hands them over.
pub(super) struct Reactor {
    manager: EventManager<Inbox>,
    id: SubscriberId,
    /// What has happened, in the last wait.
    pub(super) events: Vec<Events>,
}

impl Reactor {
    pub(super) fn new() -> anyhow::Result<Self> {
        let mut manager = EventManager::new().context("the event loop cannot be made")?;
        Ok(Self {
            id: manager.add_subscriber(Inbox::default()),
            manager,
            events: Vec::new(),
        })
    }

    /// For what else is to be watched.
    pub(super) fn ops(&mut self) -> anyhow::Result<EventOps<'_>> {
        Ok(self.manager.event_ops(self.id)?)
    }

    /// Watches a descriptor; its events have `data`.
    pub(super) fn add(&mut self, fd: i32, data: u32, set: EventSet) -> anyhow::Result<()> {
        let events = Events::with_data_raw(fd, data, set);
        self.ops()?
            .add(events)
            .map_err(|error| anyhow::anyhow!("the event loop does not take a descriptor: {error}"))
    }

    /// Forgets a descriptor, which is still open.
    pub(super) fn remove(&mut self, fd: i32) -> anyhow::Result<()> {
        if let Err(error) = self.ops()?.remove(Events::empty_raw(fd)) {
            debug!("the event loop did not have a descriptor: {error}");
        }
        Ok(())
    }

    /// Waits; what has happened is in `events`.
    pub(super) fn wait(&mut self, timeout: Duration) -> anyhow::Result<()> {
        let milliseconds = timeout.as_micros().div_ceil(1000);
        self.manager
            .run_with_timeout(i32::try_from(milliseconds).unwrap_or(i32::MAX))
            .context("the event loop failed")?;
        let inbox = self.manager.subscriber_mut(self.id)?;
        self.events.clear();
        self.events.append(&mut inbox.0);
        Ok(())
    }
}
