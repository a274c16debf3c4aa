//! A [`Function`] behind a vfio-user socket.
//!
//! The server is another program and is not trusted: what it says of itself is checked, every
//! call has a deadline, and after the first call that went wrong for good the connection is
//! closed and each later call fails at once. A reset then connects anew, so that a server
//! that was started again is found.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use log::info;
use vmm_sys_util::eventfd::EventFd;

use super::body::{
    DMA_READ, DMA_WRITE, IRQ_INDEX_INTX, IRQ_INDEX_MSI, IRQ_INDEX_MSIX, IrqAction, IrqData,
    REGION_INDEX_CONFIG, SetIrqs,
};
use super::describe::describe;
use super::event::borrow;
use super::{Client, ClientError};
use crate::{
    DmaAccess, DmaWindow, Function, FunctionError, FunctionInfo, InterruptKind, Iova, RegionIndex,
};

/// A function that a vfio-user server offers. Windows for DMA must be file-backed, since
/// the server gets at them by their file.
pub struct UserFunction {
    info: FunctionInfo,
    /// Where the server is found again, and how long to wait for its answers.
    address: Option<(PathBuf, Duration)>,
    link: Mutex<Link>,
}

/// The connection, and what the server must be told again on another one.
struct Link {
    /// Or why it was lost.
    client: Result<Client, String>,
    windows: Vec<DmaWindow>,
    events: BTreeMap<(InterruptKind, u32), Arc<EventFd>>,
}

impl UserFunction {
    /// Connects to the server at `path`, and asks it what its function is like. Every call
    /// waits at most `timeout` for its answer.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        let client = Client::connect(path, timeout)?;
        let mut function = Self::new(client, format!("vfio-user {}", path.display()))?;
        function.address = Some((path.to_owned(), timeout));
        Ok(function)
    }

    /// Asks the server what its function is like. When the connection is lost, so is the
    /// function.
    pub fn new(mut client: Client, label: String) -> Result<Self, ClientError> {
        Ok(Self {
            info: describe(&mut client, label)?,
            address: None,
            link: Mutex::new(Link {
                client: Ok(client),
                windows: Vec::new(),
                events: BTreeMap::new(),
            }),
        })
    }

    /// A link is whole between calls, so one that a panic left behind can still be used.
    fn link(&self) -> MutexGuard<'_, Link> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(
        &self,
        what: &str,
        call: impl FnOnce(&mut Client) -> Result<(), ClientError>,
    ) -> Result<(), FunctionError> {
        self.link().call(what, call)
    }

    /// A client that knows all that the lost one was told.
    fn find_again(&self, link: &Link) -> Result<Client, ClientError> {
        let Some((path, timeout)) = &self.address else {
            return Err(ClientError::Lost);
        };
        let mut client = Client::connect(path, *timeout)?;
        if describe(&mut client, self.info.label.clone())? != self.info {
            return Err(ClientError::Changed);
        }
        for window in &link.windows {
            map(&mut client, window)?;
        }
        for ((kind, vector), event) in &link.events {
            set_events(&mut client, *kind, *vector, &[Some(event.clone())])?;
        }
        Ok(client)
    }
}

impl Link {
    fn call(
        &mut self,
        what: &str,
        call: impl FnOnce(&mut Client) -> Result<(), ClientError>,
    ) -> Result<(), FunctionError> {
        let client = match &mut self.client {
            Ok(client) => client,
            Err(why) => return Err(FunctionError::Gone(why.clone())),
        };
        match call(client) {
            Ok(()) => Ok(()),
            Err(ClientError::Refused { errno, .. }) => Err(FunctionError::Io {
                what: format!("vfio-user {what}"),
                source: std::io::Error::from_raw_os_error(errno as i32),
            }),
            Err(error) => {
                // What the server says from here on would be taken for another answer.
                self.client = Err(error.to_string());
                Err(FunctionError::Gone(error.to_string()))
            }
        }
    }
}

fn irq_index(kind: InterruptKind) -> u32 {
    match kind {
        InterruptKind::Intx => IRQ_INDEX_INTX,
        InterruptKind::Msi => IRQ_INDEX_MSI,
        InterruptKind::Msix => IRQ_INDEX_MSIX,
    }
}

fn map(client: &mut Client, window: &DmaWindow) -> Result<(), ClientError> {
    let flags = match window.access {
        DmaAccess::Read => DMA_READ,
        DmaAccess::ReadWrite => DMA_READ | DMA_WRITE,
    };
    let file = window.memory.file_offset().map(|file| {
        let offset = file.start().saturating_add(window.offset as u64);
        (file.file().as_fd(), offset)
    });
    client.dma_map(window.iova, window.len as u64, flags, file)
}

fn set_events(
    client: &mut Client,
    kind: InterruptKind,
    first: u32,
    events: &[Option<Arc<EventFd>>],
) -> Result<(), ClientError> {
    let batch = client.max_msg_fds();
    let mut start = first;
    // One message has descriptors for all of its interrupts or for none of them.
    for run in events.chunk_by(|a, b| a.is_some() == b.is_some()) {
        for part in run.chunks(batch) {
            let request = SetIrqs {
                index: irq_index(kind),
                start,
                count: part.len() as u32,
                action: IrqAction::Trigger,
                data: IrqData::EventFd,
            };
            let files: Vec<BorrowedFd<'_>> =
                part.iter().flatten().map(|event| borrow(event)).collect();
            client.set_irqs(&request, &files)?;
            start += part.len() as u32;
        }
    }
    Ok(())
}

impl Function for UserFunction {
    fn info(&self) -> &FunctionInfo {
        &self.info
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> Result<(), FunctionError> {
        self.call("configuration read", |client| {
            client.region_read(REGION_INDEX_CONFIG, u64::from(offset), data)
        })
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Result<(), FunctionError> {
        self.call("configuration write", |client| {
            client.region_write(REGION_INDEX_CONFIG, u64::from(offset), data)
        })
    }

    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        self.call("REGION_READ", |client| {
            client.region_read(u32::from(region.0), offset, data)
        })
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        self.call("REGION_WRITE", |client| {
            client.region_write_posted(u32::from(region.0), offset, data)
        })
    }

    fn map_dma(&self, window: &DmaWindow) -> Result<(), FunctionError> {
        if window.memory.file_offset().is_none() {
            return Err(FunctionError::BadWindow {
                iova: window.iova,
                len: window.len as u64,
                why: "its memory has no file, and only files can be sent through a socket",
            });
        }
        let mut link = self.link();
        link.call("DMA_MAP", |client| map(client, window))?;
        link.windows.push(window.clone());
        Ok(())
    }

    fn unmap_dma(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        let mut link = self.link();
        let result = link.call("DMA_UNMAP", |client| client.dma_unmap(iova, len));
        // A server that is gone is not told of it again either.
        if !matches!(result, Err(FunctionError::Io { .. })) {
            link.windows.retain(|window| {
                let offset = window.iova.0.checked_sub(iova.0);
                offset.is_none_or(|offset| offset >= len)
            });
        }
        result
    }

    fn set_interrupts(
        &self,
        kind: InterruptKind,
        first: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        let mut link = self.link();
        let result = link.call("SET_IRQS", |client| set_events(client, kind, first, events));
        for (vector, event) in (first..).zip(events) {
            match event {
                Some(event) if result.is_ok() => {
                    link.events.insert((kind, vector), event.clone());
                }
                Some(_) => {}
                None => {
                    link.events.remove(&(kind, vector));
                }
            }
        }
        result
    }

    fn mask_interrupt(
        &self,
        kind: InterruptKind,
        vector: u32,
        masked: bool,
    ) -> Result<(), FunctionError> {
        let action = if masked {
            IrqAction::Mask
        } else {
            IrqAction::Unmask
        };
        let request = SetIrqs {
            index: irq_index(kind),
            start: vector,
            count: 1,
            action,
            data: IrqData::None,
        };
        self.call("SET_IRQS", |client| client.set_irqs(&request, &[]))
    }

    fn reset(&self) -> Result<(), FunctionError> {
        let mut link = self.link();
        if let Err(why) = &link.client {
            let lost = |error: ClientError| {
                FunctionError::Gone(format!("{why}; connecting anew failed: {error}"))
            };
            let client = self.find_again(&link).map_err(lost)?;
            info!("{}: the server is there again", self.info.label);
            link.client = Ok(client);
        }
        link.call("DEVICE_RESET", Client::reset)
    }
}
