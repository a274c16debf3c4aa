//! What the fabric promises, shown from outside: the wire's bytes, the TCP link, set-up.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may fail a test"
)]

mod congestion;
mod hostile;
mod link;
mod listing;
mod provider;
mod revoke;
mod session;
mod stream;
mod support;
mod wire;
mod wire_hostile;
mod wire_values;
