//! How an attachment ends: the VM lets go, then the worker ends, then it is forgotten. A VM, a worker
//! or a device server that is dead is no obstacle; only a guest that keeps its device is, until it
//! is taken by force.

use std::time::{Duration, Instant};

use log::{error, warn};
use tokio::task::spawn_blocking;

use super::super::process::Worker;
use super::super::store::Phase;
use super::bring_up::Launched;
use super::{Owner, Wish};
use crate::api::EndpointSpec;
use crate::hotplug::HotplugError;

/// How long a guest may take to let go.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long it may take while its device server is away: a driver waits for answers before it lets go,
/// and gives up after minutes.
const PATIENCE_WITH_THE_DEAD: Duration = Duration::from_secs(5);

/// How long a VMM is waited for at a time: then the wish may have become one by force.
const SLICE: Duration = Duration::from_secs(2);

/// So many workers that die meanwhile are replaced.
const MAX_SUCCESSORS: u32 = 3;

/// How long a VMM may take when nobody asks the guest.
pub(super) const FORCE_PATIENCE: Duration = Duration::from_secs(1);

impl Owner {
    /// Takes it away. Whether it is gone; if not, it is attached as before.
    pub(super) async fn take_away(&mut self, force: bool) -> bool {
        if self.record.plugged {
            if let Err(error) = self.ask_the_vm(force).await {
                self.give_back(format!("it could not be detached: {error}"))
                    .await;
                return false;
            }
            self.record.plugged = false;
        }
        self.end_worker().await;
        self.context.custody.release(&self.record.id);
        self.context.chooser.release(&self.record.id);
        let (store, id) = (self.context.store.clone(), self.record.id.clone());
        match spawn_blocking(move || store.forget(&id)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => error!("{:#}", anyhow::Error::new(error)),
            Err(error) => error!("attachment {} is not forgotten: {error}", self.record.id),
        }
        true
    }

    async fn ask_the_vm(&mut self, mut force: bool) -> Result<(), HotplugError> {
        let begun = Instant::now();
        let mut successors = 0;
        // It may have died with the daemon before this one.
        if !force && self.worker.is_none() && self.context.custody.can_resume(&self.record.id) {
            self.succeed(successors).await;
        }
        loop {
            let slice = if force { FORCE_PATIENCE } else { SLICE };
            let unplug = self.unplug(slice, force);
            tokio::pin!(unplug);
            let done = loop {
                tokio::select! {
                    done = &mut unplug => break done,
                    () = gone(self.worker.as_ref()), if !force => {
                        successors += 1;
                        self.succeed(successors).await;
                    }
                }
            };
            let error = match done {
                Ok(_) => return Ok(()),
                Err(error) if error.is_vmm_gone() => return Ok(()),
                Err(error) if force => {
                    warn!(
                        "attachment {} is taken all the same: {error}",
                        self.record.id
                    );
                    return Ok(());
                }
                Err(error) => error,
            };
            // What the guest waits for before it lets go may never come. Without its worker the device
            // reads as one that was pulled out, and the driver leaves at once.
            let waited = begun.elapsed();
            let dead = self.link_down.borrow().is_some() && waited >= PATIENCE_WITH_THE_DEAD;
            if dead && self.worker.is_some() {
                let id = &self.record.id;
                warn!("attachment {id}: {error}; its device server is away, so its worker ends");
                self.end_worker().await;
                continue;
            }
            let late = waited >= PATIENCE || !matches!(error, HotplugError::GuestKeeps { .. });
            let wished = *self.wish.borrow() == (Wish::Detach { force: true });
            if wished || late && self.worker.is_none() {
                force = true;
                self.enter(Phase::Detaching { force }).await;
            } else if late {
                return Err(error);
            }
        }
    }

    /// The worker has died while the guest is asked to let go. A driver that does so has things to write and
    /// registers to read first: another worker goes on, if one can. If not, what is kept is let go of, so that
    /// the device reads as one that was pulled out, and nobody waits for it.
    async fn succeed(&mut self, count: u32) {
        let id = self.record.id.clone();
        let lost = match self.worker.take() {
            Some(mut worker) => {
                let fate = worker.fate().await;
                self.context.custody.worker_died(&id);
                format!("its worker has ended with {fate}")
            }
            None => "its worker was gone when this daemon came".to_owned(),
        };
        warn!("attachment {id}: {lost}, and the VM has not let go yet");
        let comes_back = matches!(self.record.spec.endpoint, EndpointSpec::VhostUserBlk { .. });
        let can = comes_back || self.context.custody.can_resume(&id);
        if let (Some(device), true) = (self.record.device.clone(), can && count <= MAX_SUCCESSORS) {
            self.record.restarts += 1;
            self.context.counts.worker_restarts.inc();
            match self.launch(&device).await {
                Launched::Ready => return self.publish(),
                Launched::Unwanted => {}
                Launched::Refused(error) => warn!("attachment {id}: no other worker: {error}"),
            }
        }
        self.end_worker().await;
        self.publish();
    }

    /// The guest keeps it: it is attached as before, unless somebody takes it by force by now.
    async fn give_back(&mut self, reason: String) {
        let kept = self.wishes.send_if_modified(|wish| {
            let patient = *wish == Wish::Detach { force: false };
            if patient {
                *wish = Wish::Keep;
            }
            patient
        });
        if kept {
            self.record.reason = Some(reason);
            self.enter(Phase::Attached).await;
        } else {
            self.enter(Phase::Detaching { force: true }).await;
        }
    }
}

/// Waits for the end of a worker, if there is one.
async fn gone(worker: Option<&Worker>) {
    match worker {
        Some(worker) => worker.ended().await,
        None => std::future::pending().await,
    }
}
