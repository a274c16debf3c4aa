//! What does not leave the process: a wake-up from thread to thread, and copying memory.

use std::hint::black_box;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::Result;
use rustix::event::{self, EventfdFlags};
use rustix::io::{Errno, read, write};

use super::stream::rate;
use super::wire::ping;
use super::{BIG, How, MEMORY, NOT_CACHED};
use crate::helpers::Pinned;
use crate::results::Figures;
use crate::session::{Plan, Subject, Take};

/// Round trip between two threads that signal each other through eventfds.
pub(crate) fn eventfd(how: How, plan: &Plan) -> Result<Figures> {
    let flags = if how == How::Polled {
        EventfdFlags::NONBLOCK
    } else {
        EventfdFlags::empty()
    };
    let there = event::eventfd(0, flags)?;
    let back = event::eventfd(0, flags)?;
    let far = if how == How::OneCpu {
        Pinned::NEAR
    } else {
        Pinned::far()
    };
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let answering = scope.spawn(|| -> Result<()> {
            let _pinned = Pinned::to(far)?;
            while !done.load(Ordering::Relaxed) {
                take(&there)?;
                signal(&back)?;
            }
            Ok(())
        });
        let pinned = Pinned::to(Pinned::NEAR)?;
        let measured = ping(plan, || {
            signal(&there)?;
            take(&back)
        });
        drop(pinned);
        done.store(true, Ordering::Relaxed);
        // Lets the other thread see the flag; after its error nobody answers.
        signal(&there)?;
        match answering.join() {
            Ok(answered) => answered.and(measured),
            Err(_) => measured,
        }
    })
}

fn signal(fd: &OwnedFd) -> Result<()> {
    write(fd, &1_u64.to_ne_bytes())?;
    Ok(())
}

fn take(fd: &OwnedFd) -> Result<()> {
    let mut count = [0; 8];
    loop {
        match read(fd, &mut count) {
            Ok(_) => return Ok(()),
            Err(Errno::AGAIN | Errno::INTR) => std::hint::spin_loop(),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Copying memory in pieces of 128 KiB.
pub(crate) struct Memory;

/// Beyond any cache.
const COLD: usize = 512 << 20;

impl Subject for Memory {
    fn part(&self) -> &'static str {
        "limits"
    }

    fn name(&self) -> String {
        MEMORY.into()
    }

    fn measure(&self, take: &mut Take<'_>) -> Result<()> {
        take.one("128 KiB cached", |plan| copy(BIG, &plan.brief()))?;
        take.one(NOT_CACHED, |plan| copy(COLD, &plan.brief()))
    }
}

/// Copies pieces in turn between two areas of this size.
fn copy(area: usize, plan: &Plan) -> Result<Figures> {
    let from = vec![1_u8; area];
    let mut to = vec![2_u8; area];
    let mut at = 0;
    rate(plan, || {
        to[at..at + BIG].copy_from_slice(black_box(&from[at..at + BIG]));
        black_box(&mut to[at]);
        at = (at + BIG) % area;
        Ok(BIG)
    })
}
