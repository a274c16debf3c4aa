//! Set-up as the compute side does it: connect, agree on a version, claim, ask what was got.

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use super::budget::Budget;
use super::channel::Channel;
use crate::wire::{
    Description, Epoch, ExportName, Label, Message, NEWEST, OLDEST, ProtocolVersion, Side,
};
use crate::{FabricError, Link, TcpLink};

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
}

/// Connects to a device server at `address` (`host:port`) and claims an export.
///
/// `deadline` bounds everything together: resolving, connecting (each address that the name
/// resolves to gets its share) and the exchange.
pub fn claim(
    address: &str,
    export: &ExportName,
    label: &str,
    deadline: Duration,
) -> Result<ClaimedLink, FabricError> {
    let label = Label::new(label)?;
    let mut budget = Budget::new(deadline);
    let addresses = resolve(address, &mut budget)?;
    let stream = connect(&addresses, &mut budget)?;
    let link = TcpLink::new(stream, Side::Compute)?;
    exchange(Channel::new(Box::new(link), budget), export, label)
}

/// Claims an export over a link that is connected already.
pub fn claim_over(
    link: Box<dyn Link>,
    export: &ExportName,
    label: &str,
    deadline: Duration,
) -> Result<ClaimedLink, FabricError> {
    let label = Label::new(label)?;
    exchange(Channel::new(link, Budget::new(deadline)), export, label)
}

fn exchange(
    mut channel: Channel,
    export: &ExportName,
    label: Label,
) -> Result<ClaimedLink, FabricError> {
    channel.send(&Message::Hello {
        oldest: OLDEST.number(),
        newest: NEWEST.number(),
        label,
    })?;
    let (version, peer) = match channel.receive("the device server's welcome")? {
        Message::Welcome { version, label } => (version, label),
        other => return Err(unexpected(other, "Welcome")),
    };
    channel.send(&Message::Claim {
        export: export.clone(),
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
    channel.send(&Message::Describe)?;
    let description = match channel.receive("the description of the function")? {
        Message::Description(description) => *description,
        other => return Err(unexpected(other, "Description")),
    };
    Ok(ClaimedLink {
        link: channel.into_link(),
        epoch,
        shadow_len,
        tags,
        description,
        version,
        peer,
    })
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
