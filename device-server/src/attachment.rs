//! The event loop of one claim: link and function on one thread, run to completion.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_fabric::wire::{FaultCode, Message};
use farbus_fabric::{FabricError, Received};
use farbus_shadow_mem::nvme::device::DeviceHalf;
use farbus_shadow_mem::polling::{Polling, Waiter};
use farbus_shadow_mem::session::Session;
use farbus_vfio::Notice;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::exports::{Counts, Tally};
use crate::liveness::Liveness;

/// Messages received before other work has its turn.
const RECEIVE_BURST: usize = 64;
/// Looks at link and function between two at everything else.
const LOOKS_PER_WAIT: u32 = 16;

const LINK: u64 = 0;
const INTERRUPT: u64 = 1;
const STOP: u64 = 2;
const EVICT: u64 = 3;
/// The first of the function's notices.
const NOTICE: u64 = 4;

/// How long the claimant's network may take for the news that the function is gone. A host
/// that unplugs it waits meanwhile.
const FAREWELL: Duration = Duration::from_millis(500);
/// How often is looked meanwhile whether there is room for the rest: which event tells of room differs by
/// provider, and a claim says farewell once.
const FAREWELL_STEP: Duration = Duration::from_millis(5);

/// How an attachment ended.
#[derive(Debug)]
pub enum Ended {
    /// The claimant gave the export back, or closed its connection.
    Released,
    /// This process ends.
    Stopped,
    /// An operator wants the export back.
    Evicted,
    /// The function is gone, for this reason; the claimant was told.
    Failed(String),
    /// The claimant is gone or broke the protocol.
    Lost(FabricError),
}

/// One claim at work.
pub struct Attachment {
    half: DeviceHalf,
    session: Session,
    liveness: Liveness,
    ticked: Instant,
    /// More may have arrived than was received: the link need not become readable for it.
    more: bool,
    waiter: Waiter,
    looks: u32,
    tally: Arc<Tally>,
    /// What the tally has already.
    counted: Counts,
}

impl Attachment {
    /// From the two ends that it joins, and how to wait for either.
    pub fn new(
        mut half: DeviceHalf,
        session: Session,
        polling: Polling,
        tally: Arc<Tally>,
    ) -> Self {
        if polling == Polling::Always {
            half.look_at_queues();
        }
        let now = Instant::now();
        Self {
            half,
            session,
            liveness: Liveness::new(now),
            ticked: now,
            more: false,
            waiter: Waiter::new(polling),
            looks: 0,
            tally,
            counted: Counts::default(),
        }
    }

    /// Runs until the claim ends, or `stop` or `evict` is readable.
    pub fn run(&mut self, stop: &EventFd, evict: &EventFd) -> Ended {
        let served = self.serve(stop, evict);
        self.count();
        match served {
            Ok(ended) => ended,
            Err(FabricError::Closed) => Ended::Released,
            Err(error) => Ended::Lost(error),
        }
    }

    /// Closes the connection, and leaves the function: to drop that may take long.
    pub fn hang_up(self) -> DeviceHalf {
        self.half
    }

    fn serve(&mut self, stop: &EventFd, evict: &EventFd) -> Result<Ended, FabricError> {
        let what = |what| move |source| FabricError::Io { what, source };
        let link = self.session.descriptor().as_raw_fd();
        let epoll = Epoll::new().map_err(what("creating an epoll instance"))?;
        // Each signal of the function's is an event, so that nobody has to read the eventfd.
        let signalled = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (fd, id, events) in [
            (link, LINK, EventSet::IN),
            (self.half.interrupt().as_raw_fd(), INTERRUPT, signalled),
            (stop.as_raw_fd(), STOP, EventSet::IN),
            (evict.as_raw_fd(), EVICT, EventSet::IN),
        ] {
            watch(&epoll, ControlOperation::Add, fd, id, events)
                .map_err(what("watching a descriptor"))?;
        }
        let notices: Vec<Notice> = self.watch_notices(&epoll)?;
        self.session.keep_looking();
        let mut watched = EventSet::IN;
        let mut events = [EpollEvent::default(); 4];
        loop {
            let looking =
                self.transfer()? || self.waiter.looks_again() || !self.session.may_wait()?;
            self.more |= looking;
            self.looks += 1;
            if looking && self.looks % LOOKS_PER_WAIT != 0 {
                continue;
            }
            self.look_after()?;
            if let Some(why) = self.half.gone().map(str::to_owned) {
                self.say_farewell()?;
                return Ok(Ended::Failed(why));
            }
            let wanted = self.interest();
            if wanted != watched {
                watched = wanted;
                watch(&epoll, ControlOperation::Modify, link, LINK, watched)
                    .map_err(what("watching the link"))?;
            }
            let timeout = if looking { 0 } else { self.timeout() };
            let asleep = Instant::now();
            let ready = match epoll.wait(timeout, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                ready => ready.map_err(what("waiting for events"))?,
            };
            if !looking {
                self.waiter.slept(asleep.elapsed());
            }
            for event in &events[..ready] {
                match event.data() {
                    LINK => self.more = true,
                    // What it has completed is found in its queues.
                    INTERRUPT => {}
                    STOP => return Ok(Ended::Stopped),
                    EVICT => return Ok(Ended::Evicted),
                    notice => {
                        let index = (notice - NOTICE) as usize;
                        self.noticed(notices.get(index).copied());
                    }
                }
            }
        }
    }

    /// Moves what there is to move, from the link to the function and back; whether there may
    /// be more at once.
    fn transfer(&mut self) -> Result<bool, FabricError> {
        let before = self.progress();
        if self.session.is_congested() {
            self.session.flush()?;
        }
        if self.more {
            self.receive()?;
        }
        self.half.pump(&mut self.session)?;
        if self.progress() != before {
            self.waiter.found();
        }
        Ok(self.more && !self.half.is_backlogged())
    }

    /// Adds to the tally what was done since the last time.
    fn count(&mut self) {
        let (own, lanes) = (self.session.counters(), self.half.carried_by_lanes());
        let now = Counts {
            commands: self.half.commands(),
            bytes_received: own.bytes_received + lanes.bytes_received,
            bytes_sent: own.bytes_sent + lanes.bytes_sent,
        };
        self.tally.add(self.counted, now);
        self.counted = now;
    }

    /// Rises with every byte that moves.
    fn progress(&self) -> u64 {
        let counters = self.session.counters();
        counters.bytes_received + counters.bytes_sent
    }

    /// Waits for the function's notices, too; returns them in the order of their ids.
    fn watch_notices(&self, epoll: &Epoll) -> Result<Vec<Notice>, FabricError> {
        let mut notices = Vec::new();
        for (id, (notice, event)) in (NOTICE..).zip(self.half.notices()) {
            watch(
                epoll,
                ControlOperation::Add,
                event.as_raw_fd(),
                id,
                EventSet::IN,
            )
            .map_err(|source| FabricError::Io {
                what: "watching the function's notices",
                source,
            })?;
            notices.push(notice);
        }
        Ok(notices)
    }

    fn noticed(&mut self, notice: Option<Notice>) {
        for (kind, event) in self.half.notices() {
            if Some(kind) == notice {
                // Nobody else reads it; when it was not signalled after all, it is next time.
                let _ = event.read();
            }
        }
        match notice {
            Some(Notice::UnplugRequested) => {
                let text = "the device server's host unplugs it, or takes it for another driver";
                self.half.fail(FaultCode::Gone, text);
            }
            Some(Notice::ErrorReported) => {
                let text = "it has reported an uncorrectable PCIe error";
                self.half.fail(FaultCode::Fatal, text);
            }
            None => {}
        }
    }

    /// Lets the claimant know that the function is gone, unless its network is too slow.
    fn say_farewell(&mut self) -> Result<(), FabricError> {
        let until = Instant::now() + FAREWELL;
        loop {
            self.session.flush()?;
            self.half.pump(&mut self.session)?;
            if !self.session.is_congested() || Instant::now() > until {
                return Ok(());
            }
            std::thread::sleep(FAREWELL_STEP);
        }
    }

    /// Receives some of what has arrived, and finds out whether there is more.
    fn receive(&mut self) -> Result<(), FabricError> {
        for _ in 0..RECEIVE_BURST {
            // A peer that asks and does not listen waits, and with it what it asks.
            if self.half.is_backlogged() {
                break;
            }
            if self.session.receive(&mut self.half)? == Received::Idle {
                self.more = false;
                break;
            }
            // What the function did at once is on its way while the next message comes in.
            self.half.pump(&mut self.session)?;
        }
        Ok(())
    }

    /// What to wait for on the link.
    fn interest(&self) -> EventSet {
        let mut wanted = EventSet::empty();
        // A one-sided link hears by its own descriptor that there is room again.
        let hears_of_room = self.session.is_one_sided() && self.session.is_congested();
        if !self.half.is_backlogged() || hears_of_room {
            wanted |= EventSet::IN;
        }
        if self.session.is_congested() {
            wanted |= EventSet::OUT;
        }
        wanted
    }

    /// What time brings: the controller's state, and the claimant's silence.
    fn look_after(&mut self) -> Result<(), FabricError> {
        let now = Instant::now();
        if now >= self.ticked + self.half.next_tick() {
            self.ticked = now;
            self.half.tick();
            self.half.pump(&mut self.session)?;
        }
        let speak = self.liveness.look(now, &self.session.counters())?;
        if speak {
            self.count();
        }
        // A claimant that is sending something large over a slow network waits for none.
        if speak && !self.session.is_congested() {
            self.session.send(&Message::Ping { nonce: 0 })?;
        }
        Ok(())
    }

    /// Milliseconds until time brings something.
    fn timeout(&self) -> i32 {
        let due = (self.ticked + self.half.next_tick()).min(self.liveness.due());
        let now = Instant::now();
        let left = due.saturating_duration_since(now).as_millis() as i32 + 1;
        match self.half.due() {
            // Commands that wait for the claim's limits. What becomes due within this millisecond
            // goes with the next.
            Some(due) => left.min(due.saturating_duration_since(now).as_millis() as i32 + 1),
            None => left,
        }
    }
}

fn watch(
    epoll: &Epoll,
    operation: ControlOperation,
    fd: RawFd,
    id: u64,
    events: EventSet,
) -> io::Result<()> {
    epoll.ctl(operation, fd, EpollEvent::new(events, id))
}
