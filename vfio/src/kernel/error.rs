//! Why the kernel does not hand over a function, and what to do about it.

use std::io;

use crate::PciAddress;

/// Why a function cannot be opened. Each variant names the function and says what helps.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// No such function in this host.
    #[error("there is no PCI function {address}; `lspci -D` shows those that this host has")]
    NotFound {
        /// The function.
        address: PciAddress,
    },
    /// It has no driver at all.
    #[error(
        "{address} is not bound to a driver; bind it to vfio-pci (driverctl set-override {address} vfio-pci)"
    )]
    NoDriver {
        /// The function.
        address: PciAddress,
    },
    /// The host itself uses it.
    #[error(
        "{address} belongs to the driver {driver}, so this host may be using it; when it does not, \
         bind the function to vfio-pci (driverctl set-override {address} vfio-pci)"
    )]
    OtherDriver {
        /// The function.
        address: PciAddress,
        /// Its driver.
        driver: String,
    },
    /// Nothing would keep its DMA within bounds.
    #[error(
        "{address} is behind no IOMMU; turn VT-d or AMD-Vi on in the firmware's set-up, and on the \
         kernel's command line (intel_iommu=on)"
    )]
    NoIommu {
        /// The function.
        address: PciAddress,
    },
    /// VFIO is not there, or not for this user.
    #[error("{address}: {path} cannot be opened; {remedy}")]
    Node {
        /// The function.
        address: PciAddress,
        /// The device node.
        path: String,
        /// What to do about it.
        remedy: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The kernel's VFIO is not the one that this program was written for.
    #[error("{address}: the kernel's VFIO lacks {what}; Linux 5.4 or newer is needed")]
    TooOld {
        /// The function.
        address: PciAddress,
        /// What is missing.
        what: &'static str,
    },
    /// Another process holds the group, or this one does for another function.
    #[error(
        "{address}: IOMMU group {group} is in use ({holder}), and has one user at a time, as the IOMMU \
         does not tell its functions apart"
    )]
    GroupBusy {
        /// The function.
        address: PciAddress,
        /// Its IOMMU group.
        group: u32,
        /// Who has it, as far as that can be seen.
        holder: String,
    },
    /// Some function of the group belongs to another driver.
    #[error(
        "{address}: IOMMU group {group} is not viable, since it also has {}; bind these to vfio-pci as \
         well, or put the device into a slot whose path has ACS", others.join(", ")
    )]
    GroupNotViable {
        /// The function.
        address: PciAddress,
        /// Its IOMMU group.
        group: u32,
        /// The other functions and their drivers.
        others: Vec<String>,
    },
    /// The IOMMU does not check who sends interrupts.
    #[error(
        "{address}: the kernel does not let IOMMU group {group} be used; as a rule interrupt remapping \
         is missing: turn it on in the firmware's set-up (x2APIC or VT-d interrupt remapping)"
    )]
    NotIsolated {
        /// The function.
        address: PciAddress,
        /// Its IOMMU group.
        group: u32,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It is a virtual function whose physical one is lent as well.
    #[error(
        "{address} is a virtual function whose physical function is bound to VFIO as well, and is not \
         handed out without that one's token; leave the physical function to its own driver"
    )]
    NeedsToken {
        /// The function.
        address: PciAddress,
    },
    /// It is a device of another kind.
    #[error("{address} is not a PCI function to VFIO")]
    NotPci {
        /// The function.
        address: PciAddress,
    },
    /// The operating system refused.
    #[error("{address}: {what} failed")]
    Io {
        /// The function.
        address: PciAddress,
        /// What was tried, as a noun phrase.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}
