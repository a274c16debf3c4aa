//! Admin commands to an NVMe controller that this host's own driver has, through the driver's
//! character device (`linux/nvme_ioctl.h`).
//!
//! Rules of this module, the only unsafe one here:
//!
//! 1. The request's structure is `Command`, whose layout and size are those of `struct
//!    nvme_passthru_cmd`; the request's number holds that size, so the kernel touches no more.
//! 2. The structure names at most one buffer, [`PAGE_SIZE`] bytes that live for the call; the
//!    kernel writes at most as many.
#![deny(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr};

use crate::nvme::{PAGE_SIZE, admin};

/// How long the driver waits for a command, in milliseconds.
const TIMEOUT_MS: u32 = 10_000;

/// `struct nvme_passthru_cmd`.
#[repr(C)]
#[derive(Default)]
struct Command {
    opcode: u8,
    flags: u8,
    reserved: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    addr: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}

/// `NVME_IOCTL_ADMIN_CMD`.
const ADMIN_COMMAND: libc::c_ulong = ioctl_expr(
    _IOC_READ | _IOC_WRITE,
    b'N' as u32,
    0x41,
    size_of::<Command>() as u32,
);

/// Why a command did not do what it was to.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The controller refused.
    #[error("the controller answers with status {0:#x}")]
    Status(u16),
    /// The kernel did.
    #[error("the kernel does not pass the command on")]
    Io(#[source] io::Error),
}

/// Who carries out admin commands. Tests put a made-up controller here.
pub trait AdminCommands {
    /// Identify (NVMe 1.4 §5.15): one page.
    fn identify(&self, cns: u8, controller: u16) -> Result<Vec<u8>, AdminError>;

    /// A command without data; returns dword 0 of its completion.
    fn run(&self, opcode: u8, cdw10: u32, cdw11: u32) -> Result<u32, AdminError>;
}

/// A controller's character device, `/dev/nvmeN`.
#[derive(Debug)]
pub struct AdminPort(File);

impl AdminPort {
    /// Opens it.
    pub fn open(node: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(node)?;
        Ok(Self(file))
    }

    #[allow(unsafe_code, reason = "the kernel takes admin commands by ioctl only")]
    fn submit(&self, command: &mut Command, page: &mut [u8; PAGE_SIZE]) -> Result<u32, AdminError> {
        if command.data_len > 0 {
            command.addr = page.as_mut_ptr() as u64;
            command.data_len = PAGE_SIZE as u32;
        }
        command.timeout_ms = TIMEOUT_MS;
        // SAFETY: rules 1 and 2: the structure is borrowed for the call and as large as the
        // request's number says, and so is the page, if the command names it.
        let outcome = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                ADMIN_COMMAND as _,
                std::ptr::from_mut(command),
            )
        };
        match outcome {
            0 => Ok(command.result),
            ..0 => Err(AdminError::Io(io::Error::last_os_error())),
            // Without the phase bit, in 15 bits.
            status => Err(AdminError::Status(status as u16 & 0x7fff)),
        }
    }
}

impl AdminCommands for AdminPort {
    fn identify(&self, cns: u8, controller: u16) -> Result<Vec<u8>, AdminError> {
        let mut page = [0; PAGE_SIZE];
        let mut command = Command {
            opcode: admin::IDENTIFY,
            cdw10: u32::from(controller) << 16 | u32::from(cns),
            data_len: PAGE_SIZE as u32,
            ..Command::default()
        };
        self.submit(&mut command, &mut page)?;
        Ok(page.to_vec())
    }

    fn run(&self, opcode: u8, cdw10: u32, cdw11: u32) -> Result<u32, AdminError> {
        let mut command = Command {
            opcode,
            cdw10,
            cdw11,
            ..Command::default()
        };
        self.submit(&mut command, &mut [0; PAGE_SIZE])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_and_number_are_those_of_linux_nvme_ioctl_h() {
        assert_eq!(size_of::<Command>(), 72);
        assert_eq!(std::mem::offset_of!(Command, addr), 24);
        assert_eq!(std::mem::offset_of!(Command, cdw10), 40);
        assert_eq!(std::mem::offset_of!(Command, result), 68);
        assert_eq!(ADMIN_COMMAND, 0xc048_4e41);
    }

    #[test]
    fn file_that_is_no_controller_is_an_error() {
        let port = AdminPort::open(Path::new("/dev/null")).unwrap();
        assert!(matches!(port.identify(1, 0), Err(AdminError::Io(_))));
    }
}
