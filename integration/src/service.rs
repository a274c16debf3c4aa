//! The agent as a service: a daemon with directories of its own, and a client that asks it.
//!
//! Workers outlive the daemon, on purpose; a [`Service`] that is dropped ends those that are left.

use std::path::{Path, PathBuf};
use std::time::Duration;

use farbus_compute_agent::api::{Attachment, AttachmentState, Attachments, Devices};
use farbus_compute_agent::daemon::process;
use farbus_compute_agent::sandbox::User;
use farbus_rest::client::{Answer, Client, ClientError, Events};
use farbus_rest::problem::Problem;
use hyper::body::Bytes;
use hyper::{Method, header};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};

use crate::daemon::Daemon;
use crate::deadline::Deadline;
use crate::error::{Error, IoContext, Result};
use crate::scratch::Scratch;

/// How long an answer may take that nobody asked to be held.
const PATIENCE: Duration = Duration::from_secs(60);

/// See the module's own description.
#[derive(Debug)]
pub struct Service {
    daemon: Option<Daemon>,
    arguments: Vec<String>,
    /// Where it and its workers have their sockets.
    runtime_dir: PathBuf,
    state_dir: PathBuf,
    client: Client,
    runtime: Runtime,
}

/// Whose processes workers are in tests that name a user.
const NOBODY: User = User {
    uid: 65534,
    gid: 65534,
};

impl Service {
    /// Starts an agent that uses these device servers, each `NAME=HOST:PORT`; `further` arguments come
    /// after those.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn start(scratch: &Scratch, device_servers: &[String], further: &[&str]) -> Result<Self> {
        let text = |path: &Path| path.display().to_string();
        let (runtime_dir, state_dir) = (scratch.join("run"), scratch.join("state"));
        let socket = scratch.join("agent.sock");
        let mut arguments = vec!["serve".to_owned()];
        for (name, path) in [
            ("--socket", &socket),
            ("--runtime-dir", &runtime_dir),
            ("--state-dir", &state_dir),
        ] {
            arguments.extend([name.to_owned(), text(path)]);
        }
        for server in device_servers {
            arguments.extend(["--device-server".to_owned(), server.clone()]);
        }
        arguments.extend(further.iter().map(|argument| (*argument).to_owned()));
        let runtime = Builder::new_current_thread().enable_all().build();
        let mut service = Self {
            daemon: None,
            arguments,
            runtime_dir,
            state_dir,
            client: Client::new(&socket, PATIENCE),
            runtime: runtime.context(|| "starting tokio".into())?,
        };
        service.restart()?;
        Ok(service)
    }

    /// Starts the daemon again, after it was ended or killed.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn restart(&mut self) -> Result<()> {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        self.daemon = Some(Daemon::start("farbus-compute-agent", &arguments)?);
        Ok(())
    }

    /// As [`Self::restart`], run by another program that executes it in place.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn restart_under(&mut self, wrapper: &[&str]) -> Result<()> {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let daemon = Daemon::start_under(wrapper, "farbus-compute-agent", &arguments)?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Kills the daemon: its workers go on.
    ///
    /// # Errors
    /// When it does not die.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.take().map_or(Ok(()), Daemon::kill)
    }

    /// Ends the daemon in order.
    ///
    /// # Errors
    /// When it does not end with exit status 0.
    pub fn terminate(&mut self) -> Result<()> {
        self.daemon.take().map_or(Ok(()), Daemon::terminate)
    }

    /// The daemon.
    ///
    /// # Errors
    /// When it was ended or killed.
    pub fn daemon(&self) -> Result<&Daemon> {
        self.daemon.as_ref().ok_or_else(|| Error::Missing {
            what: "the agent".into(),
            place: self.runtime_dir.clone(),
        })
    }

    /// The workers that there are, as the kernel knows them.
    #[must_use]
    pub fn workers(&self) -> Vec<u32> {
        let mut pids: Vec<u32> = process::find(&self.sockets(), Some(NOBODY))
            .into_iter()
            .map(|(_, pid)| pid)
            .collect();
        pids.sort_unstable();
        pids
    }

    /// Where the attachments' sockets are.
    #[must_use]
    pub fn sockets(&self) -> PathBuf {
        self.runtime_dir.join("attachments")
    }

    /// What is left of attachments in the file system: sockets and records.
    #[must_use]
    pub fn remains(&self) -> Vec<PathBuf> {
        let directories = [self.sockets(), self.state_dir.join("attachments")];
        let entries = directories
            .iter()
            .filter_map(|directory| std::fs::read_dir(directory).ok())
            .flat_map(|entries| entries.flatten().map(|entry| entry.path()));
        entries.collect()
    }

    /// Asks for a path, and takes whatever comes.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn ask(&self, method: Method, path: &str, json: Option<&str>) -> Result<Answer> {
        let headers = [(header::CONTENT_TYPE, "application/json")];
        let headers = if json.is_some() { &headers[..] } else { &[] };
        let body = Bytes::copy_from_slice(json.unwrap_or("").as_bytes());
        let asked = self.client.raw(method, path, headers, body);
        self.runtime.block_on(asked).map_err(unexpected)
    }

    /// Asks for an attachment; with which status it was taken, and how it is when it is ready or not
    /// to be.
    ///
    /// # Errors
    /// When it is refused.
    pub fn put(&self, id: &str, spec: &Value) -> Result<(u16, Attachment)> {
        let path = format!("/v1/attachments/{id}?wait=60");
        let asked = self.client.put(&path, spec);
        let (status, attachment) = self.runtime.block_on(asked).map_err(unexpected)?;
        Ok((status.as_u16(), attachment))
    }

    /// As [`Self::put`], for one that must become ready.
    ///
    /// # Errors
    /// When it does not.
    pub fn attach(&self, id: &str, spec: &Value) -> Result<Attachment> {
        let (_status, attachment) = self.put(id, spec)?;
        if attachment.state == AttachmentState::Ready {
            return Ok(attachment);
        }
        Err(Error::Protocol {
            peer: format!("attachment {id}"),
            answer: format!("{attachment:?}"),
        })
    }

    /// As [`Self::put`], for one that is refused; why.
    ///
    /// # Errors
    /// When it is not.
    pub fn refused(&self, id: &str, spec: &Value) -> Result<Problem> {
        let path = format!("/v1/attachments/{id}");
        let answer = self.ask(Method::PUT, &path, Some(&spec.to_string()))?;
        problem(&answer)
    }

    /// Has an attachment taken away; how it is then.
    ///
    /// # Errors
    /// When there is none.
    pub fn detach(&self, id: &str, force: bool) -> Result<Attachment> {
        let path = format!("/v1/attachments/{id}?wait=60&force={force}");
        let asked = self.client.delete(&path);
        let (_status, attachment) = self.runtime.block_on(asked).map_err(unexpected)?;
        Ok(attachment)
    }

    /// One attachment, if there is one.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn attachment(&self, id: &str) -> Result<Option<Attachment>> {
        let path = format!("/v1/attachments/{id}");
        match self.runtime.block_on(self.client.get(&path)) {
            Ok(attachment) => Ok(Some(attachment)),
            Err(error) if error.problem().is_some_and(|problem| problem.status == 404) => Ok(None),
            Err(error) => Err(unexpected(error)),
        }
    }

    /// All attachments.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn attachments(&self) -> Result<Vec<Attachment>> {
        let asked = self.client.get::<Attachments>("/v1/attachments");
        let all = self.runtime.block_on(asked).map_err(unexpected)?;
        Ok(all.attachments)
    }

    /// What the device servers offer.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn devices(&self, query: &str) -> Result<Devices> {
        let path = format!("/v1/devices{query}");
        self.runtime
            .block_on(self.client.get(&path))
            .map_err(unexpected)
    }

    /// What happens, from after the event `last`.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn events(&self, last: u64) -> Result<Events> {
        let asked = self.client.events("/v1/events", Some(last));
        self.runtime.block_on(asked).map_err(unexpected)
    }

    /// Reads events until one is as wanted; all of them.
    ///
    /// # Errors
    /// When none comes in time.
    pub fn until(
        &self,
        events: &mut Events,
        deadline: Deadline,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Vec<Event>> {
        let mut seen = Vec::new();
        loop {
            let next = async { tokio::time::timeout(deadline.remaining(), events.next()).await };
            let event = self.runtime.block_on(next).ok().flatten();
            let event = event.and_then(|event| serde_json::from_str(&event.data).ok());
            let Some(event) = event else {
                return Err(deadline.missed_with("the awaited event", &format!("{seen:#?}")));
            };
            seen.push(event);
            if seen.last().is_some_and(&wanted) {
                return Ok(seen);
            }
        }
    }

    /// Waits until an attachment is in a state.
    ///
    /// # Errors
    /// When it is not in time.
    pub fn wait_state(&self, id: &str, state: AttachmentState, deadline: Deadline) -> Result<()> {
        // From the first event on: what has happened meanwhile is among them.
        let mut events = self.events(0)?;
        if self.attachment(id)?.is_some_and(|it| it.state == state) {
            return Ok(());
        }
        loop {
            self.until(&mut events, deadline, |event| event.attachment == id)?;
            if self.attachment(id)?.is_some_and(|it| it.state == state) {
                return Ok(());
            }
        }
    }
}

pub use farbus_compute_agent::api::Event;

/// The problem that an answer tells of.
///
/// # Errors
/// When it does not.
pub fn problem(answer: &Answer) -> Result<Problem> {
    let kind = answer.headers.get(header::CONTENT_TYPE);
    if kind.is_none_or(|kind| kind != "application/problem+json") {
        return Err(Error::Protocol {
            peer: "the agent".into(),
            answer: format!("{}: {:?}", answer.status, answer.body),
        });
    }
    serde_json::from_slice(&answer.body).map_err(|error| Error::Protocol {
        peer: "the agent".into(),
        answer: error.to_string(),
    })
}

fn unexpected(error: ClientError) -> Error {
    Error::Protocol {
        peer: "the agent".into(),
        answer: match error {
            ClientError::Problem(problem) => format!("{problem:?}"),
            other => other.to_string(),
        },
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // First the daemon, which would replace its workers.
        if let Some(daemon) = self.daemon.take() {
            let _ = daemon.kill();
        }
        for worker in self.workers() {
            let pid = i32::try_from(worker).ok().and_then(Pid::from_raw);
            if let Some(pid) = pid {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}
