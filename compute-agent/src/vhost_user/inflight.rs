//! Which requests are under way, in memory that the VMM keeps when this process dies.
//!
//! The layout is that of the vhost-user specification ("Inflight I/O tracking", split
//! virtqueues). For each queue: features u64, version u16, number of entries u16, the head of the
//! last batch u16, the used index u16; then 16 bytes per descriptor: in flight u8, padding, the
//! next of its batch u16, a counter u64 that gives the order in which requests came. Stores are
//! in an order in which a kill at any moment leaves something that can be made sense of: that of
//! [`Queue::begin`] and [`Queue::finish`].
//!
//! The VMM hands the memory over and may change or truncate it; nothing is believed that could
//! hurt, and what is truncated reads as zero (see [`farbus_vfio::sigbus`]).

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use farbus_vfio::sigbus;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;

const VERSION: u16 = 1;
const HEAD: usize = 16;
const ENTRY: usize = 16;
/// Queues begin at multiples of this.
const ALIGNMENT: usize = 64;

/// Bytes of one queue's part.
fn stride(queue_size: u16) -> usize {
    (HEAD + usize::from(queue_size) * ENTRY).next_multiple_of(ALIGNMENT)
}

/// The memory of all queues of a device.
#[derive(Debug)]
pub struct Inflight {
    memory: Arc<MmapRegion>,
    guard: sigbus::Guard,
    /// Where the first queue begins.
    offset: usize,
    queues: u16,
    queue_size: u16,
}

/// One queue's part.
#[derive(Clone, Debug)]
pub struct Queue {
    memory: Arc<MmapRegion>,
    at: usize,
    size: u16,
    counter: u64,
}

/// What a former backend left behind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Heads of the requests that were not answered, in the order in which they came.
    pub heads: Vec<u16>,
}

/// Makes the memory: its file and its length in bytes.
pub fn create(queues: u16, queue_size: u16) -> io::Result<(File, u64)> {
    let len = (stride(queue_size) * usize::from(queues)) as u64;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("farbus-inflight", flags)?);
    file.set_len(len)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok((file, len))
}

impl Inflight {
    /// Takes what the VMM hands over: `len` bytes of `file` from `offset` on. `lost` is signalled
    /// when the file turns out to be truncated.
    pub fn map(
        file: File,
        offset: u64,
        len: u64,
        queues: u16,
        queue_size: u16,
        lost: &Arc<EventFd>,
    ) -> io::Result<Self> {
        let invalid = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        let end = offset
            .checked_add(len)
            .filter(|end| *end <= 1 << 30)
            .ok_or_else(|| invalid("it is larger than anything this device needs"))?;
        if len < (stride(queue_size) * usize::from(queues)) as u64 || offset % 8 != 0 {
            return Err(invalid("it is smaller than its queues need, or misaligned"));
        }
        if file.metadata()?.len() < end {
            return Err(invalid("its file is shorter than it should be"));
        }
        let memory =
            MmapRegion::from_file(FileOffset::new(file, 0), end as usize).map_err(|error| {
                match error {
                    MmapRegionError::Mmap(source) => source,
                    other => io::Error::other(other),
                }
            })?;
        let memory = Arc::new(memory);
        Ok(Self {
            guard: sigbus::Guard::new(&memory, 4096, lost)?,
            memory,
            offset: offset as usize,
            queues,
            queue_size,
        })
    }

    /// Whether the file was truncated while it was in use.
    pub fn lost(&self) -> bool {
        self.guard.was_hit()
    }

    /// The part of one queue with `size` entries, and what is in it. `used` is the used index in
    /// the guest's ring, and says how far the former backend got.
    pub fn queue(&self, index: u16, size: u16, used: u16) -> Option<(Queue, Left)> {
        if index >= self.queues || size > self.queue_size {
            return None;
        }
        let mut queue = Queue {
            memory: self.memory.clone(),
            at: self.offset + usize::from(index) * stride(self.queue_size),
            size,
            counter: 0,
        };
        let left = queue.take_up(used);
        Some((queue, left))
    }
}

impl Queue {
    fn load<T: vm_memory::AtomicAccess + Default>(&self, at: usize) -> T {
        let offset = self.at + at;
        let slice = self.memory.as_volatile_slice();
        // Every offset lies within what `Inflight::map` has checked.
        slice.load(offset, Ordering::Acquire).unwrap_or_default()
    }

    fn store<T: vm_memory::AtomicAccess>(&self, at: usize, value: T) {
        let slice = self.memory.as_volatile_slice();
        let _ = slice.store(value, self.at + at, Ordering::Release);
    }

    fn entry(head: u16) -> usize {
        HEAD + usize::from(head) * ENTRY
    }

    /// A request has been taken from the available ring.
    pub fn begin(&mut self, head: u16) {
        if head >= self.size {
            return;
        }
        self.counter = self.counter.wrapping_add(1);
        self.store(Self::entry(head) + 8, self.counter);
        self.store(Self::entry(head), 1u8);
    }

    /// A request's answer is about to be put into the used ring.
    pub fn publish(&self, head: u16) {
        if head >= self.size {
            return;
        }
        let last: u16 = self.load(12);
        self.store(Self::entry(head) + 6, last);
        self.store(12, head);
    }

    /// The answer is in the used ring, whose index is `used` now.
    pub fn finish(&self, head: u16, used: u16) {
        if head >= self.size {
            return;
        }
        self.store(Self::entry(head), 0u8);
        self.store(14, used);
    }

    fn take_up(&mut self, used: u16) -> Left {
        let version: u16 = self.load(8);
        if version != VERSION {
            for head in 0..self.size {
                self.store(Self::entry(head), 0u8);
            }
            self.store(0, 0u64);
            self.store(10, self.size);
            self.store(14, used);
            self.store(8, VERSION);
            return Left::default();
        }
        // Killed after the used ring had the last answer, and before it was noted here. Answers
        // go there one by one, so that it is one at most.
        if self.load::<u16>(14) != used {
            let last: u16 = self.load(12);
            if last < self.size {
                self.store(Self::entry(last), 0u8);
            }
            self.store(14, used);
        }
        let mut left: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.load::<u8>(Self::entry(*head)) != 0)
            .map(|head| (self.load(Self::entry(head) + 8), head))
            .collect();
        left.sort_unstable();
        self.counter = left.last().map_or(0, |(counter, _)| *counter);
        Left {
            heads: left.into_iter().map(|(_, head)| head).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inflight(file: &File) -> Inflight {
        let lost = Arc::new(EventFd::new(0).unwrap());
        let len = file.metadata().unwrap().len();
        Inflight::map(file.try_clone().unwrap(), 0, len, 2, 8, &lost).unwrap()
    }

    #[test]
    fn what_was_not_answered_is_found_in_its_order() {
        let (file, _) = create(2, 8).unwrap();
        let (mut queue, left) = inflight(&file).queue(1, 8, 100).unwrap();
        assert_eq!(left, Left::default());
        for head in [5, 2, 7] {
            queue.begin(head);
        }
        queue.publish(2);
        queue.finish(2, 101);
        drop(queue);
        let (_, left) = inflight(&file).queue(1, 8, 101).unwrap();
        assert_eq!(left.heads, [5, 7]);
        let (_, other) = inflight(&file).queue(0, 8, 0).unwrap();
        assert_eq!(other, Left::default());
    }

    #[test]
    fn request_whose_answer_the_guest_has_is_not_done_again() {
        let (file, _) = create(2, 8).unwrap();
        let (mut queue, _) = inflight(&file).queue(0, 8, 0).unwrap();
        queue.begin(3);
        queue.begin(4);
        queue.publish(3);
        // Killed here, with the used ring's index at 1.
        let (_, left) = inflight(&file).queue(0, 8, 1).unwrap();
        assert_eq!(left.heads, [4]);
    }

    #[test]
    fn request_that_was_about_to_be_answered_is_done_again() {
        let (file, _) = create(2, 8).unwrap();
        let (mut queue, _) = inflight(&file).queue(0, 8, 0).unwrap();
        queue.begin(3);
        queue.publish(3);
        let (_, left) = inflight(&file).queue(0, 8, 0).unwrap();
        assert_eq!(left.heads, [3]);
    }

    #[test]
    fn counters_go_on_after_a_restart() {
        let (file, _) = create(1, 8).unwrap();
        let map = || {
            let lost = Arc::new(EventFd::new(0).unwrap());
            let len = file.metadata().unwrap().len();
            Inflight::map(file.try_clone().unwrap(), 0, len, 1, 8, &lost).unwrap()
        };
        let (mut queue, _) = map().queue(0, 8, 0).unwrap();
        queue.begin(6);
        let (mut queue, _) = map().queue(0, 8, 0).unwrap();
        queue.begin(1);
        let (_, left) = map().queue(0, 8, 0).unwrap();
        assert_eq!(left.heads, [6, 1]);
    }

    #[test]
    fn memory_that_is_too_small_is_refused() {
        let lost = Arc::new(EventFd::new(0).unwrap());
        let (file, len) = create(1, 8).unwrap();
        let map = |offset, len, queues| {
            Inflight::map(file.try_clone().unwrap(), offset, len, queues, 8, &lost)
        };
        assert!(map(0, len, 2).is_err(), "too small for two queues");
        assert!(map(64, len, 1).is_err(), "beyond the end of the file");
        assert!(map(u64::MAX, len, 1).is_err(), "beyond everything");
        assert!(map(0, u64::MAX, 1).is_err(), "endless");
    }
}
