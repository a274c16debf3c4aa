//! A worker that keeps a guest's MSI-X table is killed, and its successor keeps it.

use farbus_compute_agent::hotplug::{self, DeviceKind, Plugged, Unplugged};
use farbus_integration::attached;
use farbus_integration::builder::MachineBuilder;
use farbus_integration::custody::KeptWorker;
use farbus_integration::deadline::Deadline;
use farbus_integration::report::TestResult;
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use farbus_integration::tools::initramfs::Userland;
use serde_json::Value;

use crate::bed::{ID, NVME, device, limit, vm};

const KILLS: u64 = 12;

#[test]
fn killed_workers_are_pauses_to_a_guest_whose_interrupts_they_keep() -> TestResult {
    let scratch = Scratch::new("killed")?;
    let socket = scratch.join("disk0.sock");
    let server = attached::serve("backing=memory,size=64MiB")?;
    let address = attached::address(&server);
    let mut kept = KeptWorker::start(scratch.path(), &address, &socket, &[])?;
    let qmp = scratch.join("agent.qmp");
    let machine = MachineBuilder::new("killed")
        .userland(Userland::Large)
        .monitor(&qmp)
        .root_port("rp1", &Value::Null)
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    let vm = vm(&qmp);
    let plugged = hotplug::plug(&vm, &device(&socket, DeviceKind::VfioUser))?;
    assert_eq!(plugged, Plugged::Now);
    guest.wait_file(NVME, Deadline::secs(30))?;

    let job = guest.spawn(&format!(
        "fio --name=kill --filename={NVME} --direct=1 --ioengine=libaio --rw=randwrite \
         --bsrange=4k-64k --iodepth=16 --numjobs=2 --offset_increment=32M --size=32M --loops=40 \
         --runtime=20 --verify=crc32c --verify_fatal=1 --output-format=terse"
    ))?;
    for kill in 0..KILLS {
        let enough = kept.completed()? + 20 + 37 * kill;
        let deadline = Deadline::secs(60);
        while kept.completed()? < enough {
            assert!(!deadline.has_passed(), "no I/O after {kill} kills");
            std::thread::yield_now();
        }
        kept.kill_worker()?;
        kept.start_worker()?;
    }
    job.check(Deadline::secs(180))?;
    let log = guest.check("dmesg")?;
    for word in ["timeout", "I/O error", "resetting controller"] {
        assert!(!log.contains(word), "{log}");
    }
    let unplugged = hotplug::unplug(&vm, ID, limit(30), false)?;
    assert_eq!(unplugged, Unplugged::Now);
    machine.quit()?;
    kept.end()?;
    server.terminate()?;
    Ok(())
}
