//! What is exported, in what state it is, and who has claimed it.

mod known;
mod list;
mod tally;

use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use farbus_fabric::wire::{Epoch, ExportName, ListedState, RateLimits};
use farbus_shadow_mem::nvme::device::{DeviceHalf, Settings};
use farbus_vfio::{Function, Notice};
use log::{info, warn};
use tokio::sync::watch;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use self::known::{Known, ask, state_name};
pub use self::list::{Exports, StillClaimed};
pub use self::tally::{Counts, Refused, Tally};

/// How long a claim waits for the end of the former one, of which there is no sign yet: that the
/// claimant has gone may be on its way.
const NO_SIGN: Duration = Duration::from_millis(100);
/// How long a claim waits for the former one that is being ended: longer than a reset takes, and
/// shorter than a claimant is patient.
const BEING_ENDED: Duration = Duration::from_secs(3);
/// How long a claimant that was evicted does not get the export again. Its agent asks at once, and
/// somebody else is to have it.
const EVICTED: Duration = Duration::from_secs(30);

/// Tells of changes.
type News = Arc<watch::Sender<()>>;

/// Opens an export's function anew, after it was gone.
pub type Reopen = Box<dyn Fn() -> Result<Arc<dyn Function>, Unopened> + Send + Sync>;
/// Why it could not be opened anew.
pub type Unopened = Box<dyn std::error::Error + Send + Sync>;

/// One function that compute servers can claim.
pub struct Export {
    name: ExportName,
    reopen: Option<Reopen>,
    state: Mutex<Inner>,
    /// A claim has ended, or is being ended.
    ended: Condvar,
    /// Where notices of a function that nobody has claimed are waited for, and their id there.
    watch: OnceLock<(Arc<Epoll>, u64)>,
    /// Its place among all that ever were on the list, and who is to know of changes.
    entered: OnceLock<(u64, News)>,
    tally: Arc<Tally>,
    /// What each of its claims is held to.
    limits: RateLimits,
}

struct Inner {
    last_epoch: Epoch,
    /// Who has it now.
    holder: Option<Holder>,
    /// Who was evicted, and when.
    evicted: Option<(String, Instant)>,
    /// Why there are no new claims.
    retired: Option<String>,
    /// What is known of the function.
    known: Known,
    /// Why the function cannot be used, although it is there.
    unusable: Option<String>,
    /// The function, or why there is none.
    function: Result<Arc<dyn Function>, String>,
    /// How its function was set before the first tenant.
    settings: Option<Settings>,
    /// How many functions are being closed.
    closing: u32,
    /// Nothing is opened any more.
    ended: bool,
}

/// Who has an export.
struct Holder {
    /// As it names itself, and where it is.
    name: String,
    since: SystemTime,
    /// Ends the claim when it is signalled.
    evict: Arc<EventFd>,
    /// The claim is being brought to its end.
    ending: bool,
}

/// A claim, for operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimStatus {
    /// Who has the export, as it names itself, and where it is.
    pub holder: String,
    /// The claim's epoch.
    pub epoch: Epoch,
    /// Since when.
    pub since: SystemTime,
}

/// All that operators and peers may know of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Whether it can be had.
    pub state: ListedState,
    /// The claim, if there is one.
    pub claim: Option<ClaimStatus>,
    /// Why it cannot be had.
    pub why: Option<String>,
    /// What is known of the function.
    pub known: Known,
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
    evict: Arc<EventFd>,
}

impl Inner {
    /// Why this claimant does not get the export, although others would.
    fn keeps_out(&self, claimant: &str) -> Option<String> {
        let (host, when) = self.evicted.as_ref()?;
        let left = EVICTED.checked_sub(when.elapsed())?;
        (host == host_of(claimant)).then(|| {
            let seconds = left.as_secs() + 1;
            format!("this side was evicted, and can claim it again in {seconds} s")
        })
    }
}

/// A claimant without its port, which changes with each connection.
fn host_of(claimant: &str) -> &str {
    claimant.rsplit_once(':').map_or(claimant, |(host, _)| host)
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
    /// It takes no new claims.
    #[error("export {export} takes no new claims: {why}")]
    Retired {
        /// The export.
        export: String,
        /// Why not.
        why: String,
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
        let mut known = Known::default();
        known.read(function.as_ref());
        Self::of(name, Ok(function), known)
    }

    fn of(name: ExportName, function: Result<Arc<dyn Function>, String>, known: Known) -> Self {
        Self {
            name,
            reopen: None,
            state: Mutex::new(Inner {
                last_epoch: Epoch(0),
                holder: None,
                evicted: None,
                retired: None,
                known,
                unusable: None,
                function,
                settings: None,
                closing: 0,
                ended: false,
            }),
            ended: Condvar::new(),
            watch: OnceLock::new(),
            entered: OnceLock::new(),
            tally: Arc::default(),
            limits: RateLimits::NONE,
        }
    }

    /// The same, with limits for each of its claims.
    #[must_use]
    pub fn limited_to(self, limits: RateLimits) -> Self {
        Self { limits, ..self }
    }

    /// What each of its claims is held to.
    pub fn limits(&self) -> RateLimits {
        self.limits
    }

    /// An export that has no function yet, for a reason. If it can be opened, the next claim
    /// tries that.
    pub fn failed(name: ExportName, why: String, reopen: Option<Reopen>) -> Self {
        Self {
            reopen,
            ..Self::of(name, Err(why), Known::default())
        }
    }

    /// The same, near to a NUMA node of this host.
    #[must_use]
    pub fn near_to(self, numa_node: Option<u16>) -> Self {
        self.lock().known.numa_node = numa_node;
        self
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
                holder: holder.name.clone(),
                epoch: inner.last_epoch,
            },
        }
    }

    /// All that is to be known of it; `draining` if no export is given to anybody.
    pub fn status(&self, draining: bool) -> Status {
        let inner = self.lock();
        let claim = inner.holder.as_ref().map(|holder| ClaimStatus {
            holder: holder.name.clone(),
            epoch: inner.last_epoch,
            since: holder.since,
        });
        let failed = match (&inner.function, &inner.unusable) {
            (Err(why), _) | (Ok(_), Some(why)) => Some(why),
            (Ok(_), None) => None,
        };
        let retired = inner.retired.clone();
        let retired = retired.or_else(|| draining.then(|| "the device server drains".to_owned()));
        let (state, why) = match (failed, retired, &claim) {
            (Some(why), ..) => (ListedState::Failed, Some(why.clone())),
            (None, Some(why), _) => (ListedState::Draining, Some(why)),
            (None, None, Some(_)) => (ListedState::Claimed, None),
            (None, None, None) => (ListedState::Free, None),
        };
        Status {
            state,
            claim,
            why,
            known: inner.known.clone(),
        }
    }

    /// Whether it has no function now.
    pub fn has_no_function(&self) -> bool {
        self.lock().function.is_err()
    }

    /// It has no function yet, for another reason than before.
    pub fn still_failed(&self, why: &str) {
        let mut inner = self.lock();
        if inner.function.is_err() {
            inner.function = Err(why.to_owned());
        }
    }

    /// Whether somebody has it.
    pub fn is_claimed(&self) -> bool {
        self.lock().holder.is_some()
    }

    /// What has come of its claims.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Takes no new claims from now on, for a reason. Who has it keeps it.
    pub fn retire(&self, why: &str) {
        self.lock().retired = Some(why.to_owned());
        self.tell();
    }

    /// Takes new claims again.
    pub fn reinstate(&self) {
        self.lock().retired = None;
        self.tell();
    }

    /// Takes the export from who has it, and keeps that side from getting it again for a moment.
    /// Returns who that was.
    pub fn evict(&self) -> Option<ClaimStatus> {
        let claim = self.status(false).claim?;
        let mut inner = self.lock();
        let holder = inner.holder.as_mut()?;
        // The counter of an eventfd is never full of ones.
        let _ = holder.evict.write(1);
        let name = holder.name.clone();
        inner.evicted = Some((host_of(&name).to_owned(), Instant::now()));
        Some(claim)
    }

    /// Is on the list now.
    fn enter(&self, number: u64, news: News) {
        let _ = self.entered.set((number, news));
    }

    fn number(&self) -> u64 {
        self.entered.get().map_or(u64::MAX, |(number, _)| *number)
    }

    /// Something has changed.
    fn tell(&self) {
        if let Some((_, news)) = self.entered.get() {
            news.send_replace(());
        }
    }

    /// Has notices told under this id from now on.
    fn listen(&self, epoll: &Arc<Epoll>, id: u64) {
        if self.watch.set((epoll.clone(), id)).is_err() {
            return;
        }
        let function = self.lock().function.clone();
        if let Ok(function) = function {
            self.watch(&function);
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
        let mut inner = self.wait_for_the_former();
        let export = || self.name.as_str().to_owned();
        let retired = inner.retired.clone();
        if let Some(why) = retired.or_else(|| inner.keeps_out(claimant)) {
            return Err(ClaimError::Retired {
                export: export(),
                why,
            });
        }
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
                    holder: holder.name.clone(),
                    epoch: inner.last_epoch,
                });
            }
        }
        let evict = EventFd::new(EFD_NONBLOCK).map_err(|error| ClaimError::Failed {
            export: export(),
            why: format!("an eventfd cannot be had: {error}"),
        })?;
        let evict = Arc::new(evict);
        let epoch = Epoch(clock_epoch().max(inner.last_epoch.0 + 1));
        inner.last_epoch = epoch;
        inner.holder = Some(Holder {
            name: claimant.into(),
            since: SystemTime::now(),
            evict: evict.clone(),
            ending: false,
        });
        let function = inner.function.clone();
        drop(inner);
        self.tell();
        let claim = Claim {
            export: self.clone(),
            epoch,
            evict,
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

    /// Waits for the end of a claim that is being ended, or is about to be.
    fn wait_for_the_former(&self) -> MutexGuard<'_, Inner> {
        let begun = Instant::now();
        let mut inner = self.lock();
        while let (Some(holder), Ok(_)) = (&inner.holder, &inner.function) {
            let patience = if holder.ending { BEING_ENDED } else { NO_SIGN };
            let left = patience.saturating_sub(begun.elapsed());
            if left.is_zero() {
                break;
            }
            let waited = self.ended.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        inner
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
                inner.known.read(function.as_ref());
                inner.known.identity = None;
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
        self.tell();
        let export = self.clone();
        let close = move || {
            drop(function);
            export.lock().closing -= 1;
            export.tell();
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

    /// Rules out any further claim, unless there is one now.
    fn end_unless_claimed(&self) -> bool {
        let mut inner = self.lock();
        let free = inner.holder.is_none();
        if free {
            inner.ended = true;
            inner
                .retired
                .get_or_insert_with(|| "it is exported no longer".to_owned());
        }
        free
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

    /// Remembers which drive it is, and how the function was set before its first tenant.
    pub fn remember(&self, half: &DeviceHalf) {
        self.export.learn(half);
    }

    /// The function cannot be used, although it is there.
    pub fn is_unusable(&self, why: &str) {
        self.export.lock().unusable = Some(why.to_owned());
    }

    /// Is readable once the claim is to end.
    pub fn evict(&self) -> &EventFd {
        &self.evict
    }

    /// The claim is being brought to its end: whoever claims the export next may wait for that.
    pub fn ending(&self) {
        if let Some(holder) = &mut self.export.lock().holder {
            holder.ending = true;
        }
        self.export.ended.notify_all();
    }

    /// What is claimed.
    pub fn export(&self) -> &Arc<Export> {
        &self.export
    }

    /// Where to count what comes of it.
    pub fn tally(&self) -> &Arc<Tally> {
        &self.export.tally
    }

    /// The function is gone. Whoever drives it drops it next, and the claim after that.
    pub fn fail(&self, why: &str) {
        self.export.fail(why);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.export.lock().holder = None;
        self.export.ended.notify_all();
        self.export.tell();
        // What was signalled since the claimant has last looked.
        self.export.look_after();
    }
}
