use super::super::*;
use super::{FakeFunction, FakeHost, NVME, address, host_with_nvme};

fn nvme(host: &FakeHost) -> PciFunction {
    let inventory = Inventory::read(&host.host());
    inventory.find(address(NVME)).unwrap().clone()
}

fn sentences(function: &PciFunction) -> Vec<String> {
    function.users.iter().map(ToString::to_string).collect()
}

/// The obstacle of a function that has one.
fn obstacle(function: &PciFunction) -> (&'static str, String, String) {
    assert_eq!(function.obstacles.len(), 1, "{:?}", function.obstacles);
    let obstacle = &function.obstacles[0];
    (obstacle.kind(), obstacle.to_string(), obstacle.remedy())
}

#[test]
fn a_function_is_described_as_sysfs_has_it() {
    let host = host_with_nvme();
    host.file(&format!("sys/bus/pci/devices/{NVME}/numa_node"), "1\n");
    let function = nvme(&host);
    assert_eq!(function.class, ClassCode::NVME);
    assert_eq!(function.class_name, "NVMe controller");
    assert_eq!(function.id, "1b36:0010");
    assert_eq!(function.subsystem_id, "1af4:1100");
    assert_eq!(function.driver.as_deref(), Some("nvme"));
    assert_eq!(function.iommu_group, Some(12));
    assert_eq!(function.numa_node, Some(1));
    assert_eq!(function.reset_methods, ["flr", "bus"]);
    assert!(function.users.is_empty());
    assert!(function.is_exportable());
}

#[test]
fn a_host_without_sysfs_has_no_functions() {
    let host = FakeHost::new();
    std::fs::remove_dir_all(host.path("sys")).unwrap();
    assert!(Inventory::read(&host.host()).functions().is_empty());
}

#[test]
fn functions_with_nonsense_in_their_files_are_left_out_or_described_in_part() {
    let host = host_with_nvme();
    for (name, content) in [
        ("numa_node", "99999999999999999999"),
        ("vendor", "\u{fffd}"),
        ("sriov_totalvfs", "-5"),
        ("reset_method", "\n"),
    ] {
        host.file(&format!("sys/bus/pci/devices/{NVME}/{name}"), content);
    }
    host.file("sys/bus/pci/devices/0000:02:00.0/class", "what?");
    host.file("sys/bus/pci/devices/not-an-address/class", "0x010802");
    let function = nvme(&host);
    assert_eq!(function.numa_node, None);
    assert_eq!(function.id, "0000:0010");
    assert_eq!(function.sriov, None);
    assert_eq!(Inventory::read(&host.host()).functions().len(), 1);
}

#[test]
fn without_an_iommu_nothing_can_be_lent() {
    let host = FakeHost::new();
    host.function(NVME, &FakeFunction::default());
    let (kind, what, remedy) = obstacle(&nvme(&host));
    assert_eq!(kind, "no-iommu");
    assert_eq!(what, "no IOMMU isolates it");
    assert!(remedy.contains("intel_iommu=on"), "{remedy}");
}

#[test]
fn the_group_of_vfio_without_iommu_counts_as_none() {
    let host = host_with_nvme();
    host.file("sys/kernel/iommu_groups/12/name", "vfio-noiommu\n");
    assert_eq!(obstacle(&nvme(&host)).0, "no-iommu");
}

#[test]
fn members_of_a_shared_group_that_are_in_the_way_are_named() {
    let host = host_with_nvme();
    let member = |driver| FakeFunction {
        group: Some(12),
        driver,
        ..FakeFunction::default()
    };
    host.function("0000:00:1c.0", &member(Some("pcieport")));
    host.function("0000:02:00.0", &member(Some("e1000e")));
    host.function("0000:03:00.0", &member(None));
    host.function("0000:04:00.0", &member(Some("vfio-pci")));
    let function = nvme(&host);
    assert_eq!(function.group_members.len(), 4);
    let (kind, what, remedy) = obstacle(&function);
    assert_eq!(kind, "shared-group");
    assert_eq!(
        what,
        "it shares IOMMU group 12 with 0000:02:00.0 (e1000e), which this host uses"
    );
    assert!(remedy.contains("unbind 0000:02:00.0"), "{remedy}");
}

#[test]
fn a_bridge_is_not_for_lending() {
    let host = FakeHost::new();
    let bridge = FakeFunction {
        class: 0x06_04_00,
        driver: Some("pcieport"),
        group: Some(1),
        ..FakeFunction::default()
    };
    host.function(NVME, &bridge);
    assert_eq!(obstacle(&nvme(&host)).0, "bridge");
}

#[test]
fn what_cannot_be_reset_is_not_for_lending() {
    let host = host_with_nvme();
    host.file(&format!("sys/bus/pci/devices/{NVME}/reset_method"), "\n");
    assert_eq!(obstacle(&nvme(&host)).0, "no-reset");
}

#[test]
fn a_kernel_before_reset_method_is_asked_whether_it_can_reset() {
    let host = host_with_nvme();
    let directory = format!("sys/bus/pci/devices/{NVME}");
    std::fs::remove_file(host.path(&format!("{directory}/reset_method"))).unwrap();
    host.file(&format!("{directory}/reset"), "");
    assert_eq!(nvme(&host).reset_methods, ["unknown"]);
}

#[test]
fn a_missing_vfio_driver_is_an_obstacle_with_a_remedy() {
    let host = host_with_nvme();
    std::fs::remove_dir(host.path("sys/bus/pci/drivers/vfio-pci")).unwrap();
    let (kind, _, remedy) = obstacle(&nvme(&host));
    assert_eq!(
        (kind, remedy.as_str()),
        ("no-driver", "load it: modprobe vfio-pci")
    );
}

#[test]
fn a_mounted_partition_is_named_with_its_mount_point() {
    let host = host_with_nvme();
    host.disk(NVME, "nvme/nvme0/nvme0n1", "259:0");
    host.disk(NVME, "nvme/nvme0/nvme0n1/nvme0n1p1", "259:1");
    host.file(
        "proc/1/mountinfo",
        "22 1 259:1 / /var/with\\040space rw - ext4 /dev/nvme0n1p1 rw\n\
         23 1 8:1 / /other rw - ext4 /dev/sda1 rw\n\
         nonsense\n",
    );
    let function = nvme(&host);
    assert_eq!(
        sentences(&function),
        ["/dev/nvme0n1p1 is mounted on /var/with space"]
    );
    let (kind, what, remedy) = obstacle(&function);
    assert_eq!(kind, "in-use");
    assert!(what.contains("/dev/nvme0n1p1 is mounted on /var"), "{what}");
    assert!(remedy.contains("umount /var"), "{remedy}");
}

#[test]
fn a_btrfs_mount_is_found_by_its_source() {
    let host = host_with_nvme();
    host.disk(NVME, "nvme/nvme0/nvme0n1", "259:0");
    host.file(
        "proc/1/mountinfo",
        "22 1 0:33 / /srv rw - btrfs /dev/nvme0n1 rw\n",
    );
    assert_eq!(sentences(&nvme(&host)), ["/dev/nvme0n1 is mounted on /srv"]);
}

#[test]
fn what_is_mounted_on_top_of_device_mapper_is_found() {
    let host = host_with_nvme();
    host.disk(NVME, "nvme/nvme0/nvme0n1", "259:0");
    host.file("sys/devices/virtual/block/dm-0/dev", "254:0\n");
    host.file("sys/devices/virtual/block/dm-0/dm/name", "vg-root\n");
    host.link("sys/class/block/dm-0", "sys/devices/virtual/block/dm-0");
    host.directory(&format!(
        "sys/bus/pci/devices/{NVME}/nvme/nvme0/nvme0n1/holders/dm-0"
    ));
    host.file(
        "proc/1/mountinfo",
        "22 1 254:0 / / rw - ext4 /dev/mapper/vg-root rw\n",
    );
    assert_eq!(
        sentences(&nvme(&host)),
        [
            "/dev/nvme0n1 is part of /dev/dm-0 (vg-root)",
            "/dev/dm-0 is mounted on /"
        ]
    );
}

#[test]
fn holders_that_hold_each_other_are_seen_once() {
    let host = host_with_nvme();
    host.disk(NVME, "nvme/nvme0/nvme0n1", "259:0");
    let disk = format!("sys/bus/pci/devices/{NVME}/nvme/nvme0/nvme0n1");
    host.directory(&format!("{disk}/holders/nvme0n1"));
    assert_eq!(sentences(&nvme(&host)).len(), 1);
}

#[test]
fn swap_space_is_found() {
    let host = host_with_nvme();
    host.disk(NVME, "nvme/nvme0/nvme0n1/nvme0n1p2", "259:2");
    host.file(
        "proc/swaps",
        "Filename\tType\tSize\tUsed\tPriority\n/dev/nvme0n1p2 partition 1 0 -2\n",
    );
    assert_eq!(sentences(&nvme(&host)), ["/dev/nvme0n1p2 is swap space"]);
}

#[test]
fn with_multipath_the_disk_of_the_subsystem_is_the_controllers() {
    let host = host_with_nvme();
    let controller = format!("sys/bus/pci/devices/{NVME}/nvme/nvme0");
    host.directory(&controller);
    let subsystem = "sys/devices/virtual/nvme-subsystem/nvme-subsys0";
    host.file(&format!("{subsystem}/nvme0n1/dev"), "259:0\n");
    host.link(&format!("{subsystem}/nvme0"), &controller);
    host.link("sys/class/nvme-subsystem/nvme-subsys0", subsystem);
    host.link("sys/class/block/nvme0n1", &format!("{subsystem}/nvme0n1"));
    host.file(
        "proc/1/mountinfo",
        "22 1 259:0 / /var rw - ext4 /dev/nvme0n1 rw\n",
    );
    assert_eq!(sentences(&nvme(&host)), ["/dev/nvme0n1 is mounted on /var"]);
}

#[test]
fn a_network_interface_counts_while_it_is_up() {
    let host = host_with_nvme();
    let directory = format!("sys/bus/pci/devices/{NVME}/net/eth0");
    host.file(&format!("{directory}/flags"), "0x1002\n");
    host.link("sys/class/net/eth0", &directory);
    assert!(nvme(&host).users.is_empty());
    host.file(&format!("{directory}/flags"), "0x1003\n");
    assert_eq!(sentences(&nvme(&host)), ["network interface eth0 is up"]);
}

#[test]
fn a_program_that_has_a_node_open_is_named() {
    let host = host_with_nvme();
    host.disk(NVME, "nvme/nvme0/nvme0n1", "259:0");
    host.process(77, "dd", "/dev/nvme0n1");
    host.process(78, "cat", "/dev/null");
    assert_eq!(
        sentences(&nvme(&host)),
        ["dd (process 77) has /dev/nvme0n1 open"]
    );
}

#[test]
fn a_long_program_name_is_told_in_full() {
    let host = host_with_nvme();
    host.process(99, "farbus-device-s", "/dev/vfio/12");
    host.file("proc/99/cmdline", "/usr/bin/farbus-device-server\0export\0");
    assert_eq!(
        sentences(&nvme(&host)),
        ["farbus-device-server (process 99) has /dev/vfio/12 open"]
    );
}

#[test]
fn another_vmm_that_has_the_group_open_is_named() {
    let host = host_with_nvme();
    host.process(99, "qemu", "/dev/vfio/12");
    assert_eq!(
        sentences(&nvme(&host)),
        ["qemu (process 99) has /dev/vfio/12 open"]
    );
}

#[test]
fn the_inventory_reads_as_json() {
    let host = host_with_nvme();
    host.process(99, "qemu", "/dev/vfio/12");
    let json = serde_json::to_value(Inventory::read(&host.host()).functions()).unwrap();
    let nvme = &json[0];
    assert_eq!(nvme["address"], NVME);
    assert_eq!(nvme["class"], "010802");
    assert_eq!(nvme["users"][0]["kind"], "open");
    assert_eq!(nvme["obstacles"][0]["kind"], "in-use");
}
