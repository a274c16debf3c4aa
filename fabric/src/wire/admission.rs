//! Which frames a connection admits: the right direction, the right moment, the right epoch.
//!
//! Every provider asks an [`Admission`] about each header before it looks at the rest of the
//! frame, so that a frame of a stale claim can neither land a payload nor reach an engine.

use std::fmt;

use super::{Epoch, Header, Kind, WireError};

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the guest runs.
    Compute,
    /// Where the function is.
    Device,
}

impl Side {
    /// The other end.
    pub fn peer(self) -> Side {
        match self {
            Side::Compute => Side::Device,
            Side::Device => Side::Compute,
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Compute => "compute",
            Side::Device => "device",
        })
    }
}

impl Kind {
    /// Whether `side` may send this kind of message.
    pub fn comes_from(self, side: Side) -> bool {
        match self {
            Kind::Hello
            | Kind::Claim
            | Kind::ClaimWith
            | Kind::List
            | Kind::Describe
            | Kind::ConfigRead
            | Kind::ConfigWrite
            | Kind::RegisterRead
            | Kind::RegisterWrite
            | Kind::Submit
            | Kind::Reset
            | Kind::Release
            | Kind::RdmaOffer
            | Kind::RdmaChoice => side == Side::Compute,
            Kind::Welcome
            | Kind::Refused
            | Kind::Claimed
            | Kind::Listing
            | Kind::Description
            | Kind::EngineNotice
            | Kind::Value
            | Kind::RegisterUpdate
            | Kind::Complete
            | Kind::Interrupt
            | Kind::ResetDone
            | Kind::Released
            | Kind::Fault
            | Kind::RdmaAnswer => side == Side::Device,
            Kind::Ping | Kind::Pong | Kind::RdmaKeys => true,
        }
    }

    /// Whether this kind of message may appear on a connection with this epoch.
    ///
    /// A refusal may come at any point of set-up; every other message belongs either before
    /// the claim or after it.
    fn fits(self, epoch: Epoch) -> bool {
        match self {
            Kind::Refused => true,
            Kind::Hello
            | Kind::Welcome
            | Kind::Claim
            | Kind::ClaimWith
            | Kind::Claimed
            | Kind::List
            | Kind::Listing => epoch == Epoch::NONE,
            _ => epoch != Epoch::NONE,
        }
    }
}

/// What one end of a connection admits.
#[derive(Clone, Copy, Debug)]
pub struct Admission {
    side: Side,
    epoch: Epoch,
}

impl Admission {
    /// Admission at this end of a connection that is not claimed yet.
    pub fn new(side: Side) -> Self {
        Admission {
            side,
            epoch: Epoch::NONE,
        }
    }

    /// This end.
    pub fn side(&self) -> Side {
        self.side
    }

    /// The connection's epoch.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The connection is claimed: from now on only frames of this epoch are admitted.
    pub fn set_epoch(&mut self, epoch: Epoch) {
        self.epoch = epoch;
    }

    /// Fails unless the peer may send a frame with this header now.
    pub fn admit(&self, header: &Header) -> Result<(), WireError> {
        let kind = header.kind;
        let from = self.side.peer();
        if !kind.comes_from(from) {
            return Err(WireError::WrongSide { kind, from });
        }
        if header.epoch != self.epoch {
            return Err(WireError::WrongEpoch {
                kind,
                found: header.epoch,
                expected: self.epoch,
            });
        }
        if !kind.fits(self.epoch) {
            return Err(WireError::WrongPhase {
                kind,
                epoch: self.epoch,
            });
        }
        Ok(())
    }
}
