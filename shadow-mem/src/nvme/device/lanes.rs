//! Lane 0's dealings with the other lanes of a claim.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use farbus_fabric::wire::{CompleteEntry, LanePlace, QueueId};
use farbus_fabric::{Counters, FabricError};
use farbus_vfio::InterruptKind;
use farbus_vfio::nvme::Status;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::description::MAX_QUEUE_PAIRS;
use super::super::share;
use super::lane::{Bell, Lane};
use super::queues::Io;
use super::{DeviceError, DeviceHalf};
use crate::session::Session;

/// The other lanes, as lane 0 has them.
pub(super) struct Lanes {
    others: Vec<Arc<Lane>>,
    bell: Arc<Bell>,
    /// The lane of each submission queue.
    of_submission: Vec<u16>,
}

impl Lanes {
    /// No others. `event` wakes lane 0's thread.
    pub(super) fn none(event: Arc<EventFd>) -> Self {
        Self {
            others: Vec::new(),
            bell: Arc::new(Bell {
                event,
                rung: AtomicBool::new(false),
            }),
            of_submission: vec![0; usize::from(MAX_QUEUE_PAIRS) + 1],
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.others.is_empty()
    }

    /// Commands that they gave to the device.
    pub(super) fn commands(&self) -> u64 {
        let of = |lane: &Arc<Lane>| lane.with(|half| half.io.commands).unwrap_or_default();
        self.others.iter().map(of).sum()
    }

    fn count(&self) -> u16 {
        self.others.len() as u16 + 1
    }

    /// The lane that a completion queue belongs to.
    pub(super) fn lane_of_cq(&self, queue: u16) -> u16 {
        share::lane_of(queue, self.count())
    }

    /// One of the others; none is lane 0 itself.
    fn get(&self, lane: u16) -> Option<&Arc<Lane>> {
        self.others.get(usize::from(lane.checked_sub(1)?))
    }

    fn of_sq(&self, queue: u16) -> Option<&Arc<Lane>> {
        self.get(*self.of_submission.get(usize::from(queue))?)
    }
}

impl DeviceHalf {
    /// What the links of the other lanes have carried.
    pub fn carried_by_lanes(&self) -> Counters {
        let mut sum = Counters::default();
        for lane in &self.lanes.others {
            let carried = lane.carried();
            sum.bytes_received += carried.bytes_received;
            sum.bytes_sent += carried.bytes_sent;
        }
        sum
    }

    /// How many lanes the claim can have, if so many are wanted: each needs a queue, an interrupt
    /// and its share of tags and buffer shadow. A claim that is held to limits has one lane, which
    /// counts what it uses, and so has one of a function that wants one thread.
    pub fn possible_lanes(&self, wanted: u16) -> u16 {
        if self.io.rate.is_limited() || self.function.wants_one_thread() {
            return 1;
        }
        let limits = &self.limits;
        let most = wanted
            .min(LanePlace::MAX)
            .min(self.description.queue_pairs)
            .min(self.vectors.try_into().unwrap_or(u16::MAX));
        let max_transfer = self.description.max_transfer;
        let suffices =
            |lanes: &u16| share::suffices(*lanes, limits.tags, limits.shadow_len, max_transfer);
        (2..=most).rev().find(suffices).unwrap_or(1)
    }

    /// Divides the claim among so many lanes, of which this half keeps the first; returns the
    /// others. To be called before the claim is served.
    pub fn divide(&mut self, lanes: u16) -> Result<Vec<Arc<Lane>>, DeviceError> {
        if lanes <= 1 {
            return Ok(Vec::new());
        }
        let at = |lane| LanePlace { lane, lanes };
        let mut events = vec![self.event.clone()];
        for lane in 1..lanes {
            let event = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(DeviceError::Memory)?);
            let io = self.io.share(at(lane), &self.limits);
            let bell = self.lanes.bell.clone();
            self.lanes
                .others
                .push(Arc::new(Lane::new(io, event.clone(), bell)));
            events.push(event);
        }
        self.io = self.io.share(at(0), &self.limits);
        let all: Vec<_> = (0..self.vectors as usize)
            .map(|vector| Some(events[vector % events.len()].clone()))
            .collect();
        let kind = match self.function.info().interrupts.msix {
            0 => InterruptKind::Msi,
            _ => InterruptKind::Msix,
        };
        self.function.set_interrupts(kind, 0, &all)?;
        Ok(self.lanes.others.clone())
    }

    /// Does something to the lane that has a completion queue, or would have it.
    pub(super) fn with_cq<R>(&mut self, queue: u16, act: impl FnOnce(&mut Io) -> R) -> Option<R> {
        match self.lanes.get(self.lanes.lane_of_cq(queue)) {
            None => Some(act(&mut self.io)),
            Some(lane) => lane.with(|half| act(&mut half.io)),
        }
    }

    /// Does something to the lane that has a submission queue.
    pub(super) fn with_sq<R>(&mut self, queue: u16, act: impl FnOnce(&mut Io) -> R) -> Option<R> {
        match self.lanes.of_sq(queue) {
            None => Some(act(&mut self.io)),
            Some(lane) => lane.with(|half| act(&mut half.io)),
        }
    }

    /// Notes where a submission queue is: where its completion queue is.
    pub(super) fn place_sq(&mut self, queue: u16, completion_queue: u16) {
        let lane = self.lanes.lane_of_cq(completion_queue);
        if let Some(place) = self.lanes.of_submission.get_mut(usize::from(queue)) {
            *place = lane;
        }
    }

    /// A submission queue is gone: what it has completed counts, and must not be found later under
    /// a tag that is in use again. A device need not complete what it dropped (NVMe 1.4 §5.6); the
    /// guest's driver and the compute half wait for it all the same.
    pub(super) fn end_sq(&mut self, id: u16, session: &mut Session) -> Result<(), FabricError> {
        if let Some(lane) = self.lanes.of_sq(id) {
            lane.with_session(|io, session| io.end_sq(id, session));
            return Ok(());
        }
        self.io.end_sq(id, session)
    }

    /// The controller has started or stopped; when it has stopped, nothing is at the device.
    pub(super) fn tell_lanes(&mut self, on: bool) {
        for lane in &self.lanes.others {
            lane.with(|half| {
                half.on = on;
                if !on {
                    half.forget_commands();
                }
            });
        }
    }

    /// The controller has failed: it gets nothing more.
    pub(super) fn halt_lanes(&mut self) {
        for lane in &self.lanes.others {
            lane.with(|half| half.on = false);
        }
    }

    /// Hears what other lanes have to say. The end of one is the end of all.
    pub(super) fn hear_lanes(&mut self) -> Result<(), FabricError> {
        let rung = &self.lanes.bell.rung;
        if !rung.load(Ordering::Relaxed) || !rung.swap(false, Ordering::Acquire) {
            return Ok(());
        }
        let mut failed = None;
        for lane in &self.lanes.others {
            if let Some(error) = lane.take_lost() {
                return Err(error);
            }
            failed = failed.or(lane.with(|half| half.io.failed.take()).flatten());
        }
        if let Some(error) = failed {
            let update = self.controller.failed(&error);
            self.report(update);
        }
        Ok(())
    }

    /// No lane does anything to the device from here on.
    pub(super) fn close_lanes(&mut self) {
        for lane in &self.lanes.others {
            lane.close();
        }
    }
}

impl Io {
    fn end_sq(&mut self, id: u16, session: &mut Session) -> Result<(), FabricError> {
        if let Some(sq) = self.submission.get(id) {
            self.drain(sq.completion_queue, true, session)?;
        }
        while let Some(tag) = self.tags.take_of_queue(id) {
            let entry = CompleteEntry {
                tag,
                queue: QueueId(id),
                status: Status::ABORTED_SQ_DELETION.0,
                data_len: 0,
                result: 0,
            };
            self.append(&entry, 0, 0, session)?;
        }
        self.rate.forget_queue(id);
        self.submission.remove(id);
        Ok(())
    }
}
