//! The address of a PCI function on this host.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where a function sits: `domain:bus:device.function`, written as Linux does, such as
/// `0000:01:00.0` (all hexadecimal).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// A text that is not the address of a PCI function.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not the address of a PCI function; write it like 0000:01:00.0")]
pub struct BadPciAddress {
    text: String,
}

impl PciAddress {
    /// The address of this device and function on this bus, if there can be one: devices go
    /// to 31, functions to 7.
    pub fn new(domain: u32, bus: u8, device: u8, function: u8) -> Option<Self> {
        (device < 32 && function < 8).then_some(Self {
            domain,
            bus,
            device,
            function,
        })
    }

    /// The PCI domain (segment group); VMD makes ones above 0xffff.
    pub fn domain(self) -> u32 {
        self.domain
    }

    /// The bus number.
    pub fn bus(self) -> u8 {
        self.bus
    }

    /// The device number, 0 to 31.
    pub fn device(self) -> u8 {
        self.device
    }

    /// The function number, 0 to 7.
    pub fn function(self) -> u8 {
        self.function
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04x}:{:02x}:{:02x}.{:x}",
            self.domain, self.bus, self.device, self.function
        )
    }
}

impl From<PciAddress> for String {
    fn from(address: PciAddress) -> Self {
        address.to_string()
    }
}

impl TryFrom<String> for PciAddress {
    type Error = BadPciAddress;

    fn try_from(text: String) -> Result<Self, BadPciAddress> {
        text.parse()
    }
}

impl FromStr for PciAddress {
    type Err = BadPciAddress;

    /// Reads `0000:01:00.0`; without a domain (`01:00.0`) it is domain 0, as for lspci.
    fn from_str(text: &str) -> Result<Self, BadPciAddress> {
        parse(text).ok_or_else(|| BadPciAddress { text: text.into() })
    }
}

fn parse(text: &str) -> Option<PciAddress> {
    let (rest, function) = text.split_once('.')?;
    let mut parts = rest.rsplit(':');
    let device = hex(parts.next()?, 2)?;
    let bus = hex(parts.next()?, 2)?;
    let domain = parts.next().map_or(Some(0), |domain| hex(domain, 8))?;
    if parts.next().is_some() {
        return None;
    }
    PciAddress::new(
        domain,
        u8::try_from(bus).ok()?,
        u8::try_from(device).ok()?,
        u8::try_from(hex(function, 1)?).ok()?,
    )
}

/// A number of one to `digits` hexadecimal digits. `from_str_radix` would take a sign.
fn hex(text: &str, digits: usize) -> Option<u32> {
    let well_formed = (1..=digits).contains(&text.len());
    (well_formed && text.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .then(|| u32::from_str_radix(text, 16).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn linux_and_lspci_spellings_are_read() {
        let full: PciAddress = "0000:01:00.0".parse().unwrap();
        assert_eq!(Some(full), PciAddress::new(0, 1, 0, 0));
        assert_eq!("01:00.0".parse(), Ok(full));
        assert_eq!(
            "10000:E1:1f.7".parse().ok(),
            PciAddress::new(0x10000, 0xe1, 0x1f, 7)
        );
    }

    #[test]
    fn what_is_no_address_is_refused_and_named() {
        for text in [
            "",
            "0000",
            "0000:01:00",
            "0000:01:20.0",
            "0000:01:00.8",
            "0000:01:00.00",
            "0:0000:01:00.0",
            "0000:+1:00.0",
            "0000:01:00.0 ",
            "../../etc",
        ] {
            let error = text.parse::<PciAddress>().unwrap_err();
            assert!(error.to_string().contains(&format!("{text:?}")), "{error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(domain: u32, bus: u8, device in 0u8..32, function in 0u8..8) {
            let address = PciAddress::new(domain, bus, device, function).unwrap();
            prop_assert_eq!(address.to_string().parse(), Ok(address));
        }

        #[test]
        fn no_text_panics(text in ".{0,20}") {
            let _ = text.parse::<PciAddress>();
        }
    }
}
