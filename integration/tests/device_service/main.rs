//! `farbus-device-server serve`: what a configuration says is exported, listed, reloaded, drained,
//! and given to others, while claims that have nothing to do with it go on.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod admin;
mod bed;
mod claims;
mod refusals;
mod reload;
