//! Waiting for threads, but not for ever.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use log::warn;

/// Waits until these threads have ended, but no longer than `limit`; whether they have. Those that have
/// not go on.
pub(crate) fn within(limit: Duration, threads: Vec<JoinHandle<()>>) -> bool {
    if threads.is_empty() {
        return true;
    }
    let (ended, all_ended) = channel::<()>();
    let joining = thread::Builder::new()
        .name("joining".into())
        .spawn(move || {
            for thread in threads {
                // One that has panicked has ended, too.
                let _ = thread.join();
            }
            drop(ended);
        });
    if let Err(error) = joining {
        warn!("no thread waits for the end of others: {error}");
        return false;
    }
    all_ended.recv_timeout(limit) == Err(RecvTimeoutError::Disconnected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_end_are_waited_for_and_others_no_longer_than_told() {
        let (hold, held) = channel::<()>();
        let quick = || thread::spawn(|| {});
        let slow = thread::spawn(move || {
            let _ = held.recv();
        });

        assert!(within(Duration::from_secs(60), vec![quick(), quick()]));
        assert!(!within(Duration::from_millis(10), vec![quick(), slow]));
        assert!(within(Duration::ZERO, Vec::new()));
        drop(hold);
    }
}
