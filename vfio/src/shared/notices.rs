//! What the function or its host says, said to every portion: an eventfd has one reader, so each
//! portion has eventfds of its own, and a thread that sleeps until there is something to pass on.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::function::{Function, FunctionError, Notice};

const STOP: u64 = u64::MAX;

fn failed(what: &str) -> impl FnOnce(io::Error) -> FunctionError {
    let what = what.to_owned();
    move |source| FunctionError::Io { what, source }
}

/// One portion's eventfds.
pub(super) struct Bells {
    unplug: EventFd,
    error: EventFd,
}

impl Bells {
    pub(super) fn new() -> Result<Self, FunctionError> {
        let make = || EventFd::new(EFD_NONBLOCK).map_err(failed("making an eventfd"));
        Ok(Self {
            unplug: make()?,
            error: make()?,
        })
    }

    pub(super) fn all(&self) -> Vec<(Notice, &EventFd)> {
        vec![
            (Notice::UnplugRequested, &self.unplug),
            (Notice::ErrorReported, &self.error),
        ]
    }

    /// Forgets what was said to the one before.
    pub(super) fn silence(&self) {
        for (_, bell) in self.all() {
            // It is empty, or is now.
            let _ = bell.read();
        }
    }

    /// The function is to be let go of.
    pub(super) fn unplug(&self) {
        // A counter that is full has been signalled.
        let _ = self.unplug.write(1);
    }

    fn ring(&self, notice: Notice) {
        match notice {
            Notice::UnplugRequested => self.unplug(),
            Notice::ErrorReported => {
                let _ = self.error.write(1);
            }
        }
    }
}

/// The thread that passes notices on, until it is dropped.
pub(super) struct Crier {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Crier {
    /// Starts it, if the function can say anything. It holds duplicates of the function's
    /// eventfds, and not the function.
    pub(super) fn start(
        function: &dyn Function,
        bells: Vec<Arc<Bells>>,
    ) -> Result<Option<Self>, FunctionError> {
        let notices = function.notices();
        if notices.is_empty() {
            return Ok(None);
        }
        let duplicates: io::Result<Vec<(Notice, EventFd)>> = notices
            .into_iter()
            .map(|(notice, event)| Ok((notice, event.try_clone()?)))
            .collect();
        let notices = duplicates.map_err(failed("duplicating an eventfd"))?;
        let stop = EventFd::new(EFD_NONBLOCK).map_err(failed("making an eventfd"))?;
        let epoll = Epoll::new().map_err(failed("creating an epoll instance"))?;
        let watched = notices.iter().map(|(_, event)| event).zip(0u64..);
        for (event, id) in watched.chain([(&stop, STOP)]) {
            let wanted = EpollEvent::new(EventSet::IN, id);
            epoll
                .ctl(ControlOperation::Add, event.as_raw_fd(), wanted)
                .map_err(failed("watching an eventfd"))?;
        }
        let thread = thread::Builder::new()
            .name("notices".into())
            .spawn(move || pass_on(&epoll, &notices, &bells))
            .map_err(failed("starting a thread"))?;
        Ok(Some(Self {
            stop,
            thread: Some(thread),
        }))
    }
}

impl Drop for Crier {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn pass_on(epoll: &Epoll, notices: &[(Notice, EventFd)], bells: &[Arc<Bells>]) {
    let mut events = [EpollEvent::default(); 4];
    loop {
        let ready = match epoll.wait(-1, &mut events) {
            Ok(ready) => ready,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                log::warn!("a shared drive's notices are no longer heard: {error}");
                return;
            }
        };
        for event in &events[..ready] {
            if event.data() == STOP {
                return;
            }
            if let Some((notice, event)) = notices.get(event.data() as usize) {
                if event.read().is_ok() {
                    bells.iter().for_each(|bells| bells.ring(*notice));
                }
            }
        }
    }
}
