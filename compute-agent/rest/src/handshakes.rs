//! TLS handshakes that are under way. Who shakes hands is nobody yet, so that there are few of them, and none
//! for long. When one more comes, the oldest goes: of the address that has the most. So a host
//! that fills them all is in its own way only.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Handshakes at a time.
pub const MAX_HANDSHAKES: usize = 32;

#[derive(Debug)]
struct Entry {
    number: u64,
    address: IpAddr,
    /// Dropped when it is to go.
    _stay: oneshot::Sender<()>,
}

#[derive(Debug, Default)]
struct Entries {
    next: u64,
    /// The oldest first.
    entries: Vec<Entry>,
}

/// See the module's own description.
#[derive(Clone, Debug, Default)]
pub(crate) struct Handshakes(Arc<Mutex<Entries>>);

/// One of them, until this is dropped.
#[derive(Debug)]
pub(crate) struct Handshake {
    all: Handshakes,
    number: u64,
    stay: oneshot::Receiver<()>,
}

impl Handshakes {
    /// One more.
    pub(crate) fn begin(&self, address: IpAddr) -> Handshake {
        let (sender, stay) = oneshot::channel();
        let mut all = self.lock();
        all.next += 1;
        let number = all.next;
        all.entries.push(Entry {
            number,
            address,
            _stay: sender,
        });
        if all.entries.len() > MAX_HANDSHAKES {
            let goes = oldest_of_the_most(&all.entries);
            all.entries.remove(goes);
        }
        Handshake {
            all: self.clone(),
            number,
            stay,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the oldest entry is of the address that has the most; of several such addresses, the oldest one's.
fn oldest_of_the_most(entries: &[Entry]) -> usize {
    let count = |address| entries.iter().filter(|e| e.address == address).count();
    let most = entries.iter().map(|entry| count(entry.address)).max();
    let found = entries
        .iter()
        .position(|entry| Some(count(entry.address)) == most);
    found.unwrap_or(0)
}

impl Handshake {
    /// Waits until others need the place.
    pub(crate) async fn displaced(&mut self) {
        // Nothing is ever sent.
        let _ = (&mut self.stay).await;
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        let number = self.number;
        self.all.lock().entries.retain(|e| e.number != number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_displaced(handshake: &mut Handshake) -> bool {
        handshake.stay.try_recv() == Err(oneshot::error::TryRecvError::Closed)
    }

    #[test]
    fn one_more_than_there_may_be_displaces_the_oldest_of_who_has_the_most() {
        let handshakes = Handshakes::default();
        let (few, many) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let mut first = handshakes.begin(few);
        let mut others: Vec<_> = (1..MAX_HANDSHAKES)
            .map(|_| handshakes.begin(many))
            .collect();
        assert!(!others.iter_mut().any(is_displaced));

        let mut last = handshakes.begin(few);

        assert!(is_displaced(&mut others[0]));
        assert!(!others[1..].iter_mut().any(is_displaced));
        assert!(!is_displaced(&mut first) && !is_displaced(&mut last));
    }

    #[test]
    fn one_that_is_over_makes_room() {
        let handshakes = Handshakes::default();
        let address = IpAddr::from([10, 0, 0, 1]);
        let mut all: Vec<_> = (0..MAX_HANDSHAKES)
            .map(|_| handshakes.begin(address))
            .collect();
        drop(all.pop());

        all.push(handshakes.begin(address));

        assert!(!all.iter_mut().any(is_displaced));
        drop(all);
        assert!(handshakes.lock().entries.is_empty());
    }
}
