//! A function that sits in another server, as a [`Function`] like any local one.
//!
//! Everything a VMM asks is answered from here at once: configuration space and registers are
//! copies, and what needs the device waits as an outstanding command. The link may come and
//! go underneath; whoever runs the event loop reports its events ([`RemoteFunction::service`],
//! [`RemoteFunction::tick`]) and brings a new one ([`RemoteFunction::reconnect`]).

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use farbus_fabric::session::ClaimedLink;
use farbus_fabric::wire::{self, Description, EngineKind, Epoch, Message};
use farbus_fabric::{Counters, FabricError, Received};
use farbus_vfio::config::{ConfigError, ConfigSpace};
use farbus_vfio::nvme::{DOORBELL_BASE, PAGE_SIZE};
use farbus_vfio::{
    DmaWindow, Function, FunctionError, FunctionInfo, InterruptCounts, InterruptKind, Iova,
    RegionIndex, RegionInfo,
};
use vmm_sys_util::eventfd::EventFd;

use crate::nvme::compute::{Changed, ComputeHalf};
use crate::nvme::description::{BadDescription, NvmeDescription};
use crate::nvme::record::{ControlReader, ControlWriter, Counter, Record, RecordError};
use crate::session::Session;

/// Messages received before other work has its turn.
const RECEIVE_BURST: usize = 64;
/// Silence, in ticks of a second, after which the peer is taken for dead.
const SILENT_TICKS: u32 = 5;
/// Most commands that a device server can make us keep room for.
const MAX_TAGS: u16 = 4096;

/// Why a remote function cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The device side has no engine that this side knows.
    #[error("no engine carries this function (the device server offers {0:?})")]
    NoEngine(EngineKind),
    /// The function has no MSI-X capability.
    #[error("the function has no MSI-X, which is the only kind of interrupt that crosses")]
    NoMsix,
    /// What the peer granted or described cannot be.
    #[error("the device server granted {tags} commands and a buffer shadow of {shadow_len} bytes")]
    BadGrant {
        /// Commands that may be outstanding.
        tags: u16,
        /// Size of the buffer shadow in bytes.
        shadow_len: u32,
    },
    /// The function's configuration space does not hold together.
    #[error("the device server describes an impossible configuration space")]
    Config(#[from] ConfigError),
    /// The engine's description does not hold together.
    #[error("the device server describes an impossible controller")]
    Description(#[from] BadDescription),
    /// The function behind the export is another one than before.
    #[error(transparent)]
    Changed(#[from] Changed),
    /// This machine lacks memory.
    #[error("memory for the engine could not be had")]
    Memory(#[source] std::io::Error),
    /// What a predecessor has left cannot be taken up.
    #[error("what the last process has left of this attachment cannot be taken up")]
    Record(#[from] RecordError),
    /// The link failed.
    #[error("the link failed")]
    Link(#[from] FabricError),
}

/// Most buffer shadow that a device server can make us account for.
const MAX_SHADOW: u32 = 1 << 30;
/// Fewer tags than this leave none for I/O.
const MIN_TAGS: u16 = 64;

/// A link that has failed, for the event loop to let go of.
pub struct LostLink {
    /// Keeps the descriptor open until the event loop has forgotten it.
    pub session: Session,
    /// Why.
    pub error: FabricError,
}

/// What the event loop must wait for on the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkInterest {
    /// The link's descriptor.
    pub descriptor: RawFd,
    /// Whether to wait until it is writable, too.
    pub writable: bool,
}

struct State {
    config: ConfigSpace,
    half: ComputeHalf,
    session: Option<Session>,
    lost: Option<LostLink>,
    epoch: Epoch,
    /// Bytes that had been received at the last tick.
    heard: u64,
    /// Ticks since then without another one.
    silent: u32,
    /// See [`RemoteFunction::look_for_doorbells`].
    gathers_doorbells: bool,
}

/// See the module's own description.
pub struct RemoteFunction {
    info: FunctionInfo,
    description: Description,
    state: Mutex<State>,
}

/// What a claim granted.
#[derive(Clone, Copy)]
struct Grant {
    shadow_len: u32,
    tags: u16,
}

impl Grant {
    fn of(claimed: &ClaimedLink) -> Self {
        Self {
            shadow_len: claimed.shadow_len,
            tags: claimed.tags,
        }
    }
}

/// The function's parts that a description fixes.
fn parse(
    description: &Description,
    grant: Grant,
) -> Result<(Vec<RegionInfo>, ConfigSpace, NvmeDescription), RemoteError> {
    let Grant { shadow_len, tags } = grant;
    if description.engine != EngineKind::Nvme {
        return Err(RemoteError::NoEngine(description.engine));
    }
    if !(MIN_TAGS..=MAX_TAGS).contains(&tags)
        || !(PAGE_SIZE as u32..=MAX_SHADOW).contains(&shadow_len)
    {
        return Err(RemoteError::BadGrant { tags, shadow_len });
    }
    let regions: Vec<_> = description
        .regions
        .iter()
        .map(|region| RegionInfo {
            index: RegionIndex(region.index),
            size: region.size,
        })
        .collect();
    let config = ConfigSpace::from_image(&description.config, &regions)?;
    let nvme = NvmeDescription::decode(&description.blob, shadow_len)?;
    Ok((regions, config, nvme))
}

/// Whether two descriptions are of the same function, in the same form: what a guest's driver
/// has learnt of it must still hold. Other bits of configuration space, such as the state of
/// the device server's own PCIe link, may differ between two claims.
fn is_same_function(one: &Description, other: &Description) -> bool {
    // Vendor and device, revision and class, subsystem (PCI 3.0 §6.2.1, §6.2.4).
    let identity = |d: &Description| {
        [0x00..0x04, 0x08..0x0c, 0x2c..0x30].map(|range| d.config.get(range).map(<[u8]>::to_vec))
    };
    identity(one) == identity(other)
        && one.regions == other.regions
        && one.interrupts == other.interrupts
}

fn info(label: String, config: &ConfigSpace, regions: Vec<RegionInfo>, msix: u32) -> FunctionInfo {
    FunctionInfo {
        label,
        config_size: config.size(),
        regions,
        interrupts: InterruptCounts {
            intx: 0,
            msi: 0,
            msix,
        },
        resettable: true,
        iova_ranges: vec![0..=u64::MAX],
    }
}

/// What was claimed, as the record has it.
fn encode_claim(description: &Description, grant: Grant) -> Vec<u8> {
    let mut out = ControlWriter::default();
    out.number(grant.shadow_len.into())
        .number(grant.tags.into());
    out.bytes(&description.config).bytes(&description.blob);
    out.number(description.engine as u64);
    let interrupts = description.interrupts;
    for count in [interrupts.intx, interrupts.msi, interrupts.msix] {
        out.number(count.into());
    }
    out.number(description.regions.len() as u64);
    for region in &description.regions {
        out.number(region.index.into()).number(region.size);
    }
    out.finish()
}

fn decode_claim(bytes: &[u8]) -> Result<(Description, Grant), RecordError> {
    let mut from = ControlReader(bytes);
    let grant = Grant {
        shadow_len: from.small()?,
        tags: from.small()?,
    };
    let (config, blob) = (from.bytes()?.to_vec(), from.bytes()?.to_vec());
    let engine = match from.number()? {
        engine if engine == EngineKind::Nvme as u64 => EngineKind::Nvme,
        _ => EngineKind::None,
    };
    let interrupts = wire::InterruptCounts {
        intx: from.small()?,
        msi: from.small()?,
        msix: from.small()?,
    };
    let mut regions = Vec::new();
    for _ in 0..from.small::<u8>()? {
        regions.push(wire::Region {
            index: from.small()?,
            size: from.number()?,
        });
    }
    let description = Description {
        config,
        regions,
        interrupts,
        engine,
        blob,
    };
    Ok((description, grant))
}

impl RemoteFunction {
    /// The function of a claim. `label` says to people where it is.
    pub fn new(label: String, claimed: ClaimedLink) -> Result<Self, RemoteError> {
        let grant = Grant::of(&claimed);
        let (regions, config, nvme) = parse(&claimed.description, grant)?;
        let msix = config.msix().ok_or(RemoteError::NoMsix)?.vectors.into();
        let half = ComputeHalf::new(nvme, claimed.shadow_len, claimed.tags, msix)
            .map_err(RemoteError::Memory)?;
        Ok(Self {
            info: info(label, &config, regions, msix),
            description: claimed.description,
            state: Mutex::new(State {
                config,
                half,
                session: Some(Session::new(claimed.link)),
                lost: None,
                epoch: claimed.epoch,
                heard: 0,
                silent: 0,
                gathers_doorbells: false,
            }),
        })
    }

    /// As [`Self::new`], for a process that may be killed: what another one needs to go on is in
    /// memory that [`Self::record`] names.
    pub fn with_record(label: String, claimed: ClaimedLink) -> Result<Self, RemoteError> {
        let (description, grant) = (claimed.description.clone(), Grant::of(&claimed));
        let remote = Self::new(label, claimed)?;
        let record = Record::create().map_err(RemoteError::Memory)?;
        if !record.set_claim(&encode_claim(&description, grant)) {
            return Err(RecordError::Broken("the description is too long").into());
        }
        let mut state = remote.state();
        state.half.keep_record(record);
        state.record_config();
        drop(state);
        Ok(remote)
    }

    /// The function of a process that was killed, from the memory that it left. It has no link yet. When
    /// the guest's memory is mapped and the interrupts are set as they were, and before anything
    /// else, [`Self::recover`] is to be called.
    pub fn resume(label: String, memory: OwnedFd) -> Result<Self, RemoteError> {
        let record = Record::open(memory)?;
        let (description, grant) = decode_claim(&record.claim())?;
        let (regions, mut config, nvme) = parse(&description, grant)?;
        let msix = config.msix().ok_or(RemoteError::NoMsix)?.vectors.into();
        let size = usize::from(config.size());
        // What software may not write stays, as it does when software writes.
        config.write(0, record.config().get(..size).unwrap_or_default())?;
        let half = ComputeHalf::resume(nvme, grant.shadow_len, grant.tags, msix, record)?;
        Ok(Self {
            info: info(label, &config, regions, msix),
            description,
            state: Mutex::new(State {
                config,
                half,
                session: None,
                lost: None,
                epoch: Epoch::NONE,
                heard: 0,
                silent: 0,
                gathers_doorbells: false,
            }),
        })
    }

    /// Takes up the commands that the killed process had under way: they are sent again when there
    /// is a link, and what was done already is completed.
    pub fn recover(&self) -> Result<(), RemoteError> {
        Ok(self.state().half.recover()?)
    }

    /// The memory of the record, if one is kept.
    pub fn record(&self) -> Option<OwnedFd> {
        let state = self.state();
        let descriptor = state.half.record()?.descriptor()?;
        descriptor.try_clone_to_owned().ok()
    }

    /// Whether there is a link.
    pub fn is_linked(&self) -> bool {
        self.state().session.is_some()
    }

    /// A panic of another thread while it held the lock would have ended the process's one
    /// event loop, so the state behind it is whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to wait for, while there is a link.
    pub fn link_interest(&self) -> Option<LinkInterest> {
        let state = self.state();
        let session = state.session.as_ref()?;
        Some(LinkInterest {
            descriptor: session.descriptor().as_raw_fd(),
            writable: session.is_congested(),
        })
    }

    /// The link's descriptor has events, or may have: receives, sends what waited, and goes on
    /// with what either made possible. Returns whether there was anything, so that there may
    /// be more: then the descriptor need not say so, and this is to be called again without
    /// waiting.
    pub fn service(&self) -> bool {
        let mut state = self.state();
        let before = state.progress();
        state.with_session(|half, session| {
            if session.is_congested() {
                session.flush()?;
            }
            for _ in 0..RECEIVE_BURST {
                if session.receive(half)? == Received::Idle {
                    break;
                }
            }
            half.pump(session)
        });
        state.progress() != before
    }

    /// As [`Self::service`], for when nothing can have arrived: goes on with what the guest has
    /// asked for since.
    pub fn pump(&self) -> bool {
        let mut state = self.state();
        let before = state.progress();
        state.pump();
        state.progress() != before
    }

    /// To be asked before a sleep: has the guest write its doorbells from here on. If it has
    /// rung one meanwhile, that is acted on, and the answer is no.
    pub fn may_sleep(&self) -> bool {
        let mut state = self.state();
        let rung = state.half.arm_doorbells();
        if rung {
            state.pump();
        }
        // A link that fails over this is seen to in the next round, not after the sleep.
        let mut quiet = state.session.is_none();
        state.with_session(|_, session| {
            quiet = session.may_wait()?;
            Ok(())
        });
        !rung && quiet
    }

    /// When [`Self::service`] must be called at the latest, whatever happens.
    pub fn due(&self) -> Option<Instant> {
        self.state().half.due()
    }

    /// The caller promises to call [`Self::service`] or [`Self::pump`] after each round of its
    /// event loop, and [`Self::may_sleep`] before each sleep. So a write to a doorbell waits
    /// for the end of the round, and all that have come lead to one message; and the guest is
    /// offered doorbells in its own memory. Other registers act at once as before.
    pub fn look_for_doorbells(&self) {
        let mut state = self.state();
        state.gathers_doorbells = true;
        state.half.offer_shadow_doorbells();
        if let Some(session) = &mut state.session {
            session.keep_looking();
        }
    }

    /// Once a second: gives the peer a sign of life and asks for one, and gives up on a peer
    /// that has been silent for too long.
    pub fn tick(&self) {
        let mut state = self.state();
        let heard = state
            .session
            .as_ref()
            .map_or(0, |s| s.counters().bytes_received);
        let news = std::mem::replace(&mut state.heard, heard) != heard;
        state.silent = if news { 0 } else { state.silent + 1 };
        let silent = state.silent;
        state.with_session(|half, session| match silent {
            SILENT_TICKS.. => Err(FabricError::Timeout {
                what: "a sign of life of the device server",
                after: std::time::Duration::from_secs(silent.into()),
            }),
            _ if session.is_congested() => Ok(()),
            _ => {
                if let Some(record) = half.record_mut() {
                    record.ping();
                }
                session.send(&Message::Ping { nonce: 0 })
            }
        });
    }

    /// The link that failed since the last call, if one did.
    pub fn take_lost(&self) -> Option<LostLink> {
        self.state().lost.take()
    }

    /// Goes on over a new claim of the same export: the guest's controller is rebuilt, and
    /// what was outstanding is sent again.
    pub fn reconnect(&self, claimed: ClaimedLink) -> Result<(), RemoteError> {
        let (_, _, nvme) = parse(&claimed.description, Grant::of(&claimed))?;
        let mut state = self.state();
        if !is_same_function(&claimed.description, &self.description) {
            return Err(Changed::function().into());
        }
        state
            .half
            .link_up(&nvme, claimed.shadow_len, claimed.tags)?;
        let mut session = Session::new(claimed.link);
        for window in state.half.windows() {
            session.register(window, window.iova.0)?;
        }
        if state.gathers_doorbells {
            session.keep_looking();
        }
        if let Some(record) = state.half.record() {
            record.add_to(Counter::Reconnects, 1);
        }
        state.epoch = claimed.epoch;
        state.heard = 0;
        state.silent = 0;
        state.session = Some(session);
        state.pump();
        Ok(())
    }

    /// The epoch of the claim at hand, or of the last one.
    pub fn epoch(&self) -> Epoch {
        self.state().epoch
    }

    /// What the link has carried, while there is one.
    pub fn counters(&self) -> Option<Counters> {
        self.state().session.as_ref().map(Session::counters)
    }

    /// Gives the export back: says so to the device server, without waiting for it.
    pub fn release(&self) {
        if let Some(mut session) = self.state().session.take() {
            // The end of the connection says the same, only less politely.
            let _ = session.send(&Message::Release);
            let _ = session.flush();
        }
    }

    fn out_of_bounds(&self, what: String, offset: u64, len: usize) -> FunctionError {
        FunctionError::OutOfBounds { what, offset, len }
    }

    fn check_region(
        &self,
        region: RegionIndex,
        offset: u64,
        len: usize,
    ) -> Result<(), FunctionError> {
        let size = self.info.region(region).map_or(0, |region| region.size);
        match offset.checked_add(len as u64) {
            Some(end) if end <= size => Ok(()),
            _ => Err(self.out_of_bounds(region.to_string(), offset, len)),
        }
    }

    fn check_msix(&self, kind: InterruptKind) -> Result<(), FunctionError> {
        match kind {
            InterruptKind::Msix => Ok(()),
            other => Err(FunctionError::Unsupported(format!(
                "the function has no {other:?} interrupts"
            ))),
        }
    }
}

impl State {
    /// Does something over the link, if there is one; an error is the end of that link.
    fn with_session(
        &mut self,
        act: impl FnOnce(&mut ComputeHalf, &mut Session) -> Result<(), FabricError>,
    ) {
        let Some(session) = &mut self.session else {
            // What was held back has its time all the same.
            self.half.signal_interrupts();
            return;
        };
        if let Err(error) = act(&mut self.half, session) {
            self.half.link_lost();
            self.lost = self
                .session
                .take()
                .map(|session| LostLink { session, error });
        }
    }

    /// Rises with every byte that moves.
    fn progress(&self) -> u64 {
        let counters = self.session.as_ref().map(Session::counters);
        counters.map_or(0, |c| c.bytes_sent + c.bytes_received)
    }

    fn pump(&mut self) {
        self.with_session(ComputeHalf::pump);
    }

    fn record_config(&self) {
        if let Some(record) = self.half.record() {
            let mut bytes = vec![0; self.config.size().into()];
            // All of it, which is within its bounds.
            let _ = self.config.read(0, &mut bytes);
            record.set_config(&bytes);
        }
    }

    fn reset(&mut self) {
        self.config.reset();
        self.record_config();
        self.half.reset();
        self.with_session(|half, session| {
            // The guest's memory is its own again, at once. What is still to be sent would go
            // out with whatever the guest puts there now; a frame that is cut off is never
            // acted on, and the next claim begins with a reset.
            if session.is_congested() {
                return Err(FabricError::Closed);
            }
            for window in half.windows() {
                session.revoke(window);
            }
            half.pump(session)
        });
    }
}

impl Function for RemoteFunction {
    fn info(&self) -> &FunctionInfo {
        &self.info
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        self.state().config.read(offset, data).map_err(|_| {
            self.out_of_bounds("configuration space".into(), offset.into(), data.len())
        })
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), FunctionError> {
        let mut state = self.state();
        let effect = state.config.write(offset, data).map_err(|_| {
            self.out_of_bounds("configuration space".into(), offset.into(), data.len())
        })?;
        state.record_config();
        if effect.flr {
            state.reset();
        }
        Ok(())
    }

    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        self.check_region(region, offset, data.len())?;
        match region {
            RegionIndex::BAR0 => self.state().half.register_read(offset, data),
            _ => data.fill(0),
        }
        Ok(())
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        self.check_region(region, offset, data.len())?;
        if region == RegionIndex::BAR0 {
            let mut state = self.state();
            state.half.register_write(offset, data);
            if offset < DOORBELL_BASE || !state.gathers_doorbells {
                state.pump();
            }
        }
        Ok(())
    }

    fn map_dma(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        let mut state = self.state();
        state.half.map(window)?;
        state.with_session(|_, session| session.register(window, window.iova.0));
        Ok(())
    }

    fn unmap_dma(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        let mut state = self.state();
        let gone = state.half.unmap(iova, len)?;
        state.with_session(|_, session| {
            // What is still to be sent would go out with whatever is there by then; a frame
            // that is cut off is never acted on, and is sent again on the next link.
            if gone.iter().any(|window| session.is_sending(window)) {
                return Err(FabricError::Closed);
            }
            for window in &gone {
                session.revoke(window);
                session.unregister(window, window.iova.0);
            }
            Ok(())
        });
        Ok(())
    }

    fn set_interrupts(
        &self,
        kind: InterruptKind,
        first: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        self.check_msix(kind)?;
        self.state().half.set_interrupts(first, events)
    }

    fn mask_interrupt(
        &self,
        kind: InterruptKind,
        vector: u32,
        masked: bool,
    ) -> Result<(), FunctionError> {
        self.check_msix(kind)?;
        self.state().half.mask_interrupt(vector, masked)
    }

    fn reset(&self) -> Result<(), FunctionError> {
        self.state().reset();
        Ok(())
    }
}
