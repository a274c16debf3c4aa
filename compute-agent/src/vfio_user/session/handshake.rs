//! The beginning of a conversation: the version, what both can, and who keeps the MSI-X table.

use farbus_vfio::user::body::Version;
use farbus_vfio::user::caps::Capabilities;
use farbus_vfio::user::wire::{
    Command, DMA_PAGE, Header, MAX_DATA_XFER, MAX_MSG_FDS, VERSION_MAJOR, VERSION_MINOR,
};
use log::info;

use super::super::msix::Mediator;
use super::super::outbox::Outbox;
use super::super::refusal::{End, Refusal};
use super::Session;
use crate::api::Msix;
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

impl Session {
    /// Everything before the version has been agreed on.
    pub(super) fn shake_hands(
        &mut self,
        command: Option<Command>,
        header: &Header,
        body: &[u8],
        outbox: &mut Outbox,
    ) -> Result<(), End> {
        if command != Some(Command::Version) || header.no_reply() {
            if !header.no_reply() {
                outbox.put(&header.error_reply(libc::EINVAL), &[])?;
            }
            return Err(End::NotNegotiated(header.command));
        }
        match answer_version(body) {
            Ok((answer, proposed)) => {
                outbox.put(&header.reply(answer.len()), &answer)?;
                self.negotiated = true;
                self.choose_msix(&proposed);
                Ok(())
            }
            Err(refusal) => {
                outbox.put(&header.error_reply(refusal.errno()), &[])?;
                Err(End::Handshake(refusal))
            }
        }
    }

    /// Decides who keeps the MSI-X table: see [`super::super::msix`].
    fn choose_msix(&mut self, client: &Capabilities) {
        let is_mediated = match self.msix {
            Msix::Auto => client.are_qemus(),
            Msix::Mediated => true,
            Msix::Irqfd => false,
        };
        if is_mediated {
            self.mediator = Mediator::new(self.function.as_ref());
            if let (Some(mediator), Some(record)) = (&mut self.mediator, &self.record) {
                mediator.keep(record);
            }
        }
        let how = match &self.mediator {
            Some(_) => "MSI-X is mediated",
            None if is_mediated => "no MSI-X can be mediated",
            None => "MSI-X by eventfds",
        };
        info!("vfio-user {}: client connected, {how}", self.name);
    }
}

/// The reply to a version request, and what the client proposes in it.
fn answer_version(body: &[u8]) -> Result<(Vec<u8>, Capabilities), Refusal> {
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
