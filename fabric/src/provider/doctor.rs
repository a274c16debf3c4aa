//! What RDMA this host has, for people who ask why it is or is not used.

/// How good something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// RDMA can use it.
    Usable,
    /// There is nothing, and TCP does.
    None,
    /// There is something, and it cannot be used.
    Broken,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How good it is.
    pub level: Level,
    /// What was found, as a sentence without its full stop.
    pub what: String,
    /// What helps, unless it is usable.
    pub remedy: Option<&'static str>,
}

/// Looks at the RDMA devices as a provider would.
#[cfg(feature = "verbs")]
pub fn examine() -> Vec<Finding> {
    use crate::verbs::survey;

    let ports = match survey() {
        Ok(ports) => ports,
        Err(error) => {
            return vec![Finding {
                level: Level::Broken,
                what: format!("RDMA devices cannot be listed: {error}"),
                remedy: Some(
                    "load ib_uverbs, and give this user access to /dev/infiniband/uverbs*",
                ),
            }];
        }
    };
    if ports.is_empty() {
        return vec![Finding {
            level: Level::None,
            what: "there is no RDMA device; TCP is used".to_owned(),
            remedy: Some(
                "nothing needs to be done; an RDMA NIC with ibverbs-providers installed, or \
                 rdma link add rxe0 type rxe netdev NAME, makes one",
            ),
        }];
    }
    let mut findings: Vec<Finding> = ports.into_iter().map(of_port).collect();
    findings.extend(crate::verbs::locked_memory().map(|what| Finding {
        level: Level::Broken,
        what,
        remedy: Some("set LimitMEMLOCK=infinity in the unit, or ulimit -l unlimited"),
    }));
    findings
}

/// Looks at the RDMA devices as a provider would.
#[cfg(not(feature = "verbs"))]
pub fn examine() -> Vec<Finding> {
    vec![Finding {
        level: Level::None,
        what: "this program was built without RDMA; TCP is used".to_owned(),
        remedy: Some("build it with the feature verbs"),
    }]
}

#[cfg(feature = "verbs")]
fn of_port(port: Result<crate::verbs::PortReport, (String, std::io::Error)>) -> Finding {
    let port = match port {
        Ok(port) => port,
        Err((device, error)) => {
            return Finding {
                level: Level::Broken,
                what: format!("RDMA device {device} cannot be opened: {error}"),
                remedy: Some("give this user access to /dev/infiniband/uverbs*"),
            };
        }
    };
    let link = if port.ethernet {
        "Ethernet"
    } else {
        "InfiniBand"
    };
    let name = format!("{} port {} ({link})", port.device, port.port);
    if !port.active {
        return Finding {
            level: Level::Broken,
            what: format!("{name} is down"),
            remedy: Some("bring its link up (ip link, rdma link show), and look at its cable"),
        };
    }
    let addresses: Vec<String> = port.addresses.iter().map(ToString::to_string).collect();
    if addresses.is_empty() {
        return Finding {
            level: Level::Broken,
            what: format!("{name} is up, and has no IP address of its own"),
            remedy: Some(
                "give its network interface an address; on InfiniBand name the device with --rdma-device",
            ),
        };
    }
    Finding {
        level: Level::Usable,
        what: format!("{name} is up, and is reached by {}", addresses.join(", ")),
        remedy: None,
    }
}
