//! Builds a [`ConfigSpace`] from an untrusted image: an allow list of fields, each checked.

use super::{
    ConfigSpace, EXTENDED_SIZE, LEGACY_SIZE, MsixLayout, STATUS_CAPABILITIES, cap, command, header,
};
use crate::function::{RegionIndex, RegionInfo};

/// Why an image or an access was refused. Trying again does not help with any of them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The image has a size that configuration space cannot have.
    #[error("a configuration space image of {0} bytes; it must have 256 to 4096")]
    ImageSize(usize),
    /// No function answers with this vendor id (PCI 3.0 §6.1).
    #[error("vendor id {0:#06x} is that of no function")]
    NoFunction(u16),
    /// A bridge, or something newer than this code.
    #[error("header type {0:#04x} is not that of an endpoint (0x00)")]
    HeaderType(u8),
    /// A region that no base address register can express.
    #[error("{region} of {size:#x} bytes: {why}")]
    Region {
        /// Which one.
        region: RegionIndex,
        /// Its size in bytes.
        size: u64,
        /// What is wrong, as a clause.
        why: &'static str,
    },
    /// A capability that contradicts itself or the regions.
    #[error("the {name} capability at {at:#04x}: {why}")]
    Capability {
        /// Its name.
        name: &'static str,
        /// Where it begins in configuration space, in bytes.
        at: usize,
        /// What is wrong, as a clause.
        why: &'static str,
    },
    /// An access outside of the space.
    #[error("configuration access of {len} bytes at {offset:#x} in a space of {size} bytes")]
    OutOfRange {
        /// First byte of the access.
        offset: u16,
        /// Length of the access in bytes.
        len: usize,
        /// Size of the space in bytes.
        size: u16,
    },
}

impl ConfigSpace {
    /// The configuration space that a guest may see of a function whose space looks like
    /// `image` (256 to 4096 bytes, from anyone) and that has `regions`.
    ///
    /// Kept are the identity, the type bits of the BARs, and the capabilities Power
    /// Management, MSI-X and PCI Express, at their offsets. BAR sizes come from `regions`.
    /// Everything else is hidden: vendor-specific windows can reach what the guest must not
    /// reach, and the other capabilities need emulation that is not here. There is no
    /// interrupt pin. Addresses and enable bits start as after power-on.
    pub fn from_image(image: &[u8], regions: &[RegionInfo]) -> Result<Self, ConfigError> {
        if !(LEGACY_SIZE..=EXTENDED_SIZE).contains(&image.len()) {
            return Err(ConfigError::ImageSize(image.len()));
        }
        let size = if image.len() == LEGACY_SIZE {
            LEGACY_SIZE
        } else {
            EXTENDED_SIZE
        };
        let mut builder = Builder {
            image,
            value: [0; LEGACY_SIZE],
            writable: [0; LEGACY_SIZE],
            used: [false; LEGACY_SIZE],
            memory_bars: [None; 6],
            has_io: false,
        };
        builder.header()?;
        for region in regions {
            builder.region(*region)?;
        }
        let mut commands = command::MEMORY
            | command::BUS_MASTER
            | command::PARITY
            | command::SERR
            | command::INTX_DISABLE;
        if builder.has_io {
            commands |= command::IO;
        }
        builder.allow(header::COMMAND, &commands.to_le_bytes());
        let found = builder.capabilities()?;
        Ok(Self {
            size: size as u16,
            initial: builder.value,
            value: builder.value,
            writable: builder.writable,
            power: found.power,
            express: found.express,
            msix: found.msix,
        })
    }
}

#[derive(Default)]
struct Capabilities {
    power: Option<usize>,
    express: Option<usize>,
    msix: Option<(usize, MsixLayout)>,
}

struct Builder<'a> {
    image: &'a [u8],
    value: [u8; LEGACY_SIZE],
    writable: [u8; LEGACY_SIZE],
    /// Bytes that a BAR or a capability has taken.
    used: [bool; LEGACY_SIZE],
    memory_bars: [Option<u64>; 6],
    has_io: bool,
}

impl Builder<'_> {
    fn header(&mut self) -> Result<(), ConfigError> {
        let vendor = self.word(header::VENDOR);
        if matches!(vendor, 0 | 0xffff) {
            return Err(ConfigError::NoFunction(vendor));
        }
        // Bit 7 says that the device has more functions; the guest gets just this one.
        let kind = self.byte(header::TYPE) & 0x7f;
        if kind != 0 {
            return Err(ConfigError::HeaderType(kind));
        }
        self.keep(header::VENDOR, 4);
        self.keep(header::REVISION, 4);
        self.keep(header::SUBSYSTEM_VENDOR, 4);
        self.allow(header::CACHE_LINE, &[0xff]);
        self.allow(header::INTERRUPT_LINE, &[0xff]);
        Ok(())
    }

    fn region(&mut self, region: RegionInfo) -> Result<(), ConfigError> {
        let refuse = |why| {
            Err(ConfigError::Region {
                region: region.index,
                size: region.size,
                why,
            })
        };
        if !region.size.is_power_of_two() || region.size < 16 {
            return refuse("a size must be a power of two and at least 16");
        }
        if region.index == RegionIndex::ROM {
            if !(0x800..=1 << 31).contains(&region.size) {
                return refuse("a ROM has 2 KiB to 2 GiB");
            }
            let mask = !(region.size as u32 - 1) & 0xffff_f800;
            if !self.claim(header::ROM, 4) {
                return refuse("it appears twice");
            }
            // Bit 0 enables the decoder.
            self.allow(header::ROM, &(mask | 1).to_le_bytes());
            return Ok(());
        }
        let index = usize::from(region.index.0);
        let Some(slot) = self.memory_bars.get(index).copied() else {
            return refuse("there is no such region");
        };
        let at = header::BAR0 + 4 * index;
        let kind = self.byte(at);
        if slot.is_some() {
            return refuse("it appears twice");
        }
        if kind & 1 == 1 {
            if region.size > 1 << 16 {
                return refuse("an I/O BAR has at most 64 KiB");
            }
            if !self.claim(at, 4) {
                return refuse("its register belongs to another one");
            }
            self.has_io = true;
            self.put(at, &[1]);
            self.allow(at, &(!(region.size as u32 - 1) & !3).to_le_bytes());
            return Ok(());
        }
        let prefetchable = kind & 8;
        match kind & 6 {
            4 if index == 5 => return refuse("a 64-bit BAR needs a register after it"),
            4 => {
                if !self.claim(at, 8) {
                    return refuse("its registers belong to another one");
                }
                self.put(at, &[4 | prefetchable]);
                self.allow(at, &(!(region.size - 1) & !0xf).to_le_bytes());
            }
            // 2 is "below 1 MiB", which PCI 2.3 abolished: such a BAR works anywhere below
            // 4 GiB. 6 is reserved and gets the same treatment.
            _ if region.size > 1 << 31 => return refuse("a 32-bit BAR has at most 2 GiB"),
            _ => {
                if !self.claim(at, 4) {
                    return refuse("its register belongs to another one");
                }
                self.put(at, &[prefetchable]);
                self.allow(at, &(!(region.size as u32 - 1) & !0xf).to_le_bytes());
            }
        }
        if let Some(slot) = self.memory_bars.get_mut(index) {
            *slot = Some(region.size);
        }
        Ok(())
    }

    /// Walks the list (PCI 3.0 §6.7) and chains what is kept, in the order found.
    fn capabilities(&mut self) -> Result<Capabilities, ConfigError> {
        let mut found = Capabilities::default();
        if self.word(header::STATUS) & STATUS_CAPABILITIES == 0 {
            return Ok(found);
        }
        let mut next = self.byte(header::CAPABILITIES);
        let mut link = header::CAPABILITIES;
        // Each capability takes at least four bytes, so a longer walk is a loop.
        for _ in 0..(LEGACY_SIZE - header::END) / 4 {
            // The two low bits are reserved and to be masked.
            let at = usize::from(next & !3);
            if at < header::END {
                break;
            }
            next = self.byte(at + 1);
            let kept = match self.byte(at) {
                cap::POWER if found.power.is_none() => {
                    found.power = Some(at);
                    self.power(at)?;
                    true
                }
                cap::MSIX if found.msix.is_none() => {
                    found.msix = Some((at, self.msix(at)?));
                    true
                }
                cap::EXPRESS if found.express.is_none() => {
                    found.express = Some(at);
                    self.express(at)?;
                    true
                }
                _ => false,
            };
            if kept {
                self.put(link, &[at as u8]);
                link = at + 1;
                self.put(header::STATUS, &STATUS_CAPABILITIES.to_le_bytes());
            }
        }
        Ok(found)
    }

    fn power(&mut self, at: usize) -> Result<(), ConfigError> {
        self.claim_capability("Power Management", at, cap::PM_LEN)?;
        // Only the version is kept: no wake-up events, no D1 and D2.
        let version = self.byte(at + cap::PM_PMC) & 7;
        self.put(at, &[cap::POWER]);
        self.put(at + cap::PM_PMC, &[version]);
        // The power state is emulated, so that leaving D3hot never resets anything.
        self.put(at + cap::PM_CSR, &[cap::PM_NO_SOFT_RESET]);
        self.allow(at + cap::PM_CSR, &[3]);
        Ok(())
    }

    fn msix(&mut self, at: usize) -> Result<MsixLayout, ConfigError> {
        const NAME: &str = "MSI-X";
        let refuse = |why| {
            Err(ConfigError::Capability {
                name: NAME,
                at,
                why,
            })
        };
        self.claim_capability(NAME, at, cap::MSIX_LEN)?;
        let vectors = (self.word(at + cap::MSIX_CONTROL) & 0x7ff) + 1;
        let table = self.dword(at + cap::MSIX_TABLE);
        let pba = self.dword(at + cap::MSIX_PBA);
        let table_len = 16 * u64::from(vectors);
        let pba_len = 8 * u64::from(vectors.div_ceil(64));
        if !self.in_memory_bar(table, table_len) {
            return refuse("its table does not lie within a memory BAR");
        }
        if !self.in_memory_bar(pba, pba_len) {
            return refuse("its pending bits do not lie within a memory BAR");
        }
        let (table_at, pba_at) = (u64::from(table & !7), u64::from(pba & !7));
        if table & 7 == pba & 7 && table_at < pba_at + pba_len && pba_at < table_at + table_len {
            return refuse("its table and its pending bits overlap");
        }
        self.put(at, &[cap::MSIX]);
        self.put(at + cap::MSIX_CONTROL, &(vectors - 1).to_le_bytes());
        self.put(at + cap::MSIX_TABLE, &table.to_le_bytes());
        self.put(at + cap::MSIX_PBA, &pba.to_le_bytes());
        self.allow(
            at + cap::MSIX_CONTROL,
            &(cap::MSIX_ENABLE | cap::MSIX_MASK).to_le_bytes(),
        );
        Ok(MsixLayout {
            vectors,
            table: (RegionIndex((table & 7) as u8), table_at),
            pba: (RegionIndex((pba & 7) as u8), pba_at),
        })
    }

    fn express(&mut self, at: usize) -> Result<(), ConfigError> {
        const NAME: &str = "PCI Express";
        let flags = self.word(at + cap::EXP_FLAGS);
        let version = flags & 0xf;
        let len = if version >= 2 {
            cap::EXP_LEN_V2
        } else {
            cap::EXP_LEN_V1
        };
        self.claim_capability(NAME, at, len)?;
        // 0 endpoint, 1 legacy endpoint, 9 root complex integrated endpoint.
        if !matches!(flags >> 4 & 0xf, 0 | 1 | 9) {
            return Err(ConfigError::Capability {
                name: NAME,
                at,
                why: "it is not an endpoint's",
            });
        }
        self.put(at, &[cap::EXPRESS]);
        // Whatever it was, the guest gets an endpoint, with nothing said about slots.
        self.put(at + cap::EXP_FLAGS, &[if version >= 2 { 2 } else { 1 }, 0]);
        // Payload sizes, extended tags and role-based error reporting; no phantom functions,
        // and no power limits of a slot that the guest does not have.
        let devcap = self.dword(at + cap::EXP_DEVCAP) & (1 << 15 | 1 << 5 | 7);
        self.put(
            at + cap::EXP_DEVCAP,
            &(devcap | cap::EXP_DEVCAP_FLR).to_le_bytes(),
        );
        // The defaults of PCIe 4.0 §7.5.3.4: relaxed ordering, no snoop, 512-byte reads. Of the
        // rest, phantom functions (9), auxiliary power (10) and FLR (15) cannot be set.
        self.put(at + cap::EXP_DEVCTL, &0x2810u16.to_le_bytes());
        self.allow(at + cap::EXP_DEVCTL, &0x79ffu16.to_le_bytes());
        // Speed, width and port number. Power management of the link is left out: the link
        // that the guest's port has is not the one that these registers describe.
        let lnkcap = self.dword(at + cap::EXP_LNKCAP) & 0xff00_03ff;
        self.put(at + cap::EXP_LNKCAP, &lnkcap.to_le_bytes());
        self.allow(at + cap::EXP_LNKCTL, &0x00c0u16.to_le_bytes());
        let lnksta = self.word(at + cap::EXP_LNKSTA) & 0x13ff;
        self.put(at + cap::EXP_LNKSTA, &lnksta.to_le_bytes());
        if version >= 2 {
            // Completion time-outs only.
            let devcap2 = self.dword(at + cap::EXP_DEVCAP2) & 0x1f;
            self.put(at + cap::EXP_DEVCAP2, &devcap2.to_le_bytes());
            self.allow(at + cap::EXP_DEVCTL2, &[0x1f]);
            let speeds = self.dword(at + cap::EXP_LNKCAP2) & 0xfe;
            self.put(at + cap::EXP_LNKCAP2, &speeds.to_le_bytes());
            let target = self.byte(at + cap::EXP_LNKCTL2) & 0xf;
            self.put(at + cap::EXP_LNKCTL2, &[target]);
            self.allow(at + cap::EXP_LNKCTL2, &[0xf]);
        }
        Ok(())
    }

    /// Whether `len` bytes where an MSI-X register points to exist.
    fn in_memory_bar(&self, register: u32, len: u64) -> bool {
        let size = self
            .memory_bars
            .get((register & 7) as usize)
            .copied()
            .flatten();
        size.is_some_and(|size| u64::from(register & !7) + len <= size)
    }

    fn claim_capability(
        &mut self,
        name: &'static str,
        at: usize,
        len: usize,
    ) -> Result<(), ConfigError> {
        if at + len > LEGACY_SIZE {
            return Err(ConfigError::Capability {
                name,
                at,
                why: "it ends past the space",
            });
        }
        if !self.claim(at, len) {
            return Err(ConfigError::Capability {
                name,
                at,
                why: "it overlaps another one",
            });
        }
        Ok(())
    }

    /// Takes bytes; false if one of them is taken already.
    fn claim(&mut self, at: usize, len: usize) -> bool {
        let Some(bytes) = self.used.get_mut(at..at + len) else {
            return false;
        };
        let free = !bytes.contains(&true);
        bytes.fill(true);
        free
    }

    fn keep(&mut self, at: usize, len: usize) {
        let image = self.image;
        self.put(at, image.get(at..at + len).unwrap_or_default());
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (slot, &byte) in self.value.iter_mut().skip(at).zip(bytes) {
            *slot = byte;
        }
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        for (slot, &byte) in self.writable.iter_mut().skip(at).zip(bits) {
            *slot = byte;
        }
    }

    /// A byte of the image's first 256; what lies behind them reads as zero.
    fn byte(&self, at: usize) -> u8 {
        if at < LEGACY_SIZE {
            self.image.get(at).copied().unwrap_or(0)
        } else {
            0
        }
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.byte(at), self.byte(at + 1)])
    }

    fn dword(&self, at: usize) -> u32 {
        u32::from(self.word(at)) | u32::from(self.word(at + 2)) << 16
    }
}
