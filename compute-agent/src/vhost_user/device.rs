//! The device that a VMM sees: its queues, its memory, its drive. What each message of the VMM does
//! to them is in `handler.rs`.
//!
//! Nothing here waits. What needs the drive goes on in [`Device::work`], which the event loop calls
//! whenever something may have happened.

#![forbid(unsafe_code)]

use std::sync::Arc;

use farbus_vfio::Function;
use farbus_vfio::driver::DriverError;
use log::{info, warn};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_ACCESS_PLATFORM;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use super::config::Options;
use super::drive::{BounceId, Done, Drive, Shape};
use super::inflight::Inflight;
use super::iommu::asks::{Ask, NotAsked};
use super::iommu::message::Said;
use super::iommu::view::Behind;
use super::iommu::{Counts, Iommu};
use super::memory::Memory;
use super::notifier::Notifier;
use super::ring::{Ring, of_token};
use super::vring::{BadVring, Vring};
use super::work::Context;

/// How often the queues are gone through before other work has its turn.
const ROUNDS: usize = 4;

/// A descriptor that the event loop is to watch, or to forget.
pub enum Change {
    /// The kick of this queue is new.
    New(u16),
    /// This one is no longer in use. It is open until the event loop has forgotten it.
    Gone(Notifier),
}

/// What came of [`Device::work`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Worked {
    /// There was something to do.
    pub any: bool,
    /// There may be more to do at once.
    pub more: bool,
    /// The configuration space has changed.
    pub changed: bool,
    /// There are questions for the VMM.
    pub asks: bool,
}

/// What requests are judged by: a borrow of some fields, so that others can be changed.
macro_rules! context {
    ($device:expr) => {{
        let flush = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE;
        let guest = $device.memory.guest();
        let is_behind = $device.acked >> VIRTIO_F_ACCESS_PLATFORM & 1 == 1;
        Context {
            guest,
            behind: is_behind.then(|| Behind::new(guest, &$device.iommu)),
            shape: &$device.shape,
            read_only: $device.options.read_only,
            // A driver that knows neither flushes nor modes counts on durable writes
            // (virtio 1.2 §5.2.6.2).
            write_through: !$device.writeback || $device.acked & flush == 0,
            serial: &$device.serial,
        }
    }};
}

/// See the module's own description.
pub struct Device {
    pub(super) options: Options,
    pub(super) serial: String,
    pub(super) shape: Shape,
    pub(super) drive: Option<Drive>,
    pub(super) memory: Memory,
    pub(super) iommu: Iommu,
    /// The VMM can be asked, and says when it has answered.
    pub(super) can_ask: bool,
    pub(super) lost: Arc<EventFd>,
    pub(super) peer: Option<u32>,
    pub(super) acked: u64,
    pub(super) protocol: u64,
    pub(super) writeback: bool,
    pub(super) vrings: Vec<Vring>,
    pub(super) inflight: Option<Inflight>,
    /// Commands of a client that is gone are at the drive: until they are done, nothing of the
    /// next client's begins, so that what was left half done is not done after its repetition.
    pub(super) fenced: bool,
    pub(super) stale_bounces: Vec<BounceId>,
    pub(super) changes: Vec<Change>,
    /// What the drive has done.
    pub(super) done: Vec<Done>,
}

impl Device {
    /// A device in front of a drive. `lost` is signalled when a VMM truncates memory under it.
    pub fn new(
        function: Arc<dyn Function>,
        drive: Drive,
        options: Options,
        lost: Arc<EventFd>,
    ) -> Self {
        let shape = drive.shape().clone();
        let serial = options.serial.clone().unwrap_or(shape.serial.clone());
        Self {
            vrings: (0..options.num_queues).map(|_| Vring::default()).collect(),
            options,
            serial,
            shape,
            drive: Some(drive),
            memory: Memory::new(function, lost.clone()),
            iommu: Iommu::default(),
            can_ask: false,
            lost,
            peer: None,
            acked: 0,
            protocol: 0,
            writeback: true,
            inflight: None,
            fenced: false,
            stale_bounces: Vec::new(),
            changes: Vec::new(),
            done: Drive::room(),
        }
    }

    /// What the event loop is to watch, or to forget, since the last call.
    pub fn changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// The kick of a queue.
    pub fn kick(&self, index: u16) -> Option<&Notifier> {
        self.vrings.get(usize::from(index))?.kick.as_ref()
    }

    /// The guest says that a queue has something.
    pub fn kicked(&mut self, index: u16) {
        if let Some(vring) = self.vrings.get_mut(usize::from(index)) {
            if let Some(kick) = &vring.kick {
                kick.drain();
            }
            vring.kicked = true;
        }
    }

    /// Whether memory of the VMM's was truncated under this process.
    pub fn memory_lost(&self) -> bool {
        self.memory.lost() || self.inflight.as_ref().is_some_and(Inflight::lost)
    }

    /// Whether replies to messages are agreed on.
    pub fn has_protocol(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol & feature.bits() != 0
    }

    /// Whether the guest's driver is behind an IOMMU, so that addresses have to be asked for.
    pub fn is_behind_iommu(&self) -> bool {
        self.acked >> VIRTIO_F_ACCESS_PLATFORM & 1 == 1
    }

    /// The VMM says what its IOMMU maps; whether that can be.
    pub fn hear(&mut self, said: Said) -> bool {
        self.is_behind_iommu() && self.iommu.hear(said, self.memory.guest())
    }

    /// There is a new channel on which the VMM can be asked, or none any more.
    pub fn ask_anew(&mut self, there_is: bool) {
        self.can_ask = there_is && self.has_protocol(VhostUserProtocolFeatures::REPLY_ACK);
        self.iommu.ask_anew();
    }

    /// What the VMM is to be asked next.
    pub fn next_ask(&self) -> Option<Ask> {
        self.iommu.next_ask()
    }

    /// It was asked that.
    pub fn asked(&mut self) {
        self.iommu.asked();
    }

    /// It has answered the oldest question.
    pub fn answered(&mut self, refuses: bool) -> Result<(), NotAsked> {
        self.iommu.answered(refuses)
    }

    /// A queue is to stop: nothing new is taken. Whether it can.
    pub fn quiesce(&mut self, index: u32) -> bool {
        let news = self.iommu.has_news();
        match self.vrings.get_mut(index as usize) {
            Some(vring) => {
                vring.draining = true;
                vring.can_stop(news)
            }
            None => true,
        }
    }

    /// A client has connected: the process `peer`.
    pub fn open(&mut self, peer: Option<u32>) {
        self.peer = peer;
    }

    /// The client is gone: nothing of the drive's reaches its memory any more.
    pub fn close(&mut self) {
        self.tell_of_iommu();
        (self.iommu, self.can_ask) = (Iommu::default(), false);
        for vring in &mut self.vrings {
            let gone = std::mem::take(vring);
            self.stale_bounces
                .extend(gone.ring.iter().flat_map(Ring::bounces));
            self.changes.extend(gone.kick.map(Change::Gone));
        }
        if let Err(error) = self.memory.clear() {
            warn!("memory of the VMM could not be given back: {error}");
        }
        self.inflight = None;
        (self.acked, self.protocol, self.peer) = (0, 0, None);
        self.writeback = true;
        self.fenced = true;
    }

    fn tell_of_iommu(&self) {
        let counts = self.iommu.counts();
        if counts != Counts::default() {
            let Counts {
                updates,
                invalidations,
                misses,
                refusals,
            } = counts;
            info!(
                "the VMM's IOMMU: {misses} addresses were asked for, {updates} mapped, {refusals} \
                 refused, {invalidations} times some were taken back"
            );
        }
    }

    /// The drive came up again after it had failed: what was under way begins anew.
    pub fn drive_is_back(&mut self, drive: Drive) -> bool {
        let changed = self.shape != *drive.shape();
        self.shape = drive.shape().clone();
        self.drive = Some(drive);
        (self.fenced, self.stale_bounces) = (false, Vec::new());
        let context = context!(self);
        for ring in self.vrings.iter_mut().filter_map(|v| v.ring.as_mut()) {
            ring.restart(&context);
        }
        changed
    }

    /// The drive, if it has failed: it is to be shut and brought up again.
    pub fn failed_drive(&mut self) -> Option<Drive> {
        if self.drive.as_ref().is_some_and(Drive::has_failed) {
            return self.drive.take();
        }
        None
    }

    /// Takes the drive away, for the end.
    pub fn take_drive(&mut self) -> Option<Drive> {
        self.drive.take()
    }

    /// The link to the drive has been made anew: it may have another size.
    pub fn look_again(&mut self) -> Result<(), DriverError> {
        self.drive.as_mut().map_or(Ok(()), Drive::look_again)
    }

    /// Does what can be done: takes requests, submits commands, answers. With `looks`, queues are
    /// looked at that were not kicked.
    pub fn work(&mut self, looks: bool) -> Result<Worked, DriverError> {
        let Some(drive) = &mut self.drive else {
            return Ok(Worked::default());
        };
        let changed = drive.listen()?;
        if changed {
            self.shape = drive.shape().clone();
        }
        if self.fenced {
            drive.poll(&mut self.done)?;
            if drive.in_flight() > 0 {
                return Ok(Worked {
                    changed,
                    ..Worked::default()
                });
            }
            self.fenced = false;
            for id in self.stale_bounces.drain(..) {
                drive.free_bounce(id);
            }
        }
        let is_behind = self.is_behind_iommu();
        let news = is_behind && self.iommu.take_news();
        if news {
            for vring in &mut self.vrings {
                vring.look_again();
            }
        }
        self.start_rings();
        let mut any = false;
        let mut more = true;
        for _ in 0..ROUNDS {
            more = self.round(looks)?;
            any |= more;
            if !more {
                break;
            }
        }
        if news {
            self.iommu.forget_refused();
        }
        let context = context!(self);
        for vring in &mut self.vrings {
            vring.tell(&context);
        }
        Ok(Worked {
            any,
            more,
            changed,
            asks: is_behind && self.iommu.next_ask().is_some(),
        })
    }

    fn round(&mut self, looks: bool) -> Result<bool, DriverError> {
        let implied = self.is_enabling_implied();
        let context = context!(self);
        let Some(drive) = &mut self.drive else {
            return Ok(false);
        };
        let mut any = false;
        for vring in &mut self.vrings {
            let takes = (vring.enabled || implied) && !vring.draining;
            let Some(ring) = &mut vring.ring else {
                continue;
            };
            // To look is to ask the VMM, behind an IOMMU, and a fault if a driver is gone that said
            // nothing: it has to be kicked for.
            let looks = looks && !(context.behind.is_some() && ring.is_armed());
            if takes && (vring.kicked || looks || vring.kick.is_none()) {
                vring.kicked = ring.take(&context);
                any |= vring.kicked;
            }
            any |= ring.advance(&context, drive)?;
        }
        drive.ring()?;
        drive.poll(&mut self.done)?;
        for done in &self.done {
            any = true;
            let (index, head, bounced) = of_token(done.token);
            let ring = self.vrings.get_mut(usize::from(index));
            if let Some(ring) = ring.and_then(|vring| vring.ring.as_mut()) {
                ring.completed(head, bounced, done, &context, drive)?;
            }
        }
        Ok(any)
    }

    /// Has the guest kick when it has something, before this process sleeps. Whether it has
    /// something already.
    pub fn arm(&mut self) -> bool {
        if self.drive.is_none() || self.fenced {
            return false;
        }
        let implied = self.is_enabling_implied();
        let context = context!(self);
        let mut more = false;
        for vring in &mut self.vrings {
            if let Some(ring) = &mut vring.ring {
                let any = ring.arm(&context);
                vring.kicked |= any;
                // One that is not to be taken from has its turn when it is; one without a kick
                // is a VMM's way to ask for polling.
                let takes = (vring.enabled || implied)
                    && !vring.draining
                    && !ring.is_broken()
                    && !ring.waits();
                more |= (any || vring.kick.is_none()) && takes;
            }
        }
        more
    }

    /// Without the feature there is no message that enables a queue.
    fn is_enabling_implied(&self) -> bool {
        self.acked & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0
    }

    fn start_rings(&mut self) {
        let event_idx = self.acked >> VIRTIO_RING_F_EVENT_IDX & 1 == 1;
        let implied = self.is_enabling_implied();
        let context = context!(self);
        for (index, vring) in (0u16..).zip(&mut self.vrings) {
            if !vring.started || vring.ring.is_some() || !(vring.enabled || implied) {
                continue;
            }
            let inflight = self.inflight.as_ref();
            let begun = if context.behind.is_some() && !self.can_ask {
                Err(BadVring::NobodyToAsk)
            } else {
                vring.start(index, event_idx, &self.memory, inflight, &context)
            };
            if let Err(error) = begun {
                warn!("virtqueue {index} cannot be started: {error}");
                vring.started = false;
                if let Some(told) = &vring.error {
                    told.signal();
                }
            }
        }
    }
}
