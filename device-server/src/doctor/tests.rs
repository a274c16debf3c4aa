//! What doctor finds on made-up hosts.

use farbus_vfio::sysfs::fake::{FakeFunction, FakeHost};

use super::*;

const NVME: &str = "0000:01:00.0";

/// A host on which everything is as it should be.
fn good_host() -> FakeHost {
    let host = FakeHost::new();
    host.function(NVME, &nvme_in_group(12));
    host.directory("sys/class/iommu/dmar0");
    host.directory("sys/module/vfio_iommu_type1/parameters");
    host.file("dev/vfio/vfio", "");
    host.file("proc/interrupts", " 24: 1 0 IR-IO-APIC 5-edge ACPI:Ged\n");
    host.file(
        "proc/self/limits",
        "Max locked memory         unlimited            unlimited            bytes\n",
    );
    host.file("proc/self/status", "CapEff:\t0000000000000000\n");
    host.file(
        "proc/meminfo",
        "HugePages_Free:       8\nHugepagesize:    2048 kB\n",
    );
    let port = "sys/class/infiniband/mlx5_0/ports/1";
    host.file(&format!("{port}/state"), "4: ACTIVE\n");
    host.file(&format!("{port}/link_layer"), "Ethernet\n");
    host
}

fn nvme_in_group(group: u32) -> FakeFunction {
    FakeFunction {
        group: Some(group),
        above: "pci0000:00/0000:00:01.0",
        ..FakeFunction::default()
    }
}

fn wanted() -> [PciAddress; 1] {
    [NVME.parse().unwrap()]
}

/// The findings of one check.
fn of<'a>(report: &'a Report, check: &str) -> Vec<&'a Finding> {
    report
        .findings
        .iter()
        .filter(|f| f.check == check)
        .collect()
}

/// That a check has one finding, of this level, which holds this text; and that an export can
/// work unless the level says otherwise.
#[track_caller]
fn assert_finds(host: &FakeHost, check: &str, level: Level, text: &str) {
    let report = examine(&host.host(), &[]);
    let findings = of(&report, check);
    assert_eq!(findings.len(), 1, "{report:#?}");
    assert_eq!(findings[0].level, level, "{report:#?}");
    assert!(findings[0].what.contains(text), "{report:#?}");
    assert_eq!(
        findings[0].remedy.is_some(),
        level != Level::Ok,
        "{report:#?}"
    );
    assert_eq!(report.can_export, level != Level::Problem, "{report:#?}");
}

#[test]
fn a_good_host_has_nothing_but_good_findings() {
    let host = good_host();
    let report = examine(&host.host(), &wanted());
    assert!(report.can_export);
    assert!(
        report.findings.iter().all(|f| f.level == Level::Ok),
        "{report:#?}"
    );
    assert_finds(
        &host,
        "functions",
        Level::Ok,
        "can be exported: 0000:01:00.0",
    );
}

#[test]
fn a_machine_without_iommu_cannot_export() {
    let host = good_host();
    std::fs::remove_dir_all(host.path("sys/class/iommu")).unwrap();
    std::fs::remove_dir_all(host.path("sys/kernel/iommu_groups")).unwrap();
    let device = host.path(&format!("sys/bus/pci/devices/{NVME}"));
    std::fs::remove_file(device.join("iommu_group")).unwrap();

    let report = examine(&host.host(), &[]);

    assert!(!report.can_export);
    let iommu = of(&report, "iommu")[0];
    assert_eq!(iommu.level, Level::Problem);
    assert!(iommu.remedy.as_ref().unwrap().contains("intel_iommu=on"));
    assert!(
        of(&report, "interrupt-remapping").is_empty(),
        "it would say nothing new"
    );
}

#[test]
fn an_iommu_that_isolates_nothing_is_a_problem() {
    let host = good_host();
    std::fs::remove_dir_all(host.path("sys/kernel/iommu_groups")).unwrap();
    let report = examine(&host.host(), &[]);
    assert!(of(&report, "iommu")[0].what.contains("isolates nothing"));
    assert!(!report.can_export);
}

#[test]
fn missing_interrupt_remapping_is_a_problem() {
    let host = good_host();
    host.file("proc/interrupts", " 24: 1 0 IO-APIC 5-edge ACPI:Ged\n");
    assert_finds(
        &host,
        "interrupt-remapping",
        Level::Problem,
        "opens nothing",
    );
}

#[test]
fn missing_interrupt_remapping_is_a_warning_where_it_is_allowed() {
    let host = good_host();
    host.file("proc/interrupts", "");
    host.file(
        "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
        "Y\n",
    );
    assert_finds(
        &host,
        "interrupt-remapping",
        Level::Warning,
        "any interrupt",
    );
}

#[test]
fn a_shared_group_is_found_with_the_port_that_lacks_acs() {
    let host = good_host();
    let bridge = FakeFunction {
        class: 0x06_04_00,
        driver: Some("pcieport"),
        group: Some(12),
        ..FakeFunction::default()
    };
    let port = host.function("0000:00:01.0", &bridge);
    std::fs::write(port.join("config"), [0; 4096]).unwrap();
    let other = FakeFunction {
        class: 0x02_00_00,
        driver: Some("e1000e"),
        ..nvme_in_group(12)
    };
    host.function("0000:01:00.1", &other);

    let report = examine(&host.host(), &wanted());

    assert!(!report.can_export);
    let groups = of(&report, "groups");
    assert_eq!(groups.len(), 1, "{report:#?}");
    assert_eq!(
        groups[0].what,
        "0000:01:00.0: it shares IOMMU group 12 with 0000:01:00.1 (e1000e), which this host uses \
         (no ACS in 0000:00:01.0)"
    );
    assert!(groups[0].remedy.as_ref().unwrap().contains("ACS"));
}

#[test]
fn a_shared_group_of_one_function_leaves_the_other_ones_exportable() {
    let host = good_host();
    host.function("0000:02:00.0", &nvme_in_group(13));
    let other = FakeFunction {
        class: 0x02_00_00,
        driver: Some("e1000e"),
        ..nvme_in_group(13)
    };
    host.function("0000:02:00.1", &other);
    let report = examine(&host.host(), &[]);
    assert!(report.can_export, "{report:#?}");
    assert_eq!(of(&report, "groups")[0].level, Level::Warning);
}

#[test]
fn low_memlock_is_a_problem_that_names_limit_and_need() {
    let host = good_host();
    host.file(
        "proc/self/limits",
        "Max locked memory         8388608              8388608              bytes\n",
    );
    assert_finds(
        &host,
        "memlock",
        Level::Problem,
        "at most 8 MiB may be locked, and 1 export takes up to 64 MiB",
    );
}

#[test]
fn low_memlock_does_not_matter_to_who_may_exceed_it() {
    let host = good_host();
    host.file(
        "proc/self/limits",
        "Max locked memory         65536                65536                bytes\n",
    );
    host.file("proc/self/status", "Name:\tx\nCapEff:\t000001fffeffffff\n");
    assert_finds(&host, "memlock", Level::Ok, "any amount");
}

#[test]
fn missing_modules_are_named_with_the_command_that_loads_them() {
    let host = good_host();
    std::fs::remove_dir(host.path("sys/bus/pci/drivers/vfio-pci")).unwrap();
    std::fs::remove_dir_all(host.path("sys/module")).unwrap();
    std::fs::remove_file(host.path("dev/vfio/vfio")).unwrap();
    let report = examine(&host.host(), &[]);
    assert!(!report.can_export);
    let vfio = of(&report, "vfio");
    let remedies: Vec<&str> = vfio.iter().filter_map(|f| f.remedy.as_deref()).collect();
    assert_eq!(remedies.len(), 3, "{report:#?}");
    assert!(
        remedies
            .iter()
            .all(|remedy| remedy.contains("modprobe vfio"))
    );
}

#[test]
fn a_disk_in_use_is_a_problem_for_who_wants_it() {
    let host = good_host();
    host.disk(NVME, "nvme/nvme0/nvme0n1", "259:0");
    host.file(
        "proc/1/mountinfo",
        "22 1 259:0 / /var rw - ext4 /dev/nvme0n1 rw\n",
    );
    let report = examine(&host.host(), &wanted());
    let function = of(&report, "functions")[0];
    assert_eq!(function.level, Level::Problem);
    assert!(function.what.contains("/dev/nvme0n1 is mounted on /var"));
    assert!(function.remedy.as_ref().unwrap().contains("umount /var"));
}

#[test]
fn a_function_that_is_exported_now_is_as_it_should_be() {
    let host = good_host();
    host.process(99, "farbus-device-s", "/dev/vfio/12");
    host.file("proc/99/cmdline", "farbus-device-server\0export\0");
    let report = examine(&host.host(), &wanted());
    assert!(report.can_export, "{report:#?}");
    assert_eq!(
        of(&report, "functions")[0].what,
        "0000:01:00.0 is exported now"
    );
    assert_finds(
        &host,
        "functions",
        Level::Ok,
        "are exported now: 0000:01:00.0",
    );
}

#[test]
fn a_function_that_is_not_there_is_a_problem() {
    let host = good_host();
    let report = examine(&host.host(), &["0000:09:00.0".parse().unwrap()]);
    assert!(!report.can_export);
    assert!(
        of(&report, "functions")[0]
            .what
            .contains("no PCI function 0000:09:00.0")
    );
}

#[test]
fn a_class_without_an_engine_is_a_problem_for_who_wants_it() {
    let host = good_host();
    let nic = FakeFunction {
        class: 0x02_00_00,
        driver: Some("e1000e"),
        ..nvme_in_group(14)
    };
    host.function("0000:02:00.0", &nic);
    let report = examine(&host.host(), &["0000:02:00.0".parse().unwrap()]);
    assert!(
        of(&report, "functions")[0]
            .what
            .contains("Ethernet controller")
    );
    assert!(!report.can_export);
}

#[test]
fn a_host_without_nvme_has_nothing_to_export() {
    let host = good_host();
    std::fs::remove_file(host.path(&format!("sys/bus/pci/devices/{NVME}"))).unwrap();
    assert_finds(&host, "functions", Level::Problem, "no NVMe controller");
}

#[test]
fn without_rdma_tcp_is_used_and_nothing_is_wrong() {
    let host = good_host();
    std::fs::remove_dir_all(host.path("sys/class/infiniband")).unwrap();
    assert_finds(&host, "rdma", Level::Note, "TCP is used");
}

#[test]
fn an_rdma_port_that_is_down_is_a_warning() {
    let host = good_host();
    host.file("sys/class/infiniband/mlx5_0/ports/1/state", "1: DOWN\n");
    assert_finds(
        &host,
        "rdma",
        Level::Warning,
        "mlx5_0 port 1 (Ethernet) is DOWN",
    );
}

#[test]
fn missing_huge_pages_are_a_note() {
    let host = good_host();
    host.file("proc/meminfo", "HugePages_Free:       0\n");
    assert_finds(&host, "huge-pages", Level::Note, "none are reserved");
}
