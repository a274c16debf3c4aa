//! Outstanding commands. A tag stands for one command from the moment it is fetched from the
//! guest until its completion is in the guest's queue; the number of tags bounds everything
//! that a guest can keep in flight.

use farbus_fabric::wire::Tag;
use farbus_vfio::nvme::{Status, SubmissionEntry};

use super::super::transfer::Transfer;
use crate::shadow::ShadowRange;

/// Tags that I/O commands leave to admin commands, so that a guest whose I/O is stuck can
/// still abort and reset.
const ADMIN_RESERVE: usize = 16;
/// Tags that nobody but a rebuild takes: it runs one command at a time.
const REBUILD_RESERVE: usize = 1;

/// Where a command is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Not in use.
    Free,
    /// To be sent (again): fetched, not on the link.
    Queued,
    /// On the link or at the device.
    Sent,
    /// Completed; waits for room in the guest's completion queue.
    Held {
        /// Its outcome.
        status: Status,
        /// Dwords 0 and 1 of its completion.
        result: u64,
    },
    /// The controller was reset under it; the device may still complete it, for nobody.
    Dropped,
}

/// Who wants to know the outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The guest.
    Guest,
    /// The engine, while it rebuilds a controller.
    Replay,
}

/// One command.
pub(super) struct Command {
    pub(super) state: State,
    pub(super) origin: Origin,
    /// As the guest wrote it.
    pub(super) sqe: SubmissionEntry,
    /// The submission queue that it came from.
    pub(super) queue: u16,
    /// The completion queue that it goes to.
    pub(super) completion_queue: u16,
    pub(super) transfer: Transfer,
    pub(super) shadow: ShadowRange,
    /// Segments of guest memory that hold the data: see [`super::segments`].
    pub(super) segments: usize,
    /// The guest took back memory that the data was to land in.
    pub(super) landing_failed: bool,
}

impl Default for Command {
    fn default() -> Self {
        Self {
            state: State::Free,
            origin: Origin::Guest,
            sqe: SubmissionEntry::new(0),
            queue: 0,
            completion_queue: 0,
            transfer: Transfer::None,
            shadow: ShadowRange::default(),
            segments: 0,
            landing_failed: false,
        }
    }
}

/// All tags of an attachment.
pub(super) struct Tags {
    commands: Vec<Command>,
    free: Vec<Tag>,
}

impl Tags {
    pub(super) fn new(count: u16) -> Self {
        Self {
            commands: (0..count).map(|_| Command::default()).collect(),
            free: (0..count).rev().map(Tag).collect(),
        }
    }

    pub(super) fn len(&self) -> u16 {
        self.commands.len() as u16
    }

    /// How many are in use.
    pub(super) fn in_use_count(&self) -> u16 {
        (self.commands.len() - self.free.len()) as u16
    }

    /// Whether a command of this queue (0 is the admin queue) can have a tag.
    pub(super) fn is_available(&self, queue: u16) -> bool {
        self.free.len()
            > if queue == 0 {
                REBUILD_RESERVE
            } else {
                ADMIN_RESERVE
            }
    }

    /// Takes a free tag. The caller sets up the command.
    pub(super) fn take(&mut self) -> Option<(Tag, &mut Command)> {
        let tag = self.free.pop()?;
        let command = self.commands.get_mut(usize::from(tag.0))?;
        command.landing_failed = false;
        Some((tag, command))
    }

    /// Takes a certain tag; `None` if there is none such that is free.
    pub(super) fn occupy(&mut self, tag: Tag) -> Option<&mut Command> {
        let at = self.free.iter().position(|free| *free == tag)?;
        self.free.remove(at);
        self.commands.get_mut(usize::from(tag.0))
    }

    /// Gives a tag back. Its shadow range has been released.
    pub(super) fn free(&mut self, tag: Tag) {
        if let Some(command) = self.commands.get_mut(usize::from(tag.0)) {
            command.state = State::Free;
            command.shadow = ShadowRange::default();
            self.free.push(tag);
        }
    }

    pub(super) fn get(&self, tag: Tag) -> Option<&Command> {
        self.commands.get(usize::from(tag.0))
    }

    pub(super) fn get_mut(&mut self, tag: Tag) -> Option<&mut Command> {
        self.commands.get_mut(usize::from(tag.0))
    }

    /// All tags that are in use, with their commands.
    pub(super) fn in_use(&mut self) -> impl Iterator<Item = (Tag, &mut Command)> {
        numbered(self.commands.iter_mut()).filter(|(_, command)| command.state != State::Free)
    }

    /// Whether an admin command of the guest's with this opcode, about this queue, is at the
    /// device.
    pub(super) fn has_sent_admin(&self, opcode: u8, queue: u16) -> bool {
        self.commands.iter().any(|command| {
            command.state == State::Sent
                && command.origin == Origin::Guest
                && command.queue == 0
                && command.sqe.opcode() == opcode
                && command.sqe.dword(10) as u16 == queue
        })
    }

    /// The command that the guest knows by this queue and command identifier and that has not
    /// completed.
    pub(super) fn find(&self, queue: u16, cid: u16) -> Option<Tag> {
        numbered(self.commands.iter()).find_map(|(tag, command)| {
            let outstanding = matches!(command.state, State::Sent | State::Queued);
            (outstanding
                && command.origin == Origin::Guest
                && command.queue == queue
                && command.sqe.cid() == cid)
                .then_some(tag)
        })
    }
}

/// Commands with their tags: there are at most as many as tags can be.
fn numbered<C>(commands: impl Iterator<Item = C>) -> impl Iterator<Item = (Tag, C)> {
    commands
        .zip(0..=u16::MAX)
        .map(|(command, tag)| (Tag(tag), command))
}
