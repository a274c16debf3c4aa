//! Which ports let devices talk past the IOMMU.
//!
//! An IOMMU tells two functions apart only when every port between them and it sends their
//! requests up instead of across: Access Control Services, PCI Express Base 4.0 §6.12. Where
//! one does not, Linux puts what is below it in one group.

use std::fs;

use super::Host;
use super::host::read_bytes;
use crate::PciAddress;

/// Where extended capabilities begin (§7.6.1), in bytes.
const EXTENDED: usize = 0x100;
/// The capability's id (§7.7.8.1), and where its control register is (§7.7.8.3).
const ACS: u16 = 0x000d;
const CONTROL: usize = 6;
/// Source validation, P2P request redirect, P2P completion redirect, upstream forwarding.
const ISOLATES: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 4;

/// The ports above a function that do not isolate what is below them, from the root down.
/// Those whose configuration space cannot be read in full (which takes root) are not among
/// them.
pub fn ports_without_acs(host: &Host, address: PciAddress) -> Vec<PciAddress> {
    let Ok(path) = fs::canonicalize(host.function(address)) else {
        return Vec::new();
    };
    let above = path.components().filter_map(|component| {
        let name: PciAddress = component.as_os_str().to_str()?.parse().ok()?;
        (name != address).then_some(name)
    });
    above
        .filter(|port| {
            let image = read_bytes(&host.function(*port).join("config")).unwrap_or_default();
            image.len() >= 4096 && !isolates(&image)
        })
        .collect()
}

/// Whether a configuration space has ACS with everything on that isolation takes.
fn isolates(image: &[u8]) -> bool {
    let word = |at: usize| {
        let bytes = image.get(at..at + 2)?;
        Some(u16::from_le_bytes([bytes[0], bytes[1]]))
    };
    let mut at = EXTENDED;
    // A list cannot be longer than this, unless it is a loop.
    for _ in 0..(4096 - EXTENDED) / 8 {
        let (Some(id), Some(next)) = (word(at), word(at + 2)) else {
            return false;
        };
        if id == ACS {
            return word(at + CONTROL).is_some_and(|control| control & ISOLATES == ISOLATES);
        }
        at = usize::from(next >> 4);
        if at < EXTENDED {
            return false;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_acs(control: u16) -> Vec<u8> {
        let mut image = vec![0; 4096];
        // An AER capability first, which points to ACS at 0x148.
        image[0x100..0x104].copy_from_slice(&[0x01, 0x00, 0x81, 0x14]);
        image[0x148..0x14c].copy_from_slice(&[0x0d, 0x00, 0x01, 0x00]);
        image[0x14e..0x150].copy_from_slice(&control.to_le_bytes());
        image
    }

    #[test]
    fn a_port_isolates_when_everything_is_switched_on() {
        assert!(isolates(&with_acs(0x1d)));
        assert!(!isolates(&with_acs(0x01)));
        assert!(!isolates(&[0; 4096]));
    }

    #[test]
    fn a_list_that_loops_ends() {
        let mut image = vec![0; 4096];
        image[0x100..0x104].copy_from_slice(&[0x01, 0x00, 0x01, 0x10]);
        assert!(!isolates(&image));
        image[0x100..0x104].copy_from_slice(&[0x01, 0x00, 0xf1, 0xff]);
        assert!(!isolates(&image));
    }
}
