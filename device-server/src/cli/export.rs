//! `export`: opens functions, and serves them until a signal comes.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use farbus_fabric::provider::{self, Wanted};
use farbus_fabric::wire::ExportName;
use farbus_shadow_mem::polling::Polling;
use farbus_vfio::PciAddress;
use farbus_vfio::sysfs::Host;
use log::{info, warn};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::specs::{Named, SoftNvmeSpec, SriovSpec, UserSocket, parse_name};
use super::{Failure, failure};
use crate::exports::Exports;
use crate::manager::Manager;
use crate::slices::{self, LimitSpec, SliceConfig};
use crate::sources::{Order, OrderError, Source, Stock};

pub(super) const EXAMPLES: &str = "\
Examples:
  farbus-device-server export --soft-nvme path=disk.img,size=1GiB --name disk0 --listen 127.0.0.1:7420
  farbus-device-server export --bind --pci 0000:01:00.0,name=disk0 --pci 0000:02:00.0,name=disk1
  farbus-device-server export --pci 0000:01:00.0 --name disk0 --slice name=a,size=512MiB --slice name=b,offset=512MiB,size=512MiB
  farbus-device-server export --sriov 0000:01:00.0,vfs=4,name=disk
  farbus-device-server export --provider verbs --rdma-device mlx5_0 --pci 0000:01:00.0 --listen 10.0.0.1:7420 --insecure

Prints one line that begins with \"ready\" when the exports can be claimed; it has export=NAME for
each of them. What --bind and --sriov changed is undone at the end, and after a crash at the next start.";

#[derive(Args)]
pub(super) struct ExportArgs {
    /// A PCI function: ADDRESS[,name=NAME], such as 0000:01:00.0. Without a name it is exported
    /// under its address, with - for each colon. May be given several times.
    #[arg(long, value_name = "SPEC")]
    pci: Vec<Named<PciAddress>>,
    /// Binds the functions of --pci to vfio-pci for as long as they are exported.
    #[arg(long)]
    bind: bool,
    /// Has a physical function make virtual ones, and exports these: ADDRESS,vfs=COUNT[,name=PREFIX].
    /// With a prefix they are named PREFIX-0 and on. May be given several times.
    #[arg(long, value_name = "SPEC")]
    sriov: Vec<Named<SriovSpec>>,
    /// A software NVMe drive on a file or block device:
    /// `path=PATH[,size=SIZE][,block-size=512|4096][,serial=TEXT][,name=NAME]`. With size= a missing
    /// file is made; an existing one is never shrunk or overwritten. With backing=memory,size=SIZE
    /// instead of path= it is gone at the end; backing=null holds nothing, for measurements.
    /// May be given several times.
    #[arg(long, value_name = "SPEC")]
    soft_nvme: Vec<SoftNvmeSpec>,
    /// A device that another program emulates behind a vfio-user socket: path=SOCKET[,name=NAME].
    /// May be given several times.
    #[arg(long, value_name = "SPEC")]
    vfio_user_device: Vec<Named<UserSocket>>,
    /// The export's name, which compute agents claim it by: 1 to 64 of A-Z a-z 0-9 . _ -
    /// For a single export; with several, give each its name=.
    #[arg(long, value_parser = parse_name)]
    name: Option<ExportName>,
    /// Divides the drive, so that each slice is claimed by itself, as EXPORT/NAME:
    /// `[name=NAME][,offset=SIZE][,size=SIZE][,namespace=N][,overlap=yes]` and the limits of --limit, which then
    /// hold in place of those. Without a name it is EXPORT/0, the next one EXPORT/1, and so on. For a single
    /// export. May be given several times.
    #[arg(long, value_name = "SPEC")]
    slice: Vec<SliceConfig>,
    /// Holds each claim to limits: `[iops=N][,iops-burst=N][,bytes-per-second=SIZE][,bytes-burst=SIZE]`. Commands
    /// beyond them wait. A burst is what may come at once after a while without; a tenth of a second's
    /// unless given.
    #[arg(long, value_name = "SPEC")]
    limit: Option<LimitSpec>,
    /// Where to remember what was bound, for the start after a crash.
    #[arg(long, value_name = "DIRECTORY", default_value = "/run/farbus")]
    state_dir: PathBuf,
    /// Address and port to listen on; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:7420")]
    listen: String,
    /// Allow an address that other hosts can reach, although nobody is authenticated yet.
    #[arg(long)]
    insecure: bool,
    /// What carries the data: auto (RDMA if both sides have a device and a path between them, else
    /// TCP), verbs (RDMA or nothing), or tcp.
    #[arg(long, value_name = "PROVIDER", default_value_t)]
    provider: Wanted,
    /// The RDMA device to use, such as mlx5_0. By default the one that has the address by which the
    /// compute agent has connected.
    #[arg(long, value_name = "NAME")]
    rdma_device: Option<String>,
    /// The place in the RDMA port's table of addresses. By default that of the address by which the
    /// compute agent has connected.
    #[arg(long, value_name = "INDEX")]
    gid_index: Option<u8>,
    /// How an attachment's thread waits: adaptive looks for work for a moment before it sleeps,
    /// while that pays; always never sleeps; never sleeps at once.
    #[arg(long, value_name = "POLICY", default_value_t, value_parser = poll_parser())]
    poll: Polling,
    /// Print the ready line as a JSON object.
    #[arg(long)]
    json: bool,
}

impl ExportArgs {
    fn providers(&self) -> provider::Options {
        provider::Options {
            wanted: self.provider,
            device: self.rdma_device.clone(),
            gid_index: self.gid_index,
        }
    }

    /// What is to be exported, in the order of the options' description.
    fn order(&self) -> anyhow::Result<Vec<Order>> {
        let mut orders = Vec::new();
        for spec in &self.pci {
            let (address, bind) = (spec.source, self.bind);
            orders.push((Source::Pci { address, bind }, spec.name.clone()));
        }
        for spec in &self.sriov {
            let SriovSpec { physical, count } = spec.source;
            orders.push((Source::Sriov { physical, count }, spec.name.clone()));
        }
        for spec in &self.soft_nvme {
            orders.push((Source::SoftNvme(spec.source.clone()), spec.name.clone()));
        }
        for spec in &self.vfio_user_device {
            orders.push((
                Source::VfioUser(spec.source.path.clone()),
                spec.name.clone(),
            ));
        }
        if orders.is_empty() {
            bail!("nothing to export; give --pci, --sriov, --soft-nvme or --vfio-user-device");
        }
        if self.bind && self.pci.is_empty() {
            bail!("--bind is for functions, and no --pci is given");
        }
        if let Some(name) = &self.name {
            match &mut orders[..] {
                [(_, only @ None)] => *only = Some(name.clone()),
                [(_, Some(other))] => bail!(
                    "--name {} and name={} name the same export; give one of them",
                    name.as_str(),
                    other.as_str()
                ),
                several => bail!(
                    "--name {} names one export, and there are {}; give each its name=",
                    name.as_str(),
                    several.len()
                ),
            }
        }
        if orders.len() > 1 && !self.slice.is_empty() {
            bail!(
                "--slice divides one export, and there are {}; run a device server for each that is divided",
                orders.len()
            );
        }
        let limits = self.limit.unwrap_or_default();
        let orders: Result<Vec<Order>, _> = orders
            .into_iter()
            .map(|(source, name)| {
                Ok(Order::new(source, name)?
                    .with_slices(slices::numbered(self.slice.clone()))?
                    .with_limits(limits))
            })
            .collect();
        orders.map_err(|error: OrderError| error.into())
    }
}

pub(super) fn run(args: &ExportArgs, host: &Host, out: &mut dyn Write) -> Result<u8, Failure> {
    let orders = args.order().map_err(failure(2))?;
    crate::sources::check(&orders).map_err(failure(2))?;
    let signals = signals().map_err(failure(1))?;
    let listener = listen(&args.listen, args.insecure).map_err(failure(4))?;
    let mut stock = Stock::open(&orders, host, &args.state_dir).map_err(failure(3))?;
    let exports = Exports::new(stock.take_exports());
    serve(args, listener, exports, &signals, out).map_err(failure(1))?;
    drop(stock);
    info!("ended in order");
    Ok(0)
}

fn serve(
    args: &ExportArgs,
    listener: TcpListener,
    exports: Exports,
    signals: &OwnedFd,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let address = listener.local_addr()?;
    let names = exports.names();
    let manager = Manager::new(listener, exports, args.poll)?.with_providers(args.providers());
    announce(args.json, &names, address, out)?;
    manager.run(signals)?;
    Ok(())
}

pub(super) fn announce(
    json: bool,
    names: &[String],
    address: SocketAddr,
    out: &mut dyn Write,
) -> io::Result<()> {
    if json {
        let mut line =
            serde_json::json!({"ready": true, "exports": names, "listen": address.to_string()});
        if let [name] = names {
            line["export"] = name.as_str().into();
        }
        writeln!(out, "{line}")?;
    } else {
        write!(out, "ready")?;
        for name in names {
            write!(out, " export={name}")?;
        }
        writeln!(out, " listen={address}")?;
    }
    out.flush()
}

pub(super) fn listen(address: &str, insecure: bool) -> anyhow::Result<TcpListener> {
    let addresses: Vec<SocketAddr> = address
        .to_socket_addrs()
        .with_context(|| {
            format!("the address to listen on, {address}, is not an address and port")
        })?
        .collect();
    if let Some(open) = addresses.iter().find(|address| !address.ip().is_loopback()) {
        if !insecure {
            bail!(
                "cannot listen on {address}: {} can be reached by other hosts and nobody is authenticated yet; \
                 listen on 127.0.0.1, or add --insecure (insecure = true) on a network that you trust",
                open.ip()
            );
        }
        warn!("{open} is open to every host that can reach it");
    }
    TcpListener::bind(&addresses[..])
        .with_context(|| format!("cannot listen on {address} (is the port in use?)"))
}

pub(super) fn poll_parser() -> impl TypedValueParser<Value = Polling> {
    PossibleValuesParser::new(Polling::NAMES).try_map(|name| name.parse())
}

/// A descriptor that becomes readable at SIGTERM or SIGINT.
fn signals() -> anyhow::Result<OwnedFd> {
    let (reader, writer) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    Ok(reader.into())
}
