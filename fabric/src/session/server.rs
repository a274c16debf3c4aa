//! Set-up as the device side does it.
//!
//! The states are types: [`Incoming`] has agreed on a version, [`ListRequest`] wants to know what
//! there is, [`ClaimRequest`] names an export that it wants, [`Granted`] has it. Only the last yields a link. Each can be refused with a
//! reason, after which the connection closes.

use std::error::Error;
use std::net::{IpAddr, TcpStream};
use std::time::Duration;

use super::budget::Budget;
use super::channel::Channel;
use super::rdma::Prepared;
use crate::provider::{Choice, Options, Provider, Wanted};
use crate::wire::{
    Description, Epoch, ExportName, Label, Listed, Listing, Message, NEWEST, OLDEST,
    ProtocolVersion, RateLimits, RdmaEndpoint, RefusalCode, Side, Text, negotiate,
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
    /// To be told what there is to claim.
    List(ListRequest),
}

/// A peer that waits for the answer to its claim.
pub struct ClaimRequest {
    session: Session,
    export: ExportName,
    limits: RateLimits,
}

/// A peer that waits to be told what there is.
pub struct ListRequest {
    session: Session,
    after: Option<ExportName>,
}

/// A peer that has its claim.
pub struct Granted {
    session: Session,
    epoch: Epoch,
}

/// What all states have.
struct Session {
    channel: Channel,
    peer: Label,
    version: ProtocolVersion,
    /// This side's address, as far as the connection has one.
    local: Option<IpAddr>,
}

impl Incoming {
    /// Greets the peer of a new connection. `deadline` bounds the time that is spent waiting
    /// for it until the link is handed out, over all states together.
    pub fn handshake(
        stream: TcpStream,
        label: &str,
        deadline: Duration,
    ) -> Result<Self, FabricError> {
        let local = stream.local_addr().ok().map(|address| address.ip());
        let link = TcpLink::new(stream, Side::Device)?;
        let mut incoming = Self::handshake_over(Box::new(link), label, deadline)?;
        incoming.session.local = local;
        Ok(incoming)
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
                local: None,
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
                limits: RateLimits::NONE,
            })),
            Message::ClaimWith { export, limits }
                if self.session.version >= ProtocolVersion::V3 =>
            {
                Ok(Request::Claim(ClaimRequest {
                    session: self.session,
                    export,
                    limits,
                }))
            }
            Message::List { after } if self.session.version >= ProtocolVersion::V3 => {
                Ok(Request::List(ListRequest {
                    session: self.session,
                    after,
                }))
            }
            other => Err(unexpected(channel, &other, "Claim")),
        }
    }

    /// Waits for a claim, for those who have nothing else to offer.
    pub fn next_claim(self) -> Result<ClaimRequest, FabricError> {
        match self.next_request()? {
            Request::Claim(request) => Ok(request),
            Request::List(mut request) => {
                let channel = &mut request.session.channel;
                let asked = Message::List { after: None };
                Err(unexpected(channel, &asked, "Claim"))
            }
        }
    }

    /// Sends the peer away.
    pub fn refuse(mut self, code: RefusalCode, text: &str) -> Result<(), FabricError> {
        refuse(&mut self.session.channel, code, text)
    }
}

impl ListRequest {
    /// The peer knows the exports up to this one, in order of their names, and asks for those
    /// after it.
    pub fn after(&self) -> Option<&ExportName> {
        self.after.as_ref()
    }

    /// How the peer names itself.
    pub fn peer(&self) -> &Label {
        &self.session.peer
    }

    /// Answers, after which the peer may ask for something else. The exports have to be in rising
    /// order of their names; those that do not fit an answer are left for the next.
    pub fn answer(
        mut self,
        exports: impl IntoIterator<Item = Listed>,
    ) -> Result<Incoming, FabricError> {
        let listing = Listing::page(exports);
        self.session.channel.send(&Message::Listing(listing))?;
        Ok(Incoming {
            session: self.session,
        })
    }
}

impl ClaimRequest {
    /// The export that is asked for.
    pub fn export(&self) -> &ExportName {
        &self.export
    }

    /// What the peer wants to be held to.
    pub fn limits(&self) -> RateLimits {
        self.limits
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
            epoch,
        })
    }
}

impl Granted {
    /// Answers the peer's question what the function is, and ends set-up. The link admits
    /// frames of the claim's epoch only. It is the TCP connection.
    pub fn describe(self, description: Description) -> Result<Box<dyn Link>, FabricError> {
        let (link, _) = self.describe_by(description, &Options::tcp())?;
        Ok(link)
    }

    /// As [`Self::describe`], over the provider that both sides agree on.
    pub fn describe_by(
        mut self,
        description: Description,
        options: &Options,
    ) -> Result<(Box<dyn Link>, Choice), FabricError> {
        let (mut prepared, mut why) = (None, "as the compute agent asked".to_owned());
        let mut asked = receive(&mut self.session.channel, "the peer's next request")?;
        let may_offer = self.session.version >= ProtocolVersion::V2;
        if let (Message::RdmaOffer(peer), true) = (&asked, may_offer) {
            match self.answer(*peer, options)? {
                Ok(joined) => prepared = Some(joined),
                Err(obstacle) => why = obstacle,
            }
            asked = receive(
                &mut self.session.channel,
                "the peer's request for a description",
            )?;
        }
        let channel = &mut self.session.channel;
        match asked {
            Message::Describe => {}
            other => return Err(unexpected(channel, &other, "Describe")),
        }
        if prepared.is_none() && options.wanted == Wanted::Verbs {
            let what =
                format!("this device server is told to use RDMA only, and there is none: {why}");
            refuse(channel, RefusalCode::Provider, &what)?;
            return Err(FabricError::NoRdma { why });
        }
        channel.send(&Message::Description(Box::new(description)))?;
        let control = self.session.channel.into_link();
        let Some(prepared) = prepared else {
            return Ok((control, Choice::tcp(why)));
        };
        let choice = Choice {
            provider: Provider::Verbs,
            why: prepared.describe(),
        };
        let link = prepared.into_link(control, Side::Device, self.epoch, None)?;
        Ok((link, choice))
    }

    /// Answers an offer of RDMA. The inner error says why it is not to be.
    fn answer(
        &mut self,
        peer: RdmaEndpoint,
        options: &Options,
    ) -> Result<Result<Box<Prepared>, String>, FabricError> {
        let prepared = match (options.wanted, self.session.local) {
            (Wanted::Tcp, _) => Err("it is told to use TCP".to_owned()),
            (_, None) => Err("its connection has no local address".to_owned()),
            (_, Some(local)) => Prepared::new(local, options).and_then(|mut prepared| {
                prepared.connect(peer)?;
                Ok(Box::new(prepared))
            }),
        };
        let channel = &mut self.session.channel;
        let answer = prepared.as_ref().map(|prepared| prepared.endpoint());
        let answer = answer.map_err(|why| Text::truncated(why));
        channel.send(&Message::RdmaAnswer(answer))?;
        let Ok(prepared) = prepared else {
            return Ok(prepared);
        };
        match receive(channel, "the peer's choice about RDMA")? {
            Message::RdmaChoice(Ok(())) => Ok(Ok(prepared)),
            Message::RdmaChoice(Err(why)) => Ok(Err(format!("the compute agent: {why}"))),
            other => Err(unexpected(channel, &other, "RdmaChoice")),
        }
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
