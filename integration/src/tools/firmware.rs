//! Firmware for machines that boot from a disk.

use std::path::PathBuf;

use super::tree::Tree;
use crate::error::Result;

/// The firmware of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Firmware {
    /// SeaBIOS, which QEMU brings along.
    SeaBios,
    /// OVMF, a UEFI firmware, without Secure Boot.
    Ovmf,
}

impl Firmware {
    /// Both.
    pub const ALL: [Self; 2] = [Self::SeaBios, Self::Ovmf];

    /// Short name, fit for file names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SeaBios => "seabios",
            Self::Ovmf => "ovmf",
        }
    }
}

/// Where the firmware is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FirmwareFiles {
    /// QEMU finds its own.
    BuiltIn,
    /// Two flash images: the code, and a template for the variables, of which each machine needs a
    /// copy of its own.
    Flash {
        /// Read-only code.
        code: PathBuf,
        /// Variables as they leave the factory.
        variables: PathBuf,
    },
}

pub(super) fn files(tree: &Tree, firmware: Firmware) -> Result<FirmwareFiles> {
    match firmware {
        Firmware::SeaBios => Ok(FirmwareFiles::BuiltIn),
        Firmware::Ovmf => Ok(FirmwareFiles::Flash {
            code: tree.file("usr/share/OVMF/OVMF_CODE_4M.fd")?,
            variables: tree.file("usr/share/OVMF/OVMF_VARS_4M.fd")?,
        }),
    }
}
