//! A virtqueue as the VMM sets it up, message by message, before it is at work.

#![forbid(unsafe_code)]

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::inflight::Inflight;
use super::memory::{Guest, Memory};
use super::notifier::Notifier;
use super::ring::Ring;
use super::work::Context;

/// Where the parts of a queue are in the VMM's own memory.
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
    /// Puts the ring to work, where the former backend or the former run has left it.
    pub fn start(
        &mut self,
        index: u16,
        event_idx: bool,
        memory: &Memory,
        inflight: Option<&Inflight>,
        context: &Context<'_>,
    ) -> Result<(), BadVring> {
        let guest = memory.guest();
        let mut queue = self.queue(memory)?;
        queue.set_event_idx(event_idx);
        let used = queue
            .used_idx(guest, std::sync::atomic::Ordering::Acquire)
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
        Ok(())
    }

    fn queue(&self, memory: &Memory) -> Result<Queue, BadVring> {
        let bad = || BadVring::Size(self.size);
        let mut queue = Queue::new(self.size).map_err(|_| bad())?;
        let place = |user| {
            let address = memory.address_of(user).ok_or(BadVring::Place);
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
        if !queue.is_valid(memory.guest()) {
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

    /// Requests that are not answered.
    pub fn outstanding(&self) -> usize {
        self.ring.as_ref().map_or(0, Ring::outstanding)
    }

    /// Tells whoever is to be told of what has happened.
    pub fn tell(&mut self, guest: &Guest) {
        let Some(ring) = &mut self.ring else {
            return;
        };
        let wanted = ring.is_to_be_told(guest);
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
