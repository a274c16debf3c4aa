//! What kind of device a function is.

use std::fmt;

use serde::{Serialize, Serializer};

/// A class code: base class, subclass and programming interface (PCI Code and ID
/// Assignment Specification 1.11, chapter 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClassCode(pub u32);

impl ClassCode {
    /// NVM Express I/O controllers.
    pub const NVME: Self = Self(0x01_08_02);

    /// Whether it is a bridge, which has no function of its own to lend.
    pub fn is_bridge(self) -> bool {
        self.0 >> 16 == 0x06
    }

    /// The name for people; the base class's where the subclass is not known here.
    pub fn name(self) -> &'static str {
        match (self.0 >> 16 & 0xff, self.0 >> 8 & 0xff, self.0 & 0xff) {
            (0x01, 0x04, _) => "RAID controller",
            (0x01, 0x06, _) => "SATA controller",
            (0x01, 0x07, _) => "SAS controller",
            (0x01, 0x08, 0x02) => "NVMe controller",
            (0x01, 0x08, _) => "Non-volatile memory controller",
            (0x01, ..) => "Mass storage controller",
            (0x02, 0x00, _) => "Ethernet controller",
            (0x02, 0x07, _) => "InfiniBand controller",
            (0x02, ..) => "Network controller",
            (0x03, 0x00, _) => "VGA controller",
            (0x03, 0x02, _) => "3D controller",
            (0x03, ..) => "Display controller",
            (0x04, ..) => "Multimedia controller",
            (0x05, 0x02, _) => "CXL memory",
            (0x05, ..) => "Memory controller",
            (0x06, 0x00, _) => "Host bridge",
            (0x06, 0x01, _) => "ISA bridge",
            (0x06, 0x04, _) => "PCI bridge",
            (0x06, ..) => "Bridge",
            (0x07, ..) => "Communication controller",
            (0x08, ..) => "System peripheral",
            (0x0b, ..) => "Processor",
            (0x0c, 0x03, _) => "USB controller",
            (0x0c, 0x05, _) => "SMBus",
            (0x0c, ..) => "Serial bus controller",
            (0x0d, ..) => "Wireless controller",
            (0x10, ..) => "Encryption controller",
            (0x11, ..) => "Signal processing controller",
            (0x12, ..) => "Processing accelerator",
            _ => "Device",
        }
    }
}

impl fmt::Display for ClassCode {
    /// Six hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:06x}", self.0)
    }
}

impl Serialize for ClassCode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
