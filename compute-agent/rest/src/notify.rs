//! Tells systemd how a daemon is (sd_notify(3)). Without a `NOTIFY_SOCKET` in the environment nothing
//! of this does anything.

use std::os::fd::RawFd;
use std::time::Duration;

use sd_notify::NotifyState;

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, states) {
        log::warn!("systemd cannot be told {states:?}: {error}");
    }
}

/// The daemon does its work now.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// The daemon has begun to end.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// The daemon reads its configuration again; [`ready`] when that is done.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => log::warn!("systemd cannot be told of the reload: {error}"),
    }
}

/// One line for `systemctl status`.
pub fn status(line: &str) {
    tell(&[NotifyState::Status(line)]);
}

/// The descriptors that systemd has passed to this process (sd_listen_fds_with_names(3)), by number, with
/// their names; closed on exec from now on. They are whose who asks first.
#[must_use]
pub fn passed() -> Vec<(RawFd, String)> {
    match sd_notify::listen_fds_with_names(false) {
        Ok(passed) => passed.collect(),
        Err(error) => {
            log::warn!("what systemd has passed cannot be used: {error}");
            Vec::new()
        }
    }
}

/// Says every half of the unit's `WatchdogSec` that the daemon is alive; for ever, and nothing if the
/// unit has none. To be spawned on the runtime that serves, so that it falls silent with it.
pub async fn watchdog() {
    let mut period_us = 0;
    if !sd_notify::watchdog_enabled(false, &mut period_us) || period_us == 0 {
        return;
    }
    let mut ticks = tokio::time::interval(Duration::from_micros(period_us.div_ceil(2)));
    loop {
        ticks.tick().await;
        tell(&[NotifyState::Watchdog]);
    }
}
