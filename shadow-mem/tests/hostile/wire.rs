//! A link that goes nowhere: it records what is sent, and is congested when told so.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use farbus_fabric::wire::{
    Complete, CompleteEntry, Data, Epoch, Header, Kind, Message, Placement, Submit,
};
use farbus_fabric::{Counters, FabricError, Frame, Link, Received, RemoteSpan, Sink, Span};
use farbus_shadow_mem::session::Session;
use farbus_vfio::nvme::{SubmissionEntry, reg};
use vm_memory::MmapRegion;

/// A command that was sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Submitted {
    pub placement: Placement,
    pub sqe: SubmissionEntry,
}

/// What was sent, in order; the entries of a batch one by one.
#[derive(Debug)]
pub(crate) enum Sent {
    Submit(Submitted),
    Complete(CompleteEntry),
    Message(Message),
}

#[derive(Default)]
struct State {
    sent: Vec<Sent>,
    is_congested: bool,
    is_one_sided: bool,
    /// Where payloads went, and where commands want theirs.
    remote: Vec<RemoteSpan>,
    segments: Vec<RemoteSpan>,
}

/// What a test holds of a recording link.
#[derive(Clone, Default)]
pub(crate) struct Wire(Arc<Mutex<State>>);

impl Wire {
    /// A session over a link of its own.
    pub(crate) fn session() -> (Session, Self) {
        let wire = Self::default();
        let link = RecordingLink {
            wire: wire.clone(),
            descriptor: File::open("/dev/null").unwrap(),
        };
        (Session::new(Box::new(link)), wire)
    }

    pub(crate) fn set_congested(&self, is_congested: bool) {
        self.0.lock().unwrap().is_congested = is_congested;
    }

    /// From now on the link is one whose sides write into each other's memory.
    pub(crate) fn set_one_sided(&self) {
        self.0.lock().unwrap().is_one_sided = true;
    }

    /// Takes where payloads were written to since the last call.
    pub(crate) fn take_remote(&self) -> Vec<RemoteSpan> {
        std::mem::take(&mut self.0.lock().unwrap().remote)
    }

    /// Takes where the commands sent since the last call want their data.
    pub(crate) fn take_segments(&self) -> Vec<RemoteSpan> {
        std::mem::take(&mut self.0.lock().unwrap().segments)
    }

    /// Takes everything that was sent since the last call.
    pub(crate) fn take(&self) -> Vec<Sent> {
        std::mem::take(&mut self.0.lock().unwrap().sent)
    }

    /// Takes everything, and keeps the commands.
    pub(crate) fn take_submitted(&self) -> Vec<Submitted> {
        let commands = |sent| match sent {
            Sent::Submit(submitted) => Some(submitted),
            _ => None,
        };
        self.take().into_iter().filter_map(commands).collect()
    }

    /// Takes everything, and keeps the completions.
    pub(crate) fn take_completed(&self) -> Vec<CompleteEntry> {
        let completions = |sent| match sent {
            Sent::Complete(entry) => Some(entry),
            _ => None,
        };
        self.take().into_iter().filter_map(completions).collect()
    }

    /// Takes everything, and keeps the small messages.
    pub(crate) fn take_messages(&self) -> Vec<Message> {
        let messages = |sent| match sent {
            Sent::Message(message) => Some(message),
            _ => None,
        };
        self.take().into_iter().filter_map(messages).collect()
    }
}

struct RecordingLink {
    wire: Wire,
    /// Nobody waits for it.
    descriptor: File,
}

impl Link for RecordingLink {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    fn is_one_sided(&self) -> bool {
        self.wire.0.lock().unwrap().is_one_sided
    }

    fn set_epoch(&mut self, _: Epoch) {}

    fn register(&mut self, _: &Span, _: u64) -> Result<(), FabricError> {
        Ok(())
    }

    fn unregister(&mut self, _: &Span, _: u64) {}

    fn revoke(&mut self, _: &Arc<MmapRegion>, _: usize, _: usize) {}
    fn is_sending(&self, _: &Arc<MmapRegion>, _: usize, _: usize) -> bool {
        false
    }

    fn send(&mut self, frame: &Frame<'_>) -> Result<(), FabricError> {
        let state = &mut *self.wire.0.lock().unwrap();
        let total: usize = frame.payload.iter().map(|span| span.len).sum();
        let named: u32 = frame.remote.iter().map(|span| span.len).sum();
        assert_eq!(if state.is_one_sided { total } else { 0 }, named as usize);
        state.remote.extend(frame.remote);
        let sent = &mut state.sent;
        match frame.header.kind {
            Kind::Submit => {
                let batch = Submit::decode(&frame.header, frame.control)?;
                let segments = batch.entries().flat_map(|entry| entry.segments);
                state.segments.extend(segments);
                sent.extend(batch.entries().map(|entry| {
                    Sent::Submit(Submitted {
                        placement: entry.placement,
                        sqe: SubmissionEntry(*entry.command),
                    })
                }));
            }
            Kind::Complete => {
                let batch = Complete::decode(&frame.header, frame.control)?;
                sent.extend(batch.entries().map(Sent::Complete));
            }
            _ => sent.push(Sent::Message(Message::decode(
                &frame.header,
                frame.control,
            )?)),
        }
        Ok(())
    }

    fn is_congested(&self) -> bool {
        self.wire.0.lock().unwrap().is_congested
    }

    fn flush(&mut self) -> Result<(), FabricError> {
        Ok(())
    }

    fn receive(&mut self, _: &mut dyn Sink) -> Result<Received, FabricError> {
        Ok(Received::Idle)
    }

    fn counters(&self) -> Counters {
        Counters::default()
    }
}

/// Delivers a message without entries.
pub(crate) fn tell(half: &mut dyn Sink, message: &Message) -> Result<(), FabricError> {
    let mut control = Vec::new();
    let header = message.encode(&mut control)?;
    half.deliver(&header, &control)
}

/// Where the payload of a message would land; an error if the half refuses it.
pub(crate) fn landing(
    half: &mut dyn Sink,
    header: &Header,
    control: &[u8],
) -> Result<Vec<Span>, FabricError> {
    let mut spans = Vec::new();
    half.land(header, control, &mut spans)?;
    Ok(spans)
}

/// The device side tells of CSTS.
pub(crate) fn status(value: u32) -> Message {
    Message::RegisterUpdate {
        region: 0,
        offset: reg::CSTS,
        data: Data::new(&value.to_le_bytes()).unwrap(),
    }
}

/// The compute side writes CC.
pub(crate) fn configure(value: u32) -> Message {
    Message::RegisterWrite {
        region: 0,
        offset: reg::CC,
        data: Data::new(&value.to_le_bytes()).unwrap(),
    }
}

/// The value of a CSTS that was told, of a CC that was written.
pub(crate) fn register_of(message: &Message) -> Option<(u64, u32)> {
    let (Message::RegisterUpdate { offset, data, .. }
    | Message::RegisterWrite { offset, data, .. }) = message
    else {
        return None;
    };
    let value = <[u8; 4]>::try_from(&data[..]).ok()?;
    Some((*offset, u32::from_le_bytes(value)))
}
