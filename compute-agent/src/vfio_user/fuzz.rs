//! A whole conversation without a socket, for fuzzing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farbus_vfio::config::{BarKind, ConfigError, ConfigImage, ConfigSpace, MsixLayout};
use farbus_vfio::{
    DmaWindow, Function, FunctionError, FunctionInfo, InterruptCounts, InterruptKind, Iova,
    RegionIndex, RegionInfo,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::inbox::Inbox;
use super::outbox::Outbox;
use super::session::{Handled, Session};
use crate::api::Msix;

/// How many writes or messages are handled before the session is interrupted.
const BUDGET: u32 = 4;

/// Has a session handle `bytes` as the stream of one client, for a function that accepts
/// everything and raises interrupts, which are mediated. The first byte says in how long pieces the rest arrives.
///
/// It must come to its end whatever the bytes are.
pub fn fuzz_session(bytes: &[u8]) {
    let Some((piece, stream)) = bytes.split_first() else {
        return;
    };
    let Ok(event) = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC) else {
        return;
    };
    let Ok(function) = Inert::new() else {
        return;
    };
    let mut session = Session::new(
        Arc::new(function),
        "fuzz",
        None,
        Msix::Mediated,
        Arc::new(event),
    );
    let mut inbox = Inbox::new();
    let mut outbox = Outbox::new();
    for piece in stream.chunks(usize::from(*piece) + 1) {
        let space = inbox.space();
        let Some(space) = space.get_mut(..piece.len()) else {
            return;
        };
        space.copy_from_slice(piece);
        if inbox.received(piece.len(), Vec::new()).is_err() {
            return;
        }
        while let Ok(Some(message)) = inbox.next() {
            // Somewhere in the middle, interrupts come.
            session.fire(u32::from(message.header.id) % (u32::from(VECTORS) + 2));
            match session.handle(message, &mut outbox, &mut { BUDGET }) {
                Ok(Handled::Done) => inbox.consume(),
                Ok(Handled::Unfinished) => {}
                Err(why) => return session.end(&why),
            }
            while session.raise_one(&mut outbox).is_ok_and(|more| more) {}
            while !outbox.is_empty() {
                outbox.sent(outbox.first().len());
            }
        }
    }
}

/// Of the function that does nothing.
const VECTORS: u16 = 16;

/// A function that does nothing but to have a configuration space with MSI-X.
struct Inert {
    info: FunctionInfo,
    config: Mutex<ConfigSpace>,
}

impl Inert {
    fn new() -> Result<Self, ConfigError> {
        let image = ConfigImage::new(0x4642, 1, 0x01_08_02)
            .bar(0, BarKind::Memory64)
            .msix(MsixLayout {
                vectors: VECTORS,
                table: (RegionIndex::BAR0, 0x2000),
                pba: (RegionIndex::BAR0, 0x3000),
            })
            .express()
            .build();
        let info = FunctionInfo {
            label: "inert".into(),
            config_size: 4096,
            regions: vec![RegionInfo {
                index: RegionIndex::BAR0,
                size: 0x4000,
            }],
            interrupts: InterruptCounts {
                intx: 1,
                msi: 4,
                msix: VECTORS.into(),
            },
            resettable: true,
            iova_ranges: vec![0..=u64::MAX],
        };
        let config = Mutex::new(ConfigSpace::from_image(&image, &info.regions)?);
        Ok(Self { info, config })
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Function for Inert {
    fn info(&self) -> &FunctionInfo {
        &self.info
    }

    fn config_read(&self, at: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        Ok(self.config().read(at, data)?)
    }

    fn config_write(&self, at: u16, data: &[u8]) -> Result<(), FunctionError> {
        self.config().write(at, data)?;
        Ok(())
    }

    fn region_read(&self, _: RegionIndex, _: u64, _: &mut [u8]) -> Result<(), FunctionError> {
        Ok(())
    }

    fn region_write(&self, _: RegionIndex, _: u64, _: &[u8]) -> Result<(), FunctionError> {
        Ok(())
    }

    fn map_dma(&self, _: &DmaWindow) -> Result<(), FunctionError> {
        Ok(())
    }

    fn unmap_dma(&self, _: Iova, _: u64) -> Result<(), FunctionError> {
        Ok(())
    }

    fn set_interrupts(
        &self,
        _: InterruptKind,
        _: u32,
        _: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        Ok(())
    }

    fn mask_interrupt(&self, _: InterruptKind, _: u32, _: bool) -> Result<(), FunctionError> {
        Ok(())
    }

    fn reset(&self) -> Result<(), FunctionError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use farbus_vfio::user::{Command, Header};
    use proptest::prelude::*;

    use super::*;

    /// Command numbers and short bodies, past the handshake: what random bytes alone would
    /// hardly ever reach.
    fn plausible() -> impl Strategy<Value = Vec<u8>> {
        let body = proptest::collection::vec(prop_oneof![Just(0u8), 0u8..8, any::<u8>()], 0..80);
        proptest::collection::vec((0u16..20, body), 0..20).prop_map(|messages| {
            let hello = Header::command(0, Command::Version, 0, 4).encode();
            let mut stream = [&[9][..], &hello, &[0, 0, 1, 0]].concat();
            for (command, body) in messages {
                let header = Header {
                    command,
                    ..Header::command(1, Command::Version, 0, body.len())
                };
                stream.extend_from_slice(&header.encode());
                stream.extend_from_slice(&body);
            }
            stream
        })
    }

    proptest! {
        #[test]
        fn any_bytes_come_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            fuzz_session(&bytes);
        }

        #[test]
        fn any_plausible_conversation_comes_to_an_end(bytes in plausible()) {
            fuzz_session(&bytes);
        }
    }
}
