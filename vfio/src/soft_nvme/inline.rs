//! I/O commands without threads: where the backing keeps nobody waiting, whoever writes a
//! doorbell carries out what it announces before the write returns.
//!
//! A batch is what one doorbell write sets off in one submission queue: at most as many
//! commands as the queue has entries, and one interrupt at its end. Windows stay pinned from
//! its first command to its last, so that unmapping one waits for the batch. A batch counts as
//! one command under way: closing the queue ends it at the next command.

#![forbid(unsafe_code)]

use super::controller::Controller;
use super::io;
use super::queues::Sq;

impl Controller {
    /// Carries out the commands of an inline queue.
    ///
    /// A doorbell that another thread writes meanwhile makes that thread wait for this batch
    /// and then look for itself, so no command is left behind.
    pub(super) fn run(&self, sq: &Sq) {
        let Some(mut scratch) = sq.lock_inline() else {
            return;
        };
        if !sq.begin_batch() {
            return;
        }
        let scratch = &mut *scratch;
        let mut due = false;
        for _ in 0..sq.entries() {
            let fetched = sq.fetch_in_batch(&self.dma, &mut scratch.pins, || self.is_running());
            let Some((command, _)) = self.fetched(&fetched) else {
                break;
            };
            let status = io::execute(self, &command, scratch);
            self.note_failure(sq, &command, status);
            due |= self.post_quietly(sq, &mut scratch.pins, command.cid(), status, 0);
        }
        scratch.release();
        if due {
            self.signal(&sq.cq);
        }
        sq.finish();
    }
}
