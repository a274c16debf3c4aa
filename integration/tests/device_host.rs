//! The device server on hosts with and without an IOMMU: what it finds, what it refuses, and
//! what it leaves behind.

use std::path::PathBuf;

use farbus_integration::builder::MachineBuilder;
use farbus_integration::deadline::Deadline;
use farbus_integration::guest::{Guest, Output};
use farbus_integration::machine::Machine;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use farbus_integration::tools::kernel::Kernel;
use farbus_integration::vfio::lender;
use serde_json::{Value, json};

const NVME: &str = "0000:01:00.0";

/// Starts a device server in the background, and waits until it is ready or ends. `$P` is its
/// process, and `/tmp/out` has what it said.
const START: &str = "start() { : >/tmp/out; farbus-device-server \"$@\" >/tmp/out 2>&1 & P=$!; \
    until grep -q ^ready /tmp/out || ! kill -0 $P; do sleep 0.1; done; cat /tmp/out; }; \
    driver() { echo driver: $(basename $(readlink /sys/bus/pci/devices/0000:01:00.0/driver)); }; ";

fn boot(builder: &MachineBuilder) -> Result<(Machine, Guest), Failure> {
    let machine = builder.start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    guest.wait_file("/dev/nvme0n1", Deadline::secs(30))?;
    Ok((machine, guest))
}

fn disk(scratch: &Scratch, name: &str) -> Result<PathBuf, Failure> {
    Ok(scratch.disk(name, 64 << 20)?)
}

/// Runs a script in which [`START`]'s functions can be used.
fn run(guest: &Guest, script: &str) -> Result<Output, Failure> {
    let output = guest.run_within(&format!("{START}{script}"), Deadline::secs(120))?;
    println!("{script}\n{}", output.text());
    Ok(output)
}

/// Runs a script that must end with a status; returns what it said.
#[track_caller]
fn ends_with(guest: &Guest, status: i32, script: &str) -> Result<String, Failure> {
    let output = run(guest, script)?;
    assert_eq!(output.status, status, "{script}\n{}", output.text());
    Ok(output.text())
}

#[track_caller]
fn assert_said(said: &str, texts: &[&str]) {
    for text in texts {
        assert!(said.contains(text), "{text:?} is not in:\n{said}");
    }
}

#[test]
fn what_is_in_use_is_refused_with_its_user() -> TestResult {
    let scratch = Scratch::new("disk")?;
    let builder = lender("in-use", Kernel::V6_12)
        .program("farbus-device-server")
        .emulated_nvme("nv0", &disk(&scratch, "disk.img")?);
    let (machine, guest) = boot(&builder)?;
    let export = format!("farbus-device-server export --bind --pci {NVME}");
    guest.check("mkfs.ext4 -q /dev/nvme0n1 && mkdir -p /mnt")?;

    let said = ends_with(&guest, 3, &format!("mount /dev/nvme0n1 /mnt; {export}"))?;
    assert_said(&said, &["/dev/nvme0n1 is mounted on /mnt; unmount it"]);
    let said = ends_with(&guest, 0, "farbus-device-server list")?;
    assert_said(&said, &["no: in-use", "/dev/nvme0n1 is mounted on /mnt"]);
    guest.check("umount /mnt")?;

    // A mount that this process cannot see.
    let elsewhere = "unshare -m sh -c 'mount /dev/nvme0n1 /mnt && touch /tmp/on && sleep 20' & H=$!; \
                     until [ -e /tmp/on ]; do sleep 0.1; done; ";
    let said = ends_with(
        &guest,
        3,
        &format!("{elsewhere}{export}; R=$?; wait $H; exit $R"),
    )?;
    assert_said(&said, &["something in the kernel has claimed /dev/nvme0n1"]);

    let held = "sleep 60 </dev/nvme0n1 & H=$!; ";
    let said = ends_with(
        &guest,
        3,
        &format!("{held}{export}; R=$?; kill $H; exit $R"),
    )?;
    assert_said(&said, &["sleep (process ", "has /dev/nvme0n1 open"]);
    let said = run(&guest, "driver")?.text();
    assert_eq!(said, "driver: nvme");
    machine.quit()?;
    Ok(())
}

#[test]
fn function_goes_back_to_its_driver_at_the_end_and_after_a_crash() -> TestResult {
    let scratch = Scratch::new("disk")?;
    let builder = lender("crash", Kernel::V6_1)
        .program("farbus-device-server")
        .emulated_nvme("nv0", &disk(&scratch, "disk.img")?);
    let (machine, guest) = boot(&builder)?;
    let export = format!("start export --bind --pci {NVME},name=disk0; driver; ");
    let end = "kill $P; wait $P; S=$?; cat /tmp/out; driver; exit $S";

    let said = ends_with(&guest, 0, &format!("{export}{end}"))?;
    assert_said(
        &said,
        &["driver: vfio-pci", "gave 0000:01:00.0 back to nvme"],
    );
    assert!(said.ends_with("driver: nvme"), "{said}");

    let said = ends_with(
        &guest,
        137,
        &format!("{export}kill -9 $P; wait $P; S=$?; driver; exit $S"),
    )?;
    assert!(said.ends_with("driver: vfio-pci"), "{said}");
    // The next start has no use for it.
    let other = "start export --soft-nvme path=/tmp/x,size=1MiB,name=x; ";
    let said = ends_with(&guest, 0, &format!("{other}{end}"))?;
    assert_said(&said, &["repaired: gave 0000:01:00.0 back to nvme"]);
    guest.wait_file("/dev/nvme0n1", Deadline::secs(30))?;

    ends_with(&guest, 137, &format!("{export}kill -9 $P; wait $P"))?;
    // This one takes it over, without a driver of the host in between.
    let said = ends_with(
        &guest,
        0,
        &format!("start export --pci {NVME}; driver; {end}"),
    )?;
    assert_said(&said, &["takes over 0000:01:00.0", "driver: vfio-pci"]);
    assert!(said.ends_with("driver: nvme"), "{said}");
    machine.quit()?;
    Ok(())
}

#[test]
fn virtual_functions_are_made_exported_and_removed() -> TestResult {
    let scratch = Scratch::new("disk")?;
    let builder = lender("sriov", Kernel::V6_12)
        .program("farbus-device-server")
        .root_port("rp0", &Value::Null)
        .block_node("node0", &disk(&scratch, "disk.img")?)
        .device(&json!({"driver": "nvme-subsys", "id": "subsys0", "nqn": "subsys0"}))
        .device(&json!({
            "driver": "nvme", "id": "nv0", "bus": "rp0", "serial": "nv0", "subsys": "subsys0",
            "max_ioqpairs": 16, "msix_qsize": 17, "sriov_max_vfs": 4,
            "sriov_vq_flexible": 8, "sriov_vi_flexible": 8,
        }))
        .device(&json!({"driver": "nvme-ns", "drive": "node0", "nsid": 1, "bus": "nv0"}));
    let (machine, guest) = boot(&builder)?;
    let export = format!("start export --sriov {NVME},vfs=2,name=vf; ");
    let count = format!("cat /sys/bus/pci/devices/{NVME}/sriov_numvfs");
    let end = format!("kill $P; wait $P; S=$?; cat /tmp/out; {count}; exit $S");

    let said = ends_with(
        &guest,
        0,
        &format!("{export}farbus-device-server list; {end}"),
    )?;
    assert_said(
        &said,
        &["ready export=vf-0 export=vf-1", "2 of 4", "of 0000:01:00.0"],
    );
    assert_said(
        &said,
        &["virtual functions that got 2 queues and 2 interrupts each: 2"],
    );
    assert!(said.ends_with("\n0"), "{said}");

    ends_with(&guest, 137, &format!("{export}kill -9 $P; wait $P"))?;
    // As if it had died before it was done with them.
    guest.check(
        "nvme virt-mgmt /dev/nvme0 -c 2 -a 7 && nvme virt-mgmt /dev/nvme0 -c 2 -r 0 -a 8 -n 0",
    )?;
    let said = ends_with(&guest, 0, &format!("{export}{end}"))?;
    assert_said(
        &said,
        &[
            "takes over 0000:01:00.2",
            "virtual functions that got 2 queues and 2 interrupts each: 1",
            "ready export=vf-0",
        ],
    );
    assert!(said.ends_with("\n0"), "{said}");
    let secondaries = guest.check("nvme list-secondary /dev/nvme0")?;
    assert!(!secondaries.contains("(Online)"), "{secondaries}");
    machine.quit()?;
    Ok(())
}

#[test]
fn serve_finds_functions_by_what_they_are_and_gives_back_what_is_taken_out() -> TestResult {
    let scratch = Scratch::new("disk")?;
    let builder = lender("serve", Kernel::V6_12)
        .program("farbus-device-server")
        .root_port("rp0", &Value::Null)
        .block_node("node0", &disk(&scratch, "disk0.img")?)
        .device(&json!({"driver": "nvme-subsys", "id": "subsys0", "nqn": "subsys0"}))
        .device(&json!({
            "driver": "nvme", "id": "nv0", "bus": "rp0", "serial": "physical", "subsys": "subsys0",
            "max_ioqpairs": 16, "msix_qsize": 17, "sriov_max_vfs": 4,
            "sriov_vq_flexible": 8, "sriov_vi_flexible": 8,
        }))
        .device(&json!({"driver": "nvme-ns", "drive": "node0", "nsid": 1, "bus": "nv0"}))
        .emulated_nvme("alone", &disk(&scratch, "disk1.img")?);
    let (machine, guest) = boot(&builder)?;
    let server = "[server]\nlisten = \"127.0.0.1:0\"\nadmin-socket = \"/tmp/admin.sock\"\n";
    let selected = "[[export]]\nname = \"disk\"\nbind = true\n\
                    match = { class = \"nvme\", vendor-id = \"1b36\", device-id = \"0010\" }\n";
    let virtuals =
        format!("[[export]]\nname = \"vf\"\nsriov = {{ pci = \"{NVME}\", functions = 2 }}\n");
    let bad = "[[export]]\nname = \"bad\"\npci = \"0000:7f:00.0\"\nbind = true\n";
    let write = |exports: &[&str]| {
        let text = exports.concat();
        format!("cat >/tmp/c.toml <<'END'\n{server}{text}END\n")
    };
    let both = write(&[selected, &virtuals, bad]);
    let one = write(&[selected]);
    let none = write(&[]);
    let count = format!("cat /sys/bus/pci/devices/{NVME}/sriov_numvfs");
    let reload = "R=$((R + 1)); kill -HUP $P; \
                  until [ $(grep -c 'configuration read' /tmp/out) = $R ]; do sleep 0.1; done; ";

    let script = format!(
        "{both}R=0; start serve --config /tmp/c.toml; {one}{reload}{count}; {none}{reload}\
         basename $(readlink /sys/bus/pci/devices/0000:02:00.0/driver); \
         kill $P; wait $P; S=$?; cat /tmp/out; exit $S"
    );
    let said = ends_with(&guest, 0, &script)?;

    assert_said(
        &said,
        &[
            "ready export=disk export=vf-0 export=vf-1 export=bad",
            "bad: cannot be exported: there is no PCI function 0000:7f:00.0",
            "as disk\n",
            "disk: QEMU NVMe Ctrl, serial number alone, 67108864 bytes",
            "vf-0: QEMU NVMe Ctrl",
            "removed vf, bad",
            "removed disk",
            "gave 0000:02:00.0 back to nvme",
            "\n0\nnvme\n",
            "ended in order",
        ],
    );
    machine.quit()?;
    Ok(())
}

#[test]
fn doctor_and_export_tell_of_a_shared_group_and_of_low_memlock() -> TestResult {
    let scratch = Scratch::new("disk")?;
    let function = |n: u8| {
        json!({
            "driver": "nvme", "serial": format!("shared{n}"), "bus": "rp0",
            "drive": format!("node{n}"), "addr": format!("0.{n}"), "multifunction": n == 0,
        })
    };
    let builder = lender("doctor", Kernel::V6_12)
        .program("farbus-device-server")
        .root_port("rp0", &Value::Null)
        .block_node("node0", &disk(&scratch, "disk0.img")?)
        .block_node("node1", &disk(&scratch, "disk1.img")?)
        .device(&function(0))
        .device(&function(1))
        .emulated_nvme("alone", &disk(&scratch, "disk2.img")?);
    let (machine, guest) = boot(&builder)?;

    let said = ends_with(&guest, 0, "farbus-device-server doctor")?;
    assert_said(&said, &["can be exported: 0000:02:00.0", "warning  groups"]);
    let said = ends_with(
        &guest,
        5,
        &format!("farbus-device-server doctor --pci {NVME}"),
    )?;
    assert_said(&said, &["problem  groups", "with 0000:01:00.1 (nvme)"]);
    let said = ends_with(
        &guest,
        3,
        &format!("farbus-device-server export --bind --pci {NVME}"),
    )?;
    assert_said(&said, &["shares IOMMU group", "with 0000:01:00.1 (nvme)"]);

    let low = "ulimit -l 8192; setpriv --reuid 1000 --clear-groups farbus-device-server doctor";
    let said = ends_with(&guest, 5, low)?;
    assert_said(
        &said,
        &["problem  memlock: at most 8 MiB", "LimitMEMLOCK=infinity"],
    );
    machine.quit()?;
    Ok(())
}

#[test]
fn without_an_iommu_doctor_says_so_and_nothing_is_exported() -> TestResult {
    let scratch = Scratch::new("disk")?;
    let builder = MachineBuilder::new("no-iommu")
        .kernel(Kernel::V6_12)
        .program("farbus-device-server")
        .emulated_nvme("nv0", &disk(&scratch, "disk.img")?);
    let (machine, guest) = boot(&builder)?;
    let said = ends_with(&guest, 5, "farbus-device-server doctor")?;
    assert_said(
        &said,
        &["problem  iommu: there is no IOMMU", "intel_iommu=on"],
    );
    let said = ends_with(
        &guest,
        3,
        &format!("farbus-device-server export --bind --pci {NVME}"),
    )?;
    assert_said(&said, &["no IOMMU isolates it", "intel_iommu=on"]);
    machine.quit()?;
    Ok(())
}
