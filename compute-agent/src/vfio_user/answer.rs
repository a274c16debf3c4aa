//! Replies: the one that agrees on a version, and bodies with a fixed layout.

use farbus_vfio::user::body::Version;
use farbus_vfio::user::caps::Capabilities;
use farbus_vfio::user::wire::{DMA_PAGE, MAX_DATA_XFER, MAX_MSG_FDS, VERSION_MAJOR, VERSION_MINOR};

use super::refusal::Refusal;
use crate::guest_memory::MAX_WINDOWS;

/// What can be done with a client, and what this server tells of itself.
const CAPABILITIES: Capabilities = Capabilities {
    max_msg_fds: Some(MAX_MSG_FDS as u64),
    max_data_xfer_size: Some(MAX_DATA_XFER as u64),
    max_dma_maps: Some(MAX_WINDOWS as u64),
    pgsizes: Some(DMA_PAGE),
    write_multiple: Some(true),
    migration: false,
};

/// The reply to a version request, and what the client proposes in it.
pub(super) fn answer_version(body: &[u8]) -> Result<(Vec<u8>, Capabilities), Refusal> {
    let version = Version::decode(body)?;
    let Version { major, minor } = version;
    if major != VERSION_MAJOR {
        return Err(Refusal::Version { major, minor });
    }
    let proposed = Capabilities::decode(body.get(Version::LEN..).unwrap_or_default())?;
    let agreed = Version {
        major,
        minor: minor.min(VERSION_MINOR),
    };
    let answer = [
        &agreed.encode()[..],
        &CAPABILITIES.answer_to(&proposed).encode(),
    ];
    Ok((answer.concat(), proposed))
}

/// The body of a reply with a fixed layout.
pub(super) struct Answer {
    bytes: [u8; Self::MAX],
    len: usize,
}

impl Answer {
    /// The longest one: a region's description.
    const MAX: usize = 32;
    pub(super) const EMPTY: Self = Self {
        bytes: [0; Self::MAX],
        len: 0,
    };

    pub(super) fn new<const N: usize>(body: &[u8; N]) -> Self {
        const { assert!(N <= Self::MAX) };
        let mut answer = Self {
            bytes: [0; Self::MAX],
            len: N,
        };
        answer
            .bytes
            .iter_mut()
            .zip(body)
            .for_each(|(to, from)| *to = *from);
        answer
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}
