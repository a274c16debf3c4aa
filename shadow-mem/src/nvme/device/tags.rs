//! What the device half knows of each command that is at the device.

use farbus_fabric::wire::Tag;
use farbus_vfio::nvme::SubmissionEntry;

use super::super::transfer::Transfer;

/// A command at the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Command {
    pub(super) sqe: SubmissionEntry,
    pub(super) queue: u16,
    pub(super) transfer: Transfer,
    /// Where its data is in the buffer shadow, in bytes.
    pub(super) offset: u32,
    /// Pieces of guest memory that its data goes to, on a one-sided link.
    pub(super) segments: u16,
}

/// The commands by tag; a tag is the command's identifier at the device.
pub(super) struct Tags(Vec<Option<Command>>);

impl Tags {
    pub(super) fn new(count: u16) -> Self {
        Self(vec![None; usize::from(count)])
    }

    /// Whether the tag exists and no command has it.
    pub(super) fn is_free(&self, tag: Tag) -> bool {
        matches!(self.0.get(usize::from(tag.0)), Some(None))
    }

    pub(super) fn insert(&mut self, tag: Tag, command: Command) {
        if let Some(slot) = self.0.get_mut(usize::from(tag.0)) {
            *slot = Some(command);
        }
    }

    /// Takes the command that the device completed, if it has one of this tag and queue.
    pub(super) fn take(&mut self, tag: Tag, queue: u16) -> Option<Command> {
        let slot = self.0.get_mut(usize::from(tag.0))?;
        slot.take_if(|command| command.queue == queue)
    }

    /// Takes any command of a queue.
    pub(super) fn take_of_queue(&mut self, queue: u16) -> Option<Tag> {
        let of_queue = |slot: &Option<Command>| slot.is_some_and(|c| c.queue == queue);
        let tag = self.0.iter().position(of_queue)?;
        self.0[tag] = None;
        Some(Tag(tag as u16))
    }

    pub(super) fn clear(&mut self) {
        self.0.fill(None);
    }
}
