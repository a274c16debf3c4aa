//! Why a function cannot be lent.

use std::io;

use farbus_vfio::nvme::PCI_CLASS;
use farbus_vfio::{FunctionError, PciAddress};

/// Why a device half cannot serve a function.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The function refused.
    #[error(transparent)]
    Function(#[from] FunctionError),
    /// Memory could not be had.
    #[error("memory for the buffer shadow and the queues could not be had")]
    Memory(#[source] io::Error),
    /// The function is of another device class: its registers mean something else.
    #[error(
        "no engine carries devices of class {class:06x}; there is one for NVMe ({PCI_CLASS:06x})"
    )]
    NoEngine {
        /// Class, subclass and programming interface.
        class: u32,
    },
    /// The function has no interrupts that a server can wait for.
    #[error("the function has neither MSI-X nor MSI interrupts")]
    NoInterrupts,
    /// No IOVA range of the function has room.
    #[error("the function's IOVA ranges have no room for {len:#x} bytes")]
    NoIova {
        /// How many bytes were to be mapped.
        len: u64,
    },
    /// Nothing of the function answers.
    #[error(
        "the function does not answer: its {what}; it has lost its power or its link without the \
         kernel's knowledge, or its firmware hangs{}", remedy(*.address)
    )]
    NoAnswer {
        /// What shows it, as a clause.
        what: &'static str,
        /// Where it sits, if it is a PCI function of this host.
        address: Option<PciAddress>,
    },
    /// The controller did not do what the specification says.
    #[error("the controller {0}")]
    Controller(String),
}

/// How a function of this host that does not answer is brought back: the kernel has to set up
/// its registers anew, and does that only for a function that it has just found.
fn remedy(address: Option<PciAddress>) -> String {
    let Some(address) = address else {
        return String::new();
    };
    format!(
        "; once it has power, `echo 1 >/sys/bus/pci/devices/{address}/remove` and then \
         `echo 1 >/sys/bus/pci/rescan` bring it back (docs/runbooks/device-failed.md)"
    )
}
