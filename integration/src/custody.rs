//! A worker whose descriptors are kept, as the agent's daemon has it: killed, and replaced by another
//! that goes on.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};

use farbus_compute_agent::custody::{Event, Keeper};

use crate::attached::EXPORT;
use crate::daemon::Daemon;
use crate::deadline::Deadline;
use crate::error::{Error, Result};
use crate::process::Kill;

/// The attachment's id.
pub const ID: &str = "disk0";
/// A keeper hears of an end, and a worker looks for a keeper, within this.
const NOTICE_SECS: u64 = 20;

/// One attachment with its keeper.
pub struct KeptWorker {
    keeper: Option<Keeper>,
    events: Receiver<Event>,
    worker: Option<Daemon>,
    path: PathBuf,
    arguments: Vec<String>,
}

impl KeptWorker {
    /// As [`Self::start_kind`], with a vfio-user endpoint.
    ///
    /// # Errors
    /// When the worker does not become ready.
    pub fn start(directory: &Path, address: &str, socket: &Path, options: &[&str]) -> Result<Self> {
        Self::start_kind("--vfio-user", directory, address, socket, options)
    }

    /// Attaches the export at `address` on `socket` with this kind of endpoint, and further options of
    /// `attach`. What is kept is at a socket in `directory`.
    ///
    /// # Errors
    /// When the worker does not become ready.
    pub fn start_kind(
        kind: &str,
        directory: &Path,
        address: &str,
        socket: &Path,
        options: &[&str],
    ) -> Result<Self> {
        let path = directory.join("custody.sock");
        let text = |path: &Path| path.display().to_string();
        let (socket, custody) = (text(socket), text(&path));
        let mut arguments: Vec<_> = [
            "--log-level",
            "debug",
            "attach",
            "--from",
            address,
            "--export",
            EXPORT,
            kind,
            &socket,
            "--custody",
            &custody,
            "--id",
            ID,
        ]
        .map(ToOwned::to_owned)
        .into();
        arguments.extend(options.iter().map(|option| (*option).to_owned()));
        let mut kept = Self {
            keeper: None,
            events: channel().1,
            worker: None,
            path,
            arguments,
        };
        kept.restart_keeper()?;
        kept.start_worker()?;
        Ok(kept)
    }

    /// The keeper.
    ///
    /// # Errors
    /// When there is none.
    pub fn keeper(&self) -> Result<&Keeper> {
        self.keeper.as_ref().ok_or_else(|| missing("a keeper"))
    }

    /// The worker.
    ///
    /// # Errors
    /// When there is none.
    pub fn worker(&self) -> Result<&Daemon> {
        self.worker.as_ref().ok_or_else(|| missing("a worker"))
    }

    /// Starts the worker, or its successor.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn start_worker(&mut self) -> Result<()> {
        let arguments: Vec<_> = self.arguments.iter().map(String::as_str).collect();
        // No other process is to get what the last one has left.
        let started = self.keeper()?.appoint_started(ID, || {
            let launched = Daemon::launch("farbus-compute-agent", &arguments)?;
            Ok::<_, Error>((launched.pid(), launched))
        })?;
        self.worker = Some(started.await_ready()?);
        Ok(())
    }

    /// Kills the worker at once, wherever it is, and waits until the keeper knows.
    ///
    /// # Errors
    /// When the keeper does not hear of it.
    pub fn kill_worker(&mut self) -> Result<()> {
        let worker = self.worker.take().ok_or_else(|| missing("a worker"))?;
        worker.signal(Kill::Kill)?;
        self.event("the loss of the worker", |event| {
            matches!(event, Event::Lost { .. })
        })?;
        worker.kill().or(Ok(()))
    }

    /// Waits for an event.
    ///
    /// # Errors
    /// When it does not come in time.
    pub fn event(&self, what: &str, is_it: impl Fn(&Event) -> bool) -> Result<Event> {
        let deadline = Deadline::secs(NOTICE_SECS);
        loop {
            match self.events.recv_timeout(deadline.remaining()) {
                Ok(event) if is_it(&event) => return Ok(event),
                Ok(_) => {}
                Err(_) => return Err(deadline.missed(what.to_owned())),
            }
        }
    }

    /// The keeper's process ends, as it were, with all that it held, and another one takes its
    /// place.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn restart_keeper(&mut self) -> Result<()> {
        self.keeper = None;
        let (send, events) = channel();
        let keeper = Keeper::bind(&self.path, move |event| {
            // Nobody listens any more at the end of a test.
            let _ = send.send(event);
        });
        let keeper = keeper.map_err(|error| missing(&format!("a keeper: {error}")))?;
        match &self.worker {
            Some(worker) => keeper.appoint(ID, worker.pid()),
            None => keeper.admit(ID),
        }
        self.keeper = Some(keeper);
        self.events = events;
        Ok(())
    }

    /// I/Os that the workers have completed so far.
    ///
    /// # Errors
    /// When the keeper has no statistics.
    pub fn completed(&self) -> Result<u64> {
        let statistics = self.keeper()?.statistics(ID);
        let statistics = statistics
            .ok_or_else(|| missing("statistics"))?
            .to_api(None);
        Ok(statistics.reads + statistics.writes + statistics.others)
    }

    /// Ends the worker in order.
    ///
    /// # Errors
    /// When it does not end so.
    pub fn end(mut self) -> Result<()> {
        let worker = self.worker.take().ok_or_else(|| missing("a worker"))?;
        worker.terminate()
    }
}

fn missing(what: &str) -> Error {
    Error::Missing {
        what: what.to_owned(),
        place: PathBuf::from("the test"),
    }
}
