//! The client's memory, for servers that ask for it by messages.

use super::body::DmaTransfer;
use super::wire::{Command, MAX_DATA_XFER};
use crate::Iova;

/// Memory that the server reads and writes by messages (`VFIO_USER_DMA_READ` and
/// `VFIO_USER_DMA_WRITE`), for what was mapped without a file descriptor.
pub trait DmaMemory: Send {
    /// Fills `data` from `iova` on, or says with which errno to refuse.
    fn read(&mut self, iova: Iova, data: &mut [u8]) -> Result<(), i32>;
    /// Stores `data` from `iova` on, or says with which errno to refuse.
    fn write(&mut self, iova: Iova, data: &[u8]) -> Result<(), i32>;
}

/// Does what a server's command asks of memory; the body of the reply, or an errno.
pub(super) fn serve_memory(
    memory: Option<&mut (dyn DmaMemory + 'static)>,
    command: u16,
    body: &[u8],
) -> Result<Vec<u8>, i32> {
    let command = Command::from_number(command);
    if !matches!(command, Some(Command::DmaRead | Command::DmaWrite)) {
        return Err(libc::ENOTSUP);
    }
    let memory = memory.ok_or(libc::ENOTSUP)?;
    let transfer = DmaTransfer::decode(body).map_err(|_| libc::EINVAL)?;
    if transfer.count > MAX_DATA_XFER as u64 {
        return Err(libc::EINVAL);
    }
    let mut answer = transfer.encode().to_vec();
    if command == Some(Command::DmaRead) {
        answer.resize(DmaTransfer::LEN + transfer.count as usize, 0);
        let data = answer.get_mut(DmaTransfer::LEN..).unwrap_or_default();
        memory.read(Iova(transfer.address), data)?;
    } else {
        let data = body.get(DmaTransfer::LEN..).unwrap_or_default();
        if data.len() as u64 != transfer.count {
            return Err(libc::EINVAL);
        }
        memory.write(Iova(transfer.address), data)?;
    }
    Ok(answer)
}
