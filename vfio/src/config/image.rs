//! Makes the configuration space image of a function that exists in software only. The
//! result goes through [`super::ConfigSpace::from_image`] like any other image, so that there
//! is one place that decides which bits software may write.

use super::{EXTENDED_SIZE, MsixLayout, STATUS_CAPABILITIES, cap, header};

/// The type bits of a base address register (PCI 3.0 §6.2.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two registers.
    Memory64,
    /// Memory anywhere that may be prefetched; takes two registers.
    Memory64Prefetchable,
}

impl BarKind {
    fn bits(self) -> u8 {
        match self {
            Self::Memory32 => 0,
            Self::Memory64 => 0x4,
            Self::Memory64Prefetchable => 0xc,
        }
    }
}

/// A builder of configuration space images (4096 bytes, PCI Express endpoint).
#[derive(Clone, Debug)]
pub struct ConfigImage {
    bytes: [u8; EXTENDED_SIZE],
    last_capability: usize,
    next_free: usize,
}

impl ConfigImage {
    /// An image with this identity and no BARs. `class` has 24 bits: class, subclass and
    /// programming interface. The subsystem ids are the function's own.
    pub fn new(vendor: u16, device: u16, class: u32) -> Self {
        let mut image = Self {
            bytes: [0; EXTENDED_SIZE],
            last_capability: header::CAPABILITIES,
            next_free: header::END,
        };
        image.put(header::VENDOR, &vendor.to_le_bytes());
        image.put(header::DEVICE, &device.to_le_bytes());
        let [interface, subclass, class, _] = class.to_le_bytes();
        image.put(header::CLASS, &[interface, subclass, class]);
        image.put(header::SUBSYSTEM_VENDOR, &vendor.to_le_bytes());
        image.put(header::SUBSYSTEM, &device.to_le_bytes());
        image
    }

    /// Sets the revision.
    pub fn revision(mut self, revision: u8) -> Self {
        self.put(header::REVISION, &[revision]);
        self
    }

    /// Sets the type of BAR `index` (0 to 5; others are ignored). Its size comes from the
    /// region of the same index.
    pub fn bar(mut self, index: u8, kind: BarKind) -> Self {
        if index < 6 {
            self.put(header::BAR0 + 4 * usize::from(index), &[kind.bits()]);
        }
        self
    }

    /// Adds the power management capability, version 3 (PCI PM 1.2).
    pub fn power_management(mut self) -> Self {
        let at = self.add(cap::POWER, cap::PM_LEN);
        self.put(at + cap::PM_PMC, &[3, 0]);
        self
    }

    /// Adds the MSI-X capability.
    pub fn msix(mut self, layout: MsixLayout) -> Self {
        let at = self.add(cap::MSIX, cap::MSIX_LEN);
        self.put(
            at + cap::MSIX_CONTROL,
            &(layout.vectors.wrapping_sub(1) & 0x7ff).to_le_bytes(),
        );
        for (field, (bar, offset)) in [(cap::MSIX_TABLE, layout.table), (cap::MSIX_PBA, layout.pba)]
        {
            let register = (offset as u32 & !7) | u32::from(bar.0 & 7);
            self.put(at + field, &register.to_le_bytes());
        }
        self
    }

    /// Adds the PCI Express capability, version 2, of an endpoint on a 8 GT/s link with four
    /// lanes.
    pub fn express(mut self) -> Self {
        const SPEED_AND_WIDTH: u16 = 4 << 4 | 3;
        let at = self.add(cap::EXPRESS, cap::EXP_LEN_V2);
        self.put(at + cap::EXP_FLAGS, &[2, 0]);
        // Role-based error reporting is required of every endpoint (PCIe 4.0 §7.5.3.3).
        let devcap = cap::EXP_DEVCAP_FLR | 1 << 15 | 1;
        self.put(at + cap::EXP_DEVCAP, &devcap.to_le_bytes());
        self.put(
            at + cap::EXP_LNKCAP,
            &u32::from(SPEED_AND_WIDTH).to_le_bytes(),
        );
        self.put(at + cap::EXP_LNKSTA, &SPEED_AND_WIDTH.to_le_bytes());
        self.put(at + cap::EXP_DEVCAP2, &0x1fu32.to_le_bytes());
        self.put(at + cap::EXP_LNKCAP2, &0x0eu32.to_le_bytes());
        self.put(at + cap::EXP_LNKCTL2, &3u16.to_le_bytes());
        self
    }

    /// The image.
    pub fn build(self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Appends a capability to the chain; returns where it begins.
    fn add(&mut self, id: u8, len: usize) -> usize {
        let at = self.next_free;
        self.put(self.last_capability, &[at as u8]);
        self.put(header::STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.put(at, &[id, 0]);
        self.last_capability = at + 1;
        self.next_free = (at + len).next_multiple_of(4);
        at
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (slot, &byte) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *slot = byte;
        }
    }
}
