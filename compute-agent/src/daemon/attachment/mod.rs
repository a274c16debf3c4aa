//! One attachment, from the request to its end. A task of its own owns it: whatever is asked for and
//! whatever happens comes to that task, which does one thing at a time. How far it is, is on the disk
//! before the next step begins, so that a daemon that finds it knows what may be half done.
//!
//! | phase | what is done in it | module |
//! |---|---|---|
//! | starting | a device is chosen, a worker started | `bring_up` |
//! | plugging | the VM gets the device | `bring_up` |
//! | attached | the worker is watched, and replaced | `keep_up` |
//! | detaching | the VM lets go, the worker ends | `take_down` |
//! | failed | nothing, until it is deleted | here |

mod bring_up;
mod keep_up;
mod take_down;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use log::{error, info, warn};
use tokio::sync::watch;
use tokio::task::spawn_blocking;

use super::choose::Chooser;
use super::config::Config;
use super::custody::Custody;
use super::events::Events;
use super::hot_plug::HotPlug;
use super::metrics::Counts;
use super::process::{Launcher, Worker};
use super::store::{Phase, Record, Store};
use crate::api::{Attachment, AttachmentSpec, AttachmentState, WorkerStatus};
use crate::hotplug::{HotplugError, Unplugged};

/// What all attachments share.
pub struct Context {
    /// What the daemon is to do.
    pub config: Arc<Config>,
    /// Who has which device.
    pub chooser: Chooser,
    /// What survives the daemon.
    pub store: Arc<Store>,
    /// What plugs devices into VMs.
    pub hot_plug: Arc<dyn HotPlug>,
    /// What outlives workers.
    pub custody: Arc<Custody>,
    /// How workers are started.
    pub launcher: Launcher,
    /// Who is told what happens.
    pub events: Events,
    /// What is counted.
    pub counts: Counts,
}

/// What a client wants of an attachment that there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Keep,
    Detach { force: bool },
}

/// An attachment as requests see it.
#[derive(Clone, Debug)]
pub struct Handle {
    status: watch::Receiver<Attachment>,
    wish: watch::Sender<Wish>,
    custody: Arc<Custody>,
}

impl Handle {
    /// What was asked for.
    #[must_use]
    pub fn spec(&self) -> AttachmentSpec {
        self.status.borrow().spec.clone()
    }

    /// As it is now. A wish that its task has not come to yet counts.
    #[must_use]
    pub fn now(&self) -> Attachment {
        let mut now = self.status.borrow().clone();
        if self.is_leaving() && now.state != AttachmentState::Detached {
            now.state = AttachmentState::Detaching;
        }
        now.statistics = self.custody.statistics(&now.id);
        now
    }

    /// Whether it is to be taken away.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        *self.wish.borrow() != Wish::Keep
    }

    /// Has it taken away.
    pub fn detach(&self, force: bool) {
        self.wish.send_if_modified(|wish| {
            let forced = force || *wish == Wish::Detach { force: true };
            let wanted = Wish::Detach { force: forced };
            std::mem::replace(wish, wanted) != wanted
        });
    }

    /// As it is when it is neither being made nor taken away any more, or after `wait`.
    pub async fn settled(&self, wait: Duration) -> Attachment {
        let mut status = self.status.clone();
        let settles = status.wait_for(|status| match status.state {
            AttachmentState::Attaching | AttachmentState::Detaching => false,
            AttachmentState::Detached => true,
            AttachmentState::Ready | AttachmentState::Degraded | AttachmentState::Failed => {
                !self.is_leaving()
            }
        });
        // Its task is gone only when it is detached.
        let _ = tokio::time::timeout(wait, settles).await;
        self.now()
    }
}

/// An attachment that is no more, but for that nobody was told.
pub struct Gone(Owner);

impl Gone {
    /// Tells. After this, an attachment of the same id may be another one.
    pub fn say_gone(mut self) {
        self.0.date(AttachmentState::Detached);
        self.0.show(AttachmentState::Detached, None);
    }
}

/// The task of an attachment.
pub struct Owner {
    context: Arc<Context>,
    record: Record,
    socket: PathBuf,
    worker: Option<Worker>,
    /// Why what the VM asks for waits, if it does.
    degraded: Option<String>,
    /// Why its link is lost, if it is, as its worker says.
    link_down: watch::Receiver<Option<String>>,
    status: watch::Sender<Attachment>,
    wish: watch::Receiver<Wish>,
    wishes: watch::Sender<Wish>,
}

impl Owner {
    /// For an attachment that is remembered as `record`, with the worker that an earlier daemon has
    /// left.
    #[must_use]
    pub fn new(
        context: Arc<Context>,
        record: Record,
        socket: PathBuf,
        worker: Option<Worker>,
    ) -> (Self, Handle) {
        let first = match record.phase {
            Phase::Detaching { force } => Wish::Detach { force },
            _ => Wish::Keep,
        };
        let wishes = watch::Sender::new(first);
        let lost = worker.is_none() && record.phase == Phase::Attached;
        let degraded = lost.then(|| "its worker has died; it is replaced".to_owned());
        // It is no news how an earlier daemon has left it.
        let (state, reason) = shown(&record, degraded.clone());
        let mut owner = Self {
            link_down: context
                .custody
                .admit(&record.id, worker.as_ref().map(Worker::pid)),
            status: watch::Sender::new(Attachment {
                id: record.id.to_string(),
                spec: record.spec.clone(),
                device: None,
                state,
                since: record.since.clone(),
                reason,
                socket: None,
                worker: None,
                statistics: None,
            }),
            wish: wishes.subscribe(),
            wishes: wishes.clone(),
            context,
            record,
            socket,
            worker,
            degraded,
        };
        owner.publish();
        let handle = Handle {
            status: owner.status.subscribe(),
            wish: wishes,
            custody: owner.context.custody.clone(),
        };
        (owner, handle)
    }

    /// Does what is to be done until the attachment is gone.
    /// What is left of it says so, when nobody can find it any more.
    pub async fn run(mut self) -> Gone {
        loop {
            match self.record.phase {
                Phase::Starting => self.start().await,
                Phase::Plugging => self.plug().await,
                Phase::Attached => self.keep().await,
                Phase::Detaching { force } => {
                    if self.take_away(force).await {
                        return Gone(self);
                    }
                }
                Phase::Failed => {
                    let force = self.detach_wanted().await;
                    self.enter(Phase::Detaching { force }).await;
                }
            }
        }
    }

    /// Waits until a client wants it taken away; whether by force. May be given up at any time.
    async fn detach_wanted(&mut self) -> bool {
        let wanted = self.wish.wait_for(|wish| *wish != Wish::Keep).await;
        // There is always a sender: this task has one itself.
        matches!(wanted.as_deref(), Ok(Wish::Detach { force: true }))
    }

    /// Waits until what is being done is not wanted any more: a start, when it is to be taken away; what eases taking
    /// it away, when that is to be by force.
    async fn unwanted(&mut self) {
        if !matches!(self.record.phase, Phase::Detaching { .. }) {
            self.detach_wanted().await;
            return;
        }
        let force = Wish::Detach { force: true };
        let _ = self.wish.wait_for(|wish| *wish == force).await;
    }

    /// Goes on to a phase: remembers it, and tells.
    async fn enter(&mut self, phase: Phase) {
        self.record.phase = phase;
        let (state, reason) = self.seen();
        self.date(state);
        self.save().await;
        self.show(state, reason);
    }

    /// Gives up: takes away what there is of it, and remembers why.
    async fn fail(&mut self, reason: String) {
        error!("attachment {} has failed: {reason}", self.record.id);
        if self.record.plugged {
            self.record.plugged = !self.unplug_by_force().await;
        }
        self.end_worker().await;
        self.context.chooser.release(&self.record.id);
        self.degraded = None;
        self.record.reason = Some(reason);
        self.enter(Phase::Failed).await;
    }

    /// Ends the worker, if there is one, and removes what it leaves when it dies.
    async fn end_worker(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop().await;
        }
        if let Some(device) = &self.record.device {
            self.context.chooser.has_changed(device);
        }
        self.context.custody.begin_anew(&self.record.id);
        let _ = std::fs::remove_file(&self.socket);
    }

    /// Writes it down. An attachment goes on when that fails, but a crash then loses what was done.
    async fn save(&mut self) {
        let (store, record) = (self.context.store.clone(), self.record.clone());
        match spawn_blocking(move || store.save(&record)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => error!("{:#}", anyhow::Error::new(error)),
            Err(error) => error!("attachment {} is not saved: {error}", self.record.id),
        }
    }

    /// Shows it as it is now to who asks, and tells when that is news.
    fn publish(&mut self) {
        let (state, reason) = self.seen();
        self.date(state);
        self.show(state, reason);
    }

    /// How it is, and why.
    fn seen(&mut self) -> (AttachmentState, Option<String>) {
        let down = self.link_down.borrow_and_update().clone();
        shown(&self.record, self.degraded.clone().or(down))
    }

    /// Notes the time, if this state is not the one that is shown.
    fn date(&mut self, state: AttachmentState) {
        if state != self.status.borrow().state {
            self.record.since = farbus_rest::timestamp(SystemTime::now());
        }
    }

    fn show(&mut self, state: AttachmentState, reason: Option<String>) {
        let before = self.status.borrow().state;
        let known = self.status.borrow().reason.clone();
        let restarts = self.record.restarts;
        self.status.send_modify(|shown| {
            shown.state = state;
            shown.reason.clone_from(&reason);
            shown.since.clone_from(&self.record.since);
            shown.device = self.record.device.as_ref().map(super::store::Chosen::id);
            let worker = self.worker.as_ref();
            shown.worker = worker.map(|worker| WorkerStatus {
                pid: worker.pid(),
                restarts,
            });
            let offered = matches!(state, AttachmentState::Ready | AttachmentState::Degraded);
            shown.socket = offered.then(|| self.socket.display().to_string());
        });
        if state != before || reason != known {
            let id = self.record.id.as_str();
            let why = reason.as_deref().unwrap_or("");
            let gap = if why.is_empty() { "" } else { ": " };
            info!("attachment {id} is {}{gap}{why}", name(state));
            self.context.events.push(id, state, reason);
        }
    }

    /// Whether the VM has the device, or may have it, is over.
    async fn unplug_by_force(&self) -> bool {
        match self.unplug(take_down::FORCE_PATIENCE, true).await {
            Ok(_) => true,
            Err(error) if error.is_vmm_gone() => true,
            Err(error) => {
                warn!("attachment {}: {error}", self.record.id);
                false
            }
        }
    }

    fn unplug(
        &self,
        deadline: Duration,
        force: bool,
    ) -> impl Future<Output = Result<Unplugged, HotplugError>> + use<> {
        let vm = self.record.spec.vm.clone();
        let id = self.record.id.clone();
        self.blocking(move |hot_plug| hot_plug.unplug(&vm, id.as_str(), deadline, force))
    }

    /// Talks to the VMM, which may take its time, on a thread that may wait. That begins at once.
    fn blocking<T: Send + 'static, A>(
        &self,
        ask: A,
    ) -> impl Future<Output = Result<T, HotplugError>> + use<T, A>
    where
        A: FnOnce(&dyn HotPlug) -> Result<T, HotplugError> + Send + 'static,
    {
        let (hot_plug, id) = (self.context.hot_plug.clone(), self.record.id.clone());
        let asked = spawn_blocking(move || ask(&*hot_plug));
        async move {
            asked.await.unwrap_or_else(|error| {
                error!("attachment {id}: {error}");
                Err(HotplugError::NoVm)
            })
        }
    }
}

/// How an attachment is, and why; `waits` is why what its VM asks for waits, if it does.
fn shown(record: &Record, waits: Option<String>) -> (AttachmentState, Option<String>) {
    match record.phase {
        Phase::Starting | Phase::Plugging => (AttachmentState::Attaching, None),
        Phase::Attached if waits.is_some() => (AttachmentState::Degraded, waits),
        Phase::Attached => (AttachmentState::Ready, record.reason.clone()),
        Phase::Detaching { .. } => (AttachmentState::Detaching, None),
        Phase::Failed => (AttachmentState::Failed, record.reason.clone()),
    }
}

/// A state, as JSON has it.
#[must_use]
pub fn name(state: AttachmentState) -> &'static str {
    match state {
        AttachmentState::Attaching => "attaching",
        AttachmentState::Ready => "ready",
        AttachmentState::Degraded => "degraded",
        AttachmentState::Detaching => "detaching",
        AttachmentState::Detached => "detached",
        AttachmentState::Failed => "failed",
    }
}
