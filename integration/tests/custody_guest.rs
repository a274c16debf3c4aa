//! A guest under QEMU whose worker is killed again and again under verified I/O, and whose daemon is
//! replaced: it notices nothing but pauses.

#![forbid(unsafe_code)]

use farbus_compute_agent::custody::Event;
use farbus_integration::attached;
use farbus_integration::builder::MachineBuilder;
use farbus_integration::custody::KeptWorker;
use farbus_integration::deadline::Deadline;
use farbus_integration::guest::Guest;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use farbus_integration::tools::initramfs::Userland;
use farbus_integration::verify;

const DRIVE: &str = "/dev/nvme0n1";
/// How often the worker is killed; every third time the daemon is replaced before.
const KILLS: u32 = 12;
/// Shell words that print how many sectors the guest has written.
const WRITTEN: &str = "awk '{print $7}' /sys/block/nvme0n1/stat";

fn written(guest: &Guest) -> Result<u64, Failure> {
    Ok(guest.check(WRITTEN)?.trim().parse()?)
}

fn killed_workers_are_pauses(msix: &str) -> TestResult {
    let scratch = Scratch::new("custody")?;
    let socket = scratch.join("disk0.sock");
    let server = attached::serve("backing=memory,size=256MiB")?;
    let address = attached::address(&server);
    let mut kept = KeptWorker::start(scratch.path(), &address, &socket, &["--msix", msix])?;
    let machine = MachineBuilder::new(&format!("custody-{msix}"))
        .userland(Userland::Large)
        .vfio_user("disk0", &socket)
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(60))?;
    let job = guest.spawn(&format!(
        "fio --name=custody --filename={DRIVE} --direct=1 --ioengine=libaio --rw=randwrite \
         --bsrange=4k-128k --iodepth=16 --size=64M --loops=200 --verify=crc32c --verify_fatal=1 \
         --verify_backlog=64 --time_based --runtime=40 --output-format=terse"
    ))?;
    for kill in 0..KILLS {
        let before = written(&guest)?;
        guest.wait_until(
            &format!("test $({WRITTEN}) -gt {}", before + 1024),
            Deadline::secs(60),
        )?;
        if kill % 3 == 2 {
            kept.restart_keeper()?;
            kept.event("the worker's return", |event| {
                matches!(event, Event::Ready { .. })
            })?;
        }
        kept.kill_worker()?;
        kept.start_worker()?;
    }
    job.check(Deadline::secs(180))?;
    let log = guest.check("dmesg")?;
    for word in ["timeout", "I/O error", "resetting controller", "polled"] {
        assert!(!log.contains(word), "{log}");
    }
    // A VM that is reset finds the drive as new, and QEMU ends as ever.
    guest.reboot(Deadline::secs(60))?;
    let files = verify::filesystem(&guest, DRIVE)?;
    kept.kill_worker()?;
    kept.start_worker()?;
    verify::files_intact(&guest, DRIVE, &files)?;
    machine.quit()?;
    kept.end()?;
    server.terminate()?;
    Ok(())
}

#[test]
fn killed_workers_are_pauses_to_a_guest_with_mediated_msix() -> TestResult {
    killed_workers_are_pauses("mediated")
}

#[test]
fn killed_workers_are_pauses_to_a_guest_with_irqfds() -> TestResult {
    killed_workers_are_pauses("irqfd")
}
