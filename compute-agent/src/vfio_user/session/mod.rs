//! One client's conversation: what each of its messages does to the function.
//!
//! It knows no socket. Messages come from an [`Inbox`](super::inbox::Inbox), replies go to an
//! [`Outbox`]. `handshake` is how it begins, `transfers` are the accesses to regions.

mod handshake;
mod transfers;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use farbus_vfio::Function;
use farbus_vfio::user::body::DmaTransfer;
use farbus_vfio::user::wire::{Command, FLAG_NO_REPLY, Header, MessageType};
use log::{info, warn};
use vmm_sys_util::eventfd::EventFd;

use super::inbox::Message;
use super::irqs::Irqs;
use super::msix::{Mediator, Message as Interrupt, Watch};
use super::outbox::{Full, Outbox};
use super::record::{Progress, SessionRecord};
use super::refusal::{End, Refusal};
use super::{dma, regions};
use crate::api::Msix;
use crate::custody::Custody;
use crate::guest_memory::GuestMemory;

/// How many refused commands of a client are logged, one by one.
const LOGGED_REFUSALS: u32 = 16;

/// How far the handling of a message got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Handled {
    /// It is done.
    Done,
    /// The budget is used up and the message is to be handled again, to go on with it.
    Unfinished,
}

/// How far the current `REGION_WRITE_MULTI` got.
#[derive(Debug, Default)]
struct MultiProgress {
    /// Writes that were looked at.
    seen: usize,
    /// Those of them that were done.
    done: u64,
}

pub(super) struct Session {
    function: Arc<dyn Function>,
    /// For log lines: the socket and the client.
    name: String,
    peer: Option<u32>,
    negotiated: bool,
    memory: GuestMemory,
    irqs: Irqs,
    /// What is wanted of MSI-X, and what keeps it if it is not the client.
    msix: Msix,
    mediator: Option<Mediator>,
    /// Messages that were sent unasked.
    sent: u16,
    multi: MultiProgress,
    refusals: u32,
    /// Where a successor finds what it needs, if there is to be one.
    record: Option<SessionRecord>,
}

impl Session {
    /// A client of which nothing has been heard yet. `lost` is signalled when its memory
    /// breaks; see [`GuestMemory::lost`].
    pub(super) fn new(
        function: Arc<dyn Function>,
        socket: &str,
        peer: Option<u32>,
        msix: Msix,
        lost: Arc<EventFd>,
    ) -> Self {
        let pid = peer.map_or("pid unknown".to_owned(), |pid| format!("pid {pid}"));
        Self {
            function,
            name: format!("{socket} ({pid})"),
            peer,
            negotiated: false,
            memory: GuestMemory::new(lost),
            irqs: Irqs::default(),
            msix,
            mediator: None,
            sent: 0,
            multi: MultiProgress::default(),
            refusals: 0,
            record: None,
        }
    }

    /// The same, with what a successor needs of the client's memory and interrupts in the record and in
    /// custody.
    pub(super) fn keep(mut self, record: &SessionRecord, custody: &Custody) -> Self {
        self.memory = self.memory.keep(record.clone(), custody.clone());
        self.irqs = Irqs::keep(custody.clone());
        self.record = Some(record.clone());
        self
    }

    /// Takes up what a predecessor was told by the client: its memory and its interrupts are given to
    /// the function again. `first` is the message that the predecessor was perhaps handling.
    pub(super) fn resume(
        mut self,
        record: &SessionRecord,
        progress: Progress,
        first: Option<(Header, &[u8])>,
    ) -> Result<Self, Refusal> {
        self.negotiated = progress.negotiated;
        (self.multi.seen, self.multi.done) = progress.multi;
        let mut windows = record.windows();
        match first.map(|(header, body)| (Command::from_number(header.command), body)) {
            // It is agreed on again, with the same outcome.
            Some((Some(Command::Version), _)) => self.negotiated = false,
            Some((Some(Command::DmaMap), body)) => {
                // It is mapped when the message is handled again.
                if let Ok((iova, size)) = dma::range_of(body) {
                    windows.retain(|(place, window)| {
                        let again = (window.iova, window.size) == (iova, size);
                        if again {
                            record.clear_window(*place);
                        }
                        !again
                    });
                }
            }
            _ => {}
        }
        for window in self.memory.resume(windows, self.peer)? {
            self.function.map_dma(&window)?;
        }
        let function = self.function.as_ref();
        self.irqs.resume(function)?;
        if progress.mediated && self.negotiated {
            self.mediator = Mediator::new(function);
            if let Some(mediator) = &mut self.mediator {
                mediator.resume(function, record)?;
            }
        }
        info!("vfio-user {}: client taken over", self.name);
        Ok(self)
    }

    /// How far the conversation is, as far as only this knows.
    pub(super) fn progress(&self) -> Progress {
        Progress {
            negotiated: self.negotiated,
            mediated: self.mediator.is_some(),
            multi: (self.multi.seen, self.multi.done),
            ..Progress::default()
        }
    }

    /// Whether the client's memory broke.
    pub(super) fn memory_lost(&self) -> bool {
        self.memory.lost()
    }

    /// Handles one message. Each access to the function takes one off `budget`.
    pub(super) fn handle(
        &mut self,
        message: Message<'_>,
        outbox: &mut Outbox,
        budget: &mut u32,
    ) -> Result<Handled, End> {
        let Message { header, body, fds } = message;
        *budget = budget.saturating_sub(1);
        match header.message_type()? {
            // This server sends no commands, so whatever this answers was never asked.
            MessageType::Reply => return Ok(Handled::Done),
            MessageType::Command => {}
        }
        let command = Command::from_number(header.command);
        if !self.negotiated {
            return self
                .shake_hands(command, &header, body, outbox)
                .map(|()| Handled::Done);
        }
        if command == Some(Command::RegionWriteMulti) {
            return self.write_multi(&header, body, outbox, budget);
        }
        let outcome = match command {
            Some(Command::RegionWrite) => self.region_write(&header, body, outbox)?,
            Some(Command::RegionRead) => self.region_read(&header, body, outbox)?,
            Some(command) => match self.control(command, body, fds) {
                Ok(answer) => {
                    self.reply(&header, answer.bytes(), outbox)?;
                    Ok(())
                }
                Err(refusal) => Err(refusal),
            },
            None => Err(Refusal::UnknownCommand(header.command)),
        };
        match outcome {
            Ok(()) => Ok(Handled::Done),
            Err(refusal) => self
                .refuse(&header, refusal, outbox)
                .map(|()| Handled::Done),
        }
    }

    /// The commands that set the device up; what the reply holds.
    fn control(
        &mut self,
        command: Command,
        body: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<Answer, Refusal> {
        let function = self.function.as_ref();
        match command {
            Command::DmaMap => {
                dma::map(function, &mut self.memory, self.peer, body, fds)?;
                Ok(Answer::EMPTY)
            }
            Command::DmaUnmap => {
                dma::unmap(function, &mut self.memory, body).map(|a| Answer::new(&a.encode()))
            }
            Command::DeviceGetInfo => {
                regions::device_info(function, body).map(|a| Answer::new(&a.encode()))
            }
            Command::DeviceGetRegionInfo => {
                regions::region_info(function, body).map(|a| Answer::new(&a.encode()))
            }
            Command::DeviceGetIrqInfo => {
                regions::irq_info(function, body).map(|a| Answer::new(&a.encode()))
            }
            Command::DeviceSetIrqs => {
                self.irqs
                    .set(function, body, fds, self.mediator.is_some())?;
                Ok(Answer::EMPTY)
            }
            Command::DeviceReset => {
                function.reset()?;
                if let Some(mediator) = &mut self.mediator {
                    mediator.reset(function);
                }
                Ok(Answer::EMPTY)
            }
            Command::Version => Err(Refusal::VersionTwice),
            // An optimisation for doorbells through KVM; the specification lets a server do
            // without.
            Command::DeviceGetRegionIoFds => Err(Refusal::Unsupported("register access by fds")),
            Command::DeviceFeature | Command::MigDataRead | Command::MigDataWrite => {
                Err(Refusal::Unsupported("migration"))
            }
            Command::DmaRead | Command::DmaWrite => {
                Err(Refusal::Unsupported("a command of servers, from a client"))
            }
            Command::RegionRead | Command::RegionWrite | Command::RegionWriteMulti => {
                Err(Refusal::UnknownCommand(command as u16))
            }
        }
    }

    /// The function has signalled a vector of a mediated MSI-X.
    pub(super) fn fire(&mut self, vector: u32) {
        if let Some(mediator) = &mut self.mediator {
            mediator.fire(vector);
        }
    }

    /// A vector's eventfd that is to be watched from now on.
    pub(super) fn take_watch(&mut self) -> Option<Watch> {
        self.mediator.as_mut()?.take_fresh()
    }

    /// Queues the message of one vector that may be raised. Whether there was one.
    pub(super) fn raise_one(&mut self, outbox: &mut Outbox) -> Result<bool, Full> {
        let next = self.mediator.as_mut().and_then(Mediator::next_message);
        let Some(Interrupt { address, data }) = next else {
            return Ok(false);
        };
        let data = data.to_le_bytes();
        let count = data.len() as u64;
        let mut body = [0; DmaTransfer::LEN + 4];
        if let Some((head, tail)) = body.split_first_chunk_mut() {
            *head = DmaTransfer { address, count }.encode();
            tail.copy_from_slice(&data);
        }
        self.sent = self.sent.wrapping_add(1);
        let header = Header::command(self.sent, Command::DmaWrite, FLAG_NO_REPLY, body.len());
        outbox.put(&header, &body)?;
        Ok(true)
    }

    fn reply(&self, header: &Header, body: &[u8], outbox: &mut Outbox) -> Result<(), End> {
        if !header.no_reply() {
            outbox.put(&header.reply(body.len()), body)?;
        }
        Ok(())
    }

    /// Answers with an error. A command that wants no reply gets none, and goes unheard as a
    /// posted write to nowhere does.
    fn refuse(
        &mut self,
        header: &Header,
        refusal: Refusal,
        outbox: &mut Outbox,
    ) -> Result<(), End> {
        if !refusal.is_final() {
            self.log_refusal(header, &refusal);
        }
        if !header.no_reply() {
            outbox.put(&header.error_reply(refusal.errno()), &[])?;
        }
        if refusal.is_final() {
            Err(End::Memory(refusal))
        } else {
            Ok(())
        }
    }

    fn log_refusal(&mut self, header: &Header, refusal: &Refusal) {
        self.refusals = self.refusals.saturating_add(1);
        if self.refusals <= LOGGED_REFUSALS {
            warn!(
                "vfio-user {}: command {} refused: {refusal}",
                self.name, header.command
            );
        }
        if self.refusals == LOGGED_REFUSALS {
            warn!("vfio-user {}: further refusals are not logged", self.name);
        }
    }

    /// The client is gone: takes everything back that it had given, and brings the function
    /// to its initial state. A client that never got past the handshake has changed nothing.
    pub(super) fn end(&mut self, why: &End) {
        if !self.negotiated {
            if !why.is_orderly() {
                warn!("vfio-user {}: connection refused: {why}", self.name);
            }
            return;
        }
        if why.is_orderly() {
            info!("vfio-user {}: client gone: {why}", self.name);
        } else {
            warn!("vfio-user {}: client dropped: {why}", self.name);
        }
        let function = self.function.as_ref();
        let left = [
            ("interrupts", self.irqs.clear(function)),
            ("guest memory", dma::unmap_all(function, &mut self.memory)),
            ("reset", function.reset().map_err(Refusal::from)),
        ];
        for (what, result) in left {
            if let Err(error) = result {
                warn!(
                    "vfio-user {}: {what} after the client had gone: {error}",
                    self.name
                );
            }
        }
        self.mediator = None;
        self.negotiated = false;
    }
}

/// The body of a reply with a fixed layout.
struct Answer {
    bytes: [u8; Self::MAX],
    len: usize,
}

impl Answer {
    /// The longest one: a region's description.
    const MAX: usize = 32;
    const EMPTY: Self = Self {
        bytes: [0; Self::MAX],
        len: 0,
    };

    fn new<const N: usize>(body: &[u8; N]) -> Self {
        const { assert!(N <= Self::MAX) };
        let mut answer = Self {
            bytes: [0; Self::MAX],
            len: N,
        };
        answer
            .bytes
            .iter_mut()
            .zip(body)
            .for_each(|(to, from)| *to = *from);
        answer
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}
