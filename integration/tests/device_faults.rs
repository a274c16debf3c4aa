//! What becomes of a lent NVMe controller that fails, in a machine that lends it through VFIO: the
//! one who uses it sees what a local controller would have shown, the device server goes on, and the
//! controller is lent again when it is back, without a restart.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use farbus_integration::attached::attach;
use farbus_integration::builder::MachineBuilder;
use farbus_integration::daemon::Daemon;
use farbus_integration::deadline::Deadline;
use farbus_integration::guest::Guest;
use farbus_integration::machine::Machine;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use farbus_integration::tools::kernel::Kernel;
use farbus_integration::vfio::{LendingServer, lender, networked};
use farbus_vfio::driver::{DriverConfig, DriverError, NvmeDriver};
use farbus_vfio::nvme::nvm;
use farbus_vfio::user::UserFunction;
use serde_json::{Value, json};

const DISK: u64 = 64 << 20;
const EXPORT: &str = "--bind --pci 0000:01:00.0,name=disk0";
const BLOCK: usize = 4096;
/// Where the disk has an error, in sectors of 512 bytes.
const BAD_SECTOR: u64 = 4096;

type Driver = NvmeDriver<UserFunction>;

/// A machine with one NVMe controller, and a network to it.
fn host(name: &str) -> MachineBuilder {
    networked(lender(name, Kernel::V6_12))
}

/// A controller whose disk has an error in one place, and can be stopped with QEMU's `qemu-io`.
fn faulty_nvme(builder: MachineBuilder, disk: &Path) -> MachineBuilder {
    let node = json!({
        "driver": "raw",
        "node-name": "node-nv0",
        "file": {
            "driver": "blkdebug",
            "image": {"driver": "file", "filename": disk.display().to_string()},
            "inject-error": [{
                "event": "none", "iotype": "read", "errno": 5, "sector": BAD_SECTOR,
                "once": false, "immediately": true,
            }],
        },
    });
    builder
        .root_port("rp-nv0", &Value::Null)
        .argument("-blockdev")
        .argument(&node.to_string())
        .device(&nvme())
}

/// The controller, as it is plugged.
fn nvme() -> Value {
    json!({"driver": "nvme", "id": "nv0", "bus": "rp-nv0", "drive": "node-nv0", "serial": "nv0"})
}

fn lend(machine: &Machine) -> Result<(Guest, LendingServer), Failure> {
    let shell = machine.wait_guest(Deadline::secs(90))?;
    shell.wait_file("/dev/nvme0n1", Deadline::secs(30))?;
    let server = LendingServer::start(machine, &shell, EXPORT)?;
    Ok((shell, server))
}

/// Drives what is behind a socket, as a guest would.
fn drive(socket: &Path) -> Result<Driver, Failure> {
    let patience = Duration::from_secs(60);
    let function = UserFunction::connect(socket, patience)?;
    let config = DriverConfig {
        timeout: patience,
        ..DriverConfig::default()
    };
    let mut driver = NvmeDriver::new(Arc::new(function), config)?;
    bring_up(&mut driver)?;
    Ok(driver)
}

/// Resets the controller and gives it two queue pairs, as a driver does at first and after a failure.
fn bring_up(driver: &mut Driver) -> Result<(), DriverError> {
    driver.enable()?;
    driver.create_queue_pair(1, 16, Some(1))?;
    driver.create_queue_pair(2, 16, Some(2))
}

/// Reads one block of 4 KiB that begins at a sector.
fn read(driver: &mut Driver, queue: u16, sector: u64) -> Result<Vec<u8>, DriverError> {
    let mut data = vec![0; BLOCK];
    driver.read(queue, sector, 512, &mut data)?;
    Ok(data)
}

/// A block that says which one it is.
fn pattern(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(BLOCK / 8)
}

fn eventually(what: &str, mut reached: impl FnMut() -> bool) -> TestResult {
    let begun = Instant::now();
    while !reached() {
        if begun.elapsed() > Duration::from_secs(60) {
            return Err(format!("{what}: not within 60 s").into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

#[test]
fn unplugged_controller_fails_for_its_user_and_is_lent_again_once_it_is_back() -> TestResult {
    let scratch = Scratch::new("unplug")?;
    let disk = scratch.disk("disk.img", DISK)?;
    let machine = host("unplug")
        .emulated_nvme("nv0", &disk)
        .start(&Tools::open()?)?;
    let (shell, server) = lend(&machine)?;
    let socket = scratch.join("disk0.sock");
    let agent = attach(&server.address, &socket)?;
    let mut driver = drive(&socket)?;
    driver.write(1, 8, 512, &pattern(7))?;

    // QEMU says that it is done only after the device server has let go.
    machine.qmp().device_del("nv0", Deadline::secs(60))?;

    let in_vain = read(&mut driver, 1, 8);
    assert!(
        matches!(in_vain, Err(DriverError::Fatal { .. })),
        "{in_vain:?}"
    );
    let log = server.log()?;
    println!("{log}");
    assert!(
        log.contains("disk0: failed: the device server's host unplugs it"),
        "{log}"
    );
    let other = scratch.join("other.sock").display().to_string();
    let arguments = [
        "attach",
        "--from",
        &server.address,
        "--export",
        "disk0",
        "--vfio-user",
        &other,
    ];
    let refused = Daemon::run("farbus-compute-agent", &arguments, Deadline::secs(30))?;
    println!("{}", refused.stderr);
    assert!(!refused.status.success());
    assert!(
        refused.stderr.contains("export disk0 has failed"),
        "{}",
        refused.stderr
    );

    machine.qmp().device_add(&nvme())?;
    eventually("the agent has it again", || {
        agent.stderr().contains("is rebuilt on the new link")
    })?;
    bring_up(&mut driver)?;
    assert!(read(&mut driver, 1, 8)? == pattern(7));
    drop(driver);
    agent.terminate()?;

    println!("{}", server.terminate()?);
    shell.wait_file("/dev/nvme0n1", Deadline::secs(30))?;
    machine.quit()?;
    Ok(())
}

#[test]
fn unplugged_controller_that_nobody_uses_is_let_go_of() -> TestResult {
    let scratch = Scratch::new("idle")?;
    let disk = scratch.disk("disk.img", DISK)?;
    let machine = host("idle")
        .emulated_nvme("nv0", &disk)
        .start(&Tools::open()?)?;
    let (shell, server) = lend(&machine)?;

    machine.qmp().device_del("nv0", Deadline::secs(60))?;
    machine.qmp().device_add(&nvme())?;
    shell.wait_file("/sys/bus/pci/devices/0000:01:00.0", Deadline::secs(30))?;

    let socket = scratch.join("disk0.sock");
    let agent = attach(&server.address, &socket)?;
    read(&mut drive(&socket)?, 1, 8)?;
    agent.terminate()?;
    println!("{}", server.terminate()?);
    machine.quit()?;
    Ok(())
}

/// A function that is pulled out: nobody has asked, and the kernel does not know. It needs more than
/// a minute to close it, for which a device server that is to end does not keep its other functions.
#[test]
fn controller_that_vanishes_without_a_word_fails_for_its_user_and_for_nobody_else() -> TestResult {
    let scratch = Scratch::new("vanish")?;
    let (disk, other) = (scratch.disk("0", DISK)?, scratch.disk("1", DISK)?);
    let machine = host("vanish")
        .emulated_nvme("nv0", &disk)
        .emulated_nvme("nv1", &other)
        .start(&Tools::open()?)?;
    let shell = machine.wait_guest(Deadline::secs(90))?;
    shell.wait_file("/dev/nvme1n1", Deadline::secs(30))?;
    let both = format!("{EXPORT} --pci 0000:02:00.0,name=disk1");
    let server = LendingServer::start(&machine, &shell, &both)?;
    let socket = scratch.join("disk0.sock");
    let agent = attach(&server.address, &socket)?;
    let mut driver = drive(&socket)?;
    read(&mut driver, 1, 8)?;

    // Power off in the port's Slot Control (PCIe 4.0 §7.5.3.10).
    let ports = farbus_integration::vfio::find(&shell, "::0604")?;
    let port = ports.lines().next().ok_or("there is no port")?;
    shell.check(&format!("setpci -s {port} CAP_EXP+18.w=0700"))?;

    let in_vain = read(&mut driver, 1, 8);
    assert!(
        matches!(in_vain, Err(DriverError::Fatal { .. })),
        "{in_vain:?}"
    );
    let tells = || {
        server
            .log()
            .is_ok_and(|log| log.contains("disk0: failed: "))
    };
    eventually("the log tells of it", tells)?;
    drop(driver);
    agent.terminate()?;
    shell.check("killall -TERM farbus-device-server")?;
    let begun = Instant::now();
    let says = |what: &str| server.log().is_ok_and(|log| log.contains(what));
    eventually("its end", || says("ended in order"))?;
    let (log, after) = (server.log()?, begun.elapsed());
    println!("{log}\nended in order after {after:?}");
    assert!(after < Duration::from_secs(30), "{after:?}");
    assert!(log.contains("gave 0000:02:00.0 back to nvme"), "{log}");
    assert!(log.contains("0000:01:00.0 is not closed"), "{log}");
    assert!(
        log.contains("0000:01:00.0 could not be given back, and the next start will try again"),
        "{log}"
    );
    let driver = shell.check("readlink /sys/bus/pci/devices/0000:02:00.0/driver")?;
    assert!(driver.ends_with("/nvme"), "{driver}");
    machine.quit()?;
    Ok(())
}

#[test]
fn media_error_of_the_drive_is_that_of_its_user() -> TestResult {
    let scratch = Scratch::new("media")?;
    let disk = scratch.disk("disk.img", DISK)?;
    let machine = faulty_nvme(host("media"), &disk).start(&Tools::open()?)?;
    let (_shell, server) = lend(&machine)?;
    let socket = scratch.join("disk0.sock");
    let agent = attach(&server.address, &socket)?;
    let mut driver = drive(&socket)?;

    let failed = read(&mut driver, 1, BAD_SECTOR);
    let status = failed.as_ref().err().and_then(DriverError::status);
    // Unrecovered Read Error: a media error, code 81h (NVMe 1.4 §4.6.1.2.3).
    assert_eq!(
        status.map(|status| status.0 & 0x7ff),
        Some(0x281),
        "{failed:?}"
    );
    read(&mut driver, 1, 8)?;
    read(&mut driver, 2, BAD_SECTOR + 8)?;
    drop(driver);
    agent.terminate()?;
    println!("{}", server.terminate()?);
    machine.quit()?;
    Ok(())
}

#[test]
fn hung_command_stays_outstanding_while_others_go_on() -> TestResult {
    let scratch = Scratch::new("hung")?;
    let disk = scratch.disk("disk.img", DISK)?;
    let machine = faulty_nvme(host("hung"), &disk).start(&Tools::open()?)?;
    let (_shell, server) = lend(&machine)?;
    let socket = scratch.join("disk0.sock");
    let agent = attach(&server.address, &socket)?;
    let mut driver = drive(&socket)?;
    let said = machine
        .qmp()
        .human("qemu-io -d nv0 \"break write_aio A\"")?;
    println!("{said}");

    let zeroes = driver.memory().allocate(BLOCK)?;
    let mut write = farbus_vfio::driver::block_command(nvm::WRITE, 8, BLOCK, 512);
    write.set_prps(zeroes.iova().0, 0);
    let hung = driver.submit(1, write)?;
    let begun = Instant::now();
    // Longer than any of the daemons waits for a sign of life.
    while begun.elapsed() < Duration::from_secs(8) {
        read(&mut driver, 1, 64)?;
        read(&mut driver, 2, 128)?;
        assert!(
            driver.poll(1)?.is_none(),
            "the command that hangs has completed"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    let said = machine.qmp().human("qemu-io -d nv0 \"resume A\"")?;
    println!("{said}");
    let completed = driver.wait(1, hung)?;
    assert!(completed.status.is_success(), "{completed:?}");
    drop(driver);
    agent.terminate()?;
    println!("{}", server.terminate()?);
    machine.quit()?;
    Ok(())
}

/// Writes blocks and reads them back until told to end; counts them.
fn write_and_read(
    driver: &mut Driver,
    end: &AtomicBool,
    done: &AtomicU64,
) -> Result<(), DriverError> {
    for number in 0.. {
        if end.load(Ordering::Relaxed) {
            break;
        }
        let sector = number % 512 * 8;
        driver.write(1, sector, 512, &pattern(number))?;
        assert!(
            read(driver, 2, sector)? == pattern(number),
            "block {number}"
        );
        done.store(number, Ordering::Relaxed);
    }
    Ok(())
}

#[test]
fn killed_device_server_is_started_again_and_its_user_goes_on() -> TestResult {
    let scratch = Scratch::new("killed")?;
    let disk = scratch.disk("disk.img", DISK)?;
    let machine = host("killed")
        .emulated_nvme("nv0", &disk)
        .start(&Tools::open()?)?;
    let (shell, server) = lend(&machine)?;
    let socket = scratch.join("disk0.sock");
    let agent = attach(&server.address, &socket)?;
    let mut driver = drive(&socket)?;
    let (end, done) = (AtomicBool::new(false), AtomicU64::new(0));

    let (worked, outcome) = std::thread::scope(|scope| {
        let worker = scope.spawn(|| write_and_read(&mut driver, &end, &done));
        let outcome = (|| {
            let mut server = server;
            for _ in 0..2 {
                let before = done.load(Ordering::Relaxed);
                eventually("I/O", || done.load(Ordering::Relaxed) > before + 50)?;
                server.kill()?;
                server = LendingServer::start(&machine, &shell, EXPORT)?;
                println!("{}", server.log()?);
            }
            let before = done.load(Ordering::Relaxed);
            eventually("I/O", || done.load(Ordering::Relaxed) > before + 50)?;
            Ok::<_, Failure>(server)
        })();
        end.store(true, Ordering::Relaxed);
        (worker.join(), outcome)
    });

    let server = outcome?;
    worked.map_err(|_| "the reader found other data")??;
    drop(driver);
    agent.terminate()?;
    let said = server.terminate()?;
    println!("{said}");
    assert!(said.contains("takes over 0000:01:00.0"), "{said}");
    // Its former driver has it back.
    shell.wait_file("/dev/nvme0n1", Deadline::secs(30))?;
    machine.quit()?;
    Ok(())
}

/// QEMU's NVMe controller cannot report errors; this other class of device can.
#[test]
fn reported_error_of_a_function_that_nobody_uses_is_in_the_log() -> TestResult {
    let scratch = Scratch::new("aer")?;
    let disk = scratch.disk("disk.img", DISK)?;
    let machine = host("aer")
        .root_port("rp0", &Value::Null)
        .block_node("node0", &disk)
        .device(&json!({
            "driver": "virtio-blk-pci", "id": "vb0", "bus": "rp0", "drive": "node0",
            "aer": true, "disable-legacy": "on", "iommu_platform": true,
        }))
        .start(&Tools::open()?)?;
    let shell = machine.wait_guest(Deadline::secs(90))?;
    let server = LendingServer::start(&machine, &shell, EXPORT)?;

    let injected = machine
        .qmp()
        .human("pcie_aer_inject_error vb0 POISON_TLP")?;
    println!("{injected}");

    let reported = "disk0: vfio 0000:01:00.0 has reported an uncorrectable PCIe error";
    let tells = || server.log().is_ok_and(|log| log.contains(reported));
    eventually("the log tells of it", tells)?;
    println!("{}", server.terminate()?);
    machine.quit()?;
    Ok(())
}
