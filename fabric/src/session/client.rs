//! Set-up as the compute side does it: connect, agree on a version, claim, ask what was got. Or,
//! instead of a claim, ask what there is.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use super::budget::Budget;
use super::channel::Channel;
use super::rdma::Prepared;
use crate::provider::{Choice, Options, Provider, Wanted};
use crate::wire::{
    Description, Epoch, ExportName, Label, Listed, Message, NEWEST, OLDEST, ProtocolVersion,
    RateLimits, Side, Text,
};
use crate::{FabricError, Link, TcpLink};

/// Most exports that a device server is believed to have.
const MAX_LISTED: usize = 65_536;

/// An export that is ours.
pub struct ClaimedLink {
    /// The connection; its epoch is set.
    pub link: Box<dyn Link>,
    /// The epoch of the claim.
    pub epoch: Epoch,
    /// Length of the buffer shadow, in which the compute side places data.
    pub shadow_len: u32,
    /// How many commands may be outstanding; tags are below this number.
    pub tags: u16,
    /// What the function is.
    pub description: Description,
    /// The version that both sides speak.
    pub version: ProtocolVersion,
    /// How the device side names itself.
    pub peer: Label,
    /// What carries the claim.
    pub provider: Choice,
}

/// Connects to a device server at `address` (`host:port`) and claims an export, over TCP.
///
/// `deadline` bounds everything together: resolving, connecting (each address that the name
/// resolves to gets its share) and the exchange.
pub fn claim(
    address: &str,
    export: &ExportName,
    label: &str,
    deadline: Duration,
) -> Result<ClaimedLink, FabricError> {
    claim_by(address, export, label, deadline, &Options::tcp())
}

/// As [`claim`], over the provider that both sides agree on.
pub fn claim_by(
    address: &str,
    export: &ExportName,
    label: &str,
    deadline: Duration,
    options: &Options,
) -> Result<ClaimedLink, FabricError> {
    let wanted = (export, RateLimits::NONE);
    claim_limited(address, wanted, label, deadline, options)
}

/// As [`claim_by`], held to limits of one's own. A device server that is too old for them is an
/// error.
pub fn claim_limited(
    address: &str,
    (export, limits): (&ExportName, RateLimits),
    label: &str,
    deadline: Duration,
    options: &Options,
) -> Result<ClaimedLink, FabricError> {
    let label = Label::new(label)?;
    let mut budget = Budget::new(deadline);
    let addresses = resolve(address, &mut budget)?;
    let stream = connect(&addresses, &mut budget)?;
    let local = stream.local_addr().ok().map(|address| address.ip());
    let link = TcpLink::new(stream, Side::Compute)?;
    let channel = Channel::new(Box::new(link), budget);
    exchange(channel, (export, limits), label, local, options)
}

/// Claims an export over a link that is connected already.
pub fn claim_over(
    link: Box<dyn Link>,
    export: &ExportName,
    label: &str,
    deadline: Duration,
) -> Result<ClaimedLink, FabricError> {
    let label = Label::new(label)?;
    let channel = Channel::new(link, Budget::new(deadline));
    let wanted = (export, RateLimits::NONE);
    exchange(channel, wanted, label, None, &Options::tcp())
}

/// Asks the device server at `address` (`host:port`) what it offers, in rising order of the names.
/// Nothing is claimed, and no device is touched. `deadline` bounds everything together.
pub fn list(address: &str, label: &str, deadline: Duration) -> Result<Vec<Listed>, FabricError> {
    let label = Label::new(label)?;
    let mut budget = Budget::new(deadline);
    let addresses = resolve(address, &mut budget)?;
    let stream = connect(&addresses, &mut budget)?;
    let link = TcpLink::new(stream, Side::Compute)?;
    list_on(Channel::new(Box::new(link), budget), label)
}

/// As [`list`], over a link that is connected already.
pub fn list_over(
    link: Box<dyn Link>,
    label: &str,
    deadline: Duration,
) -> Result<Vec<Listed>, FabricError> {
    let label = Label::new(label)?;
    list_on(Channel::new(link, Budget::new(deadline)), label)
}

fn list_on(mut channel: Channel, label: Label) -> Result<Vec<Listed>, FabricError> {
    let (version, peer) = greet(&mut channel, label)?;
    if version < ProtocolVersion::V3 {
        return Err(FabricError::TooOld {
            peer,
            version: version.number(),
            what: "a listing of its exports",
            needed: ProtocolVersion::V3.number(),
        });
    }
    let mut listed: Vec<Listed> = Vec::new();
    loop {
        let after = listed.last().map(|entry| entry.name.clone());
        channel.send(&Message::List {
            after: after.clone(),
        })?;
        let page = match channel.receive("the listing of the exports")? {
            Message::Listing(page) => page,
            other => return Err(unexpected(other, "Listing")),
        };
        // The decoder has seen to the order within a page; that each begins after the one before
        // is what ends this loop.
        if let (Some(after), Some(first)) = (&after, page.entries.first()) {
            if first.name <= *after {
                return Err(FabricError::violation(format!(
                    "export {} was listed in answer to what follows {after}",
                    first.name
                )));
            }
        }
        listed.extend(page.entries);
        if listed.len() > MAX_LISTED {
            return Err(FabricError::violation(format!(
                "more than {MAX_LISTED} exports were listed"
            )));
        }
        if !page.more {
            return Ok(listed);
        }
    }
}

fn exchange(
    mut channel: Channel,
    (export, limits): (&ExportName, RateLimits),
    label: Label,
    local: Option<IpAddr>,
    options: &Options,
) -> Result<ClaimedLink, FabricError> {
    let (version, peer) = greet(&mut channel, label)?;
    let export = export.clone();
    channel.send(&match limits.is_none() {
        true => Message::Claim { export },
        false if version < ProtocolVersion::V3 => {
            return Err(FabricError::TooOld {
                peer,
                version: version.number(),
                what: "a claim with limits",
                needed: ProtocolVersion::V3.number(),
            });
        }
        false => Message::ClaimWith { export, limits },
    })?;
    let (epoch, shadow_len, tags) = match channel.receive("the claim of the export")? {
        Message::Claimed {
            epoch,
            shadow_len,
            tags,
        } => (epoch, shadow_len, tags),
        other => return Err(unexpected(other, "Claimed")),
    };
    channel.link().set_epoch(epoch);
    let (prepared, provider) = choose(&mut channel, version, local, options)?;
    channel.send(&Message::Describe)?;
    let description = match channel.receive("the description of the function")? {
        Message::Description(description) => *description,
        other => return Err(unexpected(other, "Description")),
    };
    let left = channel.left();
    let link = match prepared {
        Some(prepared) => {
            prepared.into_link(channel.into_link(), Side::Compute, epoch, Some(left))?
        }
        None => channel.into_link(),
    };
    Ok(ClaimedLink {
        link,
        epoch,
        shadow_len,
        tags,
        description,
        version,
        peer,
        provider,
    })
}

/// Says hello, and hears which version is spoken and by whom.
fn greet(channel: &mut Channel, label: Label) -> Result<(ProtocolVersion, Label), FabricError> {
    channel.send(&Message::Hello {
        oldest: OLDEST.number(),
        newest: NEWEST.number(),
        label,
    })?;
    match channel.receive("the device server's welcome")? {
        Message::Welcome { version, label } => Ok((version, label)),
        other => Err(unexpected(other, "Welcome")),
    }
}

/// Agrees with the device side on what carries the claim.
fn choose(
    channel: &mut Channel,
    version: ProtocolVersion,
    local: Option<IpAddr>,
    options: &Options,
) -> Result<(Option<Box<Prepared>>, Choice), FabricError> {
    if options.wanted == Wanted::Tcp {
        return Ok((None, Choice::tcp("as asked for")));
    }
    let tried = match local {
        _ if version < ProtocolVersion::V2 => {
            Err("the device server is too old for RDMA".to_owned())
        }
        None => Err("the connection has no local address".to_owned()),
        Some(local) => offer(channel, local, options)?,
    };
    match tried {
        Ok(prepared) => {
            let choice = Choice {
                provider: Provider::Verbs,
                why: prepared.describe(),
            };
            Ok((Some(prepared), choice))
        }
        Err(why) if options.wanted == Wanted::Verbs => Err(FabricError::NoRdma { why }),
        Err(why) => Ok((None, Choice::tcp(why))),
    }
}

/// Offers RDMA, if there is a device. The inner error says why it is not to be.
fn offer(
    channel: &mut Channel,
    local: IpAddr,
    options: &Options,
) -> Result<Result<Box<Prepared>, String>, FabricError> {
    let mut prepared = match Prepared::new(local, options) {
        Ok(prepared) => Box::new(prepared),
        Err(why) => return Ok(Err(why)),
    };
    channel.send(&Message::RdmaOffer(prepared.endpoint()))?;
    let peer = match channel.receive("the device server's answer about RDMA")? {
        Message::RdmaAnswer(Ok(peer)) => peer,
        Message::RdmaAnswer(Err(why)) => return Ok(Err(format!("the device server: {why}"))),
        other => return Err(unexpected(other, "RdmaAnswer")),
    };
    let works = prepared.connect(peer).and_then(|()| prepared.prove());
    let outcome = match &works {
        Ok(()) => Ok(()),
        Err(why) => Err(Text::truncated(why)),
    };
    channel.send(&Message::RdmaChoice(outcome))?;
    Ok(works.map(|()| prepared))
}

fn unexpected(message: Message, expected: &str) -> FabricError {
    match message {
        Message::Refused { code, text } => FabricError::Refused { code, text },
        other => FabricError::violation(format!(
            "a {} message came in place of {expected}",
            other.kind()
        )),
    }
}

/// Resolves on a thread of its own, since the system's resolver knows no deadline. A thread
/// that is given up ends when the resolver does.
fn resolve(address: &str, budget: &mut Budget) -> Result<Vec<SocketAddr>, FabricError> {
    if let Ok(address) = address.parse() {
        return Ok(vec![address]);
    }
    let failed = |source| FabricError::Resolve {
        address: address.to_owned(),
        source,
    };
    let (sender, receiver) = sync_channel(1);
    let name = address.to_owned();
    std::thread::Builder::new()
        .name("resolver".to_owned())
        .spawn(move || {
            let found = name.to_socket_addrs().map(Iterator::collect);
            // Nobody listens any more after the deadline, which is fine.
            sender.send(found).unwrap_or_default();
        })
        .map_err(failed)?;
    match budget.charge(|left| receiver.recv_timeout(left)) {
        Ok(found) => found.map_err(failed),
        Err(RecvTimeoutError::Timeout) => Err(budget.timeout("the address of the device server")),
        Err(RecvTimeoutError::Disconnected) => {
            Err(failed(io::Error::other("the resolver's thread ended")))
        }
    }
}

/// Tries the addresses in turn, each with its share of the time that is left.
fn connect(addresses: &[SocketAddr], budget: &mut Budget) -> Result<TcpStream, FabricError> {
    const WHAT: &str = "connecting to the device server";
    let mut last = io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no address");
    for (address, remaining) in addresses.iter().zip((1..=addresses.len()).rev()) {
        let share = budget.left() / u32::try_from(remaining).unwrap_or(u32::MAX);
        // Zero is no timeout to the standard library, but an error.
        if share.is_zero() {
            return Err(budget.timeout("a connection to the device server"));
        }
        match budget.charge(|_| TcpStream::connect_timeout(address, share)) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    if last.kind() == io::ErrorKind::TimedOut {
        return Err(budget.timeout("a connection to the device server"));
    }
    Err(FabricError::Io {
        what: WHAT,
        source: last,
    })
}
