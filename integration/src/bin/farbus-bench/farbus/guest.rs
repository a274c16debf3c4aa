//! fio in a guest: on a drive that is lent over TCP, and on the same software drive without a fabric.
//!
//! Both drives are in one machine and are measured in turn. Its CPUs are emulated, which makes everything in the
//! guest slow; what the fabric adds is seen all the same.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use farbus_integration::builder::MachineBuilder;
use farbus_integration::guest::Guest;
use farbus_integration::machine::Machine;
use farbus_integration::measure::{self, Measured, measure};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use farbus_integration::tools::initramfs::Userland;

use super::load::TOOL;
use super::path::{Attached, Backing, Poll, start};
use super::{GUEST, GUEST_LOCAL};
use crate::results::{Figures, figure};
use crate::session::{Plan, Subject, Take};
use crate::workload::{READ_1, READ_32, Workload};

/// The two drives have different sizes, by which the guest's are told apart.
const LENT: u64 = 256 << 20;
const LOCAL: u64 = 257 << 20;

const BOOT: Duration = Duration::from_secs(90);

pub(super) struct Guests {
    tools: Tools,
}

impl Guests {
    pub(super) fn new(tools: Tools) -> Self {
        Self { tools }
    }
}

impl Subject for Guests {
    fn part(&self) -> &'static str {
        "farbus"
    }

    fn name(&self) -> String {
        GUEST.into()
    }

    fn is_slow(&self) -> bool {
        true
    }

    fn measure(&self, take: &mut Take<'_>) -> Result<()> {
        let scratch = Scratch::new("local")?;
        let attached = Attached::start(Backing::Memory, LENT, 1, Poll::Adaptive, 1)?;
        let socket = scratch.join("local.sock").display().to_string();
        let spec = Backing::Memory.spec(LOCAL);
        let arguments = ["serve", "--soft-nvme", &spec, "--socket", &socket];
        let _local = start(TOOL, &arguments.map(str::to_owned))?;

        let machine = MachineBuilder::new("bench")
            .userland(Userland::Large)
            .vfio_user("lent", &attached.sockets[0])
            .vfio_user("local", socket.as_ref())
            .start(&self.tools)?;
        let guest = machine.wait_guest(BOOT.into())?;
        let workloads = if take.plan.quick {
            &[READ_1][..]
        } else {
            &[READ_1, READ_32]
        };
        for workload in workloads {
            for (name, size) in [(GUEST, LENT), (GUEST_LOCAL, LOCAL)] {
                take.one_of(name, &workload.to_string(), |plan| {
                    let device = device(&guest, size)?;
                    Ok(figures(fio(&guest, &device, workload, plan)?))
                })?;
            }
        }
        end(machine)
    }
}

fn end(machine: Machine) -> Result<()> {
    Ok(machine.quit()?)
}

/// The guest's name of the drive of this size.
fn device(guest: &Guest, size: u64) -> Result<String> {
    let sectors = size / 512;
    let found = guest.check(&format!(
        "grep -lx {sectors} /sys/class/block/nvme*n1/size | cut -d / -f 5"
    ))?;
    if found.is_empty() || found.contains('\n') {
        bail!("the guest has no single drive of {sectors} sectors: {found:?}");
    }
    Ok(format!("/dev/{found}"))
}

fn fio(guest: &Guest, device: &str, workload: &Workload, plan: &Plan) -> Result<Measured> {
    let block = workload.block.to_string();
    let measured = measure(
        guest,
        device,
        &measure::Workload {
            pattern: workload.pattern.name(),
            block: &block,
            depth: workload.depth,
            // fio starts slowly on an emulated CPU, and counts in seconds.
            seconds: plan.time.as_secs_f64().ceil() as u32 + 1,
        },
    );
    measured.context("running fio in the guest")
}

fn figures(measured: Measured) -> Figures {
    Figures::from([
        (figure::P50.into(), measured.p50_us),
        (figure::P99.into(), measured.p99_us),
        (figure::IOPS.into(), measured.iops),
        (figure::MB_PER_S.into(), measured.bytes_per_second / 1e6),
    ])
}
