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
use super::path::{Attached, Backing, Setup, start};
use super::{GUEST, GUEST_LOCAL};
use crate::awake::Awake;
use crate::results::{Figures, figure};
use crate::session::{Plan, Subject, Take};
use crate::sides::Side;
use crate::usage::{Seen, Watched};
use crate::workload::{self, READ_1, READ_32, Workload};

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

    /// A machine takes long to boot.
    fn has_own_rounds(&self) -> bool {
        true
    }

    fn measure(&self, take: &mut Take<'_>) -> Result<()> {
        take.cannot(
            &workload::of_four_queues(take.plan.quick),
            "the driver makes a queue for each of the machine's two CPUs",
        );
        take.cannot(
            &workload::of_eight_attachments(take.plan.quick),
            "eight drives on two emulated CPUs would measure these",
        );
        let scratch = Scratch::new("local")?;
        let attached = Attached::start(Setup::default_of(LENT))?;
        let socket = scratch.join("local.sock").display().to_string();
        let spec = Backing::Memory.spec(LOCAL);
        let arguments = ["serve", "--soft-nvme", &spec, "--socket", &socket];
        let local = start(TOOL, &arguments.map(str::to_owned))?;
        let watched_local = vec![Watched {
            name: "drive",
            pid: local.pid(),
            side: Side::Compute,
        }];

        let machine = MachineBuilder::new("bench")
            .userland(Userland::Large)
            .vfio_user("lent", &attached.sockets[0])
            .vfio_user("local", socket.as_ref())
            .start(&self.tools)?;
        let guest = machine.wait_guest(BOOT.into())?;
        let drives = [
            (GUEST, LENT, attached.watched()),
            (GUEST_LOCAL, LOCAL, watched_local),
        ];
        for round in take.rounds() {
            for workload in workloads(take, round) {
                for (name, size, watched) in &drives {
                    take.one_of(name, &workload.to_string(), |plan| {
                        let device = device(&guest, *size)?;
                        fio(&guest, &device, &workload, plan, watched)
                    })?;
                }
            }
        }
        end(machine)
    }
}

/// fio takes seconds to start: what is judged is in every round, the rest in the first, and most of it in one state of
/// the CPUs.
fn workloads(take: &Take<'_>, round: u32) -> Vec<Workload> {
    if take.plan.quick || round > 0 {
        vec![READ_1]
    } else if take.awake == Awake::Halting {
        workload::common(false)
    } else {
        vec![READ_1, READ_32]
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

/// Runs fio, and adds what the `watched` processes used meanwhile, its start included: they sleep until then.
fn fio(
    guest: &Guest,
    device: &str,
    workload: &Workload,
    plan: &Plan,
    watched: &[Watched],
) -> Result<Figures> {
    let block = workload.block.to_string();
    let before = Seen::now(watched)?;
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
    let measured = measured.context("running fio in the guest")?;
    let mut figures = figures(&measured);
    Seen::now(watched)?.per_io(&before, measured.ios, &mut figures);
    Ok(figures)
}

fn figures(measured: &Measured) -> Figures {
    Figures::from([
        (figure::P50.into(), measured.p50_us),
        (figure::P99.into(), measured.p99_us),
        (figure::P999.into(), measured.p999_us),
        (figure::IOPS.into(), measured.iops),
        (figure::MB_PER_S.into(), measured.bytes_per_second / 1e6),
    ])
}
