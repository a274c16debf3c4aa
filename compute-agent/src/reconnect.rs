//! How a lost link is replaced: a thread claims the export again, for as long as it takes,
//! while the event loop goes on answering the VMM.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use farbus_fabric::FabricError;
use farbus_fabric::provider::{self, Provider, Wanted};
use farbus_fabric::session::ClaimedLink;
use farbus_fabric::session::client::{self, Wish};
use farbus_fabric::wire::{ExportName, RateLimits};
use log::{info, warn};
use vmm_sys_util::eventfd::EventFd;

/// How long one attempt may take: the device server resets the drive and asks what it is, which
/// with some drives takes a while.
const ATTEMPT: Duration = Duration::from_secs(60);
/// Pause after the first failed attempt; it doubles up to [`MAX_PAUSE`].
pub(crate) const MIN_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause: what an operator waits at most once the device server is back.
pub(crate) const MAX_PAUSE: Duration = Duration::from_secs(2);

/// Where the function is.
#[derive(Clone, Debug)]
pub struct Source {
    /// The device server, as `HOST:PORT`.
    pub address: String,
    /// The export there.
    pub export: ExportName,
    /// What may carry the claim.
    pub providers: provider::Options,
    /// Whether a claim that RDMA carried may be made again over TCP.
    pub allow_tcp_fallback: bool,
    /// What this side wants to be held to.
    pub limits: RateLimits,
    /// Data threads, each with a connection of its own, at most.
    pub data_threads: u16,
}

impl Source {
    /// Claims the export. Once RDMA has carried a claim, later ones ask for it too: a guest
    /// should not become slow without a word.
    pub fn claim(&mut self, deadline: Duration) -> Result<ClaimedLink, FabricError> {
        let (address, export) = (&self.address, &self.export);
        let wish = Wish {
            export,
            limits: self.limits,
            lanes: self.data_threads,
        };
        let claimed = client::claim_as(address, &wish, &label(), deadline, &self.providers)?;
        info!(
            "claimed export {} of {address} ({}) over {}{}",
            export.as_str(),
            claimed.epoch,
            claimed.provider,
            match claimed.lanes.len() {
                0 => String::new(),
                more => format!(", by {} connections", more + 1),
            }
        );
        if claimed.provider.provider == Provider::Verbs && !self.allow_tcp_fallback {
            self.providers.wanted = Wanted::Verbs;
        }
        Ok(claimed)
    }
}

/// How this agent names itself to device servers: program, version, host and process.
pub fn label() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let mut host = host.trim().to_owned();
    let keep = host.char_indices().nth(24).map_or(host.len(), |(at, _)| at);
    host.truncate(keep);
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "farbus-compute-agent {version} {host}/{}",
        std::process::id()
    )
}

/// An attempt to get a new link that is under way. Dropping it ends the attempt.
pub struct Reconnect {
    news: Receiver<Result<ClaimedLink, String>>,
    _stop: Sender<()>,
}

impl Reconnect {
    /// Starts trying after `pause`; `done` is signalled when there is a link, or another reason why there is none.
    pub fn start(mut source: Source, pause: Duration, done: Arc<EventFd>) -> std::io::Result<Self> {
        let (send, news) = mpsc::channel();
        let (stop, stopped) = mpsc::channel();
        thread::Builder::new()
            .name("reconnect".into())
            .spawn(move || {
                if stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                    try_for_ever(&mut source, &send, &stopped, &done);
                }
            })?;
        Ok(Self { news, _stop: stop })
    }

    /// The new link, or why there is none yet, once `done` was signalled.
    pub fn take(&self) -> Option<Result<ClaimedLink, String>> {
        self.news.try_recv().ok()
    }
}

fn try_for_ever(
    source: &mut Source,
    send: &Sender<Result<ClaimedLink, String>>,
    stopped: &Receiver<()>,
    done: &EventFd,
) {
    let mut pause = MIN_PAUSE;
    let mut told = String::new();
    let tell = |news| {
        if send.send(news).is_ok() {
            // A counter that is full has a signal waiting already.
            let _ = done.write(1);
        }
    };
    loop {
        match source.claim(ATTEMPT) {
            Ok(claimed) => return tell(Ok(claimed)),
            Err(error) => {
                // Even what a new attempt cannot mend, an operator can, and a guest waits:
                // so this goes on, and says each reason once.
                let why = format!("{:#}", anyhow::Error::new(error));
                if why != told {
                    warn!("{} cannot be claimed yet: {why}", source.export.as_str());
                    tell(Err(why.clone()));
                    told = why;
                }
            }
        }
        if stopped.recv_timeout(pause) == Err(RecvTimeoutError::Disconnected) {
            return;
        }
        pause = (pause * 2).min(MAX_PAUSE);
    }
}
