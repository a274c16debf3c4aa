//! The RDMA devices of a host.

use farbus_fabric::provider::doctor::{self, Level as Found};
use farbus_vfio::sysfs::Host;

use super::{Finding, Level};

const CHECK: &str = "rdma";

pub(super) fn devices(host: &Host) -> Vec<Finding> {
    let devices = host.names("sys/class/infiniband");
    if devices.is_empty() {
        return vec![Finding::new(
            CHECK,
            Level::Note,
            "there is no RDMA device; TCP is used",
            "nothing needs to be done; an RDMA NIC, or rdma link add rxe0 type rxe netdev NAME, \
             makes one",
        )];
    }
    devices
        .iter()
        .flat_map(|device| ports(host, device))
        .collect()
}

fn ports(host: &Host, device: &str) -> Vec<Finding> {
    let directory = format!("sys/class/infiniband/{device}/ports");
    let ports = host.names(&directory);
    let port = |port: &String| {
        let attribute = |name: &str| host.attribute(format!("{directory}/{port}/{name}"));
        let link = attribute("link_layer").unwrap_or_else(|| "unknown link".into());
        // Such as `4: ACTIVE`.
        let state = attribute("state").unwrap_or_else(|| "in an unknown state".into());
        let state = state.split_once(": ").map_or(&*state, |(_, name)| name);
        let what = format!("{device} port {port} ({link}) is {state}");
        if state == "ACTIVE" {
            Finding::ok(CHECK, what)
        } else {
            Finding::new(
                CHECK,
                Level::Warning,
                what,
                "bring its link up (ip link, rdma link show), and look at its cable",
            )
        }
    };
    ports.iter().map(port).collect()
}

/// What a claim would find: a device that the kernel knows may be closed to this user, or strange to
/// libibverbs, or without an address.
pub(crate) fn as_seen_by_verbs() -> Vec<Finding> {
    let findings = doctor::examine().into_iter();
    findings
        // That there is none, the kernel has said.
        .filter(|finding| finding.level != Found::None)
        .map(|finding| Finding {
            check: "rdma-verbs",
            level: match finding.level {
                Found::Usable => Level::Ok,
                Found::None => Level::Note,
                Found::Broken => Level::Warning,
            },
            what: finding.what,
            remedy: finding.remedy.map(str::to_owned),
        })
        .collect()
}
