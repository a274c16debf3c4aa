//! The connection manager: from a new connection to a claim, and the two joined.
//!
//! Each connection has a thread of its own from its first byte on. The thread that does the
//! handshake becomes the attachment's data thread, so fabric and function meet by direct call
//! and a slow or hostile peer holds up nobody else.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use farbus_fabric::FabricError;
use farbus_fabric::provider;
use farbus_fabric::session::server::{ClaimRequest, Incoming, JoinRequest, Request};
use farbus_fabric::wire::{Description, EngineKind, InterruptCounts, RefusalCode, Region};
use farbus_shadow_mem::nvme::device::{DeviceError, DeviceHalf, Limits};
use farbus_shadow_mem::polling::Polling;
use farbus_shadow_mem::session::Session;
use farbus_vfio::{Function, FunctionError};
use log::{Level, info, log, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::attachment::{Attachment, Ended};
use crate::exports::{Claim, ClaimError, Exports};
use crate::join;
use crate::lane;
use crate::lanes::{CannotJoin, Teams};
use crate::refusals::Refusals;

/// How long a peer may take from connecting to the end of set-up.
const SETUP_DEADLINE: Duration = Duration::from_secs(10);
/// How long attachments may take to end when the process does, and functions to be closed: time
/// for the slowest resets.
const ENDING: Duration = Duration::from_secs(8);
/// How long nobody is accepted after the kernel has refused to, for want of descriptors for one: what is
/// asked for stays asked for, and nothing tells that there are descriptors again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections at a time, claimed or not. More are closed at once.
const MAX_CONNECTIONS: usize = 256;

/// Questions of one connection for what there is: the answers to so many name more exports than
/// a host can have.
const MAX_QUESTIONS: u32 = 2048;

const LISTENER: u64 = 0;
const SIGNALS: u64 = 1;
/// Where the ids of the exports' notices begin.
const NOTICES: u64 = 2;

/// Accepts connections for a set of exports.
pub struct Manager {
    listener: TcpListener,
    exports: Exports,
    providers: Arc<provider::Options>,
    refusals: Arc<Refusals>,
    teams: Teams,
    polling: Polling,
    stop: Arc<EventFd>,
}

/// A thread that serves a connection, and whether it has a claim.
struct Serving {
    thread: JoinHandle<()>,
    claimed: Arc<AtomicBool>,
}

/// One of those threads, counted.
struct Served(Arc<AtomicUsize>);

impl Drop for Served {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Manager {
    /// A manager that has not accepted anything yet, whose attachments wait in a certain way.
    pub fn new(listener: TcpListener, exports: Exports, polling: Polling) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            exports,
            providers: Arc::default(),
            refusals: Arc::default(),
            teams: Teams::default(),
            polling,
            stop: Arc::new(EventFd::new(EFD_NONBLOCK)?),
        })
    }

    /// Has claims carried by what these options say.
    #[must_use]
    pub fn with_providers(mut self, providers: provider::Options) -> Self {
        self.providers = Arc::new(providers);
        self
    }

    /// Accepts until `signals` is readable; then ends all attachments, waits for them (not for
    /// ever: the kernel may hold one up), and lets go of the functions.
    pub fn run(self, signals: &OwnedFd) -> io::Result<()> {
        let epoll = Arc::new(Epoll::new()?);
        for (id, fd) in [
            (LISTENER, self.listener.as_raw_fd()),
            (SIGNALS, signals.as_raw_fd()),
        ] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, id))?;
        }
        self.exports.watch(&epoll, NOTICES);
        let mut events = [EpollEvent::default(); 8];
        let mut threads: Vec<Serving> = Vec::new();
        let count = Arc::new(AtomicUsize::new(0));
        'accepting: loop {
            let ready = match epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                ready => ready?,
            };
            for event in &events[..ready] {
                match event.data() {
                    SIGNALS => break 'accepting,
                    LISTENER => {
                        threads.retain(|serving| !serving.thread.is_finished());
                        self.accept(&count, &mut threads);
                    }
                    notice => self.exports.look_after(notice - NOTICES),
                }
            }
        }
        self.stop.write(1)?;
        // Who is still being asked what it wants has nothing that must be brought to an end.
        let claimed = threads
            .into_iter()
            .filter(|serving| serving.claimed.load(Ordering::Acquire));
        join::within(ENDING, claimed.map(|serving| serving.thread).collect());
        join::within(ENDING, self.exports.end());
        Ok(())
    }

    fn accept(&self, count: &Arc<AtomicUsize>, threads: &mut Vec<Serving>) {
        let (stream, peer) = match self.listener.accept() {
            Ok(connection) => connection,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                warn!("a connection could not be accepted: {error}");
                thread::sleep(ACCEPT_PAUSE);
                return;
            }
        };
        if count.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            count.fetch_sub(1, Ordering::Relaxed);
            let reason = format!("there are {MAX_CONNECTIONS} already");
            self.exports.refused().count("too_many_connections");
            if let Some(left_out) = self.refusals.note(Instant::now(), peer.ip(), None, &reason) {
                warn!("closed the connection of {peer}: {reason}{left_out}");
            }
            return;
        }
        let served = Served(count.clone());
        let (exports, stop) = (self.exports.clone(), self.stop.clone());
        let providers = self.providers.clone();
        let refusals = self.refusals.clone();
        let teams = self.teams.clone();
        let polling = self.polling;
        let claimed = Arc::new(AtomicBool::new(false));
        let claims = claimed.clone();
        let serve = move || {
            let _served = served;
            let common = Common {
                providers: &providers,
                teams: &teams,
                polling,
                stop: &stop,
            };
            if let Err(error) = serve(stream, peer, &exports, &refusals, &common, &claims) {
                let error = format!("{:#}", anyhow::Error::new(error));
                exports.refused().count("broken_connection");
                if let Some(left_out) = refusals.note(Instant::now(), peer.ip(), None, &error) {
                    warn!("{peer}: {error}{left_out}");
                }
            }
        };
        match thread::Builder::new()
            .name("attachment".into())
            .spawn(serve)
        {
            Ok(thread) => threads.push(Serving { thread, claimed }),
            Err(error) => warn!("closed the connection of {peer}: no thread for it: {error}"),
        }
    }
}

/// One connection, from its first byte to its last.
fn serve(
    stream: TcpStream,
    peer: SocketAddr,
    exports: &Exports,
    refusals: &Refusals,
    common: &Common<'_>,
    claimed: &AtomicBool,
) -> Result<(), FabricError> {
    let label = concat!("farbus-device-server ", env!("CARGO_PKG_VERSION"));
    let incoming = Incoming::handshake(stream, label, SETUP_DEADLINE)?;
    let request = match answer_questions(incoming, exports)? {
        Some(Request::Claim(request)) => request,
        Some(Request::Join(request)) => return join(request, peer, refusals, common),
        Some(Request::List(_)) | None => return Ok(()),
    };
    let claimant = format!("{} at {peer}", request.peer());
    let name = request.export().as_str().to_owned();
    let refused = |level, kind: &'static str, reason: &str| {
        exports.refused().count(kind);
        if let Some(left_out) = refusals.note(Instant::now(), peer.ip(), Some(&name), reason) {
            log!(level, "refused {claimant}: {reason}{left_out}");
        }
    };
    let Some(export) = exports.find(request.export()) else {
        let text = format!(
            "there is no export {}; there is {}",
            request.export().as_str(),
            exports.names().join(", ")
        );
        refused(Level::Info, "unknown_export", &text);
        return request.refuse(RefusalCode::UnknownExport, &text);
    };
    if exports.is_draining() {
        let text =
            "this device server drains: it takes no new claims; attach another device, or wait";
        refused(Level::Info, "draining", text);
        return request.refuse(RefusalCode::NotReady, text);
    }
    let (claim, function) = match export.claim(&claimant) {
        Ok(claimed) => claimed,
        Err(error) => {
            let text = error.to_string();
            let (code, kind) = match error {
                ClaimError::Busy { .. } => (RefusalCode::Busy, "busy"),
                ClaimError::Failed { .. } => (RefusalCode::NotReady, "failed"),
                ClaimError::Retired { .. } => (RefusalCode::NotReady, "retired"),
            };
            refused(Level::Info, kind, &text);
            return request.refuse(code, &text);
        }
    };
    claimed.store(true, Ordering::Release);
    let peer = Claimant {
        name: &claimant,
        refused: &refused,
    };
    attach(request, &claim, function, &peer, common)
}

/// Tells the peer what there is as often as it asks, until it wants something else. A peer that only
/// wanted to know closes the connection, which is no error.
fn answer_questions(
    mut incoming: Incoming,
    exports: &Exports,
) -> Result<Option<Request>, FabricError> {
    for asked in 0..MAX_QUESTIONS {
        let request = match incoming.next_request() {
            Err(FabricError::Closed) if asked > 0 => return Ok(None),
            request => request?,
        };
        match request {
            Request::List(request) => {
                let listed = exports.list(request.after());
                incoming = request.answer(listed)?;
            }
            other => return Ok(Some(other)),
        }
    }
    let text = format!("asked {MAX_QUESTIONS} times what there is; connect again");
    incoming.refuse(RefusalCode::Malformed, &text)?;
    Err(FabricError::violation(text))
}

/// What all attachments have in common.
struct Common<'a> {
    providers: &'a provider::Options,
    teams: &'a Teams,
    polling: Polling,
    stop: &'a EventFd,
}

/// Who claims, and where it is told of that it may not.
struct Claimant<'a> {
    name: &'a str,
    refused: &'a dyn Fn(Level, &'static str, &str),
}

/// Joins a claimant and the function. Whatever way this ends, the function is reset and the
/// claim's memory gone before the claim is; a function that is gone is closed before that.
fn attach(
    request: ClaimRequest,
    claim: &Claim,
    function: Arc<dyn Function>,
    claimant: &Claimant<'_>,
    common: &Common<'_>,
) -> Result<(), FabricError> {
    let name = claim.export().name().clone();
    let name = name.as_str();
    let limits = Limits::default();
    let settings = claim.settings();
    let opened =
        DeviceHalf::open_as(function.clone(), limits, settings.as_ref()).and_then(|half| {
            claim.remember(&half);
            let description = describe(function.as_ref(), &half)?;
            Ok((half, description))
        });
    // From here on it is the half's, and the export's.
    drop(function);
    let (mut half, description) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            let gone = matches!(&error, DeviceError::Function(FunctionError::Gone(_)));
            let why = format!("{:#}", anyhow::Error::new(error));
            let text = format!("export {name} cannot be used: {why}");
            (claimant.refused)(Level::Warn, "unusable", &text);
            if gone {
                claim.fail(&why);
            } else {
                claim.is_unusable(&why);
            }
            return request.refuse(RefusalCode::Internal, &text);
        }
    };
    claim.tally().claims.fetch_add(1, Ordering::Relaxed);
    half.limit(claim.export().limits().lower_of(request.limits()));
    let mut granted = request.grant(claim.epoch(), limits.shadow_len, limits.tags)?;
    let mut joinable = None;
    if let Some(wanted) = granted.wanted_lanes()? {
        let lanes = half.possible_lanes(wanted);
        let others = half.divide(lanes).map_err(|error| cannot_divide(&error))?;
        let open = common
            .teams
            .open(name.into(), claim.epoch(), description.clone(), others)
            .map_err(|source| FabricError::Io {
                what: "making a token",
                source,
            })?;
        granted.give_lanes(lanes, open.token)?;
        joinable = Some(open);
    }
    let (link, provider) = granted.describe_by(description, common.providers)?;
    let mut session = Session::new(link);
    session.register(half.shadow(), 0)?;
    let claimant = claimant.name;
    info!(
        "{name}: claimed by {claimant} ({}) over {provider}",
        claim.epoch()
    );
    let mut attachment = Attachment::new(half, session, common.polling, claim.tally().clone());
    let ended = attachment.run(common.stop, claim.evict());
    // Nobody joins a claim that ends.
    drop(joinable);
    claim.ending();
    match ended {
        Ended::Released => info!("{name}: released by {claimant}"),
        Ended::Stopped => info!("{name}: taken from {claimant}: the device server ends"),
        Ended::Evicted => info!("{name}: taken from {claimant}: an operator says so"),
        Ended::Failed(why) => {
            warn!("{name}: taken from {claimant}: {why}");
            claim.fail(&why);
            drop(attachment.hang_up());
            info!("{name}: its function is closed");
        }
        Ended::Lost(error) => warn!(
            "{name}: {claimant} is lost: {:#}",
            anyhow::Error::new(error)
        ),
    }
    Ok(())
}

/// One connection that is to be a lane of a claim that there is.
fn join(
    request: JoinRequest,
    peer: SocketAddr,
    refusals: &Refusals,
    common: &Common<'_>,
) -> Result<(), FabricError> {
    let (team, lane) = match common.teams.join(request.join()) {
        Ok(joined) => joined,
        Err(error) => {
            let text = error.to_string();
            if let Some(left_out) = refusals.note(Instant::now(), peer.ip(), None, &text) {
                warn!("{peer} may not join a claim: {text}{left_out}");
            }
            let code = match error {
                CannotJoin::Unknown => RefusalCode::NotReady,
                _ => RefusalCode::Malformed,
            };
            return request.refuse(code, &text);
        }
    };
    let number = request.join().place.lane;
    let serve = || {
        let granted = request.grant()?;
        let (link, provider) = granted.describe_by(team.description.clone(), common.providers)?;
        lane.begin(Session::new(link))?;
        info!("{}: lane {number} is {peer}, over {provider}", team.name);
        Ok(lane::serve(&lane, common.polling))
    };
    let end = serve().unwrap_or_else(|error| error);
    lane.end(end);
    Ok(())
}

/// A claim that cannot be divided after all.
fn cannot_divide(error: &DeviceError) -> FabricError {
    FabricError::Io {
        what: "dividing the claim among lanes",
        source: io::Error::other(error.to_string()),
    }
}

/// What the compute side must know of the function.
fn describe(function: &dyn Function, half: &DeviceHalf) -> Result<Description, FunctionError> {
    let info = function.info();
    let mut config = vec![0; info.config_size.into()];
    function.config_read(0, &mut config)?;
    let regions = info.regions.iter().map(|region| Region {
        index: region.index.0,
        size: region.size,
    });
    Ok(Description {
        config,
        regions: regions.collect(),
        interrupts: InterruptCounts {
            intx: info.interrupts.intx,
            msi: info.interrupts.msi,
            msix: info.interrupts.msix,
        },
        engine: EngineKind::Nvme,
        blob: half.description().encode(),
    })
}
