//! Surviving the link: what happens to the guest's controller when the device side is lost,
//! and how the device's controller is rebuilt from what the guest had set up.
//!
//! The order is the driver's own: enable, features, completion queues, submission queues;
//! then every command that was outstanding is sent again. What the device may have
//! done already without our hearing of it is done twice, so only commands for which that is
//! the same as once are repeated; the others end with a status that lets the guest retry.

use std::collections::VecDeque;

use farbus_fabric::FabricError;
use farbus_fabric::wire::Tag;
use farbus_vfio::nvme::{Status, SubmissionEntry, admin, nvm};

use super::super::description::NvmeDescription;
use super::super::transfer::Transfer;
use super::ComputeHalf;
use super::lifecycle::Phase;
use super::tags::{Command, Origin, State};
use crate::session::Session;
use crate::shadow::ShadowRange;

/// A rebuild that is under way.
pub(super) struct Replay {
    /// The device's controller is enabled and ready.
    ready: bool,
    /// A step is at the device.
    busy: bool,
    /// Admin commands still to be done, one after the other.
    steps: VecDeque<SubmissionEntry>,
}

impl Replay {
    pub(super) fn controller_is_ready(&mut self) {
        self.ready = true;
    }
}

/// The export came back as something else.
#[derive(Debug, thiserror::Error)]
#[error("the export has changed ({what}); the guest's controller cannot be moved to it")]
pub struct Changed {
    what: &'static str,
}

impl Changed {
    /// Another function than before.
    pub(crate) fn function() -> Self {
        Self {
            what: "it is another function",
        }
    }
}

impl ComputeHalf {
    /// The link is gone, and with it everything that was on its way. The device server resets
    /// the function before anyone can claim it again.
    pub fn link_lost(&mut self) {
        self.device_is_lost();
        self.commit();
        self.batch.clear();
        self.landing.clear();
        self.replay = None;
        for (_, command) in self.tags.in_use() {
            if command.state == State::Sent {
                command.state = State::Queued;
            }
        }
        // The steps of a rebuild that was under way are taken anew.
        for tag in (0..self.tags.len()).map(Tag) {
            let replayed = |command: &Command| {
                command.state == State::Queued && command.origin == Origin::Replay
            };
            if self.tags.get(tag).is_some_and(replayed) {
                self.tags.free(tag);
            }
        }
    }

    /// A new claim on the same export: rebuilds the controller on it. `tags` and `shadow_len`
    /// are the new claim's; they and the description must be what they were.
    pub fn link_up(
        &mut self,
        description: &NvmeDescription,
        shadow_len: u32,
        tags: u16,
    ) -> Result<(), Changed> {
        let what = if *description != self.description {
            "its controller or namespaces differ"
        } else if shadow_len != self.shadow_len || tags != self.tags.len() {
            "its limits differ"
        } else {
            ""
        };
        if !what.is_empty() {
            self.fail("the export came back as something else");
            return Err(Changed { what });
        }
        if self.life.phase == Phase::Ready {
            self.replay = Some(Replay {
                ready: false,
                busy: false,
                steps: self.rebuild_steps(),
            });
        }
        Ok(())
    }

    fn rebuild_steps(&self) -> VecDeque<SubmissionEntry> {
        let mut steps: VecDeque<_> = self.features.iter().copied().collect();
        for (id, cq) in self.queues.completion.iter().skip(1) {
            let mut sqe = SubmissionEntry::new(admin::CREATE_CQ);
            sqe.set_dword(10, u32::from(id) | (cq.ring.size() - 1) << 16);
            let interrupt = cq.vector.map_or(0, |vector| 2 | u32::from(vector) << 16);
            sqe.set_dword(11, 1 | interrupt);
            steps.push_back(sqe);
        }
        for (id, sq) in self.queues.submission.iter().skip(1) {
            let mut sqe = SubmissionEntry::new(admin::CREATE_SQ);
            sqe.set_dword(10, u32::from(id) | (sq.ring.size() - 1) << 16);
            sqe.set_dword(11, 1 | u32::from(sq.completion_queue) << 16);
            steps.push_back(sqe);
        }
        steps
    }

    /// Sends the next step of a rebuild; after the last one, what was outstanding.
    pub(super) fn send_replay(&mut self, session: &mut Session) -> Result<(), FabricError> {
        let Some(replay) = &mut self.replay else {
            return Ok(());
        };
        if !replay.ready || replay.busy || session.is_congested() {
            return Ok(());
        }
        let Some(sqe) = replay.steps.pop_front() else {
            self.replay = None;
            return self.send_again(session);
        };
        let Some((tag, command)) = self.tags.take() else {
            self.fail("no tag is left to rebuild the controller with");
            return Ok(());
        };
        replay.busy = true;
        command.state = State::Queued;
        command.origin = Origin::Replay;
        command.sqe = sqe;
        command.queue = 0;
        command.transfer = Transfer::None;
        command.shadow = ShadowRange::default();
        command.segments = 0;
        self.queue_command(tag);
        session.submit(&mut self.batch)
    }

    /// The outcome of a step.
    pub(super) fn replayed(&mut self, sqe: &SubmissionEntry, status: Status) {
        if !status.is_success() {
            return self.fail(&format!(
                "rebuilding the controller: {sqe:?} failed: {status:?}"
            ));
        }
        if let Some(replay) = &mut self.replay {
            replay.busy = false;
        }
    }

    fn send_again(&mut self, session: &mut Session) -> Result<(), FabricError> {
        for tag in (0..self.tags.len()).map(Tag) {
            let Some(command) = self.tags.get(tag) else {
                continue;
            };
            if command.state != State::Queued {
                continue;
            }
            let (queue, repeatable) = (command.queue, is_repeatable(command.queue, &command.sqe));
            if self.queues.sq(queue).is_some_and(|sq| sq.deleting) {
                // Its deletion may overtake it, and the device side has no such queue then.
                self.complete(tag, Status::ABORTED_SQ_DELETION, 0);
            } else if repeatable {
                self.queue_command(tag);
            } else {
                self.complete(tag, Status::ABORT_REQUESTED, 0);
            }
            if self.batch_is_full() {
                session.submit(&mut self.batch)?;
            }
        }
        session.submit(&mut self.batch)
    }
}

/// Whether doing a command twice is the same as doing it once.
fn is_repeatable(queue: u16, sqe: &SubmissionEntry) -> bool {
    match (queue, sqe.opcode()) {
        // The command that it names has a new life.
        (0, admin::ABORT | admin::SELF_TEST) => false,
        (0, _) => true,
        (_, opcode) => matches!(
            opcode,
            nvm::FLUSH
                | nvm::READ
                | nvm::WRITE
                | nvm::COMPARE
                | nvm::WRITE_ZEROES
                | nvm::WRITE_UNCORRECTABLE
                | nvm::DATASET_MANAGEMENT
                | nvm::VERIFY
                | nvm::RESERVATION_REPORT
        ),
    }
}
