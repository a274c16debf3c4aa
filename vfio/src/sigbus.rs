//! Survives the loss of pages under a mapping.
//!
//! A mapping can lose its pages while it is in use: whoever holds the descriptor of a memory
//! file can shorten it, and a device's BAR goes away with the device, or when its memory
//! decoding is turned off. The next access raises SIGBUS (mmap(2)), which by default ends the
//! process. The handler here puts a page of zeros in the place of the lost one, so that the
//! access goes on, and the owner of the mapping finds out: by an eventfd, or by the guard.
//!
//! Rules:
//!
//! 1. The handler runs at any instruction of any thread. It calls only mmap(2), write(2) and
//!    sigaction(2), takes no lock, allocates nothing, and leaves errno as it was.
//! 2. It replaces pages only inside a range that a live [`Guard`] stands for. A guard keeps
//!    its mapping alive, so that the range cannot come to hold anything else. A SIGBUS
//!    anywhere else goes to whoever handled it before, or does what it does by default.
//! 3. A guard that is dropped waits until no handler looks at its slot, which takes at most
//!    two system calls; only then are slot, mapping and eventfd free for others.
//! 4. The state says that pages are lost before the first of them is replaced, and that they
//!    are whole again only after the last has been: whoever finds the same whole state before
//!    and after an access has not touched a replaced page.
#![allow(
    unsafe_code,
    reason = "signal handlers and mappings are unsafe to make"
)]

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Once};

use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

/// How many mappings can be guarded in one process.
const SLOTS: usize = 1024;

const FREE: usize = 0;
const CLAIMED: usize = 1;
const ACTIVE: usize = 2;

/// Bits of [`Slot::pages`]; what is above them counts the repairs.
const LOST: usize = 1;
const REPAIRING: usize = 2;
const REPAIRED: usize = 4;

/// One guarded range. The fields mean something while `state` is `ACTIVE`.
struct Slot {
    state: AtomicUsize,
    /// Handlers that are looking at the slot now.
    readers: AtomicUsize,
    start: AtomicUsize,
    end: AtomicUsize,
    granule: AtomicUsize,
    event: AtomicI32,
    pages: AtomicUsize,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        state: AtomicUsize::new(FREE),
        readers: AtomicUsize::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        granule: AtomicUsize::new(0),
        event: AtomicI32::new(-1),
        pages: AtomicUsize::new(0),
    }
}; SLOTS];

/// What handled SIGBUS before; set once, before our handler is, and never freed.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(null_mut());

/// A range of pages that this process has mapped.
///
/// # Safety
///
/// `range` always returns the same range. For as long as the value lives, or until a
/// [`Guard::repair`] has failed, the range is mapped, and is touched by volatile accesses and by
/// the kernel only: its bytes may change at any time.
pub(crate) unsafe trait Pages: Send + Sync {
    /// The addresses of the range.
    fn range(&self) -> Range<usize>;
}

// SAFETY: a region is one mapping for as long as it lives, and `vm-memory` gives access to it
// by volatile slices only.
unsafe impl Pages for MmapRegion {
    fn range(&self) -> Range<usize> {
        let start = self.as_ptr() as usize;
        start..start.saturating_add(self.size())
    }
}

/// Keeps accesses to one mapping from ending the process.
pub struct Guard {
    slot: &'static Slot,
    // Rules 2 and 3: neither may go while the slot is active.
    _pages: Arc<dyn Pages>,
    _event: Option<Arc<EventFd>>,
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Slot { start, end, .. } = self.slot;
        write!(f, "Guard({start:?}..{end:?}, hit {})", self.was_hit())
    }
}

impl Guard {
    /// Guards `memory`, which is made of pages of `granule` bytes (a power of two). `event`
    /// is signalled whenever a page had to be replaced.
    pub fn new(memory: &Arc<MmapRegion>, granule: usize, event: &Arc<EventFd>) -> io::Result<Self> {
        Self::of(memory.clone(), granule, Some(event.clone()))
    }

    /// As [`Self::new`], for any pages.
    pub(crate) fn of(
        pages: Arc<dyn Pages>,
        granule: usize,
        event: Option<Arc<EventFd>>,
    ) -> io::Result<Self> {
        install();
        let claim = |slot: &&Slot| {
            slot.state
                .compare_exchange(FREE, CLAIMED, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
        };
        let slot = TABLE
            .iter()
            .find(claim)
            .ok_or_else(|| io::Error::other(format!("more than {SLOTS} mappings are guarded")))?;
        let Range { start, end } = pages.range();
        slot.start.store(start, Ordering::Relaxed);
        slot.end.store(end, Ordering::Relaxed);
        slot.granule
            .store(granule.max(1).next_power_of_two(), Ordering::Relaxed);
        let fd = event.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        slot.event.store(fd, Ordering::Relaxed);
        slot.pages.store(0, Ordering::Relaxed);
        slot.state.store(ACTIVE, Ordering::SeqCst);
        Ok(Self {
            slot,
            _pages: pages,
            _event: event,
        })
    }

    /// Whether a page had to be replaced, and none has been repaired since.
    pub fn was_hit(&self) -> bool {
        self.whole().is_none()
    }

    /// What rule 4 is about: `None` while pages are lost, else a value that changes with
    /// every loss.
    #[inline]
    pub(crate) fn whole(&self) -> Option<usize> {
        let pages = self.slot.pages.load(Ordering::SeqCst);
        (pages & (LOST | REPAIRING) == 0).then_some(pages)
    }

    /// Makes lost pages whole again by `remap`, which maps the whole range anew. One thread
    /// does it; what is lost meanwhile stays lost. When `remap` fails the range may belong to
    /// anybody, so it is guarded no longer, and its pages stay lost for good.
    pub(crate) fn repair(&self, remap: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let pages = &self.slot.pages;
        let seen = pages.load(Ordering::SeqCst);
        let during = seen & !LOST | REPAIRING;
        let swap = |from, to| pages.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst);
        if seen & (LOST | REPAIRING) != LOST || swap(seen, during).is_err() {
            return Ok(());
        }
        if let Err(error) = remap() {
            let start = self.slot.start.load(Ordering::SeqCst);
            self.slot.end.store(start, Ordering::SeqCst);
            return Err(error);
        }
        if swap(during, (during & !REPAIRING).wrapping_add(REPAIRED)).is_err() {
            // Lost again meanwhile: the next one tries again.
            pages.fetch_and(!REPAIRING, Ordering::SeqCst);
        }
        Ok(())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.slot.state.store(CLAIMED, Ordering::SeqCst);
        while self.slot.readers.load(Ordering::SeqCst) != 0 {
            std::hint::spin_loop();
        }
        self.slot.state.store(FREE, Ordering::SeqCst);
    }
}

fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: all-zero is a valid `sigaction` (default action, empty mask), and both
        // calls get pointers to live ones. The handler keeps rule 1.
        unsafe {
            let mut previous: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, null(), &mut previous) != 0 {
                return;
            }
            PREVIOUS.store(Box::into_raw(Box::new(previous)), Ordering::SeqCst);
            let mut ours: libc::sigaction = std::mem::zeroed();
            ours.sa_sigaction = handle as *const () as usize;
            ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &ours, null_mut());
        }
    });
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid `info` to a handler with SA_SIGINFO, and errno is
    // this thread's own.
    let (code, address, errno) = unsafe {
        (
            (*info).si_code,
            (*info).si_addr() as usize,
            *libc::__errno_location(),
        )
    };
    // Codes above 0 come from a fault, which has an address; others from kill(2).
    if code <= 0 || !replace_page(address) {
        pass_on(signal, info, context, code > 0);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Puts zeros where `address` is, if that is in a guarded range.
fn replace_page(address: usize) -> bool {
    for slot in &TABLE {
        if slot.state.load(Ordering::SeqCst) != ACTIVE {
            continue;
        }
        slot.readers.fetch_add(1, Ordering::SeqCst);
        // Rule 3: the guard may have been dropped before it could see this reader.
        let replaced =
            slot.state.load(Ordering::SeqCst) == ACTIVE && replace_page_in(slot, address);
        slot.readers.fetch_sub(1, Ordering::SeqCst);
        if replaced {
            return true;
        }
    }
    false
}

fn replace_page_in(slot: &Slot, address: usize) -> bool {
    let (start, end) = (
        slot.start.load(Ordering::Relaxed),
        slot.end.load(Ordering::Relaxed),
    );
    if !(start..end).contains(&address) {
        return false;
    }
    let granule = slot.granule.load(Ordering::Relaxed);
    let page = address & !(granule - 1);
    // Rule 4: before the page is replaced.
    slot.pages.fetch_or(LOST, Ordering::SeqCst);
    // SAFETY: rule 2. The page lies in the guarded mapping, which the guard keeps alive and
    // which only volatile accesses and the kernel touch (`Pages`), so its bytes may change.
    let mapped = unsafe {
        libc::mmap(
            page as *mut libc::c_void,
            granule,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_FIXED | libc::MAP_ANONYMOUS | libc::MAP_PRIVATE,
            -1,
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        return false;
    }
    let event = slot.event.load(Ordering::Relaxed);
    if event >= 0 {
        let one = 1u64.to_ne_bytes();
        // SAFETY: rule 3 keeps the descriptor open, and the buffer is 8 bytes long. A full
        // counter has been noticed or will be, so the result does not matter.
        unsafe { libc::write(event, one.as_ptr().cast(), one.len()) };
    }
    true
}

/// Does with a signal what would have been done without us.
fn pass_on(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
    is_fault: bool,
) {
    // SAFETY: set before this handler was installed and never freed or changed.
    let previous = unsafe { PREVIOUS.load(Ordering::SeqCst).as_ref() };
    match previous {
        Some(p) if p.sa_sigaction == libc::SIG_IGN && !is_fault => {}
        Some(p) if p.sa_sigaction != libc::SIG_DFL && p.sa_sigaction != libc::SIG_IGN => {
            if p.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: with SA_SIGINFO the field holds a function of this type.
                let call: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    unsafe { std::mem::transmute(p.sa_sigaction) };
                call(signal, info, context);
            } else {
                // SAFETY: without SA_SIGINFO it holds a function of this type.
                let call: extern "C" fn(libc::c_int) =
                    unsafe { std::mem::transmute(p.sa_sigaction) };
                call(signal);
            }
        }
        _ => {
            // SAFETY: an all-zero `sigaction` asks for the default. A fault happens again
            // at the return; anything else has to be sent again.
            unsafe {
                let default: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, &default, null_mut());
                if !is_fault {
                    libc::raise(signal);
                }
            }
        }
    }
}
