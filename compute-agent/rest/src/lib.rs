//! What the REST interfaces of both daemons share, and what their clients need.
//!
//! - [`problem`]: errors as clients get them; [`extract`]: requests as handlers get them, with
//!   what is wrong with one told as a problem.
//! - [`listen`]: the UNIX socket; [`tls`]: TCP, with certificates; [`server`]: connections, with their
//!   limits.
//! - [`daemon`]: what both say of themselves in the same way.
//! - [`client`]: asks such a server.
//! - [`metrics`]: counts requests, and shows counts to Prometheus.
//! - [`notify`]: tells systemd how a daemon is; [`logging`]: lines for people or programs.
#![forbid(unsafe_code)]

pub mod client;
pub mod daemon;
pub mod extract;
pub mod handshakes;
pub mod listen;
pub mod logging;
pub mod metrics;
pub mod notify;
pub mod problem;
pub mod server;
pub mod tls;

/// A time as the interface shows it: RFC 3339, in UTC, to the millisecond.
#[must_use]
pub fn timestamp(time: std::time::SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}
