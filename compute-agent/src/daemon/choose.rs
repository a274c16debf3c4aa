//! Which device an attachment gets, and who of this agent has which.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use farbus_rest::problem::Problem;

use super::config::Config;
use super::id::AttachmentId;
use super::pool::{FRESH, Pool};
use super::store::Chosen;
use super::validate::{no_such_device, parse_device};
use crate::api::{AttachmentSpec, Device, DeviceState, Devices, Selector};

/// A device server may take so long to give a device that was let go of to the next one: it resets
/// it first.
const RESET: Duration = Duration::from_secs(3);

/// How often it is asked meanwhile; device servers do not tell of themselves that a device is free.
const AGAIN: Duration = Duration::from_millis(50);

/// The devices that attachments of this agent have, and those that they had a moment ago.
#[derive(Debug, Default)]
struct Taken {
    by: HashMap<String, AttachmentId>,
    released: HashMap<String, Instant>,
}

/// See the module's own description.
#[derive(Clone, Debug)]
pub struct Chooser {
    config: Arc<Config>,
    pool: Pool,
    taken: Arc<Mutex<Taken>>,
}

impl Chooser {
    /// Of this pool, for an agent that has none yet.
    #[must_use]
    pub fn new(config: Arc<Config>, pool: Pool) -> Self {
        Self {
            config,
            pool,
            taken: Arc::default(),
        }
    }

    /// Takes a device that is what `spec` asks for, but for those in `refused`.
    pub async fn choose(
        &self,
        id: &AttachmentId,
        spec: &AttachmentSpec,
        refused: &[String],
    ) -> Result<Chosen, Problem> {
        match (&spec.device, &spec.selector) {
            (Some(device), _) => self.named(id, device).await,
            (None, Some(selector)) => self.selected(id, selector, refused).await,
            (None, None) => Err(no_such_device("nothing is asked for")),
        }
    }

    async fn named(&self, id: &AttachmentId, name: &str) -> Result<Chosen, Problem> {
        let (server, _export) = parse_device(name, &self.config)?;
        if let Some(holder) = self.holder(name).filter(|holder| holder != id) {
            return Err(claimed(name, &format!("attachment {holder} of this agent")));
        }
        let begun = Instant::now();
        let mut age = FRESH;
        loop {
            let there = self.pool.devices_of(&server, age).await;
            let reachable = there.unreachable.is_empty();
            let device = there.devices.into_iter().find(|device| device.id == name);
            match device {
                Some(device) if device.state == DeviceState::Free => {
                    return self
                        .take(id, &device)
                        .ok_or_else(|| claimed(name, "another attachment of this agent"));
                }
                // What was said a moment ago may be over.
                _ if !age.is_zero() => age = Duration::ZERO,
                Some(_) if self.was_released(name) && begun.elapsed() < RESET => {
                    tokio::time::sleep(AGAIN).await;
                }
                Some(device) => return Err(not_to_be_had(&device)),
                None if reachable => {
                    return Err(no_such_device(format!(
                        "device server {server} has no export of this name: {name}"
                    )));
                }
                None => return Err(unreachable(&there.unreachable)),
            }
        }
    }

    async fn selected(
        &self,
        id: &AttachmentId,
        selector: &Selector,
        refused: &[String],
    ) -> Result<Chosen, Problem> {
        let mut age = FRESH;
        let begun = Instant::now();
        loop {
            let Devices {
                devices,
                unreachable: silent,
            } = self.pool.devices(age).await;
            let alike = devices
                .into_iter()
                .filter(|device| matches(selector, device));
            let alike: Vec<Device> = alike.collect();
            let free = |device: &&Device| {
                device.state == DeviceState::Free && !refused.contains(&device.id)
            };
            if let Some(chosen) = alike
                .iter()
                .filter(free)
                .find_map(|device| self.take(id, device))
            {
                return Ok(chosen);
            }
            if !age.is_zero() {
                age = Duration::ZERO;
                continue;
            }
            let soon = alike
                .iter()
                .any(|device| self.was_released(&device.id) && !refused.contains(&device.id));
            if soon && begun.elapsed() < RESET {
                tokio::time::sleep(AGAIN).await;
                continue;
            }
            return Err(match alike.len() {
                count @ 1.. => Problem::new(
                    StatusCode::CONFLICT,
                    "no-free-device",
                    "All such devices are taken",
                    format!("{count} devices are like this, and none is free"),
                )
                .with_remedy("detach one, or ask for less"),
                0 if silent.is_empty() => {
                    no_such_device("no device of any device server is like this")
                }
                0 => unreachable(&silent),
            });
        }
    }

    /// Notes that an attachment of an earlier daemon has a device.
    pub fn keep(&self, id: &AttachmentId, device: &str) {
        self.lock().by.insert(device.to_owned(), id.clone());
    }

    /// A device was claimed, or is free again.
    pub fn has_changed(&self, device: &Chosen) {
        self.pool.has_changed(&device.device_server);
    }

    /// Lets go of what an attachment has.
    pub fn release(&self, id: &AttachmentId) {
        let mut taken = self.lock();
        let now = Instant::now();
        let Taken { by, released } = &mut *taken;
        released.retain(|_device, when| now - *when < RESET);
        by.retain(|device, holder| {
            let keeps = holder != id;
            if !keeps {
                released.insert(device.clone(), now);
            }
            keeps
        });
    }

    fn holder(&self, device: &str) -> Option<AttachmentId> {
        self.lock().by.get(device).cloned()
    }

    fn was_released(&self, device: &str) -> bool {
        let taken = self.lock();
        let when = taken.released.get(device);
        when.is_some_and(|when| when.elapsed() < RESET)
    }

    fn take(&self, id: &AttachmentId, device: &Device) -> Option<Chosen> {
        let mut taken = self.lock();
        let holder = taken
            .by
            .entry(device.id.clone())
            .or_insert_with(|| id.clone());
        (holder == id).then(|| Chosen {
            device_server: device.device_server.clone(),
            address: device.address.clone(),
            export: device.export.clone(),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn claimed(device: &str, holder: &str) -> Problem {
    Problem::new(
        StatusCode::CONFLICT,
        "device-claimed",
        "Somebody else has the device",
        format!("{device} is claimed by {holder}"),
    )
    .with_remedy("detach it there, or choose another device")
}

fn not_to_be_had(device: &Device) -> Problem {
    let why = device.why.as_deref().unwrap_or("it does not say why");
    match device.state {
        DeviceState::Free | DeviceState::Claimed => {
            claimed(&device.id, device.holder.as_deref().unwrap_or("somebody"))
        }
        DeviceState::Failed => Problem::new(
            StatusCode::CONFLICT,
            "device-failed",
            "The device has failed",
            format!("{} does not work: {why}", device.id),
        )
        .with_remedy("mend it on the device server, or choose another device"),
        DeviceState::Draining => Problem::new(
            StatusCode::CONFLICT,
            "device-server-draining",
            "The device server takes no new claims",
            format!("{} is not given to anybody: {why}", device.id),
        )
        .with_remedy("choose a device of another device server"),
    }
}

fn unreachable(silent: &[crate::api::Unreachable]) -> Problem {
    let each = silent.iter().map(|server| {
        format!(
            "{} ({}): {}",
            server.device_server, server.address, server.error
        )
    });
    Problem::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "device-server-unreachable",
        "A device server does not answer",
        each.collect::<Vec<_>>().join("; "),
    )
    .with_remedy("start it, mend the network or the agent's configuration, and repeat the request")
}

/// Whether a device has all that is named.
fn matches(selector: &Selector, device: &Device) -> bool {
    let Selector {
        device_server,
        class,
        vendor_id,
        device_id,
        model,
        min_capacity_bytes,
        numa_node,
    } = selector;
    let same = |wanted: &Option<String>, has: &str| {
        wanted
            .as_ref()
            .is_none_or(|wanted| wanted.eq_ignore_ascii_case(has))
    };
    let exactly = |wanted: &Option<String>, has: &str| wanted.as_ref().is_none_or(|it| it == has);
    exactly(device_server, &device.device_server)
        && class.is_none_or(|class| class == device.class)
        && same(vendor_id, &device.vendor_id)
        && same(device_id, &device.device_id)
        && exactly(model, device.model.as_deref().unwrap_or(""))
        && min_capacity_bytes.is_none_or(|least| device.capacity_bytes.unwrap_or(0) >= least)
        && numa_node.is_none_or(|node| device.numa_node == Some(node))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::DeviceClass;

    fn device() -> Device {
        Device {
            id: "rack1/disk0".into(),
            device_server: "rack1".into(),
            address: "host:1".into(),
            export: "disk0".into(),
            class: DeviceClass::Nvme,
            vendor_id: "1b36".into(),
            device_id: "0010".into(),
            model: Some("QEMU NVMe Ctrl".into()),
            serial: None,
            capacity_bytes: Some(1 << 30),
            block_size_bytes: Some(512),
            numa_node: Some(1),
            state: DeviceState::Free,
            holder: None,
            why: None,
        }
    }

    fn selector(change: impl FnOnce(&mut Selector)) -> Selector {
        let mut selector = Selector::default();
        change(&mut selector);
        selector
    }

    #[test]
    fn selector_takes_what_has_all_that_it_names() {
        let all = Selector {
            device_server: Some("rack1".into()),
            class: Some(DeviceClass::Nvme),
            vendor_id: Some("1B36".into()),
            device_id: Some("0010".into()),
            model: Some("QEMU NVMe Ctrl".into()),
            min_capacity_bytes: Some(1 << 30),
            numa_node: Some(1),
        };

        assert!(matches(&Selector::default(), &device()));
        assert!(matches(&all, &device()));
    }

    #[test]
    fn selector_refuses_what_lacks_one_thing() {
        let lacking = [
            selector(|s| s.device_server = Some("rack2".into())),
            selector(|s| s.class = Some(DeviceClass::Other)),
            selector(|s| s.vendor_id = Some("8086".into())),
            selector(|s| s.device_id = Some("0011".into())),
            selector(|s| s.model = Some("QEMU".into())),
            selector(|s| s.min_capacity_bytes = Some((1 << 30) + 1)),
            selector(|s| s.numa_node = Some(0)),
        ];

        for selector in lacking {
            assert!(!matches(&selector, &device()), "{selector:?}");
        }
    }
}
