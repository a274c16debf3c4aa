//! What each message of the VMM does to the device.
//!
//! The `vhost` crate decodes and answers the messages; an error here is the end of the connection.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;

use log::info;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use virtio_bindings::bindings::virtio_config::VIRTIO_F_ACCESS_PLATFORM;

use super::config::{self, WRITEBACK_AT};
use super::device::{Change, Device};
use super::inflight::{self, Inflight};
use super::memory::MAX_REGIONS;
use super::notifier::Notifier;
use super::ring::Ring;
use super::vring::{Addresses, Vring};

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

fn notifier(file: Option<File>) -> Result<Option<Notifier>> {
    let made = file.map(Notifier::new).transpose();
    made.map_err(|errno| Error::ReqHandlerError(errno.into()))
}

impl Device {
    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        self.vrings
            .get_mut(index as usize)
            .ok_or(Error::InvalidParam)
    }

    /// A queue whose form can be changed: one that is not at work.
    fn idle(&mut self, index: u32) -> Result<&mut Vring> {
        let vring = self.vring(index)?;
        if vring.ring.is_some() {
            return Err(Error::InvalidOperation("the queue is at work"));
        }
        Ok(vring)
    }

    fn features(&self) -> u64 {
        config::features(&self.shape, &self.options, self.protocol)
    }
}

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // Withdrawn by the specification, which lets a backend ignore it.
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("a reset by message is not offered"))
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.features() != 0 {
            return Err(Error::InvalidParam);
        }
        let changes = self.acked ^ features;
        if changes >> VIRTIO_F_ACCESS_PLATFORM & 1 == 1 {
            if self.vrings.iter().any(|vring| vring.ring.is_some()) {
                return Err(Error::InvalidOperation("queues are at work"));
            }
            self.iommu.abandon();
        }
        self.acked = features;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.memory
            .replace(regions, files, self.peer)
            .map_err(refused)?;
        self.iommu.flush();
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let most = self.options.queue_size;
        let size = u16::try_from(num).ok();
        let size = size.filter(|size| size.is_power_of_two() && *size <= most);
        self.idle(index)?.size = size.ok_or(Error::InvalidParam)?;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        // A VMM says so again to switch the dirty log, which is not offered; the ring stays.
        self.vring(index)?.addresses = Some(Addresses {
            descriptors,
            available,
            used,
        });
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.idle(index)?.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let vring = self.vring(index)?;
        let held: Vec<_> = vring.ring.iter().flat_map(Ring::bounces).collect();
        let base = vring.stop();
        if let Some(drive) = &mut self.drive {
            held.into_iter().for_each(|id| drive.free_bounce(id));
        }
        if !self.vrings.iter().any(|vring| vring.started) {
            // From now on nobody says what is taken back.
            self.iommu.abandon();
        }
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let kick = notifier(fd)?;
        let vring = self.vring(index.into())?;
        let gone = std::mem::replace(&mut vring.kick, kick);
        let is_new = vring.kick.is_some();
        vring.started = true;
        self.changes.extend(gone.map(Change::Gone));
        if is_new {
            self.changes.push(Change::New(index.into()));
        }
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let call = notifier(fd)?;
        let vring = self.vring(index.into())?;
        (vring.call, vring.tells_anyway) = (call, true);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let error = notifier(fd)?;
        self.vring(index.into())?.error = error;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = self.get_protocol_features()?;
        if features & !offered.bits() != 0 {
            return Err(Error::InvalidParam);
        }
        self.protocol = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.options.num_queues.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let vring = self.vring(index)?;
        vring.enabled = enable;
        vring.kicked = true;
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let space = config::space(&self.shape, &self.options, self.writeback);
        // What a later version of the structure has beyond this one reads as zero.
        let bytes = space.iter().copied().chain(std::iter::repeat(0));
        Ok(bytes.skip(offset as usize).take(size as usize).collect())
    }

    fn set_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> Result<()> {
        let at = WRITEBACK_AT.checked_sub(offset as usize);
        if let Some(writeback) = at.and_then(|at| bytes.get(at)) {
            self.writeback = *writeback != 0;
            info!(
                "the guest's writes are durable {}",
                if self.writeback {
                    "after a flush"
                } else {
                    "at once"
                }
            );
        }
        Ok(())
    }

    fn set_gpu_socket(&mut self, _backend: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("this is no GPU"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("there are no shared objects"))
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (asked.num_queues, asked.queue_size);
        if queues > self.options.num_queues || size > self.options.queue_size {
            return Err(Error::InvalidParam);
        }
        let (file, len) = inflight::create(queues, size).map_err(Error::ReqHandlerError)?;
        Ok((VhostUserInflight::new(len, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, size) = (given.num_queues, given.queue_size);
        if self.vrings.iter().any(|vring| vring.ring.is_some()) {
            return Err(Error::InvalidOperation("queues are at work"));
        }
        let (offset, len) = (given.mmap_offset, given.mmap_size);
        let mapped = Inflight::map(file, offset, len, queues, size, &self.lost);
        self.inflight = Some(mapped.map_err(Error::ReqHandlerError)?);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.memory.add(region, file, self.peer).map_err(refused)?;
        self.iommu.flush();
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.iommu.flush();
        self.memory.remove(region).map_err(refused)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("there is no device state to move"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("there is no device state to move"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("there is no shared memory"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("dirty pages are not logged"))
    }
}
