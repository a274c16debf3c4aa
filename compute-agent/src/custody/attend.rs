//! A worker's side of custody where the event loop does not see to it: a thread that hears the keeper and
//! looks for a new one.

use std::io;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

use log::warn;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, getpid, kill_process};

use super::worker::{Asked, Custody};

/// How often it looks without being told, where the sandbox has no inotify, whether there is a new daemon.
const TICK: Duration = Duration::from_secs(1);

/// Starts the thread, if there is a keeper. An end that the keeper asks for is a SIGTERM to this
/// process.
pub fn attend(custody: &Custody) -> io::Result<()> {
    if !custody.is_some() {
        return Ok(());
    }
    let custody = custody.clone();
    thread::Builder::new()
        .name("custody".into())
        .spawn(move || run(&custody))?;
    Ok(())
}

fn run(custody: &Custody) {
    loop {
        // Only this thread waits, and with a descriptor of its own: the lock is not held meanwhile.
        let watched = custody.client().and_then(|client| {
            let fd = client.descriptor()?;
            fd.try_clone_to_owned().ok()
        });
        wait(watched.as_ref());
        let Some(mut client) = custody.client() else {
            return;
        };
        if client.listen() == Asked::Stop {
            if let Err(error) = kill_process(getpid(), Signal::TERM) {
                warn!("the end that the daemon asks for does not come: {error}");
            }
        }
        client.look_for_keeper();
    }
}

fn wait(watched: Option<&OwnedFd>) {
    let tick = Timespec {
        tv_sec: TICK.as_secs() as i64,
        tv_nsec: 0,
    };
    let mut fds: Vec<_> = watched
        .into_iter()
        .map(|fd| PollFd::new(fd, PollFlags::IN))
        .collect();
    // An interrupted wait only looks a little earlier.
    let _ = poll(&mut fds, Some(&tick));
}
