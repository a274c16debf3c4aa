//! What a client does that wants to know what there is to claim.

use std::time::Duration;

use super::budget::Budget;
use super::channel::Channel;
use super::dial::{greet, open, resolve, unexpected};
use crate::wire::{Label, Listed, Message, ProtocolVersion};
use crate::{FabricError, Link};

/// Most exports that a device server is believed to have.
const MAX_LISTED: usize = 65_536;

/// Asks the device server at `address` (`host:port`) what it offers, in rising order of the names.
/// Nothing is claimed, and no device is touched. `deadline` bounds everything together.
pub fn list(address: &str, label: &str, deadline: Duration) -> Result<Vec<Listed>, FabricError> {
    let label = Label::new(label)?;
    let mut budget = Budget::new(deadline);
    let addresses = resolve(address, &mut budget)?;
    let (channel, _) = open(&addresses, budget)?;
    list_on(channel, label)
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
