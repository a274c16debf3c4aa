//! How both errands of a client begin: find the device server, connect, agree on a version.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};

use super::budget::Budget;
use super::channel::Channel;
use crate::wire::{Label, Message, NEWEST, OLDEST, ProtocolVersion, Side};
use crate::{FabricError, TcpLink};

/// A connection to one of the addresses, and this side's address on it.
pub(super) fn open(
    addresses: &[SocketAddr],
    mut budget: Budget,
) -> Result<(Channel, Option<IpAddr>), FabricError> {
    let stream = connect(addresses, &mut budget)?;
    let local = stream.local_addr().ok().map(|address| address.ip());
    let link = TcpLink::new(stream, Side::Compute)?;
    Ok((Channel::new(Box::new(link), budget), local))
}

/// Says hello, and hears which version is spoken and by whom.
pub(super) fn greet(
    channel: &mut Channel,
    label: Label,
) -> Result<(ProtocolVersion, Label), FabricError> {
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

pub(super) fn unexpected(message: Message, expected: &str) -> FabricError {
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
pub(super) fn resolve(address: &str, budget: &mut Budget) -> Result<Vec<SocketAddr>, FabricError> {
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
