//! The kernel's VFIO, in machines with an IOMMU and devices behind it: what a device server does
//! with the functions of its host.

use std::path::Path;

use farbus_integration::builder::MachineBuilder;
use farbus_integration::deadline::Deadline;
use farbus_integration::guest::{Guest, Job};
use farbus_integration::machine::Machine;
use farbus_integration::report::{self, Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use farbus_integration::tools::kernel::Kernel;
use farbus_integration::vfio::{bind, find, lender};
use serde_json::{Value, json};

const NVME: &str = "0000:01:00.0";
const DISK: u64 = 64 << 20;
const EDU: &str = "1234:11e8";
/// Runs a command as a user without rights of his own.
const UNPRIVILEGED: &str = "setpriv --reuid 1000 --regid 1000 --clear-groups";

/// A machine with one NVMe controller, bound to vfio-pci.
fn with_nvme(kernel: Kernel, disk: &Path) -> Result<(Machine, Guest), Failure> {
    let machine = lender(&format!("lender-{}", kernel.name()), kernel)
        .program("farbus-vfio-check")
        .emulated_nvme("nv0", disk)
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    bind(&guest, NVME)?;
    Ok((machine, guest))
}

/// Runs the check program, which must succeed; its output is also the test's.
fn check(guest: &Guest, arguments: &str) -> Result<String, Failure> {
    let command = format!("farbus-vfio-check {arguments}");
    let said = guest.check_within(&command, Deadline::secs(120))?;
    println!("{command}\n{said}");
    Ok(said)
}

/// Runs the check program, which must fail.
fn refused(guest: &Guest, command: &str) -> Result<String, Failure> {
    let ended = guest.run(command)?;
    println!("{command}\n{}", ended.text());
    assert_eq!(ended.status, 1, "{}", ended.text());
    Ok(ended.text())
}

/// Starts the check program in the background and waits until it holds a function; `how` is
/// `hold` or `outlive`.
fn hold(guest: &Guest, how: &str, address: &str) -> Result<Job, Failure> {
    let job = guest.spawn(&format!(
        "farbus-vfio-check {how} {address} >/tmp/held 2>&1; status=$?; cat /tmp/held; exit $status"
    ))?;
    // The guest's own clock is the one that counts here.
    guest.check("until grep -q ^held /tmp/held; do sleep 0.05; done")?;
    Ok(job)
}

fn drives_a_controller(kernel: Kernel) -> TestResult {
    let scratch = Scratch::new("disk")?;
    let disk = scratch.disk("disk.img", DISK)?;
    let (machine, guest) = with_nvme(kernel, &disk)?;
    let described = check(&guest, &format!("describe {NVME}"))?;
    assert!(described.contains("class: 010802"), "{described}");
    assert!(described.contains("BAR0: 16384 bytes"), "{described}");
    assert!(described.contains("reset: done"), "{described}");
    assert!(described.contains("to 0xfedfffff"), "{described}");
    assert!(
        described.contains("opened by: its group's node"),
        "{described}"
    );
    check(&guest, &format!("nvme {NVME}"))?;
    machine.quit()?;
    Ok(())
}

#[test]
fn nvme_controller_is_driven_through_vfio_on_6_1() -> TestResult {
    drives_a_controller(Kernel::V6_1)
}

#[test]
fn nvme_controller_is_driven_through_vfio_on_6_12() -> TestResult {
    drives_a_controller(Kernel::V6_12)
}

/// What one tenant leaves in the controller and in memory is gone for the next; and what an I/O costs.
#[test]
fn next_tenant_finds_a_reset_controller_and_unused_memory() -> TestResult {
    let scratch = Scratch::new("disk")?;
    let disk = scratch.disk("disk.img", DISK)?;
    let (machine, guest) = with_nvme(Kernel::V6_12, &disk)?;
    guest.check("ip link set lo up")?;
    check(&guest, &format!("lend {NVME}"))?;
    machine.quit()?;
    Ok(())
}

/// A virtual function, whose physical one stays with the host's own driver.
#[test]
fn virtual_functions_are_driven_through_vfio() -> TestResult {
    let scratch = Scratch::new("disk")?;
    let disk = scratch.disk("disk.img", DISK)?;
    let machine = lender("virtual", Kernel::V6_12)
        .program("farbus-vfio-check")
        .root_port("rp0", &Value::Null)
        .block_node("node0", &disk)
        .device(&json!({"driver": "nvme-subsys", "id": "subsys0"}))
        .device(&json!({
            "driver": "nvme", "id": "nv0", "bus": "rp0", "serial": "pf", "subsys": "subsys0",
            "max_ioqpairs": 16, "msix_qsize": 17,
            "sriov_max_vfs": 2, "sriov_vq_flexible": 8, "sriov_vi_flexible": 8,
        }))
        .device(&json!({"driver": "nvme-ns", "drive": "node0", "bus": "nv0", "shared": true}))
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    let physical = format!("/sys/bus/pci/devices/{NVME}");
    guest.check(&format!("echo 0 >{physical}/sriov_drivers_autoprobe"))?;
    guest.check(&format!("echo 2 >{physical}/sriov_numvfs"))?;
    for (function, address) in [(1, "0000:01:00.1"), (2, "0000:01:00.2")] {
        // Queues, vectors, and then the secondary controller online (NVMe 1.4 §5.22).
        for action in ["-r 0 -a 8 -n 4", "-r 1 -a 8 -n 4", "-a 9"] {
            guest.check(&format!("nvme virt-mgmt /dev/nvme0 -c {function} {action}"))?;
        }
        bind(&guest, address)?;
    }
    let described = check(&guest, "describe 0000:01:00.1")?;
    assert!(described.contains("reset: done"), "{described}");
    let _other = hold(&guest, "hold", "0000:01:00.2")?;
    check(&guest, "nvme 0000:01:00.1")?;
    machine.quit()?;
    Ok(())
}

/// Functions that have nothing to do with NVMe: the seam knows no device class.
fn drives_other_classes(kernel: Kernel) -> TestResult {
    let machine = lender(&format!("classes-{}", kernel.name()), kernel)
        .program("farbus-vfio-check")
        .root_port("rp0", &Value::Null)
        .root_port("rp1", &Value::Null)
        .device(&json!({"driver": "edu", "bus": "rp0"}))
        .device(&json!({"driver": "edu", "bus": "pcie.0"}))
        .device(&json!({"driver": "e1000e", "bus": "rp1"}))
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    let both = find(&guest, EDU)?;
    let (integrated, plugged) = both.split_once('\n').ok_or("not two devices")?;
    for edu in [integrated, plugged] {
        bind(&guest, edu)?;
        check(&guest, &format!("edu {edu}"))?;
    }
    // It has no reset of its own; its slot has.
    let described = check(&guest, &format!("describe {plugged}"))?;
    assert!(described.contains("reset: done"), "{described}");
    let described = check(&guest, &format!("describe {integrated}"))?;
    assert!(described.contains("reset: refused"), "{described}");

    let nic = find(&guest, "8086:10d3")?;
    bind(&guest, &nic)?;
    let described = check(&guest, &format!("describe {nic}"))?;
    assert!(described.contains("class: 020000"), "{described}");
    assert!(described.contains("BAR3: 16384 bytes"), "{described}");
    machine.quit()?;
    Ok(())
}

#[test]
fn other_classes_are_driven_through_vfio_on_6_1() -> TestResult {
    drives_other_classes(Kernel::V6_1)
}

#[test]
fn other_classes_are_driven_through_vfio_on_6_12() -> TestResult {
    drives_other_classes(Kernel::V6_12)
}

#[test]
fn what_is_in_the_way_is_named_with_its_remedy() -> TestResult {
    let scratch = Scratch::new("disk")?;
    let disk = scratch.disk("disk.img", DISK)?;
    let (machine, guest) = with_nvme(Kernel::V6_12, &disk)?;

    let text = refused(&guest, "farbus-vfio-check describe 0000:7f:00.0")?;
    assert!(text.contains("no PCI function 0000:7f:00.0"), "{text}");
    let port = find(&guest, "::0604")?;
    let text = refused(&guest, &format!("farbus-vfio-check describe {port}"))?;
    assert!(text.contains("belongs to the driver pcieport"), "{text}");

    let job = hold(&guest, "hold", NVME)?;
    let text = refused(&guest, &format!("farbus-vfio-check describe {NVME}"))?;
    assert!(
        text.contains("is in use") && text.contains("/dev/vfio/"),
        "{text}"
    );
    guest.check("kill $(pidof ld.so) 2>/dev/null || killall ld.so")?;
    job.wait(Deadline::secs(20))?;

    let limit = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
    guest.check(&format!("echo 5 >{limit}"))?;
    check(&guest, &format!("map {NVME} 5 4096"))?;
    let text = refused(&guest, &format!("farbus-vfio-check map {NVME} 6 4096"))?;
    assert!(text.contains("dma_entry_limit"), "{text}");
    guest.check(&format!("echo 65535 >{limit}"))?;

    // Root is not held to the limit, others are.
    guest.check("chmod 666 /dev/vfio/*")?;
    let text = refused(
        &guest,
        &format!("ulimit -l 64; {UNPRIVILEGED} farbus-vfio-check map {NVME} 2 65536"),
    )?;
    assert!(text.contains("LimitMEMLOCK"), "{text}");
    guest.check("chmod 600 /dev/vfio/*")?;
    let text = refused(
        &guest,
        &format!("{UNPRIVILEGED} farbus-vfio-check describe {NVME}"),
    )?;
    assert!(text.contains("udev"), "{text}");
    machine.quit()?;
    Ok(())
}

#[test]
fn requested_unplug_is_heard_and_the_function_given_back() -> TestResult {
    let scratch = Scratch::new("disk")?;
    let disk = scratch.disk("disk.img", DISK)?;
    let (machine, guest) = with_nvme(Kernel::V6_12, &disk)?;
    let job = hold(&guest, "hold", NVME)?;
    machine.qmp().device_del("nv0", Deadline::secs(60))?;
    let said = job.check(Deadline::secs(20))?;
    println!("{said}");
    assert!(said.contains("event: the kernel wants it back"), "{said}");
    assert!(said.ends_with("given back"), "{said}");
    let gone = refused(&guest, &format!("farbus-vfio-check describe {NVME}"))?;
    assert!(gone.contains("no PCI function"), "{gone}");
    machine.quit()?;
    Ok(())
}

#[test]
fn function_that_vanishes_without_a_word_is_survived() -> TestResult {
    let scratch = Scratch::new("disk")?;
    let disk = scratch.disk("disk.img", DISK)?;
    let (machine, guest) = with_nvme(Kernel::V6_12, &disk)?;
    let _job = hold(&guest, "outlive", NVME)?;
    // Power off in the port's Slot Control (PCIe 4.0 §7.5.3.10), which no driver looks after here.
    let port = find(&guest, "::0604")?;
    guest.check(&format!("setpci -s {port} CAP_EXP+18.w=0700"))?;
    // Its end is not waited for: the kernel waits more than a minute for the device to come back.
    guest.check("until grep -q -e ^used -e ^failed /tmp/held; do sleep 0.05; done")?;
    let said = guest.check("cat /tmp/held")?;
    println!("{said}");
    assert!(said.contains("reset: the function is gone"), "{said}");
    assert!(said.contains("unmap: done"), "{said}");
    machine.quit()?;
    Ok(())
}

#[test]
fn killed_holder_leaves_a_function_that_can_be_opened() -> TestResult {
    let scratch = Scratch::new("disk")?;
    let disk = scratch.disk("disk.img", DISK)?;
    let (machine, guest) = with_nvme(Kernel::V6_12, &disk)?;
    for _ in 0..3 {
        let job = hold(&guest, "hold", NVME)?;
        guest.check("killall -9 farbus-vfio-check")?;
        job.wait(Deadline::secs(20))?;
    }
    check(&guest, &format!("nvme {NVME}"))?;
    machine.quit()?;
    Ok(())
}

#[test]
fn groups_that_isolate_nothing_are_refused() -> TestResult {
    let scratch = Scratch::new("disk")?;
    let disk = scratch.disk("disk.img", DISK)?;
    // Behind a bridge to conventional PCI, requests do not say whose they are.
    let machine = lender("group", Kernel::V6_12)
        .program("farbus-vfio-check")
        .root_port("rp0", &Value::Null)
        .device(&json!({"driver": "pcie-pci-bridge", "id": "bridge0", "bus": "rp0"}))
        .device(&json!({"driver": "edu", "bus": "bridge0", "addr": "1"}))
        .block_node("node0", &disk)
        .device(&json!({
            "driver": "virtio-blk-pci", "bus": "bridge0", "addr": "2", "drive": "node0",
        }))
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    let (edu, disk) = (find(&guest, EDU)?, find(&guest, "1af4:")?);
    bind(&guest, &edu)?;
    let text = refused(&guest, &format!("farbus-vfio-check describe {edu}"))?;
    assert!(
        text.contains(&format!("{disk} (driver virtio-pci)")),
        "{text}"
    );
    bind(&guest, &disk)?;
    check(&guest, &format!("edu {edu}"))?;
    let described = check(&guest, &format!("describe {edu}"))?;
    assert!(described.contains("reset: refused"), "{described}");
    machine.quit()?;
    Ok(())
}

#[test]
fn machines_without_protection_are_refused() -> TestResult {
    let bare = |name: &str| {
        MachineBuilder::new(name)
            .modules("vfio-pci,vfio_iommu_type1")
            .program("farbus-vfio-check")
    };
    let no_remapping = bare("intremap")
        .device(&json!({"driver": "intel-iommu", "intremap": "off"}))
        .parameter("intel_iommu=on");
    for (machine, binds, remedy) in [
        // Without an IOMMU vfio-pci does not even take the function.
        (bare("no-iommu"), false, "intel_iommu=on"),
        (no_remapping, true, "interrupt remapping"),
    ] {
        let machine = machine
            .root_port("rp0", &Value::Null)
            .device(&json!({"driver": "edu", "bus": "rp0"}))
            .start(&Tools::open()?)?;
        let guest = machine.wait_guest(Deadline::secs(90))?;
        let edu = find(&guest, EDU)?;
        assert_eq!(bind(&guest, &edu).is_ok(), binds);
        report::failure_was_expected();
        let text = refused(&guest, &format!("farbus-vfio-check describe {edu}"))?;
        assert!(text.contains(remedy), "{text}");
        machine.quit()?;
    }
    Ok(())
}

#[test]
fn reported_error_is_heard() -> TestResult {
    let scratch = Scratch::new("disk")?;
    let disk = scratch.disk("disk.img", DISK)?;
    let machine = lender("aer", Kernel::V6_12)
        .program("farbus-vfio-check")
        .root_port("rp0", &Value::Null)
        .block_node("node0", &disk)
        .device(&json!({
            "driver": "virtio-blk-pci", "id": "vb0", "bus": "rp0", "drive": "node0",
            "aer": true, "disable-legacy": "on", "iommu_platform": true,
        }))
        .start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    bind(&guest, NVME)?;
    let job = hold(&guest, "hold", NVME)?;
    let injected = machine
        .qmp()
        .human("pcie_aer_inject_error vb0 POISON_TLP")?;
    println!("{injected}");
    let said = job.check(Deadline::secs(30))?;
    println!("{said}");
    assert!(said.contains("event: it has reported an error"), "{said}");
    machine.quit()?;
    Ok(())
}
