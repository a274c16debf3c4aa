//! Functions that are opened by their own nodes and see address spaces of iommufd, on a kernel that has
//! that. Debian's kernels do not, so such a kernel is this machine's owner's to give (`ci/iommufd-kernel` makes one);
//! without one these tests are skipped.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use farbus_integration::attached::attach;
use farbus_integration::builder::MachineBuilder;
use farbus_integration::deadline::Deadline;
use farbus_integration::report::TestResult;
use farbus_integration::scratch::Scratch;
use farbus_integration::skip;
use farbus_integration::tools::Tools;
use farbus_integration::tools::kernel::Kernel;
use farbus_integration::vfio::{LendingServer, bind, lender, networked};
use farbus_vfio::driver::{DriverConfig, NvmeDriver};
use farbus_vfio::user::UserFunction;
use serde_json::{Value, json};

const VARIABLE: &str = "FARBUS_IOMMUFD_KERNEL";
const NVME: &str = "0000:01:00.0";
const DISK: u64 = 64 << 20;

fn kernel() -> Option<PathBuf> {
    std::env::var_os(VARIABLE).map(PathBuf::from)
}

/// A machine that lends its functions; all modules are built in.
fn iommufd_lender(name: &str, kernel: &Path, disk: &Path) -> MachineBuilder {
    lender(name, Kernel::V6_12)
        .kernel_image(kernel)
        .emulated_nvme("nv0", disk)
}

#[test]
fn functions_are_opened_by_their_own_nodes_and_driven_as_by_their_groups() -> TestResult {
    let Some(kernel) = kernel() else {
        skip!("needs a kernel with iommufd ({VARIABLE}=path)");
    };
    let scratch = Scratch::new("disk")?;
    let disk = scratch.disk("disk.img", DISK)?;
    let machine = iommufd_lender("iommufd", &kernel, &disk)
        .program("farbus-vfio-check")
        .program("farbus-device-server")
        .root_port("rp-edu", &Value::Null)
        .device(&json!({"driver": "edu", "bus": "rp-edu"}))
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    guest.check("ip link set lo up")?;
    let edu = farbus_integration::vfio::find(&guest, "1234:11e8")?;
    bind(&guest, NVME)?;
    bind(&guest, &edu)?;
    let check = |arguments: &str| {
        let said = guest.check_within(arguments, Deadline::secs(120));
        println!("{arguments}\n{said:?}");
        said
    };

    let own_node = "opened by: its own node, with iommufd";
    let described = check(&format!("farbus-vfio-check describe {NVME}"))?;
    assert!(described.contains(own_node), "{described}");
    assert!(described.contains("to 0xfedfffff"), "{described}");
    assert!(described.contains("reset: done"), "{described}");
    check(&format!("farbus-vfio-check nvme {NVME}"))?;
    check(&format!("farbus-vfio-check lend {NVME}"))?;
    // It has no reset of its own; its slot has.
    let described = check(&format!("farbus-vfio-check describe {edu}"))?;
    assert!(described.contains("reset: done"), "{described}");
    check(&format!("farbus-vfio-check edu {edu}"))?;

    let doctor = check(&format!("farbus-device-server doctor --pci {NVME}"))?;
    assert!(doctor.contains("iommufd"), "{doctor}");
    let listed = check("farbus-device-server list --json")?;
    assert!(listed.contains("dev/vfio/devices/vfio"), "{listed}");
    machine.quit()?;
    Ok(())
}

#[test]
fn drive_is_lent_through_iommufd_and_given_back() -> TestResult {
    let Some(kernel) = kernel() else {
        skip!("needs a kernel with iommufd ({VARIABLE}=path)");
    };
    let scratch = Scratch::new("disk")?;
    let disk = scratch.disk("disk.img", DISK)?;
    let machine =
        networked(iommufd_lender("iommufd-lends", &kernel, &disk)).start(&Tools::open()?)?;
    let shell = machine.wait_guest(Deadline::secs(90))?;
    shell.wait_file("/dev/nvme0n1", Deadline::secs(30))?;
    let options = format!("--bind --pci {NVME},name=disk0");
    let server = LendingServer::start(&machine, &shell, &options)?;
    let held = shell.check("ls -l /proc/$(pidof farbus-device-server)/fd")?;
    assert!(
        held.contains("/dev/iommu") && held.contains("/dev/vfio/devices/"),
        "{held}"
    );

    let socket = scratch.join("disk0.sock");
    let agent = attach(&server.address, &socket)?;
    let function = UserFunction::connect(&socket, Duration::from_secs(20))?;
    let mut driver = NvmeDriver::new(Arc::new(function), DriverConfig::default())?;
    driver.enable()?;
    driver.create_queue_pair(1, 16, Some(1))?;
    let data: Vec<u8> = (0..128 << 10).map(|n: u32| (n / 7) as u8).collect();
    driver.write(1, 8, 512, &data)?;
    let mut back = vec![0; data.len()];
    driver.read(1, 8, 512, &mut back)?;
    assert!(back == data, "the data came back changed");
    drop(driver);
    agent.terminate()?;

    println!("{}", server.terminate()?);
    shell.wait_file("/dev/nvme0n1", Deadline::secs(30))?;
    machine.quit()?;
    Ok(())
}
