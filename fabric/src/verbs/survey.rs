//! What RDMA this host has, for people who ask why it is or is not used.

use std::io;
use std::net::IpAddr;

use super::raw::{self, Context, GidKind, LinkLayer};

/// A port, as `doctor` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortReport {
    /// The device.
    pub device: String,
    /// Its number.
    pub port: u8,
    /// Whether it can carry data.
    pub active: bool,
    /// Whether it is plugged into Ethernet, and so speaks RoCE.
    pub ethernet: bool,
    /// The IP addresses that it can be reached by, over RoCE version 2.
    pub addresses: Vec<IpAddr>,
}

/// The ports of all devices, or for each device that cannot be opened its name and why.
pub fn survey() -> io::Result<Vec<Result<PortReport, (String, io::Error)>>> {
    let mut reports = Vec::new();
    for device in raw::device_names()? {
        match ports(&device) {
            Ok(ports) => reports.extend(ports.into_iter().map(Ok)),
            Err(error) => reports.push(Err((device, error))),
        }
    }
    Ok(reports)
}

fn ports(device: &str) -> io::Result<Vec<PortReport>> {
    let context = Context::open(device)?;
    let (count, _) = context.limits()?;
    let report = |number: u8| {
        let port = context.port(number)?;
        let gids = (0..port.gids.min(256)).filter_map(|index| context.gid(number, index));
        let addresses = gids.filter(|(_, kind)| *kind == GidKind::RoceV2);
        Ok(PortReport {
            device: device.to_owned(),
            port: number,
            active: port.active,
            ethernet: port.link_layer == LinkLayer::Ethernet,
            addresses: addresses.map(|(gid, _)| gid.address()).collect(),
        })
    };
    (1..=count).map(report).collect()
}
