//! The namespace's size, which follows its file's: a file that was made longer is a larger drive.
//!
//! The admin thread looks at the file now and then, and tells the host if it wants to know. A file
//! that was cut short leaves the size as it is: blocks behind its end are bad ones.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::controller::Controller;
use super::events::Event;
use super::lock;
use crate::nvme::PAGE_SIZE;

/// How often a file's size is looked at.
pub(super) const INTERVAL: Duration = Duration::from_secs(1);

/// How many blocks there are, and whether the host has read of the last change.
pub(super) struct Size {
    blocks: AtomicU64,
    changed: AtomicBool,
}

impl Size {
    pub(super) fn new(blocks: u64) -> Self {
        Self {
            blocks: AtomicU64::new(blocks),
            changed: AtomicBool::new(false),
        }
    }

    pub(super) fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::SeqCst)
    }

    /// Whether it is more than before. Only the admin thread calls this.
    fn grow(&self, blocks: u64) -> bool {
        let grown = self.blocks.fetch_max(blocks, Ordering::SeqCst) < blocks;
        if grown {
            self.changed.store(true, Ordering::SeqCst);
        }
        grown
    }

    /// The Changed Namespace List log (NVMe 1.4 §5.14.1.4), which is empty once it has been read.
    pub(super) fn changed_list(&self, keep: bool) -> [u8; PAGE_SIZE] {
        let mut page = [0; PAGE_SIZE];
        let changed = if keep {
            self.changed.load(Ordering::SeqCst)
        } else {
            self.changed.swap(false, Ordering::SeqCst)
        };
        page[0] = changed.into();
        page
    }
}

impl Controller {
    /// Finds out whether the file has grown.
    pub(super) fn look_at_size(&self) {
        let Some(len) = self.backing.len_by_now() else {
            return;
        };
        let before = self.size.blocks();
        let blocks = len >> self.block_shift;
        if !self.size.grow(blocks) {
            return;
        }
        log::info!("the drive has grown from {before} to {blocks} blocks");
        if lock(&self.features).reports_namespaces() {
            self.raise(Event::NamespaceChanged);
        }
    }
}
