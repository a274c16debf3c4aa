//! Lane 0's dealings with the other lanes of its attachment: queues are made and removed there,
//! what the guest does to the whole controller happens to all of them, and what becomes of one
//! is the matter of all.
//!
//! Each lane has a [`ComputeHalf`] of its own, which knows no admin queue and does as lane 0 says:
//! whether it takes commands, and when what it had is void. So that nothing of before a reset
//! comes after it on another connection, each lane is *fenced* before the controller goes on: once
//! the device is off, it asks for a reset of the lane, and has the answer when all that came before
//! has come.
//!
//! Locks are taken from lane 0 to the others, never the other way: a lane that has something to
//! say rings the [`Bell`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use farbus_fabric::wire::{LanePlace, Tag};
use farbus_fabric::{Counters, FabricError, Link};
use farbus_vfio::nvme::{Status, csts};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::description::MAX_QUEUE_PAIRS;
use super::super::share;
use super::lane::Lane;
use super::lifecycle::{Device, Phase};
use super::replay::Replay;
use super::{ComputeHalf, Outstanding};
use crate::session::Session;

/// How lanes make themselves heard by lane 0's thread.
pub(super) struct Bell {
    event: EventFd,
    rung: AtomicBool,
}

impl Bell {
    pub(super) fn ring(&self) {
        self.rung.store(true, Ordering::Release);
        // A counter that is full has a signal waiting already.
        let _ = self.event.write(1);
    }

    fn was_rung(&self) -> bool {
        self.rung.load(Ordering::Relaxed) && self.rung.swap(false, Ordering::Acquire)
    }
}

/// What lane 0 says of the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Told {
    /// The guest sees it ready.
    ready: bool,
    /// It takes commands.
    runs: bool,
}

/// A deletion of a submission queue that the device has done, while completions of the queue are
/// still on their way in its lane.
struct Deletion {
    tag: Tag,
    queue: u16,
    status: Status,
    result: u64,
}

/// The other lanes, as lane 0 has them.
pub(super) struct Lanes {
    others: Vec<Arc<Lane>>,
    bell: Arc<Bell>,
    /// The lane of each submission queue.
    of_submission: Vec<u16>,
    told: Option<Told>,
    /// The device is off, and not all lanes are fenced.
    pub(super) fencing: bool,
    deletions: Vec<Deletion>,
}

impl Lanes {
    /// No others.
    pub(super) fn none() -> std::io::Result<Self> {
        Ok(Self {
            others: Vec::new(),
            bell: Arc::new(Bell {
                event: EventFd::new(EFD_NONBLOCK)?,
                rung: AtomicBool::new(false),
            }),
            of_submission: vec![0; usize::from(MAX_QUEUE_PAIRS) + 1],
            told: None,
            fencing: false,
            deletions: Vec::new(),
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.others.is_empty()
    }

    fn lane_of_cq(&self, queue: u16) -> u16 {
        share::lane_of(queue, self.others.len() as u16 + 1)
    }

    fn lane_of_sq(&self, queue: u16) -> u16 {
        let lane = self.of_submission.get(usize::from(queue));
        lane.copied().unwrap_or_default()
    }

    /// One of the others; none is lane 0 itself.
    fn get(&self, lane: u16) -> Option<&Arc<Lane>> {
        self.others.get(usize::from(lane.checked_sub(1)?))
    }
}

impl ComputeHalf {
    /// Makes the other lanes of `place.lanes`. They are linked by [`Self::link_lanes`].
    pub(super) fn make_lanes(&mut self, tags: u16, vectors: u32) -> std::io::Result<()> {
        let lanes = self.place.lanes;
        for lane in 1..lanes {
            let place = LanePlace { lane, lanes };
            let description = self.description.clone();
            let half = ComputeHalf::at(place, description, self.shadow_len, tags, vectors)?;
            let lane = Lane::new(half, self.lanes.bell.clone())?;
            self.lanes.others.push(Arc::new(lane));
        }
        Ok(())
    }

    /// The other lanes, for the threads that serve them.
    pub fn lanes(&self) -> &[Arc<Lane>] {
        &self.lanes.others
    }

    /// Is signalled when another lane has something for [`Self::pump`]. Nobody needs to read it
    /// who takes each signal for an event (edge-triggered).
    pub fn lanes_event(&self) -> std::io::Result<EventFd> {
        self.lanes.bell.event.try_clone()
    }

    /// Gives each of the other lanes its link. Those of before are gone.
    pub fn link_lanes(&mut self, links: Vec<Box<dyn Link>>) -> Result<(), FabricError> {
        let looks = self.offers_shadow_doorbells;
        for (lane, link) in self.lanes.others.iter().zip(links) {
            let mut session = Session::new(link);
            for window in self.memory.windows() {
                session.register(window, window.iova.0)?;
            }
            if looks {
                session.keep_looking();
            }
            lane.link(session);
        }
        Ok(())
    }

    /// The other lanes give their links back, and end.
    pub fn end_lanes(&mut self) {
        for lane in &self.lanes.others {
            lane.end();
        }
    }

    /// The links of the other lanes may be looked at without a pause from here on.
    pub(super) fn lanes_keep_looking(&self) {
        for lane in &self.lanes.others {
            lane.keep_looking();
        }
    }

    /// Does something to the half of every other lane.
    pub(super) fn each_lane(&self, mut act: impl FnMut(&mut ComputeHalf)) {
        for lane in &self.lanes.others {
            act(&mut lane.lock().half);
        }
    }

    /// Does something to the half that has a completion queue, or would have it.
    pub(super) fn with_cq<R>(&mut self, queue: u16, act: impl FnOnce(&mut ComputeHalf) -> R) -> R {
        self.with_lane(self.lanes.lane_of_cq(queue), act)
    }

    /// Does something to the half that has a submission queue.
    pub(super) fn with_sq<R>(&mut self, queue: u16, act: impl FnOnce(&mut ComputeHalf) -> R) -> R {
        self.with_lane(self.lanes.lane_of_sq(queue), act)
    }

    fn with_lane<R>(&mut self, lane: u16, act: impl FnOnce(&mut ComputeHalf) -> R) -> R {
        match self.lanes.get(lane).cloned() {
            None => act(self),
            Some(lane) => act(&mut lane.lock().half),
        }
    }

    /// Notes where a submission queue is: where its completion queue is.
    pub(super) fn place_sq(&mut self, queue: u16, completion_queue: u16) {
        let lane = self.lanes.lane_of_cq(completion_queue);
        if let Some(place) = self.lanes.of_submission.get_mut(usize::from(queue)) {
            *place = lane;
        }
    }

    /// Has another lane's half take a doorbell of the guest's, if it is about a queue there.
    pub(super) fn forward_doorbell(&mut self, queue: u16, completion: bool, value: u32) -> bool {
        let lane = match completion {
            true => self.lanes.lane_of_cq(queue),
            false => self.lanes.lane_of_sq(queue),
        };
        let Some(lane) = self.lanes.get(lane) else {
            return false;
        };
        lane.doorbell(queue, completion, value);
        true
    }

    /// Whether the end of a submission queue must wait: until its lane has brought the completions
    /// that the device has sent before.
    pub(super) fn defers_deletion(
        &mut self,
        tag: Tag,
        queue: u16,
        status: Status,
        result: u64,
    ) -> bool {
        let Some(lane) = self.lanes.get(self.lanes.lane_of_sq(queue)) else {
            return false;
        };
        if !lane.awaits_commands_of(queue) {
            return false;
        }
        self.lanes.deletions.push(Deletion {
            tag,
            queue,
            status,
            result,
        });
        true
    }

    /// Whether a deletion waits under this tag: a device that completes it again breaks the
    /// protocol.
    pub(super) fn is_deferred(&self, tag: Tag) -> bool {
        self.lanes.deletions.iter().any(|wait| wait.tag == tag)
    }

    /// Hears what other lanes have to say. The loss of one's link is the loss of all.
    pub(super) fn hear_lanes(&mut self) -> Result<(), FabricError> {
        if !self.lanes.bell.was_rung() {
            return Ok(());
        }
        let mut fenced = true;
        for lane in &self.lanes.others {
            let mut state = lane.lock();
            if let Some(error) = state.take_lost() {
                return Err(error);
            }
            fenced &= state.half.life.is_quiet();
            if state.half.life.phase == Phase::Fatal && self.life.phase == Phase::Ready {
                self.life.phase = Phase::Fatal;
                self.registers.csts |= csts::CFS;
            }
        }
        if self.lanes.fencing && fenced {
            self.lanes.fencing = false;
            self.lanes_are_off();
        }
        self.finish_deletions();
        Ok(())
    }

    fn finish_deletions(&mut self) {
        let waiting = std::mem::take(&mut self.lanes.deletions);
        // Those with queues that are still waited for are watched again below.
        for lane in &self.lanes.others {
            lane.unwatch();
        }
        for wait in waiting {
            let Deletion {
                tag,
                queue,
                status,
                result,
            } = wait;
            if self.defers_deletion(tag, queue, status, result) {
                continue;
            }
            if let Some(sqe) = self.tags.get(tag).map(|command| command.sqe) {
                let result = self.settle(&sqe, status, result);
                self.complete(tag, status, result);
            }
        }
    }

    /// Says to the other lanes what has changed for them.
    pub(super) fn tell_lanes(&mut self) {
        let told = Told {
            ready: self.life.phase == Phase::Ready,
            runs: self.life.takes_commands() && self.replay.is_none(),
        };
        if self.lanes.told.replace(told) == Some(told) {
            return;
        }
        for lane in &self.lanes.others {
            lane.lock().half.follow(told);
            lane.wake();
        }
    }

    /// As another lane: does as lane 0 says.
    fn follow(&mut self, told: Told) {
        self.life.phase = match told.ready {
            true => Phase::Ready,
            false => Phase::Disabled,
        };
        if told.runs && self.life.device == Device::Off {
            self.life.device = Device::On;
            // What it had when the last link was lost comes first.
            self.replay = Some(Replay::of_commands());
        }
    }

    /// The guest has taken back what it asked for.
    pub(super) fn drop_lanes_commands(&mut self) {
        self.lanes.told = None;
        self.lanes.deletions.clear();
        self.each_lane(|half| {
            half.drop_commands();
            half.life.phase = Phase::Disabled;
        });
    }

    /// As [`ComputeHalf::reset`] of the whole: guest memory is the guest's again at once.
    pub(super) fn reset_lanes(&mut self) {
        for lane in &self.lanes.others {
            lane.reset();
        }
    }

    /// The device is off: what is still on its way in other lanes must have come before anything
    /// else begins.
    pub(super) fn fence_lanes(&mut self) {
        self.lanes.fencing = false;
        for lane in &self.lanes.others {
            let mut state = lane.lock();
            if state.half.life.device != Device::Off {
                state.half.life.ask_for_reset();
                self.lanes.fencing = true;
                lane.wake();
            }
        }
    }

    /// The claim is lost, and with it all links.
    pub(super) fn lanes_are_lost(&mut self) {
        self.lanes.told = None;
        self.lanes.deletions.clear();
        for lane in &self.lanes.others {
            lane.unlink();
        }
    }

    /// What other lanes hold.
    pub(super) fn outstanding_in_lanes(&self, mut sum: Outstanding) -> Outstanding {
        self.each_lane(|half| {
            let more = half.outstanding();
            sum.commands += more.commands;
            sum.shadow_pages += more.shadow_pages;
        });
        sum
    }

    /// What the links of the other lanes have carried.
    pub fn lane_counters(&self) -> Counters {
        let counters = self.lanes.others.iter().map(|lane| lane.counters());
        counters.fold(Counters::default(), Counters::plus)
    }
}
