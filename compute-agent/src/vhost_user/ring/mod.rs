//! One virtqueue at work: requests are taken from the available ring, and answered through the
//! used ring.
//!
//! Each head of a descriptor chain has a place for its request, made when the ring starts, so
//! that nothing is allocated per request. A driver that uses a head twice, or makes a chain that
//! cannot be, breaks its own ring and nothing else.

#![forbid(unsafe_code)]

mod answers;

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use log::warn;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, Permissions};

use super::chain::{self, BrokenChain, Part};
use super::drive::{BOUNCE, BounceId};
use super::inflight;
use super::request::{self, NoStatus};
use super::space::{Found, Space};
use super::vring;
use super::work::{Context, Request};

/// Requests that are looked at while the one before them waits for the VMM.
const AHEAD: u16 = 32;

/// A ring that cannot go on. The guest has to reset its device.
#[derive(Debug, thiserror::Error)]
pub enum BrokenRing {
    /// A descriptor chain that cannot be.
    #[error("chain {head}: {why}")]
    Chain {
        /// Its head.
        head: u16,
        /// What is wrong with it.
        why: BrokenChain,
    },
    /// A chain that cannot be answered.
    #[error("chain {head}: {why}")]
    NoStatus {
        /// Its head.
        head: u16,
        /// What is wrong with it.
        why: NoStatus,
    },
    /// A head that the ring does not have, or that is in use.
    #[error("head {0} does not exist, or is in use")]
    Head(u16),
    /// The rings themselves.
    #[error("the rings are not where they should be, or make no sense ({0})")]
    Ring(#[from] virtio_queue::Error),
    /// The available ring cannot be read.
    #[error("the available ring cannot be read")]
    Unreadable,
    /// The guest's IOMMU does not let the device use the rings.
    #[error("the rings are not mapped for the device")]
    NotMapped,
}

/// Why the next request is not taken.
enum Stop {
    /// The VMM has to say first where something is.
    Missing,
    /// The ring cannot go on.
    Broken(BrokenRing),
}

impl<E: Into<BrokenRing>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Broken(error.into())
    }
}

/// Does something in the space that the driver's addresses are of.
macro_rules! in_space {
    ($context:expr, $space:ident => $done:expr) => {
        match &$context.behind {
            None => {
                let $space = $context.guest;
                $done
            }
            Some($space) => $done,
        }
    };
}
pub(super) use in_space;

/// A virtqueue at work.
pub struct Ring {
    index: u16,
    queue: Queue,
    requests: Vec<Request>,
    /// Heads of requests with commands still to be submitted, in order.
    backlog: VecDeque<u16>,
    inflight: Option<inflight::Queue>,
    outstanding: usize,
    parts: Vec<Part>,
    broken: bool,
    /// The guest kicks when it has something.
    armed: bool,
    /// Answers that the guest was not told of.
    untold: bool,
    /// Commands at the drive.
    at_drive: usize,
    /// What a former backend left, and was not taken up yet.
    left: VecDeque<u16>,
    /// Requests whose commands are done, and that wait for the place of their data or answer.
    parked: VecDeque<u16>,
    /// Something is missing that the VMM has to say first.
    waits: bool,
    /// The rings are mapped, as of this generation of translations.
    mapped: Option<u64>,
}

impl Ring {
    /// A ring that goes on where `queue` says. `inflight` is its record of requests under way.
    pub fn new(index: u16, queue: Queue, inflight: Option<inflight::Queue>) -> Self {
        let size = usize::from(queue.size());
        Self {
            index,
            requests: (0..size).map(|_| Request::vacant()).collect(),
            backlog: VecDeque::with_capacity(size),
            queue,
            inflight,
            outstanding: 0,
            parts: Vec::with_capacity(chain::MAX_PARTS),
            broken: false,
            armed: true,
            untold: false,
            at_drive: 0,
            left: VecDeque::new(),
            parked: VecDeque::with_capacity(size),
            waits: false,
            mapped: None,
        }
    }

    /// Whether it can be taken from work: all is answered, or what is not waits for the VMM, which
    /// may be waiting for this. That is in the inflight record. With `news` the VMM has said something
    /// since the last look.
    pub fn can_stop(&self, news: bool) -> bool {
        self.outstanding == 0 || (self.waits && !news && self.at_drive == 0)
    }

    /// Whether something is missing that the VMM has to say first.
    pub fn waits(&self) -> bool {
        self.waits
    }

    /// Whether the guest kicks when it has something.
    pub fn is_armed(&self) -> bool {
        self.armed
    }

    /// Something may be found that was missing.
    pub fn look_again(&mut self) {
        self.waits = false;
    }

    /// Where the next request is taken from.
    pub fn next_available(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Whether it has come to a stop by the guest's own doing.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The bounce buffers that its requests hold.
    pub fn bounces(&self) -> impl Iterator<Item = BounceId> + '_ {
        self.requests.iter().filter_map(Request::bounce)
    }

    fn break_down(&mut self, error: &BrokenRing) {
        if !self.broken {
            warn!("virtqueue {} is broken by its driver: {error}", self.index);
            self.broken = true;
        }
    }

    /// Takes up what a former backend left, in order.
    pub fn take_up(&mut self, heads: &[u16], context: &Context<'_>) {
        self.left.extend(heads);
        let taken = in_space!(context, space => self.take_left(space, context));
        self.unless_stopped(taken);
    }

    /// Takes new requests; whether there may be more. The guest need not kick from now on.
    pub fn take(&mut self, context: &Context<'_>) -> bool {
        if self.broken || self.waits {
            return false;
        }
        let taken = in_space!(context, space => self.take_some(space, context));
        self.unless_stopped(taken)
    }

    /// What there is to do, unless that cannot go on.
    fn unless_stopped(&mut self, more: Result<bool, Stop>) -> bool {
        match more {
            Ok(more) => more,
            Err(Stop::Missing) => {
                self.waits = true;
                false
            }
            Err(Stop::Broken(error)) => {
                self.break_down(&error);
                false
            }
        }
    }

    /// Has the guest kick when it has something, before this process sleeps. Whether it has
    /// something already.
    pub fn arm(&mut self, context: &Context<'_>) -> bool {
        if self.broken || self.waits || self.armed {
            return false;
        }
        let more = in_space!(context, space => self.arm_in(space));
        self.armed = matches!(more, Ok(false));
        self.unless_stopped(more)
    }

    fn arm_in<S: Space>(&mut self, space: &S) -> Result<bool, Stop> {
        self.need_rings(space)?;
        Ok(self.queue.enable_notification(space)?)
    }

    /// Whether the rings are mapped for the device.
    fn need_rings<S: Space>(&mut self, space: &S) -> Result<(), Stop> {
        let now = Some(space.generation());
        if S::IS_GUESTS || self.mapped == now {
            return Ok(());
        }
        match vring::find(space, &self.queue) {
            Found::Here => self.mapped = now,
            Found::Missing => return Err(Stop::Missing),
            Found::Refused => return Err(BrokenRing::NotMapped.into()),
        }
        Ok(())
    }

    fn take_left<S: Space>(&mut self, space: &S, context: &Context<'_>) -> Result<bool, Stop> {
        while let Some(head) = self.left.front() {
            self.start(*head, false, space, context)?;
            self.left.pop_front();
        }
        Ok(true)
    }

    fn take_some<S: Space>(&mut self, space: &S, context: &Context<'_>) -> Result<bool, Stop> {
        self.need_rings(space)?;
        self.take_left(space, context)?;
        if std::mem::take(&mut self.armed) {
            self.queue.disable_notification(space)?;
        }
        let mut unread = false;
        // A driver that is faster than this loop has its next turn later.
        for _ in 0..self.requests.len() {
            let next = self
                .queue
                .iter(space)?
                .next()
                .map(|chain| chain.head_index());
            let Some(head) = next else {
                let available = self.queue.avail_idx(space, Ordering::Acquire)?.0;
                if available == self.queue.next_avail() {
                    return Ok(false);
                }
                // It came just now; had it been there before, it could not be read.
                if std::mem::replace(&mut unread, true) {
                    return Err(BrokenRing::Unreadable.into());
                }
                continue;
            };
            unread = false;
            let started = self.start(head, true, space, context);
            if let Err(Stop::Missing) = started {
                // Not taken: it can be left there when the queue has to stop.
                let next = self.queue.next_avail().wrapping_sub(1);
                self.queue.set_next_avail(next);
                self.ask_ahead(space);
            }
            started?;
        }
        Ok(true)
    }

    /// Starts a request. It is new, or a former backend has left it.
    fn start<S: Space>(
        &mut self,
        head: u16,
        is_new: bool,
        space: &S,
        context: &Context<'_>,
    ) -> Result<(), Stop> {
        let request = self
            .requests
            .get_mut(usize::from(head))
            .filter(|request| !request.active)
            .ok_or(BrokenRing::Head(head))?;
        let (table, size) = (self.queue.desc_table(), self.queue.size());
        let _ = space.missed();
        let walked = chain::walk(space, table, size, head, &mut self.parts);
        if space.missed() {
            return Err(Stop::Missing);
        }
        walked.map_err(|why| BrokenRing::Chain { head, why })?;
        if !S::IS_GUESTS {
            ask_for(space, &self.parts);
        }
        let parsed = request::parse(space, &self.parts, &mut request.segments);
        if space.missed() {
            return Err(Stop::Missing);
        }
        let nobody = |why| BrokenRing::NoStatus { head, why };
        request.parsed = parsed.map_err(nobody)?;
        if !S::IS_GUESTS {
            match space.find(request.parsed.status, 1, Permissions::Write) {
                Found::Here => {}
                Found::Missing => return Err(Stop::Missing),
                Found::Refused => return Err(nobody(NoStatus).into()),
            }
            if request.finds_its_own(space) == Found::Missing {
                return Err(Stop::Missing);
            }
        }
        if let (true, Some(inflight)) = (is_new, &mut self.inflight) {
            inflight.begin(head);
        }
        request.begin(space, context);
        self.outstanding += 1;
        if request.is_finished() {
            return Ok(self.finish(head, space)?);
        }
        self.backlog.push_back(head);
        Ok(())
    }

    /// Asks for what the next requests need while the first one waits.
    fn ask_ahead<S: Space>(&mut self, space: &S) {
        let (table, size) = (self.queue.desc_table(), self.queue.size());
        let Ok(available) = self.queue.avail_idx(space, Ordering::Acquire) else {
            return;
        };
        let next = self.queue.next_avail();
        for n in 1..available.0.wrapping_sub(next).min(AHEAD) {
            let at = u64::from(next.wrapping_add(n) % size);
            let at = self.queue.avail_ring().saturating_add(4 + at * 2);
            let Ok(head) = space.load::<u16>(GuestAddress(at), Ordering::Acquire) else {
                return;
            };
            if chain::walk(space, table, size, u16::from_le(head), &mut self.parts).is_ok() {
                ask_for(space, &self.parts);
            }
        }
    }
}

/// Asks for all that is missing of a chain, or of the first part of each of its buffers.
fn ask_for<S: Space>(space: &S, parts: &[Part]) {
    for part in parts {
        let access = if part.writable {
            Permissions::Write
        } else {
            Permissions::Read
        };
        space.find(part.address, part.len.min(BOUNCE).into(), access);
    }
}

/// What tells a command's completion where it belongs.
fn token(ring: u16, head: u16, bounced: bool) -> u64 {
    u64::from(ring) | u64::from(head) << 16 | u64::from(bounced) << 32
}

/// Ring, head, and whether a bounce buffer was used.
pub fn of_token(token: u64) -> (u16, u16, bool) {
    (token as u16, (token >> 16) as u16, token >> 32 & 1 == 1)
}
