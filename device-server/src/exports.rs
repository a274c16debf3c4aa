//! What is exported, in what state it is, and who has claimed it.

use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{SystemTime, UNIX_EPOCH};

use farbus_fabric::wire::{Epoch, ExportName, Label, Listed, ListedState, Text};
use farbus_shadow_mem::nvme::device::Settings;
use farbus_vfio::{Function, Notice};
use log::{info, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Opens an export's function anew, after it was gone.
pub type Reopen = Box<dyn Fn() -> Result<Arc<dyn Function>, Unopened> + Send + Sync>;
/// Why it could not be opened anew.
pub type Unopened = Box<dyn std::error::Error + Send + Sync>;

/// One function that compute servers can claim.
pub struct Export {
    name: ExportName,
    reopen: Option<Reopen>,
    state: Mutex<Inner>,
    /// Where notices of a function that nobody has claimed are waited for, and their id there.
    watch: OnceLock<(Arc<Epoll>, u64)>,
}

struct Inner {
    last_epoch: Epoch,
    /// Who has it now, as it names itself.
    holder: Option<String>,
    /// The function, or why there is none.
    function: Result<Arc<dyn Function>, String>,
    /// How its function was set before the first tenant.
    settings: Option<Settings>,
    /// How many functions are being closed.
    closing: u32,
    /// Nothing is opened any more.
    ended: bool,
}

/// What an export is fit for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// It can be claimed.
    Ready,
    /// It is someone's.
    Claimed {
        /// Who has it, as it names itself.
        holder: String,
        /// That claim's epoch.
        epoch: Epoch,
    },
    /// It has no function; the next claim tries to open it again.
    Failed {
        /// Why.
        why: String,
    },
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready => f.write_str("ready"),
            Self::Claimed { holder, epoch } => write!(f, "claimed by {holder} ({epoch})"),
            Self::Failed { why } => write!(f, "failed: {why}"),
        }
    }
}

/// The exclusive right to an export, until it is dropped.
pub struct Claim {
    export: Arc<Export>,
    epoch: Epoch,
}

/// Why an export could not be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Someone else has it.
    #[error(
        "export {export} is claimed by {holder} ({epoch}); detach it there first, or wait until that side is found dead"
    )]
    Busy {
        /// The export.
        export: String,
        /// Who has it.
        holder: String,
        /// That claim's epoch.
        epoch: Epoch,
    },
    /// Its function is gone, and not back.
    #[error("export {export} has failed: {why}; it can be claimed once the device is back")]
    Failed {
        /// The export.
        export: String,
        /// Why there is no function.
        why: String,
    },
}

impl Export {
    /// An export that nobody has claimed. A function that is gone stays so.
    pub fn new(name: ExportName, function: Arc<dyn Function>) -> Self {
        Self {
            name,
            reopen: None,
            state: Mutex::new(Inner {
                last_epoch: Epoch(0),
                holder: None,
                function: Ok(function),
                settings: None,
                closing: 0,
                ended: false,
            }),
            watch: OnceLock::new(),
        }
    }

    /// As [`Self::new`], of a function that can be opened again when it is back.
    pub fn reopening(name: ExportName, function: Arc<dyn Function>, reopen: Reopen) -> Self {
        Self {
            reopen: Some(reopen),
            ..Self::new(name, function)
        }
    }

    /// The export's name.
    pub fn name(&self) -> &ExportName {
        &self.name
    }

    /// What it is fit for.
    pub fn state(&self) -> State {
        let inner = self.lock();
        match (&inner.function, &inner.holder) {
            (Err(why), _) => State::Failed { why: why.clone() },
            (Ok(_), None) => State::Ready,
            (Ok(_), Some(holder)) => State::Claimed {
                holder: holder.clone(),
                epoch: inner.last_epoch,
            },
        }
    }

    /// What peers are told of it.
    fn listed(&self) -> Listed {
        let (state, holder, why) = match self.state() {
            State::Ready => (ListedState::Free, String::new(), String::new()),
            State::Claimed { holder, .. } => (ListedState::Claimed, holder, String::new()),
            State::Failed { why } => (ListedState::Failed, String::new(), why),
        };
        Listed {
            name: self.name.clone(),
            class: 0,
            vendor: 0,
            device: 0,
            model: Label::default(),
            serial: Label::default(),
            capacity: None,
            block_size: None,
            numa_node: None,
            state,
            holder: Text::truncated(&holder),
            why: Text::truncated(&why),
        }
    }

    /// The state is whole whenever the lock is free, so a panic elsewhere does not matter.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims the export for `claimant`, with an epoch higher than every one before; across a
    /// restart of this process, as long as the clock has not been set back. A function that
    /// was gone is opened again first.
    pub fn claim(
        self: &Arc<Self>,
        claimant: &str,
    ) -> Result<(Claim, Arc<dyn Function>), ClaimError> {
        let mut inner = self.lock();
        let export = || self.name.as_str().to_owned();
        match (&inner.holder, &inner.function) {
            // It is being closed, or opened again, or was for the last time.
            (_, Err(why)) if inner.holder.is_some() || inner.closing > 0 || inner.ended => {
                return Err(ClaimError::Failed {
                    export: export(),
                    why: why.clone(),
                });
            }
            (None, _) | (_, Err(_)) => {}
            (Some(holder), Ok(_)) => {
                return Err(ClaimError::Busy {
                    export: export(),
                    holder: holder.clone(),
                    epoch: inner.last_epoch,
                });
            }
        }
        let epoch = Epoch(clock_epoch().max(inner.last_epoch.0 + 1));
        inner.last_epoch = epoch;
        inner.holder = Some(claimant.into());
        let function = inner.function.clone();
        drop(inner);
        let claim = Claim {
            export: self.clone(),
            epoch,
        };
        let function = match function {
            Ok(function) => function,
            Err(why) => self.open_again(why).map_err(|why| ClaimError::Failed {
                export: export(),
                why,
            })?,
        };
        Ok((claim, function))
    }

    /// Opens the function again, which was gone for the reason `why`.
    fn open_again(&self, why: String) -> Result<Arc<dyn Function>, String> {
        let Some(reopen) = &self.reopen else {
            return Err(why);
        };
        match reopen() {
            Ok(function) => {
                info!("{}: {} is back", self.name.as_str(), function.info().label);
                let mut inner = self.lock();
                inner.function = Ok(function.clone());
                // It may be another device, and has had no power meanwhile.
                inner.settings = None;
                drop(inner);
                self.watch(&function);
                Ok(function)
            }
            Err(error) => {
                let why = format!("{:#}", anyhow::anyhow!(error));
                self.lock().function = Err(why.clone());
                Err(why)
            }
        }
    }

    /// Gives the function up, which is gone.
    fn fail(self: &Arc<Self>, why: &str) {
        drop(self.let_go(why));
        warn!(
            "{}: {}; a claim opens it again once the device is back",
            self.name.as_str(),
            self.state()
        );
    }

    /// Lets go of the function. This may be the moment at which it is closed, and closing a
    /// device that vanished without the kernel's knowledge takes more than a minute; so a thread
    /// does that which has nothing else to do.
    fn let_go(self: &Arc<Self>, why: &str) -> Option<JoinHandle<()>> {
        let mut inner = self.lock();
        let function = std::mem::replace(&mut inner.function, Err(why.into())).ok()?;
        inner.closing += 1;
        drop(inner);
        let export = self.clone();
        let close = move || {
            drop(function);
            export.lock().closing -= 1;
        };
        let closing = thread::Builder::new().name("closing".into()).spawn(close);
        match closing {
            Ok(thread) => Some(thread),
            Err(error) => {
                // The closure is gone, and the function was closed with it.
                self.lock().closing -= 1;
                warn!("{}: closed without a thread: {error}", self.name.as_str());
                None
            }
        }
    }

    /// Lets go of the function for good.
    fn end(self: &Arc<Self>) -> Option<JoinHandle<()>> {
        self.lock().ended = true;
        self.let_go("the device server ends")
    }

    /// Has `epoll` say `id` when the function gives a notice.
    fn watch(&self, function: &Arc<dyn Function>) {
        let Some((epoll, id)) = self.watch.get() else {
            return;
        };
        for (_, event) in function.notices() {
            // Each signal is told of once: while the function is claimed, nobody reads it here.
            let told = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, *id);
            if let Err(error) = epoll.ctl(ControlOperation::Add, event.as_raw_fd(), told) {
                warn!("{}: a notice is not heard: {error}", self.name.as_str());
            }
        }
    }

    /// Acts on notices, unless a claim does so.
    fn look_after(self: &Arc<Self>) {
        let inner = self.lock();
        let (None, Ok(function)) = (&inner.holder, &inner.function) else {
            return;
        };
        let mut wanted_back = false;
        for (notice, event) in function.notices() {
            if event.read().is_err() {
                continue;
            }
            match notice {
                Notice::UnplugRequested => wanted_back = true,
                Notice::ErrorReported => warn!(
                    "{}: {} has reported an uncorrectable PCIe error; it is reset for the next claim",
                    self.name.as_str(),
                    function.info().label
                ),
            }
        }
        drop(inner);
        if wanted_back {
            self.fail("the device server's host unplugs it, or takes it for another driver");
        }
    }
}

/// Microseconds since 1970.
fn clock_epoch() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(1, |now| now.as_micros() as u64)
}

impl Claim {
    /// The claim's epoch.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// How the function was set before its first tenant, if that is known.
    pub fn settings(&self) -> Option<Settings> {
        self.export.lock().settings.clone()
    }

    /// Remembers how the function was set before its first tenant.
    pub fn remember(&self, settings: &Settings) {
        self.export.lock().settings = Some(settings.clone());
    }

    /// What is claimed.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// The function is gone. Whoever drives it drops it next, and the claim after that.
    pub fn fail(&self, why: &str) {
        self.export.fail(why);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.export.lock().holder = None;
        // What was signalled since the claimant has last looked.
        self.export.look_after();
    }
}

/// All exports of a device server, by name.
#[derive(Clone)]
pub struct Exports(Arc<[Arc<Export>]>);

impl Exports {
    /// From a list whose names differ.
    pub fn new(exports: Vec<Export>) -> Self {
        Self(exports.into_iter().map(Arc::new).collect())
    }

    /// The export of this name.
    pub fn find(&self, name: &ExportName) -> Option<&Arc<Export>> {
        self.0.iter().find(|export| export.name() == name)
    }

    /// The names, in the order of the list.
    pub fn names(&self) -> Vec<String> {
        let names = self.0.iter().map(|export| export.name().as_str());
        names.map(Into::into).collect()
    }

    /// What peers are told that ask: the exports whose names come after `after`, in that order.
    pub fn list(&self, after: Option<&ExportName>) -> Vec<Listed> {
        let mut listed: Vec<Listed> = self
            .0
            .iter()
            .filter(|export| after.is_none_or(|after| export.name() > after))
            .map(|export| export.listed())
            .collect();
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        listed
    }

    /// Lets go of all functions, for good. The threads that close them are returned.
    pub fn end(&self) -> Vec<JoinHandle<()>> {
        self.0.iter().filter_map(Export::end).collect()
    }

    /// From now on `epoll` tells when a function gives a notice; each such event's id is
    /// `first` or higher, and for [`Self::look_after`].
    pub fn watch(&self, epoll: &Arc<Epoll>, first: u64) {
        for (id, export) in (first..).zip(self.0.iter()) {
            let _ = export.watch.set((epoll.clone(), id));
            let function = export.lock().function.clone();
            if let Ok(function) = function {
                export.watch(&function);
            }
        }
    }

    /// Acts on a notice of the function of the export with this place in the list.
    pub fn look_after(&self, index: u64) {
        if let Some(export) = self.0.get(index as usize) {
            export.look_after();
        }
    }
}
