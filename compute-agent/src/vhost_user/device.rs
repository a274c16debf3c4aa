//! The device that a VMM sees: its queues, its memory, its drive. What each message of the VMM does
//! to them is in `handler.rs`.
//!
//! Nothing here waits. What needs the drive goes on in [`Device::work`], which the event loop calls
//! whenever something may have happened.

#![forbid(unsafe_code)]

use std::sync::Arc;

use farbus_vfio::Function;
use farbus_vfio::driver::DriverError;
use log::warn;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use super::config::Options;
use super::drive::{BounceId, Done, Drive, Shape};
use super::inflight::Inflight;
use super::memory::Memory;
use super::notifier::Notifier;
use super::ring::{Ring, of_token};
use super::vring::Vring;
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
}

/// What requests are judged by: a borrow of some fields, so that others can be changed.
macro_rules! context {
    ($device:expr) => {{
        let flush = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE;
        Context {
            guest: $device.memory.guest(),
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

    /// A queue is to stop: nothing new is taken. Whether everything of it is answered.
    pub fn quiesce(&mut self, index: u32) -> bool {
        match self.vrings.get_mut(index as usize) {
            Some(vring) => {
                vring.draining = true;
                vring.outstanding() == 0
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
        for vring in &mut self.vrings {
            vring.tell(self.memory.guest());
        }
        Ok(Worked { any, more, changed })
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
                ring.completed(head, bounced, done, context.guest, drive)?;
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
        let mut more = false;
        for vring in &mut self.vrings {
            if let Some(ring) = &mut vring.ring {
                let any = ring.arm(self.memory.guest());
                vring.kicked |= any;
                // One that is not to be taken from has its turn when it is; one without a kick
                // is a VMM's way to ask for polling.
                let takes = (vring.enabled || implied) && !vring.draining && !ring.is_broken();
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
            if let Err(error) = vring.start(index, event_idx, &self.memory, inflight, &context) {
                warn!("virtqueue {index} cannot be started: {error}");
                vring.started = false;
                if let Some(told) = &vring.error {
                    told.signal();
                }
            }
        }
    }
}
