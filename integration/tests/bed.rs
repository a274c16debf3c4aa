//! The test bed proves itself: what it says when machines fail, and that its other tools work.

use std::time::{Duration, Instant};

use farbus_integration::builder::MachineBuilder;
use farbus_integration::deadline::Deadline;
use farbus_integration::error::Error;
use farbus_integration::guest::Guest;
use farbus_integration::machine::Machine;
use farbus_integration::report::{self, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use serde_json::{Value, json};

fn boot(builder: &MachineBuilder) -> Result<(Machine, Guest), Error> {
    let machine = builder.start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(60))?;
    Ok((machine, guest))
}

#[test]
fn guest_panic_ends_a_command_and_shows_the_console() -> TestResult {
    let (_machine, guest) = boot(&MachineBuilder::new("panic"))?;
    let begun = Instant::now();
    let ended = guest.run_within(
        "echo c >/proc/sysrq-trigger; sleep 1000",
        Deadline::secs(100),
    );
    let text = ended.unwrap_err().to_string();
    assert!(text.contains("sysrq triggered crash"), "{text}");
    assert!(begun.elapsed() < Duration::from_secs(30));
    report::failure_was_expected();
    Ok(())
}

#[test]
fn end_of_qemu_ends_a_command() -> TestResult {
    let (machine, guest) = boot(&MachineBuilder::new("killed"))?;
    guest.spawn("sleep 1000")?;
    machine.kill()?;
    let ended = guest.run_within("true", Deadline::secs(100));
    assert!(
        matches!(ended, Err(Error::MachineExited { .. } | Error::Io { .. })),
        "{ended:?}"
    );
    report::failure_was_expected();
    Ok(())
}

#[test]
fn refused_command_line_is_told_in_qemus_words() -> TestResult {
    let builder = MachineBuilder::new("refused").device(&json!({"driver": "no-such-device"}));
    let text = builder.start(&Tools::open()?).unwrap_err().to_string();
    assert!(
        text.contains("'no-such-device' is not a valid device"),
        "{text}"
    );
    Ok(())
}

#[test]
fn command_output_comes_whole_and_unchanged() -> TestResult {
    let (_machine, guest) = boot(&MachineBuilder::new("output").cpus(1))?;

    let every_byte: Vec<u8> = (0..=255).cycle().take(4000).collect();
    guest.write_file("/tmp/bytes", &every_byte)?;
    assert_eq!(guest.run("cat /tmp/bytes")?.bytes, every_byte);

    let long = guest.check("seq 20000")?;
    assert_eq!(long.lines().count(), 20000);

    let noisy = guest.run("for i in 1 2 3; do echo message >/dev/kmsg; echo $i; done; exit 3")?;
    assert_eq!((noisy.status, noisy.text().as_str()), (3, "1\n2\n3"));

    let job = guest.spawn("sleep 0.2; echo done; exit 5")?;
    assert_eq!(guest.check("echo meanwhile")?, "meanwhile");
    let ended = job.wait(Deadline::secs(20))?;
    assert_eq!((ended.status, ended.text().as_str()), (5, "done"));

    let missed = guest.run_within("sleep 1000", Deadline::after(Duration::from_millis(200)));
    assert!(matches!(missed, Err(Error::Deadline { .. })), "{missed:?}");
    report::failure_was_expected();
    Ok(())
}

#[test]
fn drive_is_plugged_and_unplugged_and_the_guest_survives_a_reset() -> TestResult {
    let scratch = Scratch::new("disk")?;
    let disk = scratch.disk("disk.img", 16 << 20)?;
    let builder = MachineBuilder::new("plug")
        .iommu()
        .root_port("rp0", &Value::Null)
        .block_node("node0", &disk);
    let (machine, guest) = boot(&builder)?;

    let drive =
        json!({"driver": "nvme", "id": "nv0", "bus": "rp0", "drive": "node0", "serial": "s"});
    machine.qmp().device_add(&drive)?;
    guest.wait_file("/dev/nvme0n1", Deadline::secs(30))?;
    machine.qmp().device_del("nv0", Deadline::secs(30))?;
    let gone = guest.run("test -e /dev/nvme0n1")?;
    assert_eq!(gone.status, 1);

    machine.reset(Deadline::secs(60))?;
    guest.power_off()?;
    machine.wait_end(Deadline::secs(30))?;
    Ok(())
}
