//! How a thread waits for completions: not at all, or for interrupts and the link.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use farbus_shadow_mem::remote::LinkInterest;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::lane::Lane;
use crate::target::{Driver, Linked};

/// Marks the link among the events; the others are indices of eventfds.
const LINK: u64 = u64::MAX;
/// Signs of life must go on while nothing completes.
const LIMIT: Duration = Duration::from_millis(500);

/// See the module's own description.
pub(crate) struct Waiter {
    epoll: Epoll,
    events: Vec<Arc<EventFd>>,
    link: Option<Arc<Linked>>,
    watched: Option<LinkInterest>,
    ready: Vec<EpollEvent>,
}

impl Waiter {
    pub(crate) fn new(
        driver: &Driver,
        lanes: &[Lane],
        link: Option<Arc<Linked>>,
    ) -> anyhow::Result<Self> {
        let epoll = Epoll::new().context("making an epoll instance")?;
        let vectors = driver.function().info().interrupts.msix.max(1);
        let mut numbers: Vec<u16> = lanes
            .iter()
            .map(|lane| (u32::from(lane.queue()) % vectors) as u16)
            .collect();
        numbers.sort_unstable();
        numbers.dedup();
        let events: Vec<_> = numbers
            .into_iter()
            .filter_map(|vector| driver.event(vector).cloned())
            .collect();
        for (n, event) in events.iter().enumerate() {
            epoll.ctl(
                ControlOperation::Add,
                std::os::fd::AsRawFd::as_raw_fd(&**event),
                EpollEvent::new(EventSet::IN, n as u64),
            )?;
        }
        Ok(Self {
            ready: vec![EpollEvent::default(); events.len() + 1],
            epoll,
            events,
            link,
            watched: None,
        })
    }

    /// Waits for an interrupt or the link, and lets the link move on. Interrupts are taken
    /// before the queues are looked at, so that none is missed.
    pub(crate) fn wait(&mut self) -> anyhow::Result<()> {
        self.watch_link()?;
        let count = match self.epoll.wait(LIMIT.as_millis() as i32, &mut self.ready) {
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error).context("waiting for an interrupt"),
        };
        for ready in self.ready.iter().take(count) {
            match (ready.data(), &self.link) {
                (LINK, Some(link)) => while link.service() {},
                (n, _) => {
                    if let Some(event) = self.events.get(n as usize) {
                        // It may have been taken already, with the same interrupt.
                        let _ = event.read();
                    }
                }
            }
        }
        Ok(())
    }

    fn watch_link(&mut self) -> anyhow::Result<()> {
        let wanted = self.link.as_ref().and_then(|link| link.interest());
        if wanted == self.watched {
            return Ok(());
        }
        let event = |interest: LinkInterest| {
            let writable = if interest.writable {
                EventSet::OUT
            } else {
                EventSet::empty()
            };
            EpollEvent::new(EventSet::IN | writable, LINK)
        };
        match (self.watched, wanted) {
            (Some(old), Some(new)) if old.descriptor == new.descriptor => {
                self.epoll
                    .ctl(ControlOperation::Modify, new.descriptor, event(new))?;
            }
            (old, new) => {
                if let Some(old) = old {
                    self.epoll
                        .ctl(ControlOperation::Delete, old.descriptor, event(old))?;
                }
                if let Some(new) = new {
                    self.epoll
                        .ctl(ControlOperation::Add, new.descriptor, event(new))?;
                }
            }
        }
        self.watched = wanted;
        Ok(())
    }
}
