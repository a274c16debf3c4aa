//! All attachments of the agent: which there are, and how new ones come and those of an earlier daemon
//! come back.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use axum::http::StatusCode;
use farbus_rest::problem::Problem;
use log::{error, info, warn};
use tokio::sync::Notify;
use tokio::task::spawn_blocking;

use super::attachment::{Context, Handle, Owner};
use super::id::AttachmentId;
use super::identity::Identity;
use super::pool::Pool;
use super::process::{self, Worker};
use super::store::{Phase, Record, StoreError};
use super::validate;
use crate::api::{Attachment, AttachmentSpec, AttachmentState, Devices, EndpointSpec, Vm};

/// See the module's own description.
pub struct Registry {
    context: Arc<Context>,
    pool: Pool,
    attachments: Mutex<BTreeMap<AttachmentId, Handle>>,
    /// Ids that a request is about to make an attachment of.
    turns: Mutex<BTreeSet<AttachmentId>>,
    turn_over: Notify,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The right to make an attachment of an id, while others wait.
struct Turn<'a>(&'a Registry, AttachmentId);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.0.turns).remove(&self.1);
        self.0.turn_over.notify_waiters();
    }
}

impl Registry {
    /// Goes on with what an earlier daemon has left: its records, and its workers.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub async fn recover(context: Arc<Context>, pool: Pool) -> Result<Arc<Self>, StoreError> {
        let this = Arc::new(Self {
            context,
            pool,
            attachments: Mutex::default(),
            turns: Mutex::default(),
            turn_over: Notify::new(),
        });
        let sockets = this.context.config.sockets();
        let (records, strange) = this.context.store.load()?;
        for record in &records {
            // Workers look for this daemon already.
            let known = record.worker.as_ref().filter(|worker| worker.is_there());
            let _ = this
                .context
                .custody
                .admit(&record.id, known.map(Identity::pid));
        }
        let mut workers = process::find(&sockets, this.context.config.worker_user);
        let mut living = Vec::new();
        for mut record in records {
            let Ok(socket) = record.id.socket(&sockets, &record.life) else {
                warn!(
                    "attachment {} does not fit in {}",
                    record.id,
                    sockets.display()
                );
                continue;
            };
            let worker = match &record.worker {
                Some(known) => Worker::adopt_known(known),
                None => this.adopt_found(&mut record, &socket, &workers),
            };
            workers.retain(|(_, pid)| worker.as_ref().is_none_or(|worker| worker.pid() != *pid));
            let found = if worker.is_some() { "" } else { "no " };
            info!("attachment {} is taken over, with {found}worker", record.id);
            if let Some(device) = record
                .device
                .as_ref()
                .filter(|_| record.phase != Phase::Failed)
            {
                this.context.chooser.keep(&record.id, &device.id());
            }
            let kept = matches!(record.spec.endpoint, EndpointSpec::VfioUser { .. });
            if kept && worker.is_some() {
                living.push(record.id.clone());
            }
            this.begin(record, socket, worker);
        }
        this.context.custody.all_admitted();
        for (socket, pid) in workers {
            if strange.iter().any(|id| id.owns(&socket)) {
                error!(
                    "worker {pid} at {} is left alone: the record of its attachment is not understood",
                    socket.display()
                );
                continue;
            }
            warn!(
                "worker {pid} at {} is nobody's and is ended",
                socket.display()
            );
            if let Some(worker) = adopt(pid) {
                worker.stop().await;
            }
        }
        // From then on they may die, and their VMs notice nothing.
        this.context.custody.wait_for(&living).await;
        Ok(this)
    }

    /// The worker of an attachment, by its command line: the daemon before has ended between its start
    /// and the note of it, or was one that made no notes. Of several none is the worker.
    fn adopt_found(
        &self,
        record: &mut Record,
        socket: &Path,
        workers: &[(PathBuf, u32)],
    ) -> Option<Worker> {
        let mut named = workers.iter().filter(|(of, _)| of == socket);
        let (Some((_, pid)), None) = (named.next(), named.next()) else {
            return None;
        };
        let worker = adopt(*pid)?;
        if record.phase != Phase::Starting {
            warn!(
                "attachment {}: it was not written down which process its worker is; {pid}, whose command \
                 line names its socket, is taken for it",
                record.id
            );
        }
        record.worker = Identity::of_worker(*pid);
        if let Err(error) = self.context.store.save(record) {
            error!("{:#}", anyhow::Error::new(error));
        }
        Some(worker)
    }

    fn begin(self: &Arc<Self>, record: Record, socket: PathBuf, worker: Option<Worker>) -> Handle {
        let id = record.id.clone();
        let (owner, handle) = Owner::new(self.context.clone(), record, socket, worker);
        lock(&self.attachments).insert(id.clone(), handle.clone());
        let registry = Arc::downgrade(self);
        tokio::spawn(async move {
            let last = owner.run().await;
            if let Some(registry) = registry.upgrade() {
                lock(&registry.attachments).remove(&id);
            }
            last.say_gone();
        });
        handle
    }

    /// All of them, by id.
    #[must_use]
    pub fn list(&self) -> Vec<Attachment> {
        lock(&self.attachments).values().map(Handle::now).collect()
    }

    /// One of them.
    ///
    /// # Errors
    /// When there is none of this id.
    pub fn get(&self, id: &AttachmentId) -> Result<Handle, Problem> {
        let found = lock(&self.attachments).get(id).cloned();
        found.ok_or_else(|| {
            Problem::new(
                StatusCode::NOT_FOUND,
                "no-such-attachment",
                "There is no such attachment",
                format!("no attachment is named {id}"),
            )
            .with_remedy("GET /v1/attachments lists what there is")
        })
    }

    /// What the device servers offer.
    pub async fn devices(&self, age: Duration) -> Devices {
        self.pool.devices(age).await
    }

    /// Which device servers have answered when they were asked last, of those that were asked.
    #[must_use]
    pub fn reachable(&self) -> Vec<(String, bool)> {
        self.pool.reachable()
    }

    /// The attachment of this id, made if there is none; whether it was. Nothing is left of one that
    /// is refused.
    ///
    /// # Errors
    /// When it cannot be, or there is another one of this id.
    pub async fn put(
        self: &Arc<Self>,
        id: AttachmentId,
        spec: AttachmentSpec,
    ) -> Result<(bool, Handle), Problem> {
        validate::check(&spec, &self.context.config)?;
        // A VM that was rid of a device by force may still look for its socket, and must not find
        // another's there. Who connects by himself has to know the path.
        let life = match spec.vm {
            Vm::None => String::new(),
            _ => format!("{:08x}", RandomState::new().hash_one(&id) as u32),
        };
        let socket = id.socket(&self.context.config.sockets(), &life)?;
        let _turn = self.turn(&id).await;
        if let Ok(there) = self.get(&id) {
            return same(&id, &spec, there).map(|there| (false, there));
        }
        self.check_vm(&id, &spec.vm).await?;
        let device = self.context.chooser.choose(&id, &spec, &[]).await?;
        let record = Record {
            id: id.clone(),
            life,
            spec,
            device: Some(device),
            phase: Phase::Starting,
            plugged: false,
            reason: None,
            since: farbus_rest::timestamp(SystemTime::now()),
            restarts: 0,
            worker: None,
        };
        let (store, saved) = (self.context.store.clone(), record.clone());
        let done = spawn_blocking(move || store.save(&saved)).await;
        if let Err(why) = done.map_err(anyhow::Error::new).and_then(|done| Ok(done?)) {
            self.context.chooser.release(&id);
            error!("attachment {id} is not made: {why:#}");
            return Err(Problem::internal(format!("{why:#}")));
        }
        Ok((true, self.begin(record, socket, None)))
    }

    async fn turn(&self, id: &AttachmentId) -> Turn<'_> {
        loop {
            let over = self.turn_over.notified();
            if lock(&self.turns).insert(id.clone()) {
                return Turn(self, id.clone());
            }
            over.await;
        }
    }

    /// Whether there is a VM where one is named.
    async fn check_vm(&self, id: &AttachmentId, vm: &Vm) -> Result<(), Problem> {
        if *vm == Vm::None {
            return Ok(());
        }
        let (hot_plug, id, vm) = (self.context.hot_plug.clone(), id.clone(), vm.clone());
        let asked = spawn_blocking(move || hot_plug.is_plugged(&vm, id.as_str())).await;
        match asked {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(Problem::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "vm-unreachable",
                "The VM cannot be asked",
                error.to_string(),
            )
            .with_remedy("name the socket of a VM that runs, which the agent may open")),
            Err(error) => Err(Problem::internal(error.to_string())),
        }
    }

    /// Asks all workers to end, without taking anything away: for the shutdown of the host.
    pub fn stop_workers(&self) -> usize {
        let workers = process::find(
            &self.context.config.sockets(),
            self.context.config.worker_user,
        );
        for worker in workers.iter().filter_map(|(_, pid)| adopt(*pid)) {
            worker.signal(rustix::process::Signal::TERM);
        }
        workers.len()
    }

    /// What has happened.
    #[must_use]
    pub fn context(&self) -> &Context {
        &self.context
    }
}

fn adopt(pid: u32) -> Option<Worker> {
    Worker::adopt(pid)
        .inspect_err(|error| warn!("worker {pid} cannot be taken over: {error}"))
        .ok()
}

/// The attachment that there is, if it is what is asked for.
fn same(id: &AttachmentId, spec: &AttachmentSpec, there: Handle) -> Result<Handle, Problem> {
    if there.is_leaving() || there.now().state == AttachmentState::Detached {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            "attachment-detaching",
            "The attachment is being taken away",
            format!("attachment {id} is not gone yet"),
        )
        .with_remedy("repeat the request when it is gone (DELETE waits with ?wait=SECONDS)"));
    }
    if there.spec() == *spec {
        return Ok(there);
    }
    Err(Problem::new(
        StatusCode::CONFLICT,
        "attachment-exists",
        "There is another attachment of this id",
        format!("attachment {id} was asked for otherwise"),
    )
    .with_remedy("delete it first, or choose another id"))
}
