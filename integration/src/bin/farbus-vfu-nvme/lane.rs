//! One queue pair with a buffer for each command that may be outstanding. Nothing here is
//! allocated, and nothing searched, once a lane is open.

use anyhow::ensure;
use farbus_vfio::driver::{DmaBuffer, Prps};
use farbus_vfio::nvme::{CompletionEntry, PAGE_SIZE, Status, SubmissionEntry, cap, reg};

use crate::target::Driver;

/// A command that has completed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    /// Its buffer.
    pub(crate) slot: usize,
    pub(crate) status: Status,
}

/// See the module's own description.
pub(crate) struct Lane {
    queue: u16,
    slots: Vec<(DmaBuffer, Prps)>,
    /// The slot of each command, by its identifier.
    commands: Vec<usize>,
    completions: Vec<CompletionEntry>,
    outstanding: usize,
}

/// DMA memory (bytes) that a lane takes.
pub(crate) fn memory_of(depth: u16, len: usize) -> usize {
    let rings = 2 * PAGE_SIZE + usize::from(entries(depth)) * 80;
    // Each buffer may need a page for its PRP list.
    let buffers = usize::from(depth) * (len.next_multiple_of(PAGE_SIZE) + PAGE_SIZE);
    rings.next_multiple_of(PAGE_SIZE) + buffers
}

/// Entries of a queue for this depth: one more than it holds, and no fewer than a guest's driver
/// would have, since the ends of a ring cost doorbells of their own.
fn entries(depth: u16) -> u16 {
    depth.saturating_add(1).max(256)
}

impl Lane {
    /// Creates queue pair `queue`, for `depth` commands of `len` bytes each. Who looks for
    /// completions all the time wants no interrupts.
    pub(crate) fn open(
        driver: &mut Driver,
        queue: u16,
        depth: u16,
        len: usize,
        interrupts: bool,
    ) -> anyhow::Result<Self> {
        let vectors = driver.function().info().interrupts.msix.max(1);
        let vector = u32::from(queue) % vectors;
        let most = (driver.read64(reg::CAP)? & cap::MQES_MASK) + 1;
        // A depth that the controller does not have is its own to refuse.
        let entries = entries(depth).min((most as u16).max(depth + 1));
        let vector = interrupts.then_some(vector as u16);
        driver.create_queue_pair(queue, entries, vector)?;
        let slots = (0..depth)
            .map(|_| {
                let buffer = driver.memory().allocate(len)?;
                Ok((buffer, driver.prps(buffer, 0, len)?))
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Self {
            queue,
            slots,
            commands: vec![0; usize::from(entries)],
            completions: Vec::with_capacity(usize::from(entries)),
            outstanding: 0,
        })
    }

    pub(crate) fn depth(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn queue(&self) -> u16 {
        self.queue
    }

    /// Commands that have not completed.
    pub(crate) fn outstanding(&self) -> usize {
        self.outstanding
    }

    pub(crate) fn buffer(&self, slot: usize) -> anyhow::Result<DmaBuffer> {
        let slot = self.slots.get(slot).map(|(buffer, _)| *buffer);
        slot.ok_or_else(|| anyhow::anyhow!("there is no such buffer"))
    }

    /// Puts a command with a slot's buffer into the queue; the doorbell is for later.
    pub(crate) fn enqueue(
        &mut self,
        driver: &mut Driver,
        slot: usize,
        mut command: SubmissionEntry,
    ) -> anyhow::Result<()> {
        if let Some((_, prps)) = self.slots.get(slot) {
            command.set_prps(prps.prp1, prps.prp2);
        }
        let cid = driver.enqueue(self.queue, command)?;
        if let Some(command) = self.commands.get_mut(usize::from(cid)) {
            *command = slot;
        }
        self.outstanding += 1;
        Ok(())
    }

    /// Announces what was enqueued.
    pub(crate) fn ring(&self, driver: &mut Driver) -> anyhow::Result<()> {
        Ok(driver.ring(self.queue)?)
    }

    /// Takes all completions that are there.
    pub(crate) fn reap(&mut self, driver: &mut Driver, done: &mut Vec<Done>) -> anyhow::Result<()> {
        self.completions.clear();
        driver.reap(self.queue, &mut self.completions)?;
        for entry in &self.completions {
            let slot = self.commands.get(usize::from(entry.cid));
            done.extend(slot.map(|slot| Done {
                slot: *slot,
                status: entry.status,
            }));
        }
        self.outstanding -= self.completions.len();
        Ok(())
    }
}

/// What the commands of a lane must keep to.
pub(crate) fn check_length(
    driver: &mut Driver,
    len: u64,
    block_size: u32,
) -> anyhow::Result<usize> {
    use farbus_vfio::nvme::cns;
    ensure!(
        len % u64::from(block_size) == 0,
        "{len} bytes are no whole number of the drive's blocks of {block_size}"
    );
    let controller = driver.identify(cns::CONTROLLER, 0)?;
    // MDTS (NVMe 1.4 §5.15.2.2), in pages; none says that there is no limit.
    let limit = match controller.get(77) {
        Some(&shift @ 1..=9) => (PAGE_SIZE as u64) << shift,
        // A list of one page.
        _ => (PAGE_SIZE as u64) << 9,
    };
    ensure!(
        len <= limit,
        "{len} bytes are more than the {limit} that one command can carry"
    );
    Ok(len as usize)
}
