//! All exports of a device server. Exports come and go while it runs.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::thread::JoinHandle;

use farbus_fabric::wire::{ExportName, Listed};
use tokio::sync::watch;
use vmm_sys_util::epoll::Epoll;

use super::tally::Refused;
use super::{Export, News};

/// All exports, by name.
#[derive(Clone)]
pub struct Exports(Arc<Shared>);

struct Shared {
    list: RwLock<Vec<Arc<Export>>>,
    /// Where notices are waited for, and the first id there.
    watch: OnceLock<(Arc<Epoll>, u64)>,
    next: AtomicU64,
    /// No new claims are given.
    draining: AtomicBool,
    news: News,
    refused: Refused,
}

impl Exports {
    /// From a list whose names differ.
    pub fn new(exports: Vec<Export>) -> Self {
        let list = Self(Arc::new(Shared {
            list: RwLock::default(),
            watch: OnceLock::new(),
            next: AtomicU64::new(0),
            draining: AtomicBool::new(false),
            news: Arc::new(watch::Sender::new(())),
            refused: Refused::default(),
        }));
        for export in exports {
            list.add(export);
        }
        list
    }

    /// All of them, in the order in which they were added.
    pub fn all(&self) -> Vec<Arc<Export>> {
        let list = self.0.list.read();
        list.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The export of this name.
    pub fn find(&self, name: &ExportName) -> Option<Arc<Export>> {
        self.all().into_iter().find(|export| export.name() == name)
    }

    /// The names, in the order in which they were added.
    pub fn names(&self) -> Vec<String> {
        let all = self.all();
        let names = all.iter().map(|export| export.name().as_str());
        names.map(Into::into).collect()
    }

    /// Adds an export, whose name no other has.
    pub fn add(&self, export: Export) -> Arc<Export> {
        let export = Arc::new(export);
        let number = self.0.next.fetch_add(1, Ordering::Relaxed);
        export.enter(number, self.0.news.clone());
        let list = self.0.list.write();
        list.unwrap_or_else(PoisonError::into_inner)
            .push(export.clone());
        if let Some((epoll, first)) = self.0.watch.get() {
            export.listen(epoll, first + number);
        }
        self.0.news.send_replace(());
        export
    }

    /// Takes an export off the list, unless somebody has it; it can never be claimed again. The
    /// thread that closes its function is returned.
    pub fn remove(&self, export: &Arc<Export>) -> Result<Option<JoinHandle<()>>, StillClaimed> {
        if !export.end_unless_claimed() {
            return Err(StillClaimed);
        }
        let list = self.0.list.write();
        list.unwrap_or_else(PoisonError::into_inner)
            .retain(|other| !Arc::ptr_eq(other, export));
        let closing = export.end();
        self.0.news.send_replace(());
        Ok(closing)
    }

    /// What peers are told that ask: the exports whose names come after `after`, in that order.
    pub fn list(&self, after: Option<&ExportName>) -> Vec<Listed> {
        let draining = self.is_draining();
        let mut listed: Vec<Listed> = self
            .all()
            .iter()
            .filter(|export| after.is_none_or(|after| export.name() > after))
            .map(|export| export.listed(draining))
            .collect();
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        listed
    }

    /// From now on no new claims are given, or given again.
    pub fn set_draining(&self, draining: bool) {
        self.0.draining.store(draining, Ordering::SeqCst);
        self.0.news.send_replace(());
    }

    /// Whether no new claims are given.
    pub fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::SeqCst)
    }

    /// How many are claimed.
    pub fn claims(&self) -> usize {
        let all = self.all();
        all.iter().filter(|export| export.is_claimed()).count()
    }

    /// Who was sent away, and why.
    pub fn refused(&self) -> &Refused {
        &self.0.refused
    }

    /// Tells of every claim that begins or ends, and of every export that comes, goes or fails.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.0.news.subscribe()
    }

    /// Lets go of all functions, for good. The threads that close them are returned.
    pub fn end(&self) -> Vec<JoinHandle<()>> {
        self.all().iter().filter_map(Export::end).collect()
    }

    /// From now on `epoll` tells when a function gives a notice; each such event's id is
    /// `first` or higher, and for [`Self::look_after`].
    pub fn watch(&self, epoll: &Arc<Epoll>, first: u64) {
        let _ = self.0.watch.set((epoll.clone(), first));
        for export in self.all() {
            export.listen(epoll, first + export.number());
        }
    }

    /// Acts on a notice of the function of the export that was added as this one, counted from 0.
    pub fn look_after(&self, number: u64) {
        let all = self.all();
        if let Some(export) = all.iter().find(|export| export.number() == number) {
            export.look_after();
        }
    }
}

/// Somebody has the export.
#[derive(Debug, PartialEq, Eq)]
pub struct StillClaimed;
