//! A link in memory. It checks what it carries as a suspicious peer and a careful kernel would:
//! every frame must decode, and every payload must come from and land in memory that is in
//! use for that at this moment.
//!
//! The script of a target can hold a direction back (the link is then congested), let payloads
//! arrive in two pieces, put in frames of its own, and cut the connection.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use farbus_fabric::wire::{self, Admission, Epoch, Header, Side};
use farbus_fabric::{Counters, FabricError, Frame, Link, Received, Sink, Span};
use farbus_vfio::{DmaAccess, DmaWindow};
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{MmapRegion, VolatileMemory};

/// Frames that a link queues at most (`docs/protocol.md`, Limits). No engine may need it all.
const MAX_BACKLOG: usize = 1024;

/// Takes a lock; the targets have one thread.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("a panic ends the process")
}

/// A frame on its way.
struct Parcel {
    header: Header,
    control: Vec<u8>,
    payload: Vec<u8>,
}

/// One direction of a connection.
#[derive(Default)]
pub struct Way {
    arrived: VecDeque<Parcel>,
    backlog: VecDeque<Parcel>,
    /// The network takes nothing: what is sent is queued.
    pub stalled: bool,
    /// Payloads arrive in two pieces, with other work in between.
    pub split: bool,
    /// The connection has ended; what has arrived can still be received.
    pub cut: bool,
}

impl Way {
    /// Puts in a frame. Anything that its header cannot say breaks the connection.
    pub fn inject(&mut self, header: Header, control: &[u8], payload: &[u8]) {
        match Header::decode(&header.encode()) {
            Ok(header) => self.arrived.push_back(Parcel {
                header,
                control: control.to_vec(),
                payload: payload.to_vec(),
            }),
            Err(_) => self.cut = true,
        }
    }
}

/// The memory that payloads may come from and land in now.
#[derive(Default)]
pub struct Ground {
    /// All memory that the watch is kept over; other memory is its owner's own.
    pub watched: Vec<Arc<MmapRegion>>,
    /// What of it is in use.
    pub windows: Vec<DmaWindow>,
}

impl Ground {
    /// One window that is in use for good.
    pub fn of(window: &DmaWindow) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            watched: vec![window.memory.clone()],
            windows: vec![window.clone()],
        }))
    }

    fn is_watched(&self, span: &Span) -> bool {
        self.watched
            .iter()
            .any(|memory| Arc::ptr_eq(memory, &span.memory))
    }

    /// Fails unless each byte of the span is in a window, or excused.
    fn check(&self, span: &Span, write: bool, excused: &[(usize, usize, usize)]) {
        let memory = Arc::as_ptr(&span.memory) as usize;
        let end = span.offset.checked_add(span.len).expect("a span that ends");
        assert!(end <= span.memory.size(), "a span beyond its memory");
        if !self.is_watched(span) {
            return;
        }
        let windows = self
            .windows
            .iter()
            .filter(|window| !write || window.access == DmaAccess::ReadWrite)
            .map(|window| {
                (
                    Arc::as_ptr(&window.memory) as usize,
                    window.offset,
                    window.len,
                )
            });
        let allowed: Vec<_> = windows.chain(excused.iter().copied()).collect();
        let mut at = span.offset;
        while at < end {
            at = allowed
                .iter()
                .filter(|(of, start, len)| *of == memory && (*start..start + len).contains(&at))
                .map(|(_, start, len)| start + len)
                .max()
                .unwrap_or_else(|| panic!("byte {at:#x} of a span is not in use (write: {write})"));
        }
    }
}

/// A payload that has arrived in part.
struct Partial {
    parcel: Parcel,
    spans: Vec<Span>,
    /// Ranges (memory, offset, length) that were taken back meanwhile.
    revoked: Vec<(usize, usize, usize)>,
}

/// One end of a connection.
pub struct FakeLink {
    admission: Admission,
    out: Arc<Mutex<Way>>,
    inward: Arc<Mutex<Way>>,
    ground: Arc<Mutex<Ground>>,
    partial: Option<Partial>,
    failed: bool,
    counters: Counters,
}

/// The two directions of a connection, for the script.
#[derive(Clone)]
pub struct Wire {
    /// From the compute side to the device side.
    pub down: Arc<Mutex<Way>>,
    /// From the device side to the compute side.
    pub up: Arc<Mutex<Way>>,
}

impl Wire {
    /// A new connection.
    pub fn new() -> Self {
        Self {
            down: Arc::default(),
            up: Arc::default(),
        }
    }

    /// One of its ends, claimed.
    pub fn end(&self, side: Side, epoch: Epoch, ground: &Arc<Mutex<Ground>>) -> FakeLink {
        let (out, inward) = match side {
            Side::Compute => (&self.down, &self.up),
            Side::Device => (&self.up, &self.down),
        };
        let mut admission = Admission::new(side);
        admission.set_epoch(epoch);
        FakeLink {
            admission,
            out: out.clone(),
            inward: inward.clone(),
            ground: ground.clone(),
            partial: None,
            failed: false,
            counters: Counters::default(),
        }
    }

    /// Ends the connection.
    pub fn cut(&self) {
        lock(&self.down).cut = true;
        lock(&self.up).cut = true;
    }

    /// Lets everything through again, whole.
    pub fn clear(&self) {
        for way in [&self.down, &self.up] {
            let mut way = lock(way);
            way.stalled = false;
            way.split = false;
        }
    }
}

impl Default for Wire {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeLink {
    fn gather(&self, frame: &Frame<'_>) -> Vec<u8> {
        let ground = lock(&self.ground);
        let mut payload = Vec::with_capacity(frame.header.payload_len as usize);
        for span in frame.payload {
            ground.check(span, false, &[]);
            let start = payload.len();
            payload.resize(start + span.len, 0);
            span.memory
                .get_slice(span.offset, span.len)
                .expect("a span within its memory")
                .copy_to(&mut payload[start..]);
        }
        payload
    }

    fn land(&mut self, parcel: Parcel, sink: &mut dyn Sink) -> Result<Received, FabricError> {
        if parcel.payload.is_empty() {
            return self.deliver(&parcel, sink);
        }
        let mut spans = Vec::new();
        sink.land(&parcel.header, &parcel.control, &mut spans)?;
        let room: usize = spans.iter().map(|span| span.len).sum();
        assert_eq!(room, parcel.payload.len(), "the landing has another length");
        for span in &spans {
            lock(&self.ground).check(span, true, &[]);
        }
        let partial = Partial {
            parcel,
            spans,
            revoked: Vec::new(),
        };
        if lock(&self.inward).split {
            self.partial = Some(partial);
            return Ok(Received::Idle);
        }
        self.finish(&partial, sink)
    }

    fn finish(&mut self, partial: &Partial, sink: &mut dyn Sink) -> Result<Received, FabricError> {
        let mut payload = partial.parcel.payload.as_slice();
        for span in &partial.spans {
            lock(&self.ground).check(span, true, &partial.revoked);
            let (here, rest) = payload.split_at(span.len);
            payload = rest;
            // What was revoked in part is dropped whole: only memory safety is at stake here.
            if partial.revoked.is_empty() {
                span.memory
                    .get_slice(span.offset, span.len)
                    .expect("a span within its memory")
                    .copy_from(here);
            }
        }
        self.deliver(&partial.parcel, sink)
    }

    fn deliver(&mut self, parcel: &Parcel, sink: &mut dyn Sink) -> Result<Received, FabricError> {
        self.counters.messages_received += 1;
        sink.deliver(&parcel.header, &parcel.control)?;
        Ok(Received::Message)
    }

    fn receive_one(&mut self, sink: &mut dyn Sink) -> Result<Received, FabricError> {
        if let Some(partial) = self.partial.take() {
            return self.finish(&partial, sink);
        }
        let next = lock(&self.inward).arrived.pop_front();
        match next {
            Some(parcel) => {
                self.counters.bytes_received += parcel.header.frame_len() as u64;
                self.admission.admit(&parcel.header)?;
                self.land(parcel, sink)
            }
            None if lock(&self.inward).cut => Err(FabricError::Closed),
            None => Ok(Received::Idle),
        }
    }
}

/// Fails unless a peer would take the frame.
fn check_frame(side: Side, frame: &Frame<'_>, payload: &[u8]) {
    let header = frame.header;
    assert!(header.kind.comes_from(side), "{side} sent {header:?}");
    assert!(frame.remote.is_empty(), "remote spans on a two-sided link");
    let bytes = [&header.encode()[..], frame.control, payload].concat();
    assert_eq!(bytes.len(), header.frame_len(), "{header:?}");
    if let Err(error) = wire::decode_frame(&bytes) {
        panic!("{header:?} does not decode: {error}");
    }
}

impl Link for FakeLink {
    fn descriptor(&self) -> BorrowedFd<'_> {
        static NEVER_READY: OnceLock<std::os::fd::OwnedFd> = OnceLock::new();
        NEVER_READY
            .get_or_init(|| eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"))
            .as_fd()
    }

    fn is_one_sided(&self) -> bool {
        false
    }

    fn set_epoch(&mut self, epoch: Epoch) {
        self.admission.set_epoch(epoch);
    }

    fn register(&mut self, _span: &Span, _address: u64) -> Result<(), FabricError> {
        Ok(())
    }

    fn unregister(&mut self, _span: &Span, _address: u64) {}

    fn is_sending(&self, _: &Arc<MmapRegion>, _: usize, _: usize) -> bool {
        false
    }

    fn revoke(&mut self, memory: &Arc<MmapRegion>, offset: usize, len: usize) {
        if let Some(partial) = &mut self.partial {
            let memory = Arc::as_ptr(memory) as usize;
            partial.revoked.push((memory, offset, len));
        }
    }

    fn send(&mut self, frame: &Frame<'_>) -> Result<(), FabricError> {
        let payload = self.gather(frame);
        check_frame(self.admission.side(), frame, &payload);
        let mut out = lock(&self.out);
        if out.cut {
            return Err(FabricError::Closed);
        }
        let parcel = Parcel {
            header: Header {
                epoch: self.admission.epoch(),
                ..frame.header
            },
            control: frame.control.to_vec(),
            payload,
        };
        self.counters.messages_sent += 1;
        if out.stalled || !out.backlog.is_empty() {
            out.backlog.push_back(parcel);
            assert!(
                out.backlog.len() <= MAX_BACKLOG,
                "an engine does not heed congestion"
            );
        } else {
            out.arrived.push_back(parcel);
        }
        Ok(())
    }

    fn is_congested(&self) -> bool {
        !lock(&self.out).backlog.is_empty()
    }

    fn flush(&mut self) -> Result<(), FabricError> {
        let mut out = lock(&self.out);
        if !out.stalled {
            let waiting = std::mem::take(&mut out.backlog);
            out.arrived.extend(waiting);
        }
        Ok(())
    }

    fn receive(&mut self, sink: &mut dyn Sink) -> Result<Received, FabricError> {
        if self.failed {
            return Err(FabricError::Closed);
        }
        self.receive_one(sink).inspect_err(|_| self.failed = true)
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}
