//! The admin commands (NVMe 1.4 §5), carried out one after the other by the admin thread.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::controller::{Controller, Scratch};
use super::dma::Access;
use super::events::{Event, Kind};
use super::front::MAX_QUEUE_ENTRIES;
use super::health::{self, warning};
use super::queues::{Cq, Shape, Sq};
use super::{identify, lock};
use crate::nvme::{PAGE_SIZE, Status, SubmissionEntry, admin, cc, cns, feature, log_page};

/// The namespace id that means all namespaces.
const ALL_NAMESPACES: u32 = 0xffff_ffff;
/// Get Log Page: retain asynchronous event, dword 10, bit 15.
const RETAIN_EVENT: u32 = 1 << 15;

/// What became of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is done, with this result dword.
    Done(u32),
    /// It is an Asynchronous Event Request, which waits.
    Waiting,
}

/// Carries one command out.
pub(super) fn execute(
    controller: &Controller,
    command: &SubmissionEntry,
    scratch: &mut Scratch,
) -> Result<Outcome, Status> {
    if command.fuse() != 0 || command.psdt() != 0 {
        return Err(Status::INVALID_FIELD);
    }
    match command.opcode() {
        admin::IDENTIFY => identify(controller, command, scratch)?,
        admin::GET_LOG_PAGE => get_log_page(controller, command, scratch)?,
        admin::CREATE_CQ => create_cq(controller, command)?,
        admin::CREATE_SQ => create_sq(controller, command)?,
        admin::DELETE_SQ => delete_sq(controller, command)?,
        admin::DELETE_CQ => delete_cq(controller, command)?,
        admin::GET_FEATURES => {
            return lock(&controller.features).get(command).map(Outcome::Done);
        }
        admin::SET_FEATURES => return set_features(controller, command).map(Outcome::Done),
        admin::ABORT => return Ok(Outcome::Done(abort(controller, command, scratch))),
        admin::ASYNC_EVENT if controller.events.wait(command.cid()) => {
            return Ok(Outcome::Waiting);
        }
        admin::ASYNC_EVENT => return Err(Status::AER_LIMIT_EXCEEDED),
        _ => return Err(Status::INVALID_OPCODE),
    }
    Ok(Outcome::Done(0))
}

fn identify(
    controller: &Controller,
    command: &SubmissionEntry,
    scratch: &mut Scratch,
) -> Result<(), Status> {
    let nsid = command.nsid();
    let page = match command.dword(10) as u8 {
        // There is no Namespace Management, hence no "all namespaces" here (§5.15.2.1).
        cns::NAMESPACE if nsid != 1 => return Err(Status::INVALID_NAMESPACE),
        cns::NAMESPACE => identify::namespace(&controller.identity, controller.shape()),
        cns::CONTROLLER => identify::controller(&controller.identity),
        cns::NAMESPACE_LIST if nsid >= ALL_NAMESPACES - 1 => {
            return Err(Status::INVALID_NAMESPACE);
        }
        cns::NAMESPACE_LIST => identify::namespace_list(nsid),
        cns::DESCRIPTORS if nsid != 1 => return Err(Status::INVALID_NAMESPACE),
        cns::DESCRIPTORS => identify::descriptors(&controller.identity),
        _ => return Err(Status::INVALID_FIELD),
    };
    scratch.map(&controller.dma, command, page.len(), Access::Write)?;
    scratch.data.fill_from(&page);
    Ok(())
}

fn get_log_page(
    controller: &Controller,
    command: &SubmissionEntry,
    scratch: &mut Scratch,
) -> Result<(), Status> {
    let dwords = u64::from(command.dword(10) >> 16) | u64::from(command.dword(11) & 0xffff) << 16;
    let len = (dwords + 1) * 4;
    let offset = u64::from(command.dword(12)) | u64::from(command.dword(13)) << 32;
    // Checked before the log is looked at, since looking can acknowledge an event.
    let len = usize::try_from(len).map_err(|_| Status::INVALID_FIELD)?;
    let page = command.dword(10) as u8;
    if !matches!(
        page,
        log_page::ERROR | log_page::SMART | log_page::FIRMWARE_SLOT | log_page::CHANGED_NAMESPACES
    ) {
        return Err(Status::INVALID_LOG_PAGE);
    }
    if offset % 4 != 0 || !matches!(command.nsid(), 0 | ALL_NAMESPACES) {
        // There is no SMART log of its own for each namespace (LPA bit 0).
        return Err(Status::INVALID_FIELD);
    }
    scratch.map(&controller.dma, command, len, Access::Write)?;
    let retain = command.dword(10) & RETAIN_EVENT != 0;
    let acknowledge = |kind| {
        if !retain {
            controller.events.acknowledge(kind);
        }
    };
    let log = match page {
        log_page::ERROR => {
            acknowledge(Kind::Error);
            controller.health.error_log()
        }
        log_page::SMART => {
            acknowledge(Kind::Health);
            controller.health.smart_log(controller.critical_warning())
        }
        log_page::CHANGED_NAMESPACES => {
            acknowledge(Kind::Notice);
            controller.size.changed_list(retain).to_vec()
        }
        _ => health::firmware_log(identify::firmware_revision()),
    };
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| log.get(offset..));
    let rest = rest.ok_or(Status::INVALID_FIELD)?;
    // What is asked for behind the end of the log reads as zero.
    scratch.data.fill_from(rest);
    scratch.data.zero_from(rest.len());
    Ok(())
}

fn create_cq(controller: &Controller, command: &SubmissionEntry) -> Result<(), Status> {
    let id = command.dword(10) as u16;
    let mut queues = controller.queues_mut();
    if id == 0 || !queues.is_valid_id(id) || queues.cq(id).is_some() {
        return Err(Status::INVALID_QID);
    }
    // 16 bytes; another size set in CC is refused like a queue size (§3.1.5).
    if controller.front.cc() >> cc::IOCQES_SHIFT & 0xf != 4 {
        return Err(Status::INVALID_QUEUE_SIZE);
    }
    let shape = queue_shape(command)?;
    let (interrupts, vector) = (command.dword(11) >> 1 & 1 == 1, command.dword(11) >> 16);
    if interrupts && vector >= controller.interrupts.count() {
        return Err(Status::INVALID_VECTOR);
    }
    queues.insert_cq(Arc::new(Cq::new(
        id,
        shape,
        interrupts.then_some(vector as u16),
    )));
    Ok(())
}

fn create_sq(controller: &Controller, command: &SubmissionEntry) -> Result<(), Status> {
    let id = command.dword(10) as u16;
    let cq_id = (command.dword(11) >> 16) as u16;
    let mut queues = controller.queues_mut();
    if id == 0 || !queues.is_valid_id(id) || queues.sq(id).is_some() {
        return Err(Status::INVALID_QID);
    }
    // 64 bytes; see above.
    if controller.front.cc() >> cc::IOSQES_SHIFT & 0xf != 6 {
        return Err(Status::INVALID_QUEUE_SIZE);
    }
    let cq = queues
        .cq(cq_id)
        .filter(|_| cq_id != 0)
        .cloned()
        .ok_or(Status::INVALID_CQ)?;
    let shape = queue_shape(command)?;
    // The priority, dword 11 bits 2:1, is for an arbitration that is not advertised.
    let sq = Sq::new(id, shape, cq);
    let sq = if controller.backing.is_immediate() {
        sq.inline()
    } else {
        sq
    };
    queues.insert_sq(Arc::new(sq));
    Ok(())
}

/// The part that Create I/O Queue commands have in common (§5.3, §5.4).
fn queue_shape(command: &SubmissionEntry) -> Result<Shape, Status> {
    let zeroes_based = (command.dword(10) >> 16) as u16;
    if zeroes_based == 0 || zeroes_based >= MAX_QUEUE_ENTRIES {
        return Err(Status::INVALID_QUEUE_SIZE);
    }
    // Queues must be physically contiguous (CAP.CQR).
    if command.dword(11) & 1 == 0 {
        return Err(Status::INVALID_FIELD);
    }
    if command.prp1() % PAGE_SIZE as u64 != 0 {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    Ok(Shape {
        base: command.prp1(),
        entries: zeroes_based + 1,
    })
}

fn delete_sq(controller: &Controller, command: &SubmissionEntry) -> Result<(), Status> {
    let id = command.dword(10) as u16;
    if id == 0 {
        return Err(Status::INVALID_QID);
    }
    let sq = controller
        .queues_mut()
        .remove_sq(id)
        .ok_or(Status::INVALID_QID)?;
    // Commands that were not fetched are aborted without a completion, as §5.6 allows; those
    // that were have their completions before this one.
    sq.close();
    sq.wait_idle();
    Ok(())
}

fn delete_cq(controller: &Controller, command: &SubmissionEntry) -> Result<(), Status> {
    let id = command.dword(10) as u16;
    let mut queues = controller.queues_mut();
    if id == 0 || queues.cq(id).is_none() {
        return Err(Status::INVALID_QID);
    }
    if queues.feeding(id).next().is_some() {
        return Err(Status::INVALID_QUEUE_DELETION);
    }
    queues.remove_cq(id);
    Ok(())
}

fn set_features(controller: &Controller, command: &SubmissionEntry) -> Result<u32, Status> {
    let has_io_queues = controller.queues().has_io();
    let (result, write_cache, too_hot) = {
        let mut features = lock(&controller.features);
        let result = features.set(command, has_io_queues)?;
        let reported = features.reported_warnings() & warning::TEMPERATURE != 0;
        (
            result,
            features.write_cache,
            reported && features.is_temperature_critical(),
        )
    };
    match command.dword(10) as u8 {
        feature::VOLATILE_WRITE_CACHE => {
            controller.write_cache.store(write_cache, Ordering::SeqCst);
            // What is in the cache that is going away must not be lost.
            if !write_cache {
                controller.flush()?;
            }
        }
        feature::TEMPERATURE_THRESHOLD | feature::ASYNC_EVENTS if too_hot => {
            controller.raise(Event::TemperatureThreshold);
        }
        _ => {}
    }
    Ok(result)
}

/// The result says whether the command was *not* aborted (§5.1). What was fetched from an I/O
/// queue is under way and cannot be called back, and what was not is not looked for.
fn abort(controller: &Controller, command: &SubmissionEntry, scratch: &mut Scratch) -> u32 {
    let (sq_id, cid) = (command.dword(10) as u16, (command.dword(10) >> 16) as u16);
    let Some(sq) = controller.sq(0).filter(|_| sq_id == 0) else {
        return 1;
    };
    // Its completion comes first, so it needs an entry of its own.
    if !sq.cq.reserve() {
        return 1;
    }
    if !controller.events.abort(cid) {
        sq.cq.unreserve();
        return 1;
    }
    controller.post(&sq, &mut scratch.pins, cid, Status::ABORT_REQUESTED, 0);
    0
}
