//! How an attachment comes to be: a device, a worker, a VM that has it.

use std::time::Duration;

use log::{info, warn};

use super::super::identity::Identity;
use super::super::process::{NUM_QUEUES, QUEUE_SIZE, StartError};
use super::super::store::{Chosen, Phase};
use super::Owner;
use crate::api::{EndpointSpec, Vm};
use crate::hotplug::{DeviceKind, PlugDevice};

/// How long a VMM may take to plug a device.
const PLUG_DEADLINE: Duration = Duration::from_secs(10);

/// How much longer than its own deadline a worker may take to say that it has failed.
const MARGIN: Duration = Duration::from_secs(10);

/// What has become of a worker that was started.
pub(super) enum Launched {
    Ready,
    /// It is to be taken away, before it was there.
    Unwanted,
    Refused(StartError),
}

impl Owner {
    /// Gets a device and a worker. A selector's next device is tried when somebody was faster.
    pub(super) async fn start(&mut self) {
        // One that an earlier daemon had started, and did not hear from.
        self.end_worker().await;
        if let Err(reason) = self.clear_the_name().await {
            return self.fail(reason).await;
        }
        let mut refused = Vec::new();
        loop {
            let device = match self.record.device.clone() {
                Some(device) => device,
                None => match self.choose(&refused).await {
                    Ok(device) => device,
                    Err(reason) => return self.fail(reason).await,
                },
            };
            // What a worker of another device may have left.
            self.context.custody.begin_anew(&self.record.id);
            match self.launch(&device).await {
                Launched::Ready => break,
                Launched::Unwanted => return self.enter(Phase::Detaching { force: true }).await,
                Launched::Refused(StartError::Refused { error, busy: true })
                    if self.record.spec.selector.is_some() =>
                {
                    info!(
                        "attachment {}: {error}; another one is tried",
                        self.record.id
                    );
                    refused.push(device.id());
                    self.context.chooser.release(&self.record.id);
                    self.record.device = None;
                }
                Launched::Refused(error) => return self.fail(error.to_string()).await,
            }
        }
        let next = match self.record.spec.vm {
            Vm::None => Phase::Attached,
            Vm::Qemu { .. } | Vm::CloudHypervisor { .. } => Phase::Plugging,
        };
        // From now on the VM may have it, whatever happens to this daemon.
        self.record.plugged = next == Phase::Plugging;
        self.enter(next).await;
    }

    async fn choose(&mut self, refused: &[String]) -> Result<Chosen, String> {
        let (id, spec) = (&self.record.id, &self.record.spec);
        let chosen = self.context.chooser.choose(id, spec, refused).await;
        let chosen = chosen.map_err(|problem| problem.detail)?;
        self.record.device = Some(chosen.clone());
        self.save().await;
        Ok(chosen)
    }

    /// Something of the same name may be in the VM, from before: its socket's server is no more.
    pub(super) async fn clear_the_name(&mut self) -> Result<(), String> {
        if self.record.spec.vm == Vm::None {
            return Ok(());
        }
        let (vm, id) = (self.record.spec.vm.clone(), self.record.id.clone());
        let there = self
            .blocking(move |hot_plug| hot_plug.is_plugged(&vm, id.as_str()))
            .await;
        match there {
            Ok(false) => Ok(()),
            Ok(true) => {
                warn!(
                    "the VM has a device of attachment {} from before",
                    self.record.id
                );
                let gone = self.unplug(PLUG_DEADLINE, false).await;
                gone.map(drop).map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// Starts a worker and waits until it is ready.
    pub(super) async fn launch(&mut self, device: &Chosen) -> Launched {
        if self.record.worker.take().is_some() {
            // A daemon that finds it must not take the dead one for all that there is.
            self.save().await;
        }
        let launcher = &self.context.launcher;
        let started = self.context.custody.start_worker(&self.record.id, || {
            launcher.start(&self.record.id, &self.record.spec, device, &self.socket)
        });
        let mut starting = match started {
            Ok(starting) => starting,
            Err(error) => return Launched::Refused(error.into()),
        };
        self.record.worker = Identity::of_worker(starting.pid());
        self.save().await;
        let launcher = &self.context.launcher;
        let patience = Duration::from_secs(launcher.connect_timeout) + MARGIN;
        let outcome = tokio::select! {
            said = tokio::time::timeout(patience, starting.announced()) => match said {
                Ok(Ok(())) => Launched::Ready,
                Ok(Err(error)) => Launched::Refused(error),
                Err(_elapsed) => Launched::Refused(StartError::Refused {
                    error: format!("the worker was not ready after {patience:?}"),
                    busy: false,
                }),
            },
            _force = self.unwanted() => Launched::Unwanted,
        };
        let worker = starting.into_worker();
        self.context.chooser.has_changed(device);
        if matches!(outcome, Launched::Ready) {
            self.worker = Some(worker);
        } else {
            worker.stop().await;
            self.context.custody.worker_died(&self.record.id);
        }
        outcome
    }

    /// Has the VMM plug what the worker offers.
    pub(super) async fn plug(&mut self) {
        if self.worker.is_none() {
            // It died with the daemon: what is plugged, if it is, has nobody behind it.
            if !self.unplug_by_force().await {
                let reason = "the VM could not be rid of a device whose worker has died".into();
                return self.fail(reason).await;
            }
            self.record.plugged = false;
            return self.enter(Phase::Starting).await;
        }
        match self.plug_now().await {
            Ok(()) => self.enter(Phase::Attached).await,
            Err(reason) => self.fail(reason).await,
        }
    }

    pub(super) async fn plug_now(&self) -> Result<(), String> {
        let device = PlugDevice {
            id: self.record.id.to_string(),
            socket: self.socket.clone(),
            kind: match &self.record.spec.endpoint {
                EndpointSpec::VfioUser { .. } => DeviceKind::VfioUser,
                EndpointSpec::VhostUserBlk {
                    num_queues,
                    queue_size,
                    ..
                } => DeviceKind::VhostUserBlk {
                    num_queues: num_queues.unwrap_or(NUM_QUEUES),
                    queue_size: queue_size.unwrap_or(QUEUE_SIZE),
                },
            },
            deadline: PLUG_DEADLINE,
        };
        let vm = self.record.spec.vm.clone();
        let plugged = self
            .blocking(move |hot_plug| hot_plug.plug(&vm, &device))
            .await;
        plugged.map(drop).map_err(|error| error.to_string())
    }
}
