//! Which provider carries a claim: what was asked for, and what came of it.

pub mod doctor;

use std::fmt;
use std::str::FromStr;

/// What an operator asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wanted {
    /// RDMA if both sides have a device and a path between them, else TCP.
    #[default]
    Auto,
    /// RDMA or nothing.
    Verbs,
    /// TCP, whatever else there is.
    Tcp,
}

/// A word that names no provider.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of auto, verbs, tcp")]
pub struct NoProvider(String);

impl FromStr for Wanted {
    type Err = NoProvider;

    fn from_str(word: &str) -> Result<Self, NoProvider> {
        match word {
            "auto" => Ok(Wanted::Auto),
            "verbs" => Ok(Wanted::Verbs),
            "tcp" => Ok(Wanted::Tcp),
            other => Err(NoProvider(other.to_owned())),
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Wanted::Auto => "auto",
            Wanted::Verbs => "verbs",
            Wanted::Tcp => "tcp",
        })
    }
}

/// How to choose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// What is asked for.
    pub wanted: Wanted,
    /// The RDMA device to use; by default the one that has the connection's local address.
    pub device: Option<String>,
    /// The place in its port's table of addresses; by default that of the local address.
    pub gid_index: Option<u8>,
}

impl Options {
    /// TCP only.
    pub fn tcp() -> Self {
        Options {
            wanted: Wanted::Tcp,
            ..Options::default()
        }
    }
}

/// A provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// RDMA.
    Verbs,
    /// TCP.
    Tcp,
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Provider::Verbs => "RDMA",
            Provider::Tcp => "TCP",
        })
    }
}

/// What was chosen, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// What carries the claim.
    pub provider: Provider,
    /// Why, for people.
    pub why: String,
}

impl Choice {
    pub(crate) fn tcp(why: impl Into<String>) -> Self {
        Choice {
            provider: Provider::Tcp,
            why: why.into(),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.provider, self.why)
    }
}
