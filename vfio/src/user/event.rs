//! Between [`EventFd`] and the standard library's descriptor types.
//!
//! `EventFd` offers raw descriptors only, and to make an owned or borrowed one of those is
//! unsafe. Rules: a raw descriptor never leaves this file, and the type that comes out
//! owns it, or borrows from the one that does.
#![allow(unsafe_code, reason = "`EventFd` has raw descriptors only")]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use vmm_sys_util::eventfd::EventFd;

/// The descriptor of an eventfd, for as long as the eventfd is borrowed.
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` keeps the descriptor open, and the result does not outlive it. The
    // raw descriptor is never -1, since `EventFd` is only made of open descriptors.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Takes a descriptor for an eventfd. That it is one is for the caller to see to: writes to
/// anything else would go wherever that leads.
pub fn from_owned(fd: OwnedFd) -> EventFd {
    // SAFETY: `into_raw_fd` hands over an open descriptor that nothing else owns.
    unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
}
