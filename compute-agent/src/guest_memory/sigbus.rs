//! Survives the truncation of a memory file.
//!
//! Whoever holds the descriptor of a file that we have mapped can shorten it; the next
//! access to a page beyond its new end then raises SIGBUS (mmap(2)), which by default ends
//! the process. The handler here puts a page of zeros in the place of the lost one, so that
//! the access goes on, and tells the owner of the mapping, who drops the client.
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
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Once};

use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

/// How many mappings can be guarded in one process.
const SLOTS: usize = 1024;

const FREE: usize = 0;
const CLAIMED: usize = 1;
const ACTIVE: usize = 2;

/// One guarded range. The fields mean something while `state` is `ACTIVE`.
struct Slot {
    state: AtomicUsize,
    /// Handlers that are looking at the slot now.
    readers: AtomicUsize,
    start: AtomicUsize,
    end: AtomicUsize,
    granule: AtomicUsize,
    event: AtomicI32,
    hit: AtomicBool,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        state: AtomicUsize::new(FREE),
        readers: AtomicUsize::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        granule: AtomicUsize::new(0),
        event: AtomicI32::new(-1),
        hit: AtomicBool::new(false),
    }
}; SLOTS];

/// What handled SIGBUS before; set once, before our handler is, and never freed.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(null_mut());

/// Keeps accesses to one mapping from ending the process.
#[derive(Debug)]
pub(super) struct Guard {
    slot: &'static Slot,
    // Rules 2 and 3: neither may go while the slot is active.
    _memory: Arc<MmapRegion>,
    _event: Arc<EventFd>,
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (start, end) = (&self.start, &self.end);
        write!(f, "Slot({start:?}..{end:?}, hit {:?})", self.hit)
    }
}

impl Guard {
    /// Guards `memory`, which is made of pages of `granule` bytes (a power of two). `event`
    /// is signalled whenever a page had to be replaced.
    pub(super) fn new(
        memory: &Arc<MmapRegion>,
        granule: usize,
        event: &Arc<EventFd>,
    ) -> io::Result<Self> {
        install();
        let claim = |slot: &&Slot| {
            slot.state
                .compare_exchange(FREE, CLAIMED, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
        };
        let slot = TABLE.iter().find(claim).ok_or_else(|| {
            io::Error::other(format!("more than {SLOTS} memory files are mapped at once"))
        })?;
        let start = memory.as_ptr() as usize;
        slot.start.store(start, Ordering::Relaxed);
        slot.end
            .store(start.saturating_add(memory.size()), Ordering::Relaxed);
        slot.granule
            .store(granule.max(1).next_power_of_two(), Ordering::Relaxed);
        slot.event.store(event.as_raw_fd(), Ordering::Relaxed);
        slot.hit.store(false, Ordering::Relaxed);
        slot.state.store(ACTIVE, Ordering::SeqCst);
        Ok(Self {
            slot,
            _memory: memory.clone(),
            _event: event.clone(),
        })
    }

    /// Whether a page had to be replaced.
    pub(super) fn was_hit(&self) -> bool {
        self.slot.hit.load(Ordering::SeqCst)
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
    // SAFETY: rule 2. The page lies in the guarded mapping, which the guard keeps alive and
    // which only volatile accesses and the kernel touch, so its bytes may change.
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
    slot.hit.store(true, Ordering::SeqCst);
    let one = 1u64.to_ne_bytes();
    // SAFETY: rule 3 keeps the descriptor open, and the buffer is 8 bytes long. A full
    // counter has been noticed or will be, so the result does not matter.
    unsafe {
        libc::write(
            slot.event.load(Ordering::Relaxed),
            one.as_ptr().cast(),
            one.len(),
        )
    };
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
