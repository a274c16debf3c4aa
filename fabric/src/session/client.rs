//! Set-up as the compute side does it: connect, agree on a version, claim, ask what was got.

use std::net::IpAddr;
use std::time::Duration;

use super::budget::Budget;
use super::channel::Channel;
use super::dial::{greet, open, resolve, unexpected};
pub use super::list::{list, list_over};
use super::rdma::Prepared;
use crate::provider::{Choice, Options, Provider, Wanted};
use crate::wire::{
    Description, Epoch, ExportName, Join, JoinToken, Joined, Label, LanePlace, Message,
    ProtocolVersion, RateLimits, Side, Text,
};
use crate::{FabricError, Link};

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
    /// Its further lanes, from lane 1 on; all of them are there.
    pub lanes: Vec<Box<dyn Link>>,
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
    let wish = Wish::of(export);
    claim_as(address, &wish, label, deadline, options)
}

/// What a claim is to be like.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    /// Of this export.
    pub export: &'a ExportName,
    /// Held to limits of one's own. A device server that is too old for them is an error.
    pub limits: RateLimits,
    /// With up to so many lanes: connections, the claim's own among them. There are fewer if the
    /// device side gives fewer, or is too old to know of lanes.
    pub lanes: u16,
}

impl<'a> Wish<'a> {
    /// A claim without limits of its own, on one connection.
    pub fn of(export: &'a ExportName) -> Self {
        Self {
            export,
            limits: RateLimits::NONE,
            lanes: 1,
        }
    }
}

/// As [`claim_by`], with all that a claim can have.
pub fn claim_as(
    address: &str,
    wish: &Wish<'_>,
    label: &str,
    deadline: Duration,
    options: &Options,
) -> Result<ClaimedLink, FabricError> {
    let label = Label::new(label)?;
    let mut budget = Budget::new(deadline);
    let addresses = resolve(address, &mut budget)?;
    let (channel, local) = open(&addresses, budget)?;
    let asked = Asked::Claim(Wish {
        lanes: wish.lanes.clamp(1, LanePlace::MAX),
        ..*wish
    });
    let (mut claimed, granted, left) = exchange(channel, &asked, label.clone(), local, options)?;
    // All lanes are carried by the same provider.
    let options = match claimed.provider.provider {
        Provider::Tcp => Options::tcp(),
        Provider::Verbs => Options {
            wanted: Wanted::Verbs,
            ..options.clone()
        },
    };
    let mut budget = Budget::new(left);
    for lane in 1..granted.place.lanes {
        let asked = Asked::Join(Join {
            epoch: claimed.epoch,
            place: LanePlace {
                lane,
                ..granted.place
            },
            token: granted.token,
        });
        let (channel, local) = open(&addresses, budget)?;
        let (joined, _, left) = exchange(channel, &asked, label.clone(), local, &options)?;
        if joined.description != claimed.description {
            return Err(FabricError::violation(format!(
                "lane {lane} is of another function than its claim"
            )));
        }
        claimed.lanes.push(joined.link);
        budget = Budget::new(left);
    }
    Ok(claimed)
}

/// What a connection is for.
enum Asked<'a> {
    /// A claim.
    Claim(Wish<'a>),
    /// To be a lane of one.
    Join(Join),
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
    let asked = Asked::Claim(Wish::of(export));
    let (claimed, ..) = exchange(channel, &asked, label, None, &Options::tcp())?;
    Ok(claimed)
}

/// The whole of set-up on one connection. Beside what was got, which lanes there are to be, and
/// the time that is left.
fn exchange(
    mut channel: Channel,
    asked: &Asked<'_>,
    label: Label,
    local: Option<IpAddr>,
    options: &Options,
) -> Result<(ClaimedLink, Joined, Duration), FabricError> {
    let (version, peer) = greet(&mut channel, label)?;
    let (granted, lanes) = match asked {
        Asked::Claim(wish) => {
            if !wish.limits.is_none() && version < ProtocolVersion::V3 {
                return Err(FabricError::TooOld {
                    peer,
                    version: version.number(),
                    what: "a claim with limits",
                    needed: ProtocolVersion::V3.number(),
                });
            }
            let granted = ask_for_claim(&mut channel, wish)?;
            channel.link().set_epoch(granted.epoch);
            let lanes = if version < ProtocolVersion::V3 {
                1
            } else {
                wish.lanes
            };
            let joined = ask_for_lanes(&mut channel, granted.epoch, lanes)?;
            (granted, joined)
        }
        Asked::Join(join) => {
            let joined = ask_to_join(&mut channel, *join)?;
            channel.link().set_epoch(join.epoch);
            let granted = Granted {
                epoch: join.epoch,
                shadow_len: 0,
                tags: 0,
            };
            (granted, joined)
        }
    };
    let epoch = granted.epoch;
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
    let claimed = ClaimedLink {
        link,
        epoch,
        shadow_len: granted.shadow_len,
        tags: granted.tags,
        description,
        version,
        peer,
        provider,
        lanes: Vec::new(),
    };
    Ok((claimed, lanes, left))
}

/// What a claim comes with.
struct Granted {
    epoch: Epoch,
    shadow_len: u32,
    tags: u16,
}

fn ask_for_claim(channel: &mut Channel, wish: &Wish<'_>) -> Result<Granted, FabricError> {
    let (export, limits) = (wish.export.clone(), wish.limits);
    channel.send(&match limits.is_none() {
        true => Message::Claim { export },
        false => Message::ClaimWith { export, limits },
    })?;
    match channel.receive("the claim of the export")? {
        Message::Claimed {
            epoch,
            shadow_len,
            tags,
        } => Ok(Granted {
            epoch,
            shadow_len,
            tags,
        }),
        other => Err(unexpected(other, "Claimed")),
    }
}

/// Asks for lanes beside the claim's own connection, if more than one are wanted.
fn ask_for_lanes(channel: &mut Channel, epoch: Epoch, lanes: u16) -> Result<Joined, FabricError> {
    let none = Joined {
        place: LanePlace::ONLY,
        token: JoinToken::NONE,
    };
    if lanes <= 1 {
        return Ok(none);
    }
    ask_to_join(
        channel,
        Join {
            epoch,
            place: LanePlace { lane: 0, lanes },
            token: JoinToken::NONE,
        },
    )
}

fn ask_to_join(channel: &mut Channel, join: Join) -> Result<Joined, FabricError> {
    channel.send(&Message::Join(join))?;
    let joined = match channel.receive("the lanes of the claim")? {
        Message::Joined(joined) => joined,
        other => return Err(unexpected(other, "Joined")),
    };
    let LanePlace { lane, lanes } = joined.place;
    let of_claim = join.place.lane == 0;
    let as_asked = lane == join.place.lane
        && (lanes == join.place.lanes || of_claim && lanes < join.place.lanes);
    if !as_asked {
        return Err(FabricError::violation(format!(
            "the answer to {:?} is {:?}",
            join.place, joined.place
        )));
    }
    Ok(joined)
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
