//! One message after the other over a link, waiting in between.

use rustix::event::PollFlags;

use super::budget::Budget;
use crate::wire::{Header, Message};
use crate::{FabricError, Frame, Link, Received, Sink, Span};

/// A link during set-up.
pub(super) struct Channel {
    link: Box<dyn Link>,
    budget: Budget,
    /// Encoded control parts; used again for each message.
    control: Vec<u8>,
}

impl Channel {
    pub(super) fn new(link: Box<dyn Link>, budget: Budget) -> Self {
        Channel {
            link,
            budget,
            control: Vec::new(),
        }
    }

    pub(super) fn link(&mut self) -> &mut dyn Link {
        &mut *self.link
    }

    /// The time that is left for waiting.
    pub(super) fn left(&self) -> std::time::Duration {
        self.budget.left()
    }

    pub(super) fn into_link(self) -> Box<dyn Link> {
        self.link
    }

    /// Sends a message, and waits until the network has taken it.
    pub(super) fn send(&mut self, message: &Message) -> Result<(), FabricError> {
        self.send_now(message)?;
        while self.link.is_congested() {
            self.budget.wait(
                self.link.descriptor(),
                PollFlags::OUT,
                "the peer's reading of a message",
            )?;
            self.link.flush()?;
        }
        Ok(())
    }

    /// Sends a message as far as the network takes it without waiting.
    pub(super) fn send_now(&mut self, message: &Message) -> Result<(), FabricError> {
        self.control.clear();
        let header = message.encode(&mut self.control)?;
        self.link.send(&Frame::plain(header, &self.control))
    }

    /// Waits for a message. `what` is what is awaited, for the error.
    pub(super) fn receive(&mut self, what: &'static str) -> Result<Message, FabricError> {
        let mut next = NextMessage(None);
        loop {
            let received = self.link.receive(&mut next)?;
            if let Some(message) = next.0.take() {
                return Ok(message);
            }
            if received == Received::Idle {
                self.budget
                    .wait(self.link.descriptor(), PollFlags::IN, what)?;
            }
        }
    }
}

/// Takes one message, which has no payload: commands are out of place during set-up.
struct NextMessage(Option<Message>);

impl Sink for NextMessage {
    fn land(
        &mut self,
        header: &Header,
        _control: &[u8],
        _spans: &mut Vec<Span>,
    ) -> Result<(), FabricError> {
        Err(out_of_place(header))
    }

    fn deliver(&mut self, header: &Header, control: &[u8]) -> Result<(), FabricError> {
        if header.kind.has_entries() {
            return Err(out_of_place(header));
        }
        self.0 = Some(Message::decode(header, control)?);
        Ok(())
    }
}

fn out_of_place(header: &Header) -> FabricError {
    FabricError::violation(format!("a {} message came during set-up", header.kind))
}
