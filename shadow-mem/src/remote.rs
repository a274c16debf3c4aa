//! A function that sits in another server, as a [`Function`] like any local one.
//!
//! Everything a VMM asks is answered from here at once: configuration space and registers are
//! copies, and what needs the device waits as an outstanding command. The link may come and
//! go underneath; whoever runs the event loop reports its events ([`RemoteFunction::service`],
//! [`RemoteFunction::tick`]) and brings a new one ([`RemoteFunction::reconnect`]).

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use farbus_fabric::session::ClaimedLink;
use farbus_fabric::wire::{self, Description, EngineKind, Epoch, Message};
use farbus_fabric::{Counters, FabricError};
use farbus_vfio::config::{ConfigError, ConfigSpace};
use farbus_vfio::nvme::{DOORBELL_BASE, PAGE_SIZE};
use farbus_vfio::{
    DmaWindow, Function, FunctionError, FunctionInfo, InterruptCounts, InterruptKind, Iova,
    RegionIndex, RegionInfo,
};
use vmm_sys_util::eventfd::EventFd;

use crate::nvme::compute::{Changed, ComputeHalf, Lane};
use crate::nvme::description::{BadDescription, NvmeDescription};
use crate::nvme::record::{ControlReader, ControlWriter, Counter, Record, RecordError};
use crate::nvme::share;
pub use crate::session::LinkInterest;
use crate::session::{Session, Silence};

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
    #[error(
        "the device server granted {tags} commands and a buffer shadow of {shadow_len} bytes for {lanes} \
         lanes; `--data-threads 1` needs least"
    )]
    BadGrant {
        /// Commands that may be outstanding.
        tags: u16,
        /// Size of the buffer shadow in bytes.
        shadow_len: u32,
        /// Connections that share it.
        lanes: u16,
    },
    /// A record is of one lane.
    #[error("a process of {0} data threads cannot be succeeded by another; use `--data-threads 1`")]
    RecordOfLanes(u16),
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

struct State {
    config: ConfigSpace,
    half: ComputeHalf,
    session: Option<Session>,
    lost: Option<LostLink>,
    epoch: Epoch,
    silence: Silence,
    /// See [`RemoteFunction::look_for_doorbells`].
    gathers_doorbells: bool,
    /// See [`RemoteFunction::keep_looking`].
    keeps_looking: bool,
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
    lanes: u16,
}

impl Grant {
    fn of(claimed: &ClaimedLink) -> Self {
        Self {
            shadow_len: claimed.shadow_len,
            tags: claimed.tags,
            lanes: claimed.lanes.len() as u16 + 1,
        }
    }
}

/// The function's parts that a description fixes.
fn parse(
    description: &Description,
    grant: Grant,
) -> Result<(Vec<RegionInfo>, ConfigSpace, NvmeDescription), RemoteError> {
    let Grant {
        shadow_len,
        tags,
        lanes,
    } = grant;
    if description.engine != EngineKind::Nvme {
        return Err(RemoteError::NoEngine(description.engine));
    }
    let bad_grant = || RemoteError::BadGrant {
        tags,
        shadow_len,
        lanes,
    };
    if !(MIN_TAGS..=MAX_TAGS).contains(&tags)
        || !(PAGE_SIZE as u32..=MAX_SHADOW).contains(&shadow_len)
    {
        return Err(bad_grant());
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
    if lanes > 1 && !share::suffices(lanes, tags, shadow_len, nvme.max_transfer) {
        return Err(bad_grant());
    }
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
        lanes: 1,
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
        let Grant {
            shadow_len,
            tags,
            lanes,
        } = grant;
        let mut half = ComputeHalf::with_lanes(nvme, shadow_len, tags, msix, lanes)
            .map_err(RemoteError::Memory)?;
        half.link_lanes(claimed.lanes)?;
        Ok(Self {
            info: info(label, &config, regions, msix),
            description: claimed.description,
            state: Mutex::new(State {
                config,
                half,
                session: Some(Session::new(claimed.link)),
                lost: None,
                epoch: claimed.epoch,
                silence: Silence::default(),
                gathers_doorbells: false,
                keeps_looking: false,
            }),
        })
    }

    /// As [`Self::new`], for a process that may be killed: what another one needs to go on is in
    /// memory that [`Self::record`] names.
    pub fn with_record(label: String, claimed: ClaimedLink) -> Result<Self, RemoteError> {
        let (description, grant) = (claimed.description.clone(), Grant::of(&claimed));
        if grant.lanes > 1 {
            return Err(RemoteError::RecordOfLanes(grant.lanes));
        }
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
                silence: Silence::default(),
                gathers_doorbells: false,
                keeps_looking: false,
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
        Some(session.interest())
    }

    /// The link's descriptor has events, or may have: receives, sends what waited, and goes on
    /// with what either made possible. Returns whether there was anything, so that there may
    /// be more: then the descriptor need not say so, and this is to be called again without
    /// waiting.
    pub fn service(&self) -> bool {
        let mut state = self.state();
        let before = state.progress();
        state.with_session(|half, session| {
            session.receive_all(half)?;
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
        drop(state);
        self.keep_looking();
    }

    /// The caller promises to call [`Self::service`] again and again, and [`Self::may_sleep`] before
    /// it waits for the link's descriptor after all. Looking costs less then.
    pub fn keep_looking(&self) {
        let mut state = self.state();
        state.keeps_looking = true;
        if let Some(session) = &mut state.session {
            session.keep_looking();
        }
    }

    /// Once a second: gives the peer a sign of life and asks for one, and gives up on a peer
    /// that has been silent for too long.
    pub fn tick(&self) {
        let mut state = self.state();
        let mut silence = state.silence;
        state.with_session(|half, session| {
            let asks = silence.tick(session)?;
            if let (true, Some(record)) = (asks, half.record_mut()) {
                record.ping();
            }
            Ok(())
        });
        state.silence = silence;
    }

    /// The lanes beside the first, each to be served by a thread of its own as this function is by
    /// its event loop; they are the same for as long as there is the function.
    pub fn lanes(&self) -> Vec<Arc<Lane>> {
        self.state().half.lanes().to_vec()
    }

    /// Is signalled when another lane has something for [`Self::pump`]; each signal is an event
    /// (edge-triggered), which nobody needs to read.
    pub fn lanes_event(&self) -> std::io::Result<EventFd> {
        self.state().half.lanes_event()
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
        if claimed.lanes.len() != state.half.lanes().len() {
            return Err(Changed::lanes().into());
        }
        state
            .half
            .link_up(&nvme, claimed.shadow_len, claimed.tags)?;
        let mut session = Session::new(claimed.link);
        for window in state.half.windows() {
            session.register(window, window.iova.0)?;
        }
        if state.keeps_looking {
            session.keep_looking();
        }
        if let Some(record) = state.half.record() {
            record.add_to(Counter::Reconnects, 1);
        }
        state.half.link_lanes(claimed.lanes)?;
        state.epoch = claimed.epoch;
        state.silence = Silence::default();
        state.session = Some(session);
        state.pump();
        Ok(())
    }

    /// The epoch of the claim at hand, or of the last one.
    pub fn epoch(&self) -> Epoch {
        self.state().epoch
    }

    /// What the link has carried, while there is one: of all lanes together.
    pub fn counters(&self) -> Option<Counters> {
        let state = self.state();
        let own = state.session.as_ref().map(Session::counters)?;
        Some(own.plus(state.half.lane_counters()))
    }

    /// Gives the export back: says so to the device server, without waiting for it.
    pub fn release(&self) {
        let mut state = self.state();
        if let Some(mut session) = state.session.take() {
            // The end of the connection says the same, only less politely.
            let _ = session.send(&Message::Release);
            let _ = session.flush();
        }
        state.half.end_lanes();
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
        self.session.as_ref().map_or(0, Session::progress)
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
            session.revoke_all(half.windows())?;
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
        state.with_session(|_, session| session.let_go(&gone));
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
