//! A device that another program emulates behind a vfio-user socket is lent like any other.
//!
//! The other program is a compute agent, whose socket is that of a drive which a device server
//! lends: what a guest does here crosses the network twice.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use farbus_integration::attached::{AttachedDrive, address, attach};
use farbus_integration::daemon::Daemon;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_vfio::driver::{DriverConfig, DriverError, NvmeDriver};
use farbus_vfio::user::UserFunction;

const PATIENCE: Duration = Duration::from_secs(10);

/// Starts a device server that lends the device behind a socket.
fn lend(socket: &Path) -> farbus_integration::error::Result<Daemon> {
    let device = format!("path={},name=disk0", socket.display());
    Daemon::start(
        "farbus-device-server",
        &[
            "export",
            "--vfio-user-device",
            &device,
            "--listen",
            "127.0.0.1:0",
        ],
    )
}

/// Drives what is behind a socket, as a guest would: its controller, enabled, with a queue.
fn drive(socket: &Path) -> Result<NvmeDriver<UserFunction>, Failure> {
    let function = UserFunction::connect(socket, PATIENCE)?;
    let mut driver = NvmeDriver::new(Arc::new(function), DriverConfig::default())?;
    driver.enable()?;
    driver.create_queue_pair(1, 16, Some(1))?;
    Ok(driver)
}

#[test]
fn device_behind_a_socket_is_lent_and_works() -> TestResult {
    let scratch = Scratch::new("vfio-user")?;
    let drive_behind = AttachedDrive::start(&scratch, "size=16MiB")?;
    let lender = lend(&drive_behind.socket)?;
    let socket = scratch.join("lent.sock");
    let agent = attach(&address(&lender), &socket)?;

    let mut driver = drive(&socket)?;
    let written: Vec<u8> = (0..64 << 10).map(|at: u32| (at / 7) as u8).collect();
    let mut read = vec![0; written.len()];
    let block_size = driver.namespace()?.block_size;
    driver.write(1, 8, block_size, &written)?;
    driver.flush(1)?;
    driver.read(1, 8, block_size, &mut read)?;

    assert!(read == written);
    let disk = std::fs::read(&drive_behind.disk)?;
    let at = 8 * block_size as usize;
    assert!(disk[at..at + written.len()] == written);
    drop(driver);
    agent.terminate()?;
    lender.terminate()?;
    drive_behind.end()?;
    Ok(())
}

#[test]
fn death_of_the_other_program_is_the_devices_and_ends_with_it() -> TestResult {
    let scratch = Scratch::new("vfio-user")?;
    let drive_behind = AttachedDrive::start(&scratch, "size=16MiB")?;
    let mut lender = lend(&drive_behind.socket)?;
    let socket = scratch.join("lent.sock");
    let agent = attach(&address(&lender), &socket)?;
    let mut driver = drive(&socket)?;
    let mut block = vec![0; 4096];
    let block_size = driver.namespace()?.block_size;
    driver.read(1, 0, block_size, &mut block)?;

    drive_behind.agent.kill()?;
    let in_vain: Result<(), DriverError> = driver.read(1, 0, block_size, &mut block);

    assert!(in_vain.is_err(), "nobody was there to read from");
    lender.check_running()?;
    drop(driver);
    agent.terminate()?;
    let log = lender.stderr();
    assert!(log.contains("disk0.sock: the function is gone"), "{log}");

    // The program is started again, and the device is lent to the next one.
    std::fs::remove_file(&drive_behind.socket).or_else(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })?;
    let again = attach(&address(&drive_behind.server), &drive_behind.socket)?;
    let next = attach(&address(&lender), &scratch.join("next.sock"))?;
    let mut driver = drive(&scratch.join("next.sock"))?;
    driver.read(1, 0, block_size, &mut block)?;
    drop(driver);
    next.terminate()?;
    lender.terminate()?;
    again.terminate()?;
    drive_behind.server.terminate()?;
    Ok(())
}
