//! Why a function of another server cannot be offered.

use farbus_fabric::FabricError;
use farbus_fabric::wire::EngineKind;
use farbus_vfio::config::ConfigError;

use crate::nvme::compute::Changed;
use crate::nvme::description::BadDescription;
use crate::nvme::record::RecordError;

/// Why a remote function cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The device side has no engine that this side knows.
    #[error("no engine carries this function (the device server offers {0:?})")]
    NoEngine(EngineKind),
    /// The function has no MSI-X capability.
    #[error("the function has no MSI-X, which is the only kind of interrupt that crosses")]
    NoMsix,
    /// What the peer granted or described cannot be.
    #[error(
        "the device server granted {tags} commands and a buffer shadow of {shadow_len} bytes for {lanes} \
         lanes; `--data-threads 1` needs least"
    )]
    BadGrant {
        /// Commands that may be outstanding.
        tags: u16,
        /// Size of the buffer shadow in bytes.
        shadow_len: u32,
        /// Connections that share it.
        lanes: u16,
    },
    /// A record is of one lane.
    #[error("a process of {0} data threads cannot be succeeded by another; use `--data-threads 1`")]
    RecordOfLanes(u16),
    /// The function's configuration space does not hold together.
    #[error("the device server describes an impossible configuration space")]
    Config(#[from] ConfigError),
    /// The engine's description does not hold together.
    #[error("the device server describes an impossible controller")]
    Description(#[from] BadDescription),
    /// The function behind the export is another one than before.
    #[error(transparent)]
    Changed(#[from] Changed),
    /// This machine lacks memory.
    #[error("memory for the engine could not be had")]
    Memory(#[source] std::io::Error),
    /// What a predecessor has left cannot be taken up.
    #[error("what the last process has left of this attachment cannot be taken up")]
    Record(#[from] RecordError),
    /// The link failed.
    #[error("the link failed")]
    Link(#[from] FabricError),
}
