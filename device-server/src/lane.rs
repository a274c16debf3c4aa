//! The event loop of one lane beside the first: its link and its queues of the function on one
//! thread, run to completion.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Instant;

use farbus_fabric::FabricError;
use farbus_shadow_mem::nvme::device::{Lane, Round};
use farbus_shadow_mem::polling::{Polling, Waiter};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::liveness::Liveness;

/// Looks at link and function between two at everything else.
const LOOKS_PER_WAIT: u32 = 16;

const LINK: u64 = 0;
const INTERRUPT: u64 = 1;

/// Serves the lane until its link ends or the claim does; why it has ended.
pub(crate) fn serve(lane: &Lane, polling: Polling) -> FabricError {
    match run(lane, polling) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

/// There is no end but an error, be it the orderly end of the connection.
enum Never {}

fn run(lane: &Lane, polling: Polling) -> Result<Never, FabricError> {
    let what = |what| move |source| FabricError::Io { what, source };
    let epoll = Epoll::new().map_err(what("creating an epoll instance"))?;
    // Each signal is an event, so that nobody has to read the eventfd.
    let signalled = EventSet::IN | EventSet::EDGE_TRIGGERED;
    let event = lane.event().as_raw_fd();
    watch(&epoll, ControlOperation::Add, event, INTERRUPT, signalled)
        .map_err(what("watching a descriptor"))?;
    let mut watched: Option<EventSet> = None;
    let mut liveness = Liveness::new(Instant::now());
    let mut waiter = Waiter::new(polling);
    let mut events = [EpollEvent::default(); 2];
    let (mut more, mut looks) = (true, 0_u32);
    loop {
        let round = lane.round(more)?;
        more = round.more;
        if round.moved {
            waiter.found();
        }
        let looking = more || waiter.looks_again() || !lane.may_wait()?;
        more |= looking;
        looks = looks.wrapping_add(1);
        if looking && looks % LOOKS_PER_WAIT != 0 {
            continue;
        }
        let now = Instant::now();
        if liveness.look(now, &round.counters)? {
            lane.ping()?;
        }
        let wanted = interest(&round);
        if watched != Some(wanted) {
            let operation = match watched.replace(wanted) {
                None => ControlOperation::Add,
                Some(_) => ControlOperation::Modify,
            };
            let link = round.interest.descriptor;
            watch(&epoll, operation, link, LINK, wanted).map_err(what("watching the link"))?;
        }
        let left = liveness.due().saturating_duration_since(now);
        let timeout = if looking {
            0
        } else {
            left.as_millis() as i32 + 1
        };
        let ready = match epoll.wait(timeout, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            ready => ready.map_err(what("waiting for events"))?,
        };
        if !looking {
            waiter.slept(now.elapsed());
        }
        // What the function has completed is found in its queues.
        more |= events[..ready].iter().any(|event| event.data() == LINK);
    }
}

/// What to wait for on the link.
fn interest(round: &Round) -> EventSet {
    let mut wanted = EventSet::empty();
    if round.listens {
        wanted |= EventSet::IN;
    }
    if round.interest.writable {
        wanted |= EventSet::OUT;
    }
    wanted
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
