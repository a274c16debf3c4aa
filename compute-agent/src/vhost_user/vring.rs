//! A virtqueue as the VMM sets it up, message by message, before it is at work.

#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, Permissions};

use super::inflight::Inflight;
use super::memory::Memory;
use super::notifier::Notifier;
use super::ring::{Ring, in_space};
use super::space::{Found, Space};
use super::work::Context;

/// Where the parts of a queue are: in the VMM's own memory, or, behind an IOMMU, as the driver names
/// them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
}

/// A queue that cannot be started as the VMM has set it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadVring {
    /// Its size is not possible.
    #[error("a size of {0} is not possible")]
    Size(u16),
    /// A part of it is not in the guest's memory.
    #[error("a part of it is not in the guest's memory, or is misaligned")]
    Place,
    /// There is an IOMMU that nobody can be asked about.
    #[error(
        "its driver is behind an IOMMU, and the VMM has given no channel to ask where memory is, \
         or does not acknowledge requests"
    )]
    NobodyToAsk,
}

/// Whether all parts of a queue can be used. All that is missing is asked for.
pub(super) fn find<S: Space>(space: &S, queue: &Queue) -> Found {
    let size = u64::from(queue.size());
    // Virtio 1.2 §2.7: with the index of the other side at the end of each ring.
    let parts = [
        (queue.desc_table(), 16 * size, Permissions::Read),
        (queue.avail_ring(), 6 + 2 * size, Permissions::Read),
        (queue.used_ring(), 6 + 8 * size, Permissions::ReadWrite),
    ];
    let found = parts.map(|(address, len, access)| space.find(address, len, access));
    if found.contains(&Found::Refused) {
        Found::Refused
    } else if found.contains(&Found::Missing) {
        Found::Missing
    } else {
        Found::Here
    }
}

/// See the module's own description.
#[derive(Default)]
pub struct Vring {
    /// Number of entries.
    pub size: u16,
    /// Where it is, once the VMM has said so.
    pub addresses: Option<Addresses>,
    /// Where it begins, or has stopped.
    pub base: u16,
    /// By what the guest tells of new requests; without it, the ring is looked at in every turn.
    pub kick: Option<Notifier>,
    /// By what the guest is told of answers.
    pub call: Option<Notifier>,
    /// By what the VMM is told of a broken ring.
    pub error: Option<Notifier>,
    /// As the VMM says.
    pub enabled: bool,
    /// The VMM wants it to run.
    pub started: bool,
    /// At work.
    pub ring: Option<Ring>,
    /// The VMM waits for it to stop: nothing new is taken.
    pub draining: bool,
    /// There may be new requests.
    pub kicked: bool,
    /// The guest is told whether it wants to know or not: of what was answered by a former backend,
    /// which was killed before it told, or by this one, while there was nothing to tell by. The
    /// guest would not ask again.
    pub tells_anyway: bool,
    /// The VMM was told that it is broken.
    pub told_broken: bool,
}

impl Vring {
    /// Puts the ring to work, where the former backend or the former run has left it; whether that
    /// was possible yet.
    pub fn start(
        &mut self,
        index: u16,
        event_idx: bool,
        memory: &Memory,
        inflight: Option<&Inflight>,
        context: &Context<'_>,
    ) -> Result<bool, BadVring> {
        let mut queue = self.queue(memory, context)?;
        queue.set_event_idx(event_idx);
        match in_space!(context, space => find(space, &queue)) {
            Found::Here => {}
            Found::Missing => return Ok(false),
            Found::Refused => return Err(BadVring::Place),
        }
        let used = in_space!(context, space => queue.used_idx(space, Ordering::Acquire))
            .map_err(|_| BadVring::Place)?
            .0;
        queue.set_next_used(used);
        queue.set_next_avail(self.base);
        let (record, left) = inflight
            .and_then(|inflight| inflight.queue(index, self.size, used))
            .unzip();
        let heads = left.map(|left| left.heads).unwrap_or_default();
        if record.is_some() {
            // What was taken is what was answered and what is under way.
            queue.set_next_avail(used.wrapping_add(heads.len() as u16));
        }
        let mut ring = Ring::new(index, queue, record);
        ring.take_up(&heads, context);
        self.ring = Some(ring);
        self.kicked = true;
        (self.tells_anyway, self.told_broken) = (true, false);
        Ok(true)
    }

    fn queue(&self, memory: &Memory, context: &Context<'_>) -> Result<Queue, BadVring> {
        let bad = || BadVring::Size(self.size);
        let mut queue = Queue::new(self.size).map_err(|_| bad())?;
        let place = |address| {
            if context.behind.is_some() {
                return Ok(GuestAddress(address));
            }
            let address = memory.address_of(address).ok_or(BadVring::Place);
            address.map(GuestAddress)
        };
        let addresses = self.addresses.ok_or(BadVring::Place)?;
        queue.try_set_size(self.size).map_err(|_| bad())?;
        let misplaced = |_| BadVring::Place;
        queue
            .try_set_desc_table_address(place(addresses.descriptors)?)
            .map_err(misplaced)?;
        queue
            .try_set_avail_ring_address(place(addresses.available)?)
            .map_err(misplaced)?;
        queue
            .try_set_used_ring_address(place(addresses.used)?)
            .map_err(misplaced)?;
        queue.set_ready(true);
        if !in_space!(context, space => queue.is_valid(space)) {
            return Err(BadVring::Place);
        }
        Ok(queue)
    }

    /// Takes it from work; where it would go on.
    pub fn stop(&mut self) -> u16 {
        if let Some(ring) = self.ring.take() {
            self.base = ring.next_available();
        }
        (self.started, self.draining, self.kicked) = (false, false, false);
        self.base
    }

    /// The VMM has said something of what was missing.
    pub fn look_again(&mut self) {
        if let Some(ring) = self.ring.as_mut().filter(|ring| ring.waits()) {
            ring.look_again();
            self.kicked = true;
        }
    }

    /// Whether it can be taken from work.
    pub fn can_stop(&self, news: bool) -> bool {
        self.ring.as_ref().is_none_or(|ring| ring.can_stop(news))
    }

    /// Tells whoever is to be told of what has happened.
    pub fn tell(&mut self, context: &Context<'_>) {
        let Some(ring) = &mut self.ring else {
            return;
        };
        let wanted = ring.is_to_be_told(context);
        if let (true, Some(call)) = (wanted || self.tells_anyway, &self.call) {
            call.signal();
            self.tells_anyway = false;
        }
        if ring.is_broken() && !std::mem::replace(&mut self.told_broken, true) {
            if let Some(error) = &self.error {
                error.signal();
            }
        }
    }
}
