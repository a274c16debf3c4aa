//! The data threads beside the first: each serves one lane, a share of the guest's queues with a
//! connection of its own, from the guest's queues to the network and back.

#![forbid(unsafe_code)]

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context;
use farbus_shadow_mem::nvme::compute::Lane;
use farbus_shadow_mem::polling::{Polling, Waiter};
use farbus_shadow_mem::remote::{Found, LinkInterest, RemoteFunction};
use log::error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::timer::Timer;
use crate::upkeep::TICK;

/// Looks at the link and the guest's doorbells between two at everything else.
const LOOKS_PER_WAIT: u32 = 16;

const LINK: u64 = 0;
const OTHER: u64 = 1;

/// The threads of a function's further lanes. They end when the function is released, or when this is
/// dropped, which waits for them.
pub struct LaneThreads(Vec<(Arc<Lane>, JoinHandle<()>)>);

impl LaneThreads {
    /// Starts one for each lane of a function beside the first.
    pub fn start(remote: &RemoteFunction, polling: Polling) -> std::io::Result<Self> {
        let mut threads = Vec::new();
        for (lane, number) in remote.lanes().into_iter().zip(1..) {
            let served = lane.clone();
            let serve = move || serve(&served, number, polling);
            let name = format!("lane-{number}");
            threads.push((lane, thread::Builder::new().name(name).spawn(serve)?));
        }
        Ok(Self(threads))
    }
}

impl Drop for LaneThreads {
    fn drop(&mut self) {
        for (lane, thread) in self.0.drain(..) {
            lane.end();
            // Whoever panicked has ended the process.
            let _ = thread.join();
        }
    }
}

/// Ends the process with its thread: without one of its lanes the guest would wait for ever, and
/// whoever starts agents starts another one.
struct Vital(u16);

impl Drop for Vital {
    fn drop(&mut self) {
        if thread::panicking() {
            error!("the thread of lane {} has failed", self.0);
            std::process::abort();
        }
    }
}

fn serve(lane: &Lane, number: u16, polling: Polling) {
    let _vital = Vital(number);
    if let Err(error) = run(lane, polling) {
        error!("the thread of lane {number} cannot go on: {error:#}");
        std::process::abort();
    }
}

/// One lane's event loop.
struct Loop<'a> {
    lane: &'a Lane,
    epoll: Epoll,
    timer: Timer,
    /// What is waited for on the link, and which one of the lane's links that is.
    watched: Option<(LinkInterest, u64)>,
}

fn run(lane: &Lane, polling: Polling) -> anyhow::Result<()> {
    let mut this = Loop::new(lane)?;
    let mut waiter = Waiter::new(polling);
    let mut due = Instant::now() + TICK;
    let (mut at_link, mut ready, mut looks) = (false, true, 0_u32);
    while !lane.has_ended() {
        let mut more = false;
        let busy = if at_link || ready {
            let found = lane.service();
            more = found == Found::More;
            found.any()
        } else {
            lane.pump()
        };
        ready = false;
        if busy {
            waiter.found();
        }
        let looks_again = waiter.looks_again();
        let awake = !busy && !looks_again && !lane.may_sleep();
        at_link = more || looks_again || awake;
        let looking = busy || at_link;
        looks = looks.wrapping_add(1);
        if looking && looks % LOOKS_PER_WAIT != 0 {
            continue;
        }
        this.watch()?;
        let asleep = Instant::now();
        let left = match looking {
            true => None,
            false => Some(due.saturating_duration_since(asleep)),
        };
        ready = this.wait(left)?;
        if !looking {
            lane.awake();
            waiter.slept(asleep.elapsed());
        }
        if Instant::now() >= due {
            due = Instant::now() + TICK;
            lane.tick();
        }
    }
    Ok(())
}

impl<'a> Loop<'a> {
    fn new(lane: &'a Lane) -> anyhow::Result<Self> {
        let epoll = Epoll::new().context("the event loop cannot be made")?;
        let timer = Timer::new()?;
        // Each signal is an event, so that nobody has to read it.
        let once = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for fd in [lane.event().as_raw_fd(), timer.as_raw_fd()] {
            let event = EpollEvent::new(once, OTHER);
            epoll
                .ctl(ControlOperation::Add, fd, event)
                .context("the event loop does not take a descriptor")?;
        }
        Ok(Self {
            lane,
            epoll,
            timer,
            watched: None,
        })
    }

    /// Waits for what the link waits for now. A link that is gone has taken its descriptor along.
    fn watch(&mut self) -> anyhow::Result<()> {
        let wanted = self.lane.link_interest();
        let old = std::mem::replace(&mut self.watched, wanted);
        let Some((interest, link)) = wanted.filter(|_| wanted != old) else {
            return Ok(());
        };
        let operation = match old {
            Some((_, last)) if last == link => ControlOperation::Modify,
            _ => ControlOperation::Add,
        };
        let set = match interest.writable {
            true => EventSet::IN | EventSet::OUT,
            false => EventSet::IN,
        };
        let event = EpollEvent::new(set, LINK);
        match self.epoll.ctl(operation, interest.descriptor, event) {
            Ok(()) => Ok(()),
            // Lane 0 has let go of it meanwhile, and wakes this thread when there is another.
            Err(_) if self.lane.link_interest().map(|(_, now)| now) != Some(link) => {
                self.watched = None;
                Ok(())
            }
            Err(error) => Err(error).context("the event loop does not take the link"),
        }
    }

    /// Waits for so long at most, or only looks; whether the link has events.
    fn wait(&mut self, left: Option<Duration>) -> anyhow::Result<bool> {
        let timeout = match left {
            None => 0,
            Some(left) => {
                self.timer.set(self.lane.due())?;
                left.as_millis() as i32 + 1
            }
        };
        let mut events = [EpollEvent::default(); 3];
        let ready = match self.epoll.wait(timeout, &mut events) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => 0,
            ready => ready.context("the event loop failed")?,
        };
        Ok(events[..ready].iter().any(|event| event.data() == LINK))
    }
}
