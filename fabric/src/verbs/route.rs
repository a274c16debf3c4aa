//! Which device, port and address to use: those of the control connection's local address,
//! unless an operator says otherwise.

use std::net::IpAddr;
use std::sync::Arc;

use super::raw::{self, Context, Gid, GidKind, LinkLayer, Port};
use crate::provider::Options;

/// Where a queue pair starts from.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) context: Arc<Context>,
    pub(super) port: u8,
    pub(super) gid_index: u8,
    pub(super) gid: Gid,
    /// 0 on Ethernet.
    pub(super) lid: u16,
    pub(super) mtu: u16,
    /// Pieces that a work request may gather.
    pub(super) max_pieces: usize,
}

/// Finds the way that leads from `local`; the error is a reason for people.
pub(super) fn find(local: IpAddr, options: &Options) -> Result<Route, String> {
    let names =
        raw::device_names().map_err(|error| format!("RDMA devices cannot be listed: {error}"))?;
    if names.is_empty() {
        return Err("this host has no RDMA device".to_owned());
    }
    if let Some(wanted) = &options.device {
        if !names.contains(wanted) {
            let known = names.join(", ");
            return Err(format!(
                "there is no RDMA device {wanted}; there is {known}"
            ));
        }
    }
    let wanted = |name: &&String| options.device.as_ref().is_none_or(|device| device == *name);
    let mut obstacles = Vec::new();
    for name in names.iter().filter(wanted) {
        match of_device(name, local.to_canonical(), options) {
            Ok(route) => return Ok(route),
            Err(why) => obstacles.push(why),
        }
    }
    Err(obstacles.join("; "))
}

fn of_device(name: &str, local: IpAddr, options: &Options) -> Result<Route, String> {
    let failed = |error: std::io::Error| {
        let hint = match error.kind() {
            std::io::ErrorKind::PermissionDenied => " (who may open /dev/infiniband/uverbs*?)",
            _ => "",
        };
        format!("RDMA device {name} cannot be used: {error}{hint}")
    };
    let context = Arc::new(Context::open(name).map_err(failed)?);
    let (ports, max_pieces) = context.limits().map_err(failed)?;
    let mut down = None;
    for number in 1..=ports {
        let port = context.port(number).map_err(failed)?;
        let Some((gid_index, gid)) = address_of(&context, number, &port, local, options) else {
            continue;
        };
        if !port.active {
            down = Some(format!("port {number} of RDMA device {name} is down"));
            continue;
        }
        return Ok(Route {
            context,
            port: number,
            gid_index,
            gid,
            lid: match port.link_layer {
                LinkLayer::Ethernet => 0,
                LinkLayer::InfiniBand => port.lid,
            },
            mtu: port.mtu,
            max_pieces,
        });
    }
    Err(down.unwrap_or_else(|| match options.gid_index {
        Some(index) => format!("RDMA device {name} has no address with index {index}"),
        None => format!("RDMA device {name} does not have the address {local}"),
    }))
}

/// The entry of the port's table of addresses to use.
fn address_of(
    context: &Context,
    number: u8,
    port: &Port,
    local: IpAddr,
    options: &Options,
) -> Option<(u8, Gid)> {
    if let Some(index) = options.gid_index {
        return context
            .gid(number, index.into())
            .map(|(gid, _)| (index, gid));
    }
    // InfiniBand's addresses are no IP addresses: the operator must have named the device.
    if port.link_layer == LinkLayer::InfiniBand && options.device.is_some() {
        return context.gid(number, 0).map(|(gid, _)| (0, gid));
    }
    let last = port.gids.min(256);
    (0..last).find_map(|index| match context.gid(number, index)? {
        (gid, GidKind::RoceV2) if gid.is_of(local) => Some((index as u8, gid)),
        _ => None,
    })
}
