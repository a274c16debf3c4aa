//! The workers' keeper as the daemon uses it: what workers say goes to the tasks of their attachments.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use super::id::AttachmentId;
use super::process::Starting;
use crate::api;
use crate::custody::fdstore::FdStore;
use crate::custody::messages::Link;
use crate::custody::{Event, Keeper, KeeperError, Statistics};
use crate::sandbox::User;

/// The percentiles that are shown are of at least so much time.
const WINDOW: Duration = Duration::from_secs(2);

/// How long workers may take to find a new daemon. A worker that is stopped, or of another version, does
/// not come.
const RETURN: Duration = Duration::from_secs(2);

/// Why what a VM asks for waits, if its worker has said so.
type Down = Option<String>;

/// What is kept of one attachment here.
#[derive(Debug, Default)]
struct Entry {
    down: watch::Sender<Down>,
    /// Counters of some time ago, and of less.
    counted: [Option<(Instant, Statistics)>; 2],
}

type Entries = Arc<Mutex<HashMap<String, Entry>>>;

/// See the module's own description.
#[derive(Debug)]
pub struct Custody {
    keeper: Keeper,
    entries: Entries,
    /// A worker has handed over what its successor needs.
    returned: Arc<Notify>,
}

impl Custody {
    /// Listens in the runtime directory, for workers of the daemon's user, and of this one.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn bind(runtime_dir: &Path, user: Option<User>) -> Result<Self, KeeperError> {
        let entries = Entries::default();
        let returned = Arc::<Notify>::default();
        let (told, heard) = (entries.clone(), returned.clone());
        let path: PathBuf = runtime_dir.join("custody.sock");
        let keeper = Keeper::bind_with(&path, FdStore::of_service(), move |event| {
            if matches!(event, Event::Ready { .. }) {
                heard.notify_waiters();
            }
            hear(&told, event);
        })?;
        if let Some(user) = user {
            keeper.allow_user(user)?;
        }
        Ok(Self {
            keeper,
            entries,
            returned,
        })
    }

    /// Where workers connect.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.keeper.path()
    }

    /// There is an attachment of this id now, with the worker of this process id, if it has one. Tells when
    /// its link is lost, and why.
    #[must_use]
    pub fn admit(&self, id: &AttachmentId, worker: Option<u32>) -> watch::Receiver<Down> {
        let mut entries = lock(&self.entries);
        let entry = entries.entry(id.to_string()).or_default();
        match worker {
            Some(pid) => self.keeper.appoint(id.as_str(), pid),
            None => self.keeper.admit(id.as_str()),
        }
        entry.down.subscribe()
    }

    /// Has the attachment's worker started: no other process gets what is held for it.
    ///
    /// # Errors
    /// Those of `start`.
    pub fn start_worker(
        &self,
        id: &AttachmentId,
        start: impl FnOnce() -> io::Result<Starting>,
    ) -> io::Result<Starting> {
        self.keeper.appoint_started(id.as_str(), || {
            let starting = start()?;
            Ok((starting.pid(), starting))
        })
    }

    /// The attachment's worker is dead.
    pub fn worker_died(&self, id: &AttachmentId) {
        self.keeper.dismiss(id.as_str());
    }

    /// All attachments of the daemon before are admitted.
    pub fn all_admitted(&self) {
        self.keeper.all_admitted();
    }

    /// Waits until each of these has a worker that has handed over what its successor needs, or long enough.
    /// One that lives looks for a new daemon many times a second.
    pub async fn wait_for(&self, ids: &[AttachmentId]) {
        let all = async {
            loop {
                let returned = self.returned.notified();
                tokio::pin!(returned);
                // What comes from here on is not missed.
                returned.as_mut().enable();
                if ids.iter().all(|id| self.keeper.is_whole(id.as_str())) {
                    return;
                }
                returned.await;
            }
        };
        // Who has not come by then may come later.
        let _ = tokio::time::timeout(RETURN, all).await;
    }

    /// What a worker had that is dead is not wanted any more: the next one begins anew.
    pub fn begin_anew(&self, id: &AttachmentId) {
        self.keeper.release(id.as_str());
        self.keeper.admit(id.as_str());
        if let Some(entry) = lock(&self.entries).get_mut(id.as_str()) {
            entry.down.send_replace(None);
        }
    }

    /// Whether the next worker can go on where the last one was.
    #[must_use]
    pub fn can_resume(&self, id: &AttachmentId) -> bool {
        self.keeper.held(id.as_str()) > 0
    }

    /// The attachment is no more.
    pub fn release(&self, id: &AttachmentId) {
        self.keeper.release(id.as_str());
        lock(&self.entries).remove(id.as_str());
    }

    /// What the attachment has done; the percentiles are of the last seconds.
    #[must_use]
    pub fn statistics(&self, id: &str) -> Option<api::Statistics> {
        let now = self.keeper.statistics(id)?;
        let mut entries = lock(&self.entries);
        let [older, newer] = &mut entries.get_mut(id)?.counted;
        let due = newer
            .as_ref()
            .is_none_or(|(when, _)| when.elapsed() >= WINDOW);
        if due {
            *older = newer.replace((Instant::now(), now.clone()));
        }
        Some(now.to_api(older.as_ref().map(|(_, counted)| counted)))
    }
}

fn hear(entries: &Entries, event: Event) {
    let (id, down) = match event {
        Event::State {
            id,
            link: Link::Down,
            reason,
        } => (
            id,
            Some(reason.unwrap_or_else(|| "the link is lost".into())),
        ),
        Event::State {
            id, link: Link::Up, ..
        }
        | Event::Bye { id } => (id, None),
        // That a worker has died is seen at the process itself.
        Event::Connected { .. } | Event::Ready { .. } | Event::Lost { .. } => return,
    };
    if let Some(entry) = lock(entries).get(&id) {
        entry.down.send_replace(down);
    }
}

fn lock(entries: &Entries) -> MutexGuard<'_, HashMap<String, Entry>> {
    entries.lock().unwrap_or_else(PoisonError::into_inner)
}
