//! libibverbs as safe types, and all unsafe code of this provider.
//!
//! Why it is needed: verbs are a C interface of pointers. The safe crate over it (`ibverbs`) stops
//! before memory that somebody else allocated, RDMA WRITE, immediate and inline data, completion
//! channels and asynchronous events; its objects borrow each other and hand out no pointer to
//! go on with. So this module stands on the sys crate alone.
//!
//! Rules:
//! 1. Each object owns one pointer that libibverbs gave out, frees it once in `drop`, and holds
//!    (by `Arc`) every object that libibverbs wants to outlive it.
//! 2. The network reads and writes memory only inside a [`Region`], which holds its mapping. No Rust
//!    reference to such memory exists: a mapping is only accessed by `vm-memory`'s volatile copies.
//! 3. A work request names memory by [`Piece`], which only a region gives out and which is in
//!    its bounds. A piece of a region that is gone names a dead key: the device refuses it. Only
//!    inline data is read through the address by the CPU, and only if it is in a region that the
//!    caller has at hand; see [`QueuePair::post`].
//! 4. libibverbs locks what it shares between threads (`man ibv_post_send`: thread safe), so the
//!    types may cross threads.

#![allow(unsafe_code, reason = "verbs are a C interface of pointers")]

mod completion;
mod device;
mod memory;
mod queue;

pub use completion::{Channel, Completion, CompletionQueue, Status};
pub use device::{AsyncEvent, Context, Gid, GidKind, LinkLayer, Port, device_names};
pub use memory::{Access, Domain, Piece, Region};
pub use queue::{Address, Chain, Connection, QueuePair, QueueSizes, Write};

use std::io;

/// The outcome of a call that returns an errno, or -1 with `errno` set.
fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        errno => Err(io::Error::from_raw_os_error(errno.abs())),
    }
}

/// A descriptor of libibverbs' that its owner keeps open.
fn set_nonblocking(fd: libc::c_int) -> io::Result<()> {
    // SAFETY: `fd` is open: the caller's object, which owns it, is alive.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let flags = rustix::fs::fcntl_getfl(fd)?;
    rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)?;
    Ok(())
}
