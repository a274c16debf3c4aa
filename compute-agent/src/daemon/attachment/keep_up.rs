//! How an attachment is kept: its worker is watched, and replaced when it dies.

use std::time::{Duration, Instant};

use log::warn;
use tokio::sync::watch;

use super::super::store::Phase;
use super::Owner;
use super::bring_up::Launched;
use crate::api::{EndpointSpec, Vm};

/// Pause before a worker is replaced, after the first time; it doubles up to [`MAX_PAUSE`].
const MIN_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// A worker that has lived this long was a good one.
const STABLE: Duration = Duration::from_secs(10);
/// How the workers of an attachment have died lately.
struct Deaths {
    count: u32,
    started: Instant,
}

impl Deaths {
    /// One more; how long to wait before the next one.
    fn another(&mut self) -> Duration {
        if self.started.elapsed() > STABLE {
            self.count = 0;
        }
        self.count = self.count.saturating_add(1);
        pause(self.count - 1)
    }
}

/// What a watched attachment has to be looked after for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Happened {
    Died,
    Unwanted { force: bool },
    Link,
}

/// Waits for news of the link.
async fn next(link: &mut watch::Receiver<Option<String>>) -> Happened {
    if link.changed().await.is_err() {
        // Its entry goes with the attachment only.
        std::future::pending::<()>().await;
    }
    Happened::Link
}

/// The pause after so many failures.
fn pause(failures: u32) -> Duration {
    if failures == 0 {
        return Duration::ZERO;
    }
    let factor = 1u32 << (failures - 1).min(16);
    (MIN_PAUSE * factor).min(MAX_PAUSE)
}

impl Owner {
    /// Watches the worker until the attachment is to be taken away, or is lost.
    pub(super) async fn keep(&mut self) {
        let mut deaths = Deaths {
            count: 0,
            started: Instant::now(),
        };
        let mut link = self.link_down.clone();
        loop {
            let Some(worker) = self.worker.take() else {
                let lost = "the worker was gone when this daemon came".to_owned();
                if !self.replace(&mut deaths, lost).await {
                    return;
                }
                continue;
            };
            let happened = tokio::select! {
                () = worker.ended() => Happened::Died,
                force = self.detach_wanted() => Happened::Unwanted { force },
                changed = next(&mut link) => changed,
            };
            let worker = self.worker.insert(worker);
            if happened == Happened::Link {
                self.publish();
                continue;
            }
            if let Happened::Unwanted { force } = happened {
                self.degraded = None;
                self.record.reason = None;
                return self.enter(Phase::Detaching { force }).await;
            }
            let lost = format!("its worker has ended with {}", worker.fate().await);
            self.context.custody.worker_died(&self.record.id);
            self.worker = None;
            if !self.replace(&mut deaths, lost).await {
                return;
            }
        }
    }

    /// Starts another worker in place of one that has died, and goes on trying for as long as the attachment is
    /// wanted: to be given up takes a VM its device, and a VMM that loses one may end. What keeps a worker from
    /// starting may be mended, if only by going back to the version before. Whether the attachment is to be
    /// watched on.
    async fn replace(&mut self, deaths: &mut Deaths, lost: String) -> bool {
        warn!("attachment {}: {lost}", self.record.id);
        let mut failures = 0;
        let mut wait = deaths.another();
        let times = deaths.count;
        self.degraded = Some(match times {
            1 => format!("{lost}; it is replaced"),
            _ => format!("{lost}, {times} times in a row; it is replaced in {wait:?}"),
        });
        self.publish();
        // A VMM does not come back to a vfio-user socket: if its connection has died with the worker, it
        // needs a new device.
        let anew = self.record.spec.vm != Vm::None
            && matches!(self.record.spec.endpoint, EndpointSpec::VfioUser { .. })
            && !self.context.custody.can_resume(&self.record.id);
        if anew && !self.unplug_by_force().await {
            self.fail(format!(
                "{lost}, and its VM keeps what has nobody behind it"
            ))
            .await;
            return false;
        }
        loop {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // What it is taken away from is what the main loop sees to.
                force = self.detach_wanted() => {
                    self.degraded = None;
                    self.enter(Phase::Detaching { force }).await;
                    return false;
                }
            }
            let Some(device) = self.record.device.clone() else {
                self.fail(format!("{lost}, and its device is not known"))
                    .await;
                return false;
            };
            self.record.restarts += 1;
            self.context.counts.worker_restarts.inc();
            deaths.started = Instant::now();
            let error = match self.launch(&device).await {
                Launched::Ready => break,
                Launched::Unwanted => continue,
                Launched::Refused(error) => error,
            };
            failures += 1;
            wait = pause(failures);
            self.degraded = Some(format!("{lost}; another one cannot be had yet: {error}"));
            self.publish();
        }
        if anew {
            // A device that the guest had not let go of would be taken for the new one.
            let plugged = match self.clear_the_name().await {
                Ok(()) => self.plug_now().await,
                kept => kept,
            };
            if let Err(reason) = plugged {
                self.fail(reason).await;
                return false;
            }
        }
        self.degraded = None;
        self.save().await;
        self.publish();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound() {
        assert_eq!(pause(0), Duration::ZERO);
        assert_eq!(pause(1), MIN_PAUSE);
        assert_eq!(pause(2), 2 * MIN_PAUSE);
        assert_eq!(pause(1000), MAX_PAUSE);
    }

    #[test]
    fn workers_that_die_at_once_are_replaced_after_longer_and_longer_pauses() {
        let mut deaths = Deaths {
            count: 0,
            started: Instant::now(),
        };

        let pauses: Vec<_> = (0..20).map(|_| deaths.another()).collect();

        assert_eq!(pauses[..2], [Duration::ZERO, MIN_PAUSE]);
        assert_eq!(pauses[19], MAX_PAUSE);
        assert!(pauses.is_sorted());
    }
}
