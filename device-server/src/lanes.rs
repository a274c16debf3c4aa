//! Which claims have lanes to be joined, and who may join them.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farbus_fabric::wire::{Description, Epoch, Join, JoinToken};
use farbus_shadow_mem::nvme::device::Lane;

/// One claim's lanes beside the first.
pub(crate) struct Team {
    /// The export's name, for log lines.
    pub(crate) name: String,
    epoch: Epoch,
    /// Each lane's connection describes the function anew.
    pub(crate) description: Description,
    lanes: Vec<Arc<Lane>>,
}

/// Why a connection cannot join.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CannotJoin {
    /// Whoever has no token learns nothing.
    #[error("no claim is joined with this token; it has ended, or never was")]
    Unknown,
    #[error("the claim has {claim}, not {asked}")]
    Epoch { claim: Epoch, asked: Epoch },
    #[error("the claim has {lanes} lanes, of which {lane} of {asked} is none")]
    NoLane { lanes: usize, lane: u16, asked: u16 },
    #[error("lane {lane} is taken, or its claim has ended")]
    Taken { lane: u16 },
}

/// The claims that can be joined, by their tokens.
#[derive(Clone, Default)]
pub(crate) struct Teams(Arc<Mutex<HashMap<JoinToken, Arc<Team>>>>);

/// A claim's place among them, until it is dropped.
pub(crate) struct Open {
    teams: Teams,
    pub(crate) token: JoinToken,
}

impl Teams {
    /// The map is whole whenever the lock is free.
    fn lock(&self) -> MutexGuard<'_, HashMap<JoinToken, Arc<Team>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets lanes be joined by who has the token.
    pub(crate) fn open(
        &self,
        name: String,
        epoch: Epoch,
        description: Description,
        lanes: Vec<Arc<Lane>>,
    ) -> io::Result<Open> {
        let token = JoinToken::random()?;
        let team = Team {
            name,
            epoch,
            description,
            lanes,
        };
        self.lock().insert(token, Arc::new(team));
        Ok(Open {
            teams: self.clone(),
            token,
        })
    }

    /// The lane that a connection asks to be, which is its own from here on.
    pub(crate) fn join(&self, join: &Join) -> Result<(Arc<Team>, Arc<Lane>), CannotJoin> {
        let team = self.lock().get(&join.token).cloned();
        let team = team.ok_or(CannotJoin::Unknown)?;
        if join.epoch != team.epoch {
            return Err(CannotJoin::Epoch {
                claim: team.epoch,
                asked: join.epoch,
            });
        }
        let (lane, lanes) = (join.place.lane, team.lanes.len() + 1);
        let index = usize::from(lane).checked_sub(1);
        let found = index.and_then(|index| team.lanes.get(index)).cloned();
        let found = found.filter(|_| usize::from(join.place.lanes) == lanes);
        let found = found.ok_or(CannotJoin::NoLane {
            lanes,
            lane,
            asked: join.place.lanes,
        })?;
        if !found.take() {
            return Err(CannotJoin::Taken { lane });
        }
        Ok((team, found))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.teams.lock().remove(&self.token);
    }
}
