//! Machines with soft RoCE: RDMA in software, over the loopback or over a network between two machines.

use std::path::Path;

use serde_json::{Value, json};

use crate::builder::MachineBuilder;
use crate::deadline::Deadline;
use crate::error::{Error, Result};
use crate::guest::{Guest, Job};
use crate::machine::Machine;
use crate::tools::Tools;
use crate::tools::initramfs::Userland;
use crate::tools::kernel::Kernel;

/// The address of a machine that is alone.
pub const LOOPBACK: &str = "127.0.0.1";
/// What runs in the machines.
pub const PROGRAMS: [&str; 4] = [
    "farbus-verbs-check",
    "farbus-device-server",
    "farbus-compute-agent",
    "farbus-vfu-nvme",
];
/// Where [`attach`] has its endpoint.
pub const SOCKET: &str = "/run/disk0.sock";
/// A drive in memory, so that what is measured is the way to it.
pub const DRIVE: &str = "--soft-nvme backing=memory,size=64MiB --name disk0";

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

/// One machine with all programs and an RDMA device on its loopback.
///
/// # Errors
/// When the machine does not start, or its kernel or tools refuse.
pub fn one_machine(kernel: Kernel) -> Result<(Machine, Guest)> {
    let machine = with_programs(machine("rdma", kernel)).start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    on_loopback(&guest)?;
    Ok((machine, guest))
}

/// Two machines on a network of their own, whose sockets are in `dir`.
///
/// # Errors
/// As [`one_machine`].
pub fn two_machines(dir: &Path, kernel: Kernel) -> Result<[(Machine, Guest); 2]> {
    let tools = Tools::open()?;
    let start = |name: &str, end: usize| {
        networked(with_programs(machine(name, kernel)), dir, end).start(&tools)
    };
    // Both boot at the same time.
    let (lends, uses) = (start("lends", 0)?, start("uses", 1)?);
    let up = |machine: Machine, end: usize| {
        let guest = machine.wait_guest(Deadline::secs(120))?;
        on_network(&guest, end)?;
        Ok::<_, Error>((machine, guest))
    };
    Ok([up(lends, 0)?, up(uses, 1)?])
}

fn with_programs(builder: MachineBuilder) -> MachineBuilder {
    PROGRAMS.iter().fold(builder, |b, name| b.program(name))
}

/// Starts a daemon and waits until it is ready.
///
/// # Errors
/// When it ends instead; the error has its log.
pub fn start(guest: &Guest, command: &str, log: &str) -> Result<Job> {
    let job = guest.spawn(&format!(
        "{command} >{log} 2>&1; status=$?; echo ended $status >>{log}; exit $status"
    ))?;
    guest.check(&format!(
        "until grep -q -e ^ready -e ^ended {log}; do sleep 0.05; done; grep ^ready {log} || {{ cat {log}; false; }}"
    ))?;
    Ok(job)
}

/// Starts a device server. Its log is `/tmp/server.log`.
///
/// # Errors
/// As [`start`].
pub fn serve(guest: &Guest, address: &str, options: &str) -> Result<Job> {
    let command =
        format!("farbus-device-server export {options} --listen {address}:7420 --insecure");
    start(guest, &command, "/tmp/server.log")
}

/// Starts a compute agent, which offers `disk0` at [`SOCKET`]. Its log is `/tmp/agent.log`.
///
/// # Errors
/// As [`start`].
pub fn attach(guest: &Guest, address: &str, options: &str) -> Result<Job> {
    let command = format!(
        "farbus-compute-agent attach --from {address}:7420 --export disk0 --vfio-user {SOCKET} {options}"
    );
    start(guest, &command, "/tmp/agent.log")
}

/// What an RDMA device takes by itself for 64 bytes there, and 4 KiB and a message back, in microseconds; both sides
/// look for completions.
#[derive(Debug, Clone, Copy)]
pub struct RoundTrip {
    /// A tenth of all take less.
    pub p10_us: f64,
    /// Half of them take less.
    pub p50_us: f64,
    /// One in a hundred takes longer.
    pub p99_us: f64,
}

/// Measures so many bare round trips.
///
/// # Errors
/// When they fail, or nothing is said of them.
pub fn bare_round_trip(guest: &Guest, count: u32) -> Result<RoundTrip> {
    let said = guest.check(&format!("farbus-verbs-check bare {LOOPBACK} {count}"))?;
    let line = "bare round trip with 4096 bytes of data:";
    Ok(RoundTrip {
        p10_us: told(&said, line, "p10_us=")?,
        p50_us: told(&said, line, "p50_us=")?,
        p99_us: told(&said, line, "p99_us=")?,
    })
}

/// Sizes of the writes of [`bare_writes`] in bytes.
pub const WRITES: [usize; 6] = [4096, 16_384, 65_536, 131_072, 262_144, 1_048_576];

/// Throughput of bare RDMA writes in MiB/s, each size for a time.
///
/// # Errors
/// As [`bare_round_trip`].
pub fn bare_writes(guest: &Guest, milliseconds: u32) -> Result<[f64; WRITES.len()]> {
    let command = format!("farbus-verbs-check stream {LOOPBACK} {milliseconds}");
    let said = guest.check(&command)?;
    let mut rates = [0.0; WRITES.len()];
    for (rate, size) in rates.iter_mut().zip(WRITES) {
        let line = format!("bare writes of {size} bytes:");
        *rate = told(&said, &line, "mib_per_s=")?;
    }
    Ok(rates)
}

/// The number that follows `key` in a line that begins with `line`.
fn told(said: &str, line: &str, key: &str) -> Result<f64> {
    said.lines()
        .find_map(|text| text.strip_prefix(line)?.split(key).nth(1))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .ok_or_else(|| Error::Protocol {
            peer: "farbus-verbs-check".into(),
            answer: said.to_owned(),
        })
}

/// Runs the load generator on `target`, which are its own words for it; returns its report.
///
/// # Errors
/// When it fails.
pub fn load(guest: &Guest, target: &str, options: &str) -> Result<Value> {
    let command = format!("farbus-vfu-nvme bench {target} {options} --json");
    let said = guest.check_within(&command, Deadline::secs(60))?;
    serde_json::from_str(&said).map_err(|error| Error::Protocol {
        peer: "farbus-vfu-nvme".into(),
        answer: format!("{error} in: {said}"),
    })
}

/// The target that [`serve`] lends with [`DRIVE`], for [`load`].
#[must_use]
pub fn lent_over(provider: &str) -> String {
    format!("--from {LOOPBACK}:7420 --export disk0 --provider {provider}")
}

/// Runs a command that must succeed; its output is also the test's.
///
/// # Errors
/// When it does not.
pub fn check(guest: &Guest, command: &str) -> Result<String> {
    let said = guest.check_within(command, Deadline::secs(240))?;
    println!("$ {command}\n{said}");
    Ok(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_is_found_in_its_line() {
        let said = "bare a: x=1.5\nbare b: p10_us=2.0 p50_us=3.0\n";
        assert_eq!(told(said, "bare b:", "p50_us=").unwrap(), 3.0);
        assert!(told(said, "bare a:", "p50_us=").is_err());
        assert!(told(said, "bare c:", "x=").is_err());
    }
}
