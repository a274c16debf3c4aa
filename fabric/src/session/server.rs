//! Set-up as the device side does it.
//!
//! The states are types: [`Incoming`] has agreed on a version, [`ClaimRequest`] names an export
//! that it wants, [`Granted`] has it. Only the last yields a link. Each can be refused with a
//! reason, after which the connection closes.

use std::error::Error;
use std::net::TcpStream;
use std::time::Duration;

use super::budget::Budget;
use super::channel::Channel;
use crate::wire::{
    Description, Epoch, ExportName, Label, Message, NEWEST, OLDEST, ProtocolVersion, RefusalCode,
    Side, Text, negotiate,
};
use crate::{FabricError, Link, TcpLink};

/// A connection whose peer speaks our protocol, and has not asked for anything yet.
pub struct Incoming {
    session: Session,
}

/// What a peer asks for.
pub enum Request {
    /// An export.
    Claim(ClaimRequest),
}

/// A peer that waits for the answer to its claim.
pub struct ClaimRequest {
    session: Session,
    export: ExportName,
}

/// A peer that has its claim.
pub struct Granted {
    session: Session,
}

/// What all states have.
struct Session {
    channel: Channel,
    peer: Label,
    version: ProtocolVersion,
}

impl Incoming {
    /// Greets the peer of a new connection. `deadline` bounds the time that is spent waiting
    /// for it until the link is handed out, over all states together.
    pub fn handshake(
        stream: TcpStream,
        label: &str,
        deadline: Duration,
    ) -> Result<Self, FabricError> {
        let link = TcpLink::new(stream, Side::Device)?;
        Self::handshake_over(Box::new(link), label, deadline)
    }

    /// As [`Self::handshake`], over any link.
    pub fn handshake_over(
        link: Box<dyn Link>,
        label: &str,
        deadline: Duration,
    ) -> Result<Self, FabricError> {
        let label = Label::new(label)?;
        let mut channel = Channel::new(link, Budget::new(deadline));
        let (oldest, newest, peer) = match receive(&mut channel, "the peer's hello")? {
            Message::Hello {
                oldest,
                newest,
                label,
            } => (oldest, newest, label),
            other => return Err(unexpected(&mut channel, &other, "Hello")),
        };
        let Some(version) = negotiate(oldest, newest) else {
            let what = format!(
                "the compute side speaks versions {oldest} to {newest}, the device side {} to {}",
                OLDEST.number(),
                NEWEST.number()
            );
            refuse(&mut channel, RefusalCode::Version, &what)?;
            return Err(FabricError::Violation { what });
        };
        channel.send(&Message::Welcome { version, label })?;
        Ok(Incoming {
            session: Session {
                channel,
                peer,
                version,
            },
        })
    }

    /// How the peer names itself.
    pub fn peer(&self) -> &Label {
        &self.session.peer
    }

    /// The version that both sides speak.
    pub fn version(&self) -> ProtocolVersion {
        self.session.version
    }

    /// Waits for what the peer wants.
    pub fn next_request(mut self) -> Result<Request, FabricError> {
        let channel = &mut self.session.channel;
        match receive(channel, "the peer's request")? {
            Message::Claim { export } => Ok(Request::Claim(ClaimRequest {
                session: self.session,
                export,
            })),
            other => Err(unexpected(channel, &other, "Claim")),
        }
    }

    /// Sends the peer away.
    pub fn refuse(mut self, code: RefusalCode, text: &str) -> Result<(), FabricError> {
        refuse(&mut self.session.channel, code, text)
    }
}

impl ClaimRequest {
    /// The export that is asked for.
    pub fn export(&self) -> &ExportName {
        &self.export
    }

    /// How the peer names itself.
    pub fn peer(&self) -> &Label {
        &self.session.peer
    }

    /// Sends the peer away.
    pub fn refuse(mut self, code: RefusalCode, text: &str) -> Result<(), FabricError> {
        refuse(&mut self.session.channel, code, text)
    }

    /// Gives the export to the peer: `shadow_len` bytes of buffer shadow, and tags below
    /// `tags`. The epoch has to be higher than that of any claim of the export before.
    pub fn grant(
        mut self,
        epoch: Epoch,
        shadow_len: u32,
        tags: u16,
    ) -> Result<Granted, FabricError> {
        let channel = &mut self.session.channel;
        channel.send(&Message::Claimed {
            epoch,
            shadow_len,
            tags,
        })?;
        channel.link().set_epoch(epoch);
        Ok(Granted {
            session: self.session,
        })
    }
}

impl Granted {
    /// Answers the peer's question what the function is, and ends set-up. The link admits
    /// frames of the claim's epoch only.
    pub fn describe(mut self, description: Description) -> Result<Box<dyn Link>, FabricError> {
        let channel = &mut self.session.channel;
        match receive(channel, "the peer's request for a description")? {
            Message::Describe => {}
            other => return Err(unexpected(channel, &other, "Describe")),
        }
        channel.send(&Message::Description(Box::new(description)))?;
        Ok(self.session.channel.into_link())
    }

    /// Sends the peer away after all.
    pub fn refuse(mut self, code: RefusalCode, text: &str) -> Result<(), FabricError> {
        refuse(&mut self.session.channel, code, text)
    }
}

/// Waits for a message, and tells a peer that breaks the protocol so.
fn receive(channel: &mut Channel, what: &'static str) -> Result<Message, FabricError> {
    channel.receive(what).map_err(|error| {
        if matches!(
            error,
            FabricError::Malformed(_) | FabricError::Violation { .. }
        ) {
            return send_away(channel, error);
        }
        error
    })
}

fn unexpected(channel: &mut Channel, message: &Message, expected: &str) -> FabricError {
    let what = format!("a {} message came in place of {expected}", message.kind());
    send_away(channel, FabricError::Violation { what })
}

/// Tells the peer about an error, as far as that is possible at once: it is owed no waiting.
fn send_away(channel: &mut Channel, error: FabricError) -> FabricError {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    let refusal = Message::Refused {
        code: RefusalCode::Malformed,
        text: Text::truncated(&text),
    };
    // The first error is the one that matters to the caller.
    channel.send_now(&refusal).unwrap_or_default();
    error
}

fn refuse(channel: &mut Channel, code: RefusalCode, text: &str) -> Result<(), FabricError> {
    channel.send(&Message::Refused {
        code,
        text: Text::truncated(text),
    })
}
