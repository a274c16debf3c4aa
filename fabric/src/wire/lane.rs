//! Lanes: further connections of one claim, each for a share of its queues.

use std::fmt;
use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

use super::codec::{Put, Reader, in_range};
use super::{Epoch, WireError};

/// What proves that a connection may join a claim: random bits that only the claimant was told.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct JoinToken(pub [u8; 16]);

impl JoinToken {
    /// No token: what a message that needs none carries.
    pub const NONE: JoinToken = JoinToken([0; 16]);

    /// One that nobody can guess.
    pub fn random() -> io::Result<Self> {
        let mut bits = [0; 16];
        let mut filled = 0;
        while filled < bits.len() {
            filled += getrandom(&mut bits[filled..], GetRandomFlags::empty())?;
        }
        Ok(JoinToken(bits))
    }
}

/// Logs are no place for it.
impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::NONE {
            "JoinToken(none)"
        } else {
            "JoinToken(…)"
        })
    }
}

/// A place among the lanes of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LanePlace {
    /// The lane, from 0: the claim's first connection.
    pub lane: u16,
    /// How many there are, or are to be.
    pub lanes: u16,
}

impl LanePlace {
    /// Most lanes of a claim.
    pub const MAX: u16 = 8;

    /// The one lane of a claim that has no others.
    pub const ONLY: LanePlace = LanePlace { lane: 0, lanes: 1 };

    pub(super) fn check(self) -> Result<(), WireError> {
        in_range("the number of lanes", self.lanes, 1, Self::MAX.into())?;
        in_range("a lane", self.lane, 0, (self.lanes - 1).into())
    }

    fn encode(self, out: &mut Vec<u8>) {
        out.put_u16(self.lane);
        out.put_u16(self.lanes);
        out.put_u32(0);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let (lane, lanes) = (reader.u16()?, reader.u16()?);
        reader.reserved::<4>()?;
        Ok(LanePlace { lane, lanes })
    }
}

/// What a connection that joins says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Join {
    /// The claim.
    pub epoch: Epoch,
    /// Which lane the connection is to be, of how many. On the claim's own connection, lane 0: how
    /// many are wanted.
    pub place: LanePlace,
    /// The claim's token; none on its own connection.
    pub token: JoinToken,
}

impl Join {
    pub(super) fn check(&self) -> Result<(), WireError> {
        in_range("the epoch of a claim", self.epoch.0, 1, u64::MAX)?;
        self.place.check()?;
        check_token(self.token, self.place.lane > 0)
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.epoch.0);
        self.place.encode(out);
        out.put_bytes(&self.token.0);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Join {
            epoch: Epoch(reader.u64()?),
            place: LanePlace::decode(reader)?,
            token: JoinToken(*reader.array()?),
        })
    }
}

/// The answer to [`Join`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Joined {
    /// The lane, and how many the claim has: no more than were wanted.
    pub place: LanePlace,
    /// On the claim's own connection, what the others prove themselves with; else none.
    pub token: JoinToken,
}

impl Joined {
    pub(super) fn check(&self) -> Result<(), WireError> {
        self.place.check()?;
        check_token(self.token, self.place.lane == 0)
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        self.place.encode(out);
        out.put_bytes(&self.token.0);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Joined {
            place: LanePlace::decode(reader)?,
            token: JoinToken(*reader.array()?),
        })
    }
}

/// A token where there is to be one, and none where not.
fn check_token(token: JoinToken, wanted: bool) -> Result<(), WireError> {
    let is_there = token != JoinToken::NONE;
    in_range(
        "the presence of a join token",
        u16::from(is_there),
        wanted.into(),
        wanted.into(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_differ_and_are_not_printed() {
        let [one, other] = [JoinToken::random().unwrap(), JoinToken::random().unwrap()];
        assert_ne!(one, other);
        assert_ne!(one, JoinToken::NONE);
        assert_eq!(format!("{one:?}"), "JoinToken(…)");
    }
}
