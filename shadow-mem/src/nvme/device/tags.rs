//! What the device half knows of each command that is at the device.

use std::ops::Range;

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
pub(super) struct Tags {
    /// The first one.
    base: u16,
    commands: Vec<Option<Command>>,
}

impl Tags {
    pub(super) fn new(tags: Range<u16>) -> Self {
        Self {
            base: tags.start,
            commands: vec![None; tags.len()],
        }
    }

    /// How many there are, in use or not.
    pub(super) fn count(&self) -> usize {
        self.commands.len()
    }

    /// Where a tag's command is; beyond the end for one that is not of this lane.
    fn index(&self, tag: Tag) -> usize {
        usize::from(tag.0.wrapping_sub(self.base))
    }

    /// Whether the tag exists and no command has it.
    pub(super) fn is_free(&self, tag: Tag) -> bool {
        matches!(self.commands.get(self.index(tag)), Some(None))
    }

    pub(super) fn insert(&mut self, tag: Tag, command: Command) {
        let index = self.index(tag);
        if let Some(slot) = self.commands.get_mut(index) {
            *slot = Some(command);
        }
    }

    /// Takes the command that the device completed, if it has one of this tag and queue.
    pub(super) fn take(&mut self, tag: Tag, queue: u16) -> Option<Command> {
        let index = self.index(tag);
        let slot = self.commands.get_mut(index)?;
        slot.take_if(|command| command.queue == queue)
    }

    /// Takes any command of a queue.
    pub(super) fn take_of_queue(&mut self, queue: u16) -> Option<Tag> {
        let of_queue = |slot: &Option<Command>| slot.is_some_and(|c| c.queue == queue);
        let index = self.commands.iter().position(of_queue)?;
        self.commands[index] = None;
        Some(Tag(self.base + index as u16))
    }

    pub(super) fn clear(&mut self) {
        self.commands.fill(None);
    }
}
