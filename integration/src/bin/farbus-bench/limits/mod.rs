//! What the machine itself can do: the rows that all others are compared with.

pub(crate) mod local;
pub(crate) mod namespaces;
pub(crate) mod stream;
pub(crate) mod wire;

use anyhow::Result;

use self::namespaces::Namespace;
use self::wire::{Place, Wire};
use crate::session::{Skip, Subject, Take};

/// Request and response of the smallest message pair, in bytes.
pub(crate) const SMALL: (usize, usize) = (64, 64);
/// Those of a 4 KiB read: a command, and a completion with data.
pub(crate) const READ: (usize, usize) = (72, (4 << 10) + 48);
/// Size of the messages whose throughput is measured.
pub(crate) const BIG: usize = 128 << 10;

/// Subjects' names, which budgets and the model refer to.
pub(crate) const TCP: &str = "TCP";
pub(crate) const TCP_VETH: &str = "TCP over veth";
pub(crate) const UNIX: &str = "UNIX socket";
pub(crate) const EVENTFD: &str = "eventfd";
pub(crate) const MEMORY: &str = "memcpy";

/// Workloads of the throughput of one connection.
pub(crate) const SENT: &str = "128 KiB sent";
pub(crate) const RECEIVED: &str = "128 KiB received";

/// How the two ends of a ping-pong wait, and where they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// Each sleeps, on a CPU of its own.
    Blocking,
    /// Each sleeps, and both share a CPU: nobody has to wake another CPU.
    OneCpu,
    /// Neither sleeps.
    Polled,
}

impl How {
    const ALL: [Self; 3] = [Self::Blocking, Self::OneCpu, Self::Polled];
}

/// The workload of a ping-pong, as it is called in the table.
pub(crate) fn round_trip(sizes: (usize, usize), how: How) -> String {
    let how = match how {
        How::Blocking => "blocking",
        How::OneCpu => "blocking, one CPU",
        How::Polled => "polled",
    };
    format!("{} B / {} B {how}", sizes.0, sizes.1)
}

/// The workload of copying memory that no cache holds.
pub(crate) const NOT_CACHED: &str = "128 KiB not cached";

/// All limits.
pub(crate) fn subjects() -> Vec<Box<dyn Subject>> {
    vec![
        Box::new(Loopback),
        Box::new(Veth),
        Box::new(Hops),
        Box::new(local::Memory),
    ]
}

/// TCP between two processes over the loopback device.
struct Loopback;

impl Subject for Loopback {
    fn part(&self) -> &'static str {
        "limits"
    }

    fn name(&self) -> String {
        TCP.into()
    }

    fn measure(&self, take: &mut Take<'_>) -> Result<()> {
        tcp(&Place::loopback(), take)
    }
}

/// TCP between two network namespaces.
struct Veth;

impl Subject for Veth {
    fn part(&self) -> &'static str {
        "limits"
    }

    fn name(&self) -> String {
        TCP_VETH.into()
    }

    fn measure(&self, take: &mut Take<'_>) -> Result<()> {
        if !rustix::process::geteuid().is_root() {
            return Err(Skip::because("network namespaces need root rights"));
        }
        let namespace = Namespace::create()?;
        tcp(&Place::namespace(&namespace), take)
    }
}

fn tcp(place: &Place, take: &mut Take<'_>) -> Result<()> {
    for how in How::ALL {
        for sizes in [SMALL, READ] {
            take.one(&round_trip(sizes, how), |plan| {
                Wire::tcp(place, sizes, how).measure(&plan.brief())
            })?;
        }
    }
    take.one(SENT, |plan| stream::send(place, BIG, &plan.brief()))?;
    take.one(RECEIVED, |plan| stream::receive(place, BIG, &plan.brief()))
}

/// From one process, or thread, to another on this machine.
struct Hops;

impl Subject for Hops {
    fn part(&self) -> &'static str {
        "limits"
    }

    fn name(&self) -> String {
        UNIX.into()
    }

    fn measure(&self, take: &mut Take<'_>) -> Result<()> {
        for how in How::ALL {
            take.one(&round_trip(SMALL, how), |plan| {
                Wire::unix(SMALL, how).measure(&plan.brief())
            })?;
        }
        for how in How::ALL {
            let workload = round_trip((8, 8), how);
            take.one_of(EVENTFD, &workload, |plan| {
                local::eventfd(how, &plan.brief())
            })?;
        }
        Ok(())
    }
}
