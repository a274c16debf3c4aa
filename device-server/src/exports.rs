//! What is exported, in what state it is, and who has claimed it.

mod claim;
mod known;
mod list;
mod notices;
mod tally;

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Instant, SystemTime};

use farbus_fabric::wire::{Epoch, ExportName, ListedState, RateLimits};
use farbus_shadow_mem::nvme::device::Settings;
use farbus_vfio::Function;
use log::{info, warn};
use tokio::sync::watch;
use vmm_sys_util::epoll::Epoll;

use self::claim::Holder;
pub use self::claim::{Claim, ClaimError};
pub use self::known::{Known, ask, state_name};
pub use self::list::{Exports, StillClaimed};
pub use self::tally::{Counts, Refused, Tally};

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

    /// The state is whole whenever the lock is free, so a panic elsewhere does not matter.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
}
