//! One virtqueue at work: requests are taken from the available ring, and answered through the
//! used ring.
//!
//! Each head of a descriptor chain has a place for its request, made when the ring starts, so
//! that nothing is allocated per request. A driver that uses a head twice, or makes a chain that
//! cannot be, breaks its own ring and nothing else.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use farbus_vfio::driver::DriverError;
use log::warn;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{self, BrokenChain, Part};
use super::drive::{BounceId, Done, Drive};
use super::inflight;
use super::memory::Guest;
use super::request::{self, NoStatus};
use super::work::{Context, Request, Submitted};

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
}

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
        }
    }

    /// Requests that are not answered.
    pub fn outstanding(&self) -> usize {
        self.outstanding
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
        for head in heads {
            if let Err(error) = self.start(*head, context) {
                return self.break_down(&error);
            }
        }
    }

    /// Takes new requests; whether there may be more. The guest need not kick from now on.
    pub fn take(&mut self, context: &Context<'_>) -> bool {
        if self.broken {
            return false;
        }
        self.take_some(context).unwrap_or_else(|error| {
            self.break_down(&error);
            false
        })
    }

    /// Has the guest kick when it has something, before this process sleeps. Whether it has
    /// something already.
    pub fn arm(&mut self, guest: &Guest) -> bool {
        if self.broken || std::mem::replace(&mut self.armed, true) {
            return false;
        }
        let more = self.queue.enable_notification(guest);
        self.armed = matches!(more, Ok(false));
        more.map_err(BrokenRing::Ring).unwrap_or_else(|error| {
            self.break_down(&error);
            false
        })
    }

    fn take_some(&mut self, context: &Context<'_>) -> Result<bool, BrokenRing> {
        let guest = context.guest;
        if std::mem::take(&mut self.armed) {
            self.queue.disable_notification(guest)?;
        }
        let mut unread = false;
        // A driver that is faster than this loop has its next turn later.
        for _ in 0..self.requests.len() {
            let next = self
                .queue
                .iter(guest)?
                .next()
                .map(|chain| chain.head_index());
            let Some(head) = next else {
                let available = self.queue.avail_idx(guest, Ordering::Acquire)?.0;
                if available == self.queue.next_avail() {
                    return Ok(false);
                }
                // It came just now; had it been there before, it could not be read.
                if std::mem::replace(&mut unread, true) {
                    return Err(BrokenRing::Unreadable);
                }
                continue;
            };
            unread = false;
            if let Some(inflight) = &mut self.inflight {
                inflight.begin(head);
            }
            self.start(head, context)?;
        }
        Ok(true)
    }

    fn start(&mut self, head: u16, context: &Context<'_>) -> Result<(), BrokenRing> {
        let request = self
            .requests
            .get_mut(usize::from(head))
            .filter(|request| !request.active)
            .ok_or(BrokenRing::Head(head))?;
        let (table, size) = (self.queue.desc_table(), self.queue.size());
        chain::walk(context.guest, table, size, head, &mut self.parts)
            .map_err(|why| BrokenRing::Chain { head, why })?;
        request.parsed = request::parse(context.guest, &self.parts, &mut request.segments)
            .map_err(|why| BrokenRing::NoStatus { head, why })?;
        request.begin(context);
        self.outstanding += 1;
        if request.is_finished() {
            return self.finish(head, context.guest);
        }
        self.backlog.push_back(head);
        Ok(())
    }

    /// Submits commands while there is room; whether any were.
    pub fn advance(
        &mut self,
        context: &Context<'_>,
        drive: &mut Drive,
    ) -> Result<bool, DriverError> {
        let mut any = false;
        while let Some(&head) = self.backlog.front() {
            let Some(request) = self.requests.get_mut(usize::from(head)) else {
                self.backlog.pop_front();
                continue;
            };
            while drive.has_room(self.index) {
                let token = |bounced| token(self.index, head, bounced);
                match request.submit(self.index, context, drive, token)? {
                    Submitted::Yes => any = true,
                    Submitted::Wait | Submitted::Nothing => break,
                }
            }
            if !request.is_submitted() {
                break;
            }
            self.backlog.pop_front();
            if request.is_finished() {
                self.finish_or_break(head, context.guest);
            }
        }
        Ok(any)
    }

    /// A command of request `head` is done.
    pub fn completed(
        &mut self,
        head: u16,
        bounced: bool,
        done: &Done,
        guest: &Guest,
        drive: &mut Drive,
    ) -> Result<(), DriverError> {
        let Some(request) = self.requests.get_mut(usize::from(head)) else {
            return Ok(());
        };
        request.completed(done, bounced, guest, drive)?;
        // One that has failed early is still in the backlog, which answers it.
        if request.is_finished() && !self.backlog.contains(&head) {
            self.finish_or_break(head, guest);
        }
        Ok(())
    }

    fn finish_or_break(&mut self, head: u16, guest: &Guest) {
        if let Err(error) = self.finish(head, guest) {
            self.break_down(&error);
        }
    }

    fn finish(&mut self, head: u16, guest: &Guest) -> Result<(), BrokenRing> {
        let Some(request) = self.requests.get_mut(usize::from(head)) else {
            return Ok(());
        };
        request.active = false;
        self.outstanding = self.outstanding.saturating_sub(1);
        // Memory that was taken away since takes no status; the used ring says the rest.
        let _ = guest.write_obj(request.status, GuestAddress(request.parsed.status));
        let written = request.written().saturating_add(1);
        if let Some(inflight) = &self.inflight {
            inflight.publish(head);
        }
        self.queue.add_used(guest, head, written)?;
        if let Some(inflight) = &self.inflight {
            inflight.finish(head, self.queue.next_used());
        }
        self.untold = true;
        Ok(())
    }

    /// Whether the guest is to be told of answers now.
    pub fn is_to_be_told(&mut self, guest: &Guest) -> bool {
        std::mem::take(&mut self.untold) && self.queue.needs_notification(guest).unwrap_or(false)
    }

    /// The drive has been reset under the requests: they begin anew.
    pub fn restart(&mut self, context: &Context<'_>) {
        self.backlog.clear();
        for (head, request) in (0u16..).zip(&mut self.requests) {
            if request.active {
                request.begin(context);
                self.backlog.push_back(head);
            }
        }
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
