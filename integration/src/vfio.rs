//! Machines that lend their PCI functions: with an IOMMU, VFIO's modules, and functions bound to
//! vfio-pci.

use crate::builder::MachineBuilder;
use crate::error::Result;
use crate::guest::Guest;
use crate::tools::kernel::Kernel;

/// A machine with an IOMMU and VFIO. Devices that are added to it are behind the IOMMU.
#[must_use]
pub fn lender(name: &str, kernel: Kernel) -> MachineBuilder {
    MachineBuilder::new(name)
        .kernel(kernel)
        .memory_mib(1024)
        .modules("vfio-pci,vfio_iommu_type1")
        .iommu()
}

/// The addresses of the functions with these ids (`1234:11e8`) or of this class (`::0604`), one per line.
///
/// # Errors
/// When `lspci` fails in the guest.
pub fn find(guest: &Guest, ids: &str) -> Result<String> {
    guest.check(&format!("lspci -D -n -d {ids} | cut -d' ' -f1"))
}

/// Takes a function from its driver, if it has one, and gives it to vfio-pci.
///
/// # Errors
/// When it is not vfio-pci's afterwards.
pub fn bind(guest: &Guest, address: &str) -> Result<()> {
    let function = format!("/sys/bus/pci/devices/{address}");
    guest.check(&format!(
        "echo vfio-pci >{function}/driver_override && \
         if [ -e {function}/driver ]; then echo {address} >{function}/driver/unbind; fi && \
         echo {address} >/sys/bus/pci/drivers_probe && \
         readlink {function}/driver | grep -q /vfio-pci$"
    ))?;
    Ok(())
}
