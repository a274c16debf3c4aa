//! The exports of all configured device servers. They are asked at the same time, each within a
//! deadline; what one has said holds for a moment, so that many clients do not ask it all the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use farbus_fabric::session::client;
use farbus_fabric::wire::{Listed, ListedState};
use tokio::sync::Mutex;
use tokio::task::{JoinSet, spawn_blocking};

use super::config::DeviceServer;
use crate::api::{Device, DeviceClass, DeviceState, Devices, Unreachable};

/// How long a device server's answer holds.
pub const FRESH: Duration = Duration::from_secs(1);

/// How long a device server may take to answer.
const DEADLINE: Duration = Duration::from_secs(2);

/// PCI class code of an NVMe controller (PCI Code and ID Assignment, 1.8.8).
const NVME_CLASS: u32 = 0x01_0802;

/// What one device server offers, or why it does not say.
type Answer = Result<Vec<Device>, String>;

/// What was said, and when.
type Said = Option<(Instant, Answer)>;

#[derive(Debug)]
struct Server {
    config: DeviceServer,
    /// Held while it is asked, so that it is asked once however many want to know.
    said: Mutex<Said>,
    /// What it has said does not hold any more.
    outdated: AtomicBool,
}

/// See the module's own description.
#[derive(Clone, Debug)]
pub struct Pool(Arc<[Arc<Server>]>);

impl Pool {
    /// The exports of these.
    #[must_use]
    pub fn new(servers: &[DeviceServer]) -> Self {
        let server = |config: &DeviceServer| {
            Arc::new(Server {
                config: config.clone(),
                said: Mutex::default(),
                outdated: AtomicBool::new(false),
            })
        };
        Self(servers.iter().map(server).collect())
    }

    /// All that there is, as it was at most `age` ago.
    pub async fn devices(&self, age: Duration) -> Devices {
        self.ask(age, |_server| true).await
    }

    /// What the device server of this name has.
    pub async fn devices_of(&self, name: &str, age: Duration) -> Devices {
        self.ask(age, |server| server.name == name).await
    }

    /// A device of this device server has been taken or given back.
    pub fn has_changed(&self, name: &str) {
        for server in self.0.iter().filter(|server| server.config.name == name) {
            server.outdated.store(true, Ordering::Relaxed);
        }
    }

    /// Which device servers have answered when they were asked last, of those that were asked.
    #[must_use]
    pub fn reachable(&self) -> Vec<(String, bool)> {
        let known = |server: &Arc<Server>| {
            // One that is being asked is left out for once.
            let said = server.said.try_lock().ok()?;
            let (_when, answer) = said.as_ref()?;
            Some((server.config.name.clone(), answer.is_ok()))
        };
        self.0.iter().filter_map(known).collect()
    }

    async fn ask(&self, age: Duration, wanted: impl Fn(&DeviceServer) -> bool) -> Devices {
        let mut asked = JoinSet::new();
        for server in self.0.iter().filter(|server| wanted(&server.config)) {
            let server = server.clone();
            asked.spawn(async move {
                let answer = server.answer(age).await;
                (server, answer)
            });
        }
        let mut all = Devices::default();
        while let Some(done) = asked.join_next().await {
            match done {
                Ok((_, Ok(devices))) => all.devices.extend(devices),
                Ok((server, Err(error))) => all.unreachable.push(Unreachable {
                    device_server: server.config.name.clone(),
                    address: server.config.address.clone(),
                    error,
                }),
                Err(error) => log::error!("a device server could not be asked: {error}"),
            }
        }
        all.devices.sort_by(|a, b| a.id.cmp(&b.id));
        all.unreachable
            .sort_by(|a, b| a.device_server.cmp(&b.device_server));
        all
    }
}

impl Server {
    async fn answer(&self, age: Duration) -> Answer {
        let mut said = self.said.lock().await;
        match &*said {
            Some((when, answer))
                if when.elapsed() < age && !self.outdated.swap(false, Ordering::Relaxed) =>
            {
                return answer.clone();
            }
            _ => {}
        }
        self.outdated.store(false, Ordering::Relaxed);
        let server = self.config.clone();
        let asked = spawn_blocking(move || ask(&server)).await;
        let answer = asked.unwrap_or_else(|error| Err(error.to_string()));
        *said = Some((Instant::now(), answer.clone()));
        answer
    }
}

fn ask(server: &DeviceServer) -> Answer {
    let listed = client::list(&server.address, &crate::reconnect::label(), DEADLINE)
        .map_err(|error| format!("{:#}", anyhow::Error::new(error)))?;
    Ok(listed.iter().map(|entry| device(server, entry)).collect())
}

/// An export as clients see it.
fn device(server: &DeviceServer, listed: &Listed) -> Device {
    let text = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    Device {
        id: format!("{}/{}", server.name, listed.name),
        device_server: server.name.clone(),
        address: server.address.clone(),
        export: listed.name.to_string(),
        class: if listed.class == NVME_CLASS {
            DeviceClass::Nvme
        } else {
            DeviceClass::Other
        },
        vendor_id: format!("{:04x}", listed.vendor),
        device_id: format!("{:04x}", listed.device),
        model: text(listed.model.as_str()),
        serial: text(listed.serial.as_str()),
        capacity_bytes: listed.capacity,
        block_size_bytes: listed.block_size,
        numa_node: listed.numa_node.map(u32::from),
        state: match listed.state {
            ListedState::Free => DeviceState::Free,
            ListedState::Claimed => DeviceState::Claimed,
            ListedState::Failed => DeviceState::Failed,
            ListedState::Draining => DeviceState::Draining,
        },
        holder: text(listed.holder.as_str()),
        why: text(listed.why.as_str()),
    }
}
