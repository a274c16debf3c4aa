//! The system calls that move bytes between memory and a socket, and the crate's only unsafe
//! code.
//!
//! Why it is needed: payloads are gathered from and land in memory that a guest (or another
//! process) changes at any time. No Rust reference to such memory may exist, so the safe
//! wrappers, which take slices, cannot be used.
//!
//! Rules:
//! 1. Span memory is only ever named to the kernel, as address and length. It is never
//!    read, written or referenced here.
//! 2. Every address handed to the kernel is in bounds of a mapping or slice that is borrowed
//!    for `'a`, and so outlives the call. [`List::push_span`] checks the bounds.
//! 3. A [`Scatter`] holds slices by unique borrow, a [`Gather`] by shared borrow; neither can
//!    stand in for the other.

#![allow(
    unsafe_code,
    reason = "no reference to memory of a guest may exist, and safe calls take slices"
)]

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::link::check_span;
use crate::{FabricError, Span};

/// The most pieces of memory that Linux takes in one call (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// Pieces of memory for one call. On the stack and not initialised: filling it costs no more
/// than the pieces that it holds.
struct List {
    pieces: [MaybeUninit<libc::iovec>; MAX_PIECES],
    len: usize,
    bytes: usize,
}

impl List {
    fn new() -> Self {
        List {
            pieces: [const { MaybeUninit::uninit() }; MAX_PIECES],
            len: 0,
            bytes: 0,
        }
    }

    /// Appends a piece; false if the list is full. Empty pieces take no place.
    fn push(&mut self, address: *mut u8, len: usize) -> bool {
        if len == 0 {
            return true;
        }
        let Some(piece) = self.pieces.get_mut(self.len) else {
            return false;
        };
        piece.write(libc::iovec {
            iov_base: address.cast(),
            iov_len: len,
        });
        self.len += 1;
        self.bytes = self.bytes.saturating_add(len);
        true
    }

    /// Appends what follows the first `skip` bytes of a span.
    fn push_span(&mut self, span: &Span, skip: usize) -> Result<bool, FabricError> {
        check_span(span)?;
        let skip = skip.min(span.len);
        // In bounds by the check, so the address does not wrap.
        let address = span.memory.as_ptr().wrapping_add(span.offset + skip);
        Ok(self.push(address, span.len - skip))
    }

    fn message(&mut self) -> libc::msghdr {
        // SAFETY: msghdr is a C struct of integers and pointers, for which zero is valid; its
        // private padding fields on some targets leave no other way to make one.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.pieces.as_mut_ptr().cast();
        message.msg_iovlen = self.len as _;
        message
    }
}

/// Memory that one call sends from.
pub(super) struct Gather<'a> {
    list: List,
    sources: PhantomData<(&'a [u8], &'a Span)>,
}

impl<'a> Gather<'a> {
    pub(super) fn new() -> Self {
        Gather {
            list: List::new(),
            sources: PhantomData,
        }
    }

    /// Appends bytes; false if there is no place for them.
    pub(super) fn push(&mut self, bytes: &'a [u8]) -> bool {
        self.list.push(bytes.as_ptr().cast_mut(), bytes.len())
    }

    /// Appends what follows the first `skip` bytes of a span; false if there is no place.
    pub(super) fn push_span(&mut self, span: &'a Span, skip: usize) -> Result<bool, FabricError> {
        self.list.push_span(span, skip)
    }

    /// Total length of what was appended.
    pub(super) fn bytes(&self) -> usize {
        self.list.bytes
    }

    /// Sends, without waiting. `None` if the socket takes nothing now.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<Option<usize>> {
        let message = self.list.message();
        no_wait(|| {
            // SAFETY: `message` names `list.len` initialised pieces, each of which is memory
            // borrowed for 'a (rule 2); the kernel only reads them.
            unsafe {
                libc::sendmsg(
                    socket.as_raw_fd(),
                    &raw const message,
                    libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
                )
            }
        })
    }
}

/// Memory that one call receives into.
pub(super) struct Scatter<'a> {
    list: List,
    targets: PhantomData<(&'a mut [u8], &'a Span)>,
}

impl<'a> Scatter<'a> {
    pub(super) fn new() -> Self {
        Scatter {
            list: List::new(),
            targets: PhantomData,
        }
    }

    /// Appends a buffer; false if there is no place for it.
    pub(super) fn push(&mut self, bytes: &'a mut [u8]) -> bool {
        self.list.push(bytes.as_mut_ptr(), bytes.len())
    }

    /// Appends a span; false if there is no place for it.
    pub(super) fn push_span(&mut self, span: &'a Span) -> Result<bool, FabricError> {
        self.list.push_span(span, 0)
    }

    /// Total length of what was appended.
    pub(super) fn bytes(&self) -> usize {
        self.list.bytes
    }

    /// Receives, without waiting. `None` if nothing has arrived, 0 at the end of the stream.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<Option<usize>> {
        let mut message = self.list.message();
        no_wait(|| {
            // SAFETY: `message` names `list.len` initialised pieces. Slices among them are
            // borrowed uniquely for 'a (rule 3); spans are memory that nothing refers to
            // (rule 1). So the kernel may write to all of them.
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) }
        })
    }
}

/// Repeats an interrupted call, and turns "would block" into `None`.
fn no_wait(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<Option<usize>> {
    loop {
        // Negative exactly when the call failed.
        if let Ok(bytes) = usize::try_from(call()) {
            return Ok(Some(bytes));
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Ok(None),
            _ => return Err(error),
        }
    }
}
