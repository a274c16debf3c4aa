//! Machines with soft RoCE: RDMA in software, over the loopback or over a network between two machines.

use std::path::Path;

use serde_json::json;

use crate::builder::MachineBuilder;
use crate::error::Result;
use crate::guest::Guest;
use crate::tools::initramfs::Userland;
use crate::tools::kernel::Kernel;

/// A machine whose kernel has soft RoCE. Its two CPUs let both sides of a connection look for
/// completions.
#[must_use]
pub fn machine(name: &str, kernel: Kernel) -> MachineBuilder {
    MachineBuilder::new(name)
        .kernel(kernel)
        .userland(Userland::Rdma)
        .memory_mib(1024)
        .modules("rdma_rxe,crc32_generic")
}

/// Adds one end of a network of two machines. `dir` is the same for both; `end` is 0 for one and 1 for
/// the other.
#[must_use]
pub fn networked(builder: MachineBuilder, dir: &Path, end: usize) -> MachineBuilder {
    let socket = |end: usize| dir.join(format!("net{end}")).display().to_string();
    let netdev = json!({
        "type": "dgram",
        "id": "net0",
        "local": {"type": "unix", "path": socket(end)},
        "remote": {"type": "unix", "path": socket(1 - end)},
    });
    let mac = format!("52:54:00:12:34:{:02x}", 0x56 + end);
    builder
        .modules("virtio_pci,virtio_net")
        .argument("-netdev")
        .argument(&netdev.to_string())
        .device(&json!({
            "driver": "virtio-net-pci", "netdev": "net0", "romfile": "", "mac": mac,
        }))
}

/// The address of an end of a [`networked`] machine.
#[must_use]
pub fn address(end: usize) -> String {
    format!("10.7.0.{}", end + 1)
}

/// Brings the loopback up, with an RDMA device `rxe0` on it.
///
/// # Errors
/// When the guest's kernel or tools refuse.
pub fn on_loopback(guest: &Guest) -> Result<()> {
    guest.check("ip link set lo up && rdma link add rxe0 type rxe netdev lo")?;
    wait_active(guest)
}

/// Brings the network of a [`networked`] machine up, with an RDMA device `rxe0` on it.
///
/// # Errors
/// When the guest's kernel or tools refuse.
pub fn on_network(guest: &Guest, end: usize) -> Result<()> {
    guest.check(&format!(
        "ip link set lo up && ip addr add {}/24 dev eth0 && ip link set eth0 up && \
         rdma link add rxe0 type rxe netdev eth0",
        address(end)
    ))?;
    wait_active(guest)
}

fn wait_active(guest: &Guest) -> Result<()> {
    guest
        .check("until grep -q ACTIVE /sys/class/infiniband/rxe0/ports/1/state; do sleep 0.05; done")
        .map(drop)
}
