//! An emulated PCI configuration space.
//!
//! It serves two masters: the software controller, whose own configuration space it is, and
//! the compute side, which shows a guest a virtual copy of a remote function. The copy is
//! made from an image that a network peer sent, so [`ConfigSpace::from_image`] trusts none of
//! it: what is not known to be harmless is not in the copy.
//!
//! Layouts are those of the PCI Local Bus Specification 3.0 chapter 6 (header, MSI-X), the PCI
//! Power Management Specification 1.2 and PCI Express Base 4.0 §7.5.3 (PCI Express
//! capability). All fields are little endian.

#![forbid(unsafe_code)]

mod image;
mod parse;
#[cfg(test)]
mod tests;
mod walk;

pub use image::{BarKind, ConfigImage};
pub use parse::ConfigError;
pub use walk::{CapabilityId, find_capability, find_msix};

use crate::function::{FunctionError, RegionIndex};

/// Size of the part that every PCI function has, in bytes.
pub const LEGACY_SIZE: usize = 256;
/// Size of the configuration space of a PCI Express function, in bytes.
pub const EXTENDED_SIZE: usize = 4096;

/// Offsets of the fields of a type 0 header (PCI 3.0 §6.1).
pub(crate) mod header {
    pub(crate) const VENDOR: usize = 0x00;
    pub(crate) const DEVICE: usize = 0x02;
    pub(crate) const COMMAND: usize = 0x04;
    pub(crate) const STATUS: usize = 0x06;
    pub(crate) const REVISION: usize = 0x08;
    /// Three bytes: programming interface, subclass, class.
    pub(crate) const CLASS: usize = 0x09;
    pub(crate) const CACHE_LINE: usize = 0x0c;
    pub(crate) const TYPE: usize = 0x0e;
    pub(crate) const BAR0: usize = 0x10;
    pub(crate) const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub(crate) const SUBSYSTEM: usize = 0x2e;
    pub(crate) const ROM: usize = 0x30;
    pub(crate) const CAPABILITIES: usize = 0x34;
    pub(crate) const INTERRUPT_LINE: usize = 0x3c;
    /// Where capabilities may begin: behind the header.
    pub(crate) const END: usize = 0x40;
}

/// Bits of the Command register (PCI 3.0 §6.2.2).
pub(crate) mod command {
    pub(crate) const IO: u16 = 1;
    pub(crate) const MEMORY: u16 = 1 << 1;
    pub(crate) const BUS_MASTER: u16 = 1 << 2;
    pub(crate) const PARITY: u16 = 1 << 6;
    pub(crate) const SERR: u16 = 1 << 8;
    pub(crate) const INTX_DISABLE: u16 = 1 << 10;
}

/// Status register, bit 4: a capability list exists.
pub(crate) const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Capability ids and the layout of those that are kept.
pub(crate) mod cap {
    pub(crate) const POWER: u8 = 0x01;
    pub(crate) const EXPRESS: u8 = 0x10;
    pub(crate) const MSIX: u8 = 0x11;

    /// Power management: capabilities, control and status; length.
    pub(crate) const PM_PMC: usize = 2;
    pub(crate) const PM_CSR: usize = 4;
    pub(crate) const PM_LEN: usize = 8;
    /// PMCSR bit 3: going from D3hot to D0 resets nothing.
    pub(crate) const PM_NO_SOFT_RESET: u8 = 1 << 3;

    /// MSI-X: message control, table, pending bit array; length.
    pub(crate) const MSIX_CONTROL: usize = 2;
    pub(crate) const MSIX_TABLE: usize = 4;
    pub(crate) const MSIX_PBA: usize = 8;
    pub(crate) const MSIX_LEN: usize = 12;
    pub(crate) const MSIX_ENABLE: u16 = 1 << 15;
    pub(crate) const MSIX_MASK: u16 = 1 << 14;

    /// PCI Express: register offsets; length of version 1 (endpoint) and version 2.
    pub(crate) const EXP_FLAGS: usize = 0x02;
    pub(crate) const EXP_DEVCAP: usize = 0x04;
    pub(crate) const EXP_DEVCTL: usize = 0x08;
    pub(crate) const EXP_LNKCAP: usize = 0x0c;
    pub(crate) const EXP_LNKCTL: usize = 0x10;
    pub(crate) const EXP_LNKSTA: usize = 0x12;
    pub(crate) const EXP_DEVCAP2: usize = 0x24;
    pub(crate) const EXP_DEVCTL2: usize = 0x28;
    pub(crate) const EXP_LNKCAP2: usize = 0x2c;
    pub(crate) const EXP_LNKCTL2: usize = 0x30;
    pub(crate) const EXP_LEN_V1: usize = 0x14;
    pub(crate) const EXP_LEN_V2: usize = 0x3c;
    /// Device Capabilities bit 28: function level reset works.
    pub(crate) const EXP_DEVCAP_FLR: u32 = 1 << 28;
    /// Device Control bit 15, "Initiate FLR", as a bit of the register's second byte.
    pub(crate) const EXP_DEVCTL_FLR_HIGH: u8 = 1 << 7;
}

/// The power state that software asked for (PCI PM 1.2 §3.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerState {
    /// Fully on.
    D0,
    /// Off as far as software can tell: only configuration space answers.
    D3Hot,
}

/// What the writable bits of configuration space say right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigState {
    /// Command register: the function answers accesses to its memory BARs.
    pub memory_enabled: bool,
    /// Command register: the function may issue DMA and MSI-X messages.
    pub bus_master: bool,
    /// MSI-X is on.
    pub msix_enabled: bool,
    /// All MSI-X vectors are masked at once (the capability's function mask).
    pub msix_masked: bool,
    /// The power state.
    pub power: PowerState,
}

/// What a write to configuration space set off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigEffect {
    /// Software asked for a function level reset (PCIe 4.0 §6.6.2). The space itself is not
    /// reset by that: its owner resets the function and calls [`ConfigSpace::reset`].
    pub flr: bool,
    /// The state after the write.
    pub state: ConfigState,
}

/// Where a function keeps its MSI-X vectors (PCI 3.0 §6.8.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixLayout {
    /// Number of vectors, 1 to 2048.
    pub vectors: u16,
    /// The BAR that holds the table, and where in it, in bytes. An entry has 16 bytes.
    pub table: (RegionIndex, u64),
    /// The BAR that holds the pending bits, and where in it, in bytes.
    pub pba: (RegionIndex, u64),
}

/// A configuration space: the bytes, which of their bits software may set, and where the
/// registers are that mean something to the function's owner.
///
/// ```
/// use farbus_vfio::config::{BarKind, ConfigImage, ConfigSpace};
/// use farbus_vfio::{RegionIndex, RegionInfo};
///
/// let image = ConfigImage::new(0x4642, 1, 0x01_08_02).bar(0, BarKind::Memory64).build();
/// let bar0 = RegionInfo { index: RegionIndex::BAR0, size: 0x4000 };
/// let mut space = ConfigSpace::from_image(&image, &[bar0])?;
/// space.write(0x10, &[0xff; 4])?;
/// let mut mask = [0; 4];
/// space.read(0x10, &mut mask)?;
/// assert_eq!(u32::from_le_bytes(mask), 0xffff_c004);
/// # Ok::<(), farbus_vfio::config::ConfigError>(())
/// ```
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    size: u16,
    value: [u8; LEGACY_SIZE],
    initial: [u8; LEGACY_SIZE],
    writable: [u8; LEGACY_SIZE],
    power: Option<usize>,
    express: Option<usize>,
    msix: Option<(usize, MsixLayout)>,
}

impl ConfigSpace {
    /// Its size in bytes: 256 or 4096.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where the MSI-X vectors are, if the function has that capability.
    pub fn msix(&self) -> Option<MsixLayout> {
        self.msix.map(|(_, layout)| layout)
    }

    /// What the writable bits say.
    pub fn state(&self) -> ConfigState {
        let command = self.word(header::COMMAND);
        let msix = self
            .msix
            .map_or(0, |(at, _)| self.word(at + cap::MSIX_CONTROL));
        let d3 = self
            .power
            .is_some_and(|at| self.byte(at + cap::PM_CSR) & 3 == 3);
        ConfigState {
            memory_enabled: command & command::MEMORY != 0,
            bus_master: command & command::BUS_MASTER != 0,
            msix_enabled: msix & cap::MSIX_ENABLE != 0,
            msix_masked: msix & cap::MSIX_MASK != 0,
            power: if d3 {
                PowerState::D3Hot
            } else {
                PowerState::D0
            },
        }
    }

    /// Reads from `offset` on (bytes) into all of `data`; any width and alignment. Extended
    /// space reads as zero, which says that there are no extended capabilities
    /// (PCIe 4.0 §7.6.2).
    pub fn read(&self, offset: u16, data: &mut [u8]) -> Result<(), ConfigError> {
        let start = self.check(offset, data.len())?;
        for (at, byte) in (start..).zip(data.iter_mut()) {
            *byte = self.byte(at);
        }
        Ok(())
    }

    /// Writes all of `data` from `offset` on (bytes); any width and alignment. Bits that
    /// software may not set stay as they are.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Result<ConfigEffect, ConfigError> {
        let start = self.check(offset, data.len())?;
        let mut flr = false;
        for (at, &byte) in (start..).zip(data) {
            flr |= self.write_byte(at, byte);
        }
        Ok(ConfigEffect {
            flr,
            state: self.state(),
        })
    }

    /// Returns every bit to what it was when the space was made, as power-on and a function
    /// level reset do.
    pub fn reset(&mut self) {
        self.value = self.initial;
    }

    /// Returns whether this byte asked for a function level reset.
    fn write_byte(&mut self, at: usize, byte: u8) -> bool {
        let (Some(value), Some(&mask)) = (self.value.get_mut(at), self.writable.get(at)) else {
            return false;
        };
        if self.power.is_some_and(|pm| pm + cap::PM_CSR == at) && matches!(byte & 3, 1 | 2) {
            // PCI PM 1.2 §3.2.4: a write of a state that is not supported (D1, D2) completes,
            // and the state stays.
            return false;
        }
        *value = (*value & !mask) | (byte & mask);
        self.express
            .is_some_and(|exp| exp + cap::EXP_DEVCTL + 1 == at)
            && byte & cap::EXP_DEVCTL_FLR_HIGH != 0
    }

    fn check(&self, offset: u16, len: usize) -> Result<usize, ConfigError> {
        let start = usize::from(offset);
        if start + len.min(EXTENDED_SIZE + 1) > usize::from(self.size) {
            return Err(ConfigError::OutOfRange {
                offset,
                len,
                size: self.size,
            });
        }
        Ok(start)
    }

    fn byte(&self, at: usize) -> u8 {
        self.value.get(at).copied().unwrap_or(0)
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.byte(at), self.byte(at + 1)])
    }
}

impl From<ConfigError> for FunctionError {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::OutOfRange { offset, len, .. } => Self::OutOfBounds {
                what: "configuration space".to_owned(),
                offset: u64::from(offset),
                len,
            },
            other => Self::Unsupported(other.to_string()),
        }
    }
}
