//! The command `farbus` against an agent that answers what the test says: what it asks, what it shows,
//! and how it ends.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod attaching;
mod connecting;
mod generated;
mod showing;
mod standin;
mod watching;
