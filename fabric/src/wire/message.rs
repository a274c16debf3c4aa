//! The messages without entries: small, owned values.
//!
//! Those that a running device needs (`Interrupt`, register accesses, `Ping`) hold their
//! data in place and so allocate nothing when decoded; the others occur at set-up, at a
//! change of the device, or at an end.

use super::codec::{in_range, within};
use super::description::check_blob;
use super::{
    Data, Description, Epoch, ExportName, FaultCode, InterruptKind, Kind, Label, Listing,
    ProtocolVersion, RateLimits, RdmaEndpoint, RdmaKey, RefusalCode, Region, RequestId, Text,
    WireError,
};

/// A message without entries. Each variant is the [`Kind`] of the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "the fields are those of docs/protocol.md; kinds are described at `Kind`"
)]
pub enum Message {
    Hello {
        oldest: u16,
        newest: u16,
        label: Label,
    },
    Welcome {
        version: ProtocolVersion,
        label: Label,
    },
    Refused {
        code: RefusalCode,
        text: Text,
    },
    Claim {
        export: ExportName,
    },
    ClaimWith {
        export: ExportName,
        limits: RateLimits,
    },
    Claimed {
        epoch: Epoch,
        shadow_len: u32,
        tags: u16,
    },
    Describe,
    Description(Box<Description>),
    EngineNotice {
        blob: Vec<u8>,
    },
    List {
        after: Option<ExportName>,
    },
    Listing(Listing),
    ConfigRead {
        request: RequestId,
        offset: u16,
        len: u16,
    },
    ConfigWrite {
        offset: u16,
        data: Data,
    },
    RegisterRead {
        request: RequestId,
        region: u8,
        offset: u64,
        len: u8,
    },
    RegisterWrite {
        region: u8,
        offset: u64,
        data: Data,
    },
    Value {
        request: RequestId,
        status: u16,
        data: Data,
    },
    RegisterUpdate {
        region: u8,
        offset: u64,
        data: Data,
    },
    Interrupt {
        kind: InterruptKind,
        vector: u16,
    },
    Reset {
        request: RequestId,
    },
    ResetDone {
        request: RequestId,
        outcome: Result<(), Text>,
    },
    Ping {
        nonce: u64,
    },
    Pong {
        nonce: u64,
    },
    Release,
    Released,
    Fault {
        code: FaultCode,
        text: Text,
    },
    RdmaOffer(RdmaEndpoint),
    RdmaAnswer(Result<RdmaEndpoint, Text>),
    RdmaChoice(Result<(), Text>),
    RdmaKeys(Vec<RdmaKey>),
}

impl Message {
    /// The message's kind.
    pub fn kind(&self) -> Kind {
        match self {
            Message::Hello { .. } => Kind::Hello,
            Message::Welcome { .. } => Kind::Welcome,
            Message::Refused { .. } => Kind::Refused,
            Message::Claim { .. } => Kind::Claim,
            Message::ClaimWith { .. } => Kind::ClaimWith,
            Message::Claimed { .. } => Kind::Claimed,
            Message::Describe => Kind::Describe,
            Message::Description(_) => Kind::Description,
            Message::EngineNotice { .. } => Kind::EngineNotice,
            Message::List { .. } => Kind::List,
            Message::Listing(_) => Kind::Listing,
            Message::ConfigRead { .. } => Kind::ConfigRead,
            Message::ConfigWrite { .. } => Kind::ConfigWrite,
            Message::RegisterRead { .. } => Kind::RegisterRead,
            Message::RegisterWrite { .. } => Kind::RegisterWrite,
            Message::Value { .. } => Kind::Value,
            Message::RegisterUpdate { .. } => Kind::RegisterUpdate,
            Message::Interrupt { .. } => Kind::Interrupt,
            Message::Reset { .. } => Kind::Reset,
            Message::ResetDone { .. } => Kind::ResetDone,
            Message::Ping { .. } => Kind::Ping,
            Message::Pong { .. } => Kind::Pong,
            Message::Release => Kind::Release,
            Message::Released => Kind::Released,
            Message::Fault { .. } => Kind::Fault,
            Message::RdmaOffer(_) => Kind::RdmaOffer,
            Message::RdmaAnswer(_) => Kind::RdmaAnswer,
            Message::RdmaChoice(_) => Kind::RdmaChoice,
            Message::RdmaKeys(_) => Kind::RdmaKeys,
        }
    }

    /// The rules about values that hold for encoding and decoding alike.
    pub(super) fn check(&self) -> Result<(), WireError> {
        match self {
            Message::Claimed { epoch, tags, .. } => {
                in_range("the epoch of a claim", epoch.0, 1, u64::MAX)?;
                in_range("the number of tags", *tags, 1, u16::MAX.into())
            }
            Message::Description(description) => description.check(),
            Message::EngineNotice { blob } => check_blob(blob),
            Message::Listing(listing) => listing.check(),
            Message::ConfigRead { offset, len, .. } => {
                in_range(
                    "the length of a config space read",
                    *len,
                    1,
                    Data::MAX as u64,
                )?;
                within_config(*offset, (*len).into())
            }
            Message::ConfigWrite { offset, data } => {
                in_range(
                    "the length of a config space write",
                    data.len(),
                    1,
                    Data::MAX as u64,
                )?;
                within_config(*offset, data.len() as u64)
            }
            Message::RegisterRead {
                region,
                offset,
                len,
                ..
            } => {
                in_range("the length of a register read", *len, 1, 8)?;
                within_region(*region, *offset, (*len).into())
            }
            Message::RegisterWrite {
                region,
                offset,
                data,
            }
            | Message::RegisterUpdate {
                region,
                offset,
                data,
            } => {
                in_range(
                    "the length of register data",
                    data.len(),
                    1,
                    Data::MAX as u64,
                )?;
                within_region(*region, *offset, data.len() as u64)
            }
            Message::RdmaOffer(endpoint) | Message::RdmaAnswer(Ok(endpoint)) => endpoint.check(),
            Message::RdmaKeys(keys) => {
                in_range("the number of keys", keys.len(), 1, RdmaKey::MAX as u64)?;
                keys.iter().try_for_each(RdmaKey::check)
            }
            _ => Ok(()),
        }
    }
}

fn within_config(offset: u16, len: u64) -> Result<(), WireError> {
    let limit = Description::MAX_CONFIG as u64;
    within("a config space access", offset.into(), len, limit)
}

fn within_region(region: u8, offset: u64, len: u64) -> Result<(), WireError> {
    in_range("the index of a region", region, 0, Region::MAX_INDEX.into())?;
    within("a register access", offset, len, u64::MAX)
}
