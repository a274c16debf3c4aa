//! What the REST interfaces of both daemons share.
//!
//! - [`problem`]: errors as clients get them.
#![forbid(unsafe_code)]

pub mod problem;
