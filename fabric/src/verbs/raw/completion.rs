//! Completion queues, and the channel that says when there is something in them.

use std::ffi::CStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ibverbs_sys as sys;

use super::{Context, check, set_nonblocking};

/// Most completions that one call takes.
const BURST: usize = 16;

/// How a work request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(sys::ibv_wc_status::Type);

impl Status {
    /// The peer's side refused the access: the key is dead, or the range outside its memory.
    pub fn is_refusal(self) -> bool {
        self.0 == sys::ibv_wc_status::IBV_WC_REM_ACCESS_ERR
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // SAFETY: the function returns a static C string for any value.
        let text = unsafe { CStr::from_ptr(sys::ibv_wc_status_str(self.0)) };
        f.write_str(&text.to_string_lossy())
    }
}

/// The end of a work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The number it was posted with.
    pub id: u64,
    /// How it failed, if it did.
    pub failure: Option<Status>,
    /// The immediate data that came with it.
    pub immediate: Option<u32>,
}

/// Tells by a descriptor that a queue has something.
#[derive(Debug)]
pub struct Channel {
    channel: NonNull<sys::ibv_comp_channel>,
    _context: Arc<Context>,
}

// SAFETY: rule 4 of the module; the pointer is owned.
unsafe impl Send for Channel {}
// SAFETY: rule 4 of the module.
unsafe impl Sync for Channel {}

impl Channel {
    /// A channel that does not block.
    pub fn new(context: &Arc<Context>) -> io::Result<Arc<Self>> {
        // SAFETY: the context is alive.
        let channel = unsafe { sys::ibv_create_comp_channel(context.as_ptr()) };
        let channel = NonNull::new(channel).ok_or_else(io::Error::last_os_error)?;
        let channel = Channel {
            channel,
            _context: Arc::clone(context),
        };
        set_nonblocking(channel.fd())?;
        Ok(Arc::new(channel))
    }

    fn fd(&self) -> libc::c_int {
        // SAFETY: the channel is alive; the field does not change.
        unsafe { (*self.channel.as_ptr()).fd }
    }

    /// Readable when [`Self::take_event`] has something.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the channel's, and open for as long as it is.
        unsafe { BorrowedFd::borrow_raw(self.fd()) }
    }
}

impl Channel {
    /// Takes an event off the channel, without waiting; says which of these queues it was of.
    pub fn take_event<const N: usize>(&self, queues: [&CompletionQueue; N]) -> Option<usize> {
        let mut queue = null_mut();
        let mut context = null_mut();
        // SAFETY: the channel is alive and does not block; both places are live.
        let result = unsafe {
            sys::ibv_get_cq_event(self.channel.as_ptr(), &raw mut queue, &raw mut context)
        };
        if result != 0 {
            return None;
        }
        let found = queues.iter().position(|known| known.as_ptr() == queue)?;
        queues[found].events.fetch_add(1, Ordering::Relaxed);
        Some(found)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once; its queues are gone (rule 1).
        unsafe { sys::ibv_destroy_comp_channel(self.channel.as_ptr()) };
    }
}

/// Where work requests of one kind end.
#[derive(Debug)]
pub struct CompletionQueue {
    queue: NonNull<sys::ibv_cq>,
    context: Arc<Context>,
    _channel: Arc<Channel>,
    /// Events that are taken and must be acknowledged before the queue can go.
    events: AtomicU32,
}

// SAFETY: rule 4 of the module; the pointer is owned.
unsafe impl Send for CompletionQueue {}
// SAFETY: rule 4 of the module.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    /// A queue for at least `depth` completions.
    pub fn new(
        channel: &Arc<Channel>,
        context: &Arc<Context>,
        depth: u32,
    ) -> io::Result<Arc<Self>> {
        // SAFETY: context and channel are alive; the queue needs no context of ours.
        let queue = unsafe {
            sys::ibv_create_cq(
                context.as_ptr(),
                depth as libc::c_int,
                null_mut(),
                channel.channel.as_ptr(),
                0,
            )
        };
        let queue = NonNull::new(queue).ok_or_else(io::Error::last_os_error)?;
        Ok(Arc::new(CompletionQueue {
            queue,
            context: Arc::clone(context),
            _channel: Arc::clone(channel),
            events: AtomicU32::new(0),
        }))
    }

    pub(super) fn as_ptr(&self) -> *mut sys::ibv_cq {
        self.queue.as_ptr()
    }

    /// Hands out what has completed, a few at most; how many there were.
    pub fn poll(&self, mut each: impl FnMut(Completion)) -> io::Result<usize> {
        let Some(poll) = self.context.ops().poll_cq else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        // SAFETY: an ibv_wc is integers only, for which zero is valid.
        let mut completions: [sys::ibv_wc; BURST] = unsafe { std::mem::zeroed() };
        // SAFETY: the queue is alive, and the array has room for as many as are asked for.
        let count = unsafe {
            poll(
                self.queue.as_ptr(),
                BURST as libc::c_int,
                completions.as_mut_ptr(),
            )
        };
        let count =
            usize::try_from(count).map_err(|_| io::Error::other("the completion queue failed"))?;
        for completion in completions.iter().take(count) {
            each(Completion {
                id: completion.wr_id(),
                failure: completion.error().map(|(status, _)| Status(status)),
                immediate: match completion.error() {
                    Some(_) => None,
                    None => completion.imm_data().map(u32::from_be),
                },
            });
        }
        Ok(count)
    }

    /// Has the channel tell of the next completion.
    pub fn arm(&self) -> io::Result<()> {
        let Some(arm) = self.context.ops().req_notify_cq else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        // SAFETY: the queue is alive.
        check(unsafe { arm(self.queue.as_ptr(), 0) })
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        let events = self.events.load(Ordering::Relaxed);
        // SAFETY: the queue is alive; all its events that were taken are acknowledged, once.
        unsafe { sys::ibv_ack_cq_events(self.queue.as_ptr(), events) };
        // SAFETY: created once, destroyed once; its queue pairs are gone (rule 1).
        unsafe { sys::ibv_destroy_cq(self.queue.as_ptr()) };
    }
}
