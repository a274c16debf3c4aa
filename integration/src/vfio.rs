//! Machines that lend their PCI functions: with an IOMMU, VFIO's modules, and functions bound to
//! vfio-pci.

use std::path::Path;

use serde_json::{Value, json};

use crate::builder::MachineBuilder;
use crate::deadline::Deadline;
use crate::error::{Error, Result};
use crate::guest::{Guest, Job};
use crate::machine::Machine;
use crate::tools::kernel::Kernel;

/// Where a device server in a machine listens.
const PORT: u16 = 7420;

/// A lender's start-up is slow where it is emulated.
const SERVER_SECS: u64 = 60;

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

/// Adds an NVMe controller that can make up to `most` virtual functions, which share 8 queues and
/// interrupts and see the controller's namespace.
#[must_use]
pub fn sriov_nvme(builder: MachineBuilder, most: u16, image: &Path) -> MachineBuilder {
    builder
        .root_port("rp-sriov", &Value::Null)
        .block_node("node-sriov", image)
        .device(&json!({"driver": "nvme-subsys", "id": "subsys0", "nqn": "subsys0"}))
        .device(&json!({
            "driver": "nvme", "id": "pf0", "bus": "rp-sriov", "serial": "pf0", "subsys": "subsys0",
            "max_ioqpairs": 16, "msix_qsize": 17, "sriov_max_vfs": most,
            "sriov_vq_flexible": 8, "sriov_vi_flexible": 8,
        }))
        .device(&json!({"driver": "nvme-ns", "drive": "node-sriov", "nsid": 1, "bus": "pf0", "shared": true}))
}

/// Adds a network to a lender, by which this host reaches its device server.
#[must_use]
pub fn networked(builder: MachineBuilder) -> MachineBuilder {
    builder
        .modules("virtio_pci,virtio_net")
        .program("farbus-device-server")
        .argument("-netdev")
        .argument(&format!(
            "user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:0-:{PORT}"
        ))
        .device(&json!({"driver": "virtio-net-pci", "netdev": "net0", "romfile": ""}))
}

/// A device server that runs in a machine.
#[derive(Debug)]
pub struct LendingServer {
    guest: Guest,
    job: Job,
    /// Where this host reaches it.
    pub address: String,
}

impl LendingServer {
    /// Starts one in a [`networked`] machine; `options` say what is exported, and how it is named.
    ///
    /// # Errors
    /// When it does not become ready; the error has what it said.
    pub fn start(machine: &Machine, guest: &Guest, options: &str) -> Result<Self> {
        guest.check("ip link set eth0 up && ip addr replace 10.0.2.15/24 dev eth0")?;
        let log = "/tmp/server.log";
        let job = guest.spawn(&format!(
            "farbus-device-server export {options} --listen 0.0.0.0:{PORT} --insecure \
             >{log} 2>&1; status=$?; cat {log}; echo ended >>{log}; exit $status"
        ))?;
        guest.check_within(
            &format!("until grep -q -e ^ready -e ^ended {log}; do sleep 0.05; done; grep ^ready {log} || {{ cat {log}; false; }}"),
            Deadline::secs(SERVER_SECS),
        )?;
        let port = forwarded_port(machine)?;
        Ok(Self {
            guest: guest.clone(),
            job,
            address: format!("127.0.0.1:{port}"),
        })
    }

    /// What it has logged so far.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn log(&self) -> Result<String> {
        self.guest.check("cat /tmp/server.log")
    }

    /// Kills it and waits for its end: what a crash looks like.
    ///
    /// # Errors
    /// When it does not die.
    pub fn kill(self) -> Result<()> {
        self.guest.check("killall -9 farbus-device-server")?;
        self.job.wait(Deadline::secs(SERVER_SECS))?;
        self.guest.check("rm /tmp/server.log").map(drop)
    }

    /// Ends it with SIGTERM; it must end with status 0. Returns what it said.
    ///
    /// # Errors
    /// When it does not end in time, or with another status.
    pub fn terminate(self) -> Result<String> {
        self.guest.check("killall -TERM farbus-device-server")?;
        self.job.check(Deadline::secs(SERVER_SECS))
    }
}

/// The port of this host that leads to the device server of a machine.
fn forwarded_port(machine: &Machine) -> Result<u16> {
    let table = machine.qmp().human("info usernet")?;
    port_in(&table).ok_or_else(|| Error::Protocol {
        peer: "QEMU's 'info usernet'".into(),
        answer: table,
    })
}

/// The source port of the line `TCP[HOST_FORWARD] FD ADDRESS PORT ADDRESS PORT …` that leads to the server.
fn port_in(table: &str) -> Option<u16> {
    table.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["TCP[HOST_FORWARD]", _, _, port, _, target, ..] if target == PORT.to_string() => {
                port.parse().ok()
            }
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwarded_port_is_found_in_the_table() {
        let table = "Hub -1 (net0):\r\n\
            \x20 Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n\
            \x20 TCP[HOST_FORWARD]  15       127.0.0.1 37123       10.0.2.15  7420     0     0\r\n";
        assert_eq!(port_in(table), Some(37123));
        assert_eq!(port_in("Hub -1 (net0):"), None);
    }
}
