use std::io::ErrorKind;

use super::super::process::Process;
use super::super::*;
use super::{FakeFunction, FakeHost, NVME, address, host_with_nvme};
use crate::PciAddress;

const MY_PID: u32 = 4242;

/// A process that runs on the made-up host.
fn process(host: &FakeHost, pid: u32) -> Process {
    host.running(pid);
    Process::with_pid(&host.host(), pid)
}

fn open(host: &FakeHost, keep: &[PciAddress]) -> Bindings {
    open_as(host, MY_PID, keep)
}

fn open_as(host: &FakeHost, pid: u32, keep: &[PciAddress]) -> Bindings {
    let me = process(host, pid);
    Bindings::open_as(host.host(), &host.state_dir(), keep, me).unwrap()
}

/// Ends a process as `kill -9` does: nothing that it would do at its end happens.
fn kill(host: &FakeHost, pid: u32, bindings: Bindings) {
    std::mem::forget(bindings);
    std::fs::remove_file(host.path(&format!("proc/{pid}/stat"))).unwrap();
}

fn assert_as_before(host: &FakeHost) {
    assert_eq!(host.driver_of(NVME).as_deref(), Some("nvme"));
    assert_eq!(host.attribute(NVME, "driver_override"), "(null)");
    let record = std::fs::read_to_string(host.state_dir().join("bindings.json")).unwrap();
    assert!(!record.contains(NVME), "{record}");
}

#[test]
fn a_function_is_bound_while_it_is_lent_and_given_back_at_the_end() {
    let host = host_with_nvme();
    let bindings = open(&host, &[]);
    bindings.lend(address(NVME), true).unwrap();
    assert_eq!(host.driver_of(NVME).as_deref(), Some("vfio-pci"));
    drop(bindings);
    assert_as_before(&host);
}

#[test]
fn function_without_power_is_not_lent_and_a_virtual_one_without_ids_is() {
    let host = host_with_nvme();
    let config = host.path(&format!("sys/bus/pci/devices/{NVME}/config"));
    std::fs::write(&config, [0xff; 64]).unwrap();
    let bindings = open(&host, &[]);
    let text = bindings.lend(address(NVME), true).unwrap_err().to_string();
    for words in ["does not answer", &format!("/{NVME}/remove"), "rescan"] {
        assert!(text.contains(words), "{words:?} is not in: {text}");
    }
    assert_eq!(host.driver_of(NVME).as_deref(), Some("nvme"));
    let mut header = [0; 64];
    header[..4].fill(0xff);
    std::fs::write(&config, header).unwrap();
    bindings.lend(address(NVME), true).unwrap();
}

#[test]
fn function_that_the_kernel_still_closes_is_left_to_the_next_start() {
    let host = host_with_nvme();
    let bindings = open(&host, &[]);
    bindings.lend(address(NVME), true).unwrap();
    bindings.leave(address(NVME));
    drop(bindings);
    assert_eq!(host.driver_of(NVME).as_deref(), Some("vfio-pci"));
    std::fs::remove_file(host.path(&format!("proc/{MY_PID}/stat"))).unwrap();
    drop(open_as(&host, MY_PID + 1, &[]));
    assert_as_before(&host);
}

#[test]
fn without_being_asked_to_bind_the_command_says_which_driver_has_it() {
    let host = host_with_nvme();
    let error = open(&host, &[]).lend(address(NVME), false).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("bound to nvme") && text.contains("--bind"),
        "{text}"
    );
    assert_eq!(host.driver_of(NVME).as_deref(), Some("nvme"));
}

#[test]
fn a_function_that_somebody_else_bound_to_vfio_stays_there() {
    let host = FakeHost::new();
    let bound = FakeFunction {
        group: Some(12),
        driver: Some("vfio-pci"),
        ..FakeFunction::default()
    };
    host.function(NVME, &bound);
    let bindings = open(&host, &[]);
    bindings.lend(address(NVME), true).unwrap();
    drop(bindings);
    assert_eq!(host.driver_of(NVME).as_deref(), Some("vfio-pci"));
}

#[test]
fn a_function_without_a_driver_has_none_afterwards() {
    let host = FakeHost::new();
    let unbound = FakeFunction {
        group: Some(12),
        driver: None,
        ..FakeFunction::default()
    };
    host.function(NVME, &unbound);
    let bindings = open(&host, &[]);
    bindings.lend(address(NVME), true).unwrap();
    assert_eq!(host.driver_of(NVME).as_deref(), Some("vfio-pci"));
    drop(bindings);
    assert_eq!(host.driver_of(NVME), None);
}

#[test]
fn an_override_that_somebody_set_is_there_again_afterwards() {
    let host = host_with_nvme();
    host.file(
        &format!("sys/bus/pci/devices/{NVME}/driver_override"),
        "nvme\n",
    );
    let bindings = open(&host, &[]);
    bindings.lend(address(NVME), true).unwrap();
    drop(bindings);
    assert_eq!(host.attribute(NVME, "driver_override"), "nvme");
    assert_eq!(host.driver_of(NVME).as_deref(), Some("nvme"));
}

#[test]
fn a_mounted_disk_is_refused_and_nothing_is_changed() {
    let host = host_with_nvme();
    host.disk(NVME, "nvme/nvme0/nvme0n1", "259:0");
    host.file(
        "proc/1/mountinfo",
        "22 1 259:0 / /var rw - ext4 /dev/nvme0n1 rw\n",
    );
    let error = open(&host, &[]).lend(address(NVME), true).unwrap_err();
    assert_eq!(
        error.to_string(),
        "0000:01:00.0 cannot be lent: it is in use: /dev/nvme0n1 is mounted on /var; \
         unmount it (umount /var)"
    );
    assert_as_before(&host);
}

#[test]
fn a_group_that_is_not_viable_is_refused_with_its_members() {
    let host = host_with_nvme();
    let other = FakeFunction {
        group: Some(12),
        driver: Some("e1000e"),
        ..FakeFunction::default()
    };
    host.function("0000:02:00.0", &other);
    let error = open(&host, &[]).lend(address(NVME), true).unwrap_err();
    assert!(
        error.to_string().contains("0000:02:00.0 (e1000e)"),
        "{error}"
    );
    assert_as_before(&host);
}

#[test]
fn a_function_that_is_not_there_is_named() {
    let host = FakeHost::new();
    let error = open(&host, &[]).lend(address(NVME), true).unwrap_err();
    assert!(
        error.to_string().contains("no PCI function 0000:01:00.0"),
        "{error}"
    );
}

#[test]
fn two_processes_cannot_lend_one_function() {
    let host = host_with_nvme();
    let first = open_as(&host, 1000, &[]);
    first.lend(address(NVME), true).unwrap();
    let second = open_as(&host, 1001, &[address(NVME)]);
    let error = second.lend(address(NVME), true).unwrap_err();
    assert!(
        matches!(error, SysfsError::Lent { pid: 1000, .. }),
        "{error}"
    );
    drop(second);
    assert_eq!(host.driver_of(NVME).as_deref(), Some("vfio-pci"));
    drop(first);
    assert_as_before(&host);
}

#[test]
fn after_a_crash_the_next_start_gives_the_function_back() {
    let host = host_with_nvme();
    let dying = open_as(&host, 1000, &[]);
    dying.lend(address(NVME), true).unwrap();
    kill(&host, 1000, dying);
    assert_eq!(host.driver_of(NVME).as_deref(), Some("vfio-pci"));
    let _next = open(&host, &[]);
    assert_as_before(&host);
}

#[test]
fn after_a_crash_what_is_lent_again_stays_with_vfio_and_is_given_back_at_the_end() {
    let host = host_with_nvme();
    let dying = open_as(&host, 1000, &[]);
    dying.lend(address(NVME), true).unwrap();
    kill(&host, 1000, dying);
    let next = open(&host, &[address(NVME)]);
    assert_eq!(host.driver_of(NVME).as_deref(), Some("vfio-pci"));
    next.lend(address(NVME), false).unwrap();
    drop(next);
    assert_as_before(&host);
}

#[test]
fn a_process_with_the_dead_ones_number_is_not_taken_for_it() {
    let host = host_with_nvme();
    let dying = open_as(&host, 1000, &[]);
    dying.lend(address(NVME), true).unwrap();
    kill(&host, 1000, dying);
    host.file(
        "proc/1000/stat",
        &format!("1000 (x) S {}77 0\n", "0 ".repeat(18)),
    );
    let _next = open(&host, &[]);
    assert_as_before(&host);
}

#[test]
fn whatever_write_a_crash_comes_before_the_next_start_repairs() {
    for writes in 0..6 {
        let host = host_with_nvme();
        let dying = open_as(&host, 1000, &[]);
        host.die_after(writes);
        let _ = dying.lend(address(NVME), true);
        dying.give_back_all();
        host.recover();
        kill(&host, 1000, dying);
        let _next = open(&host, &[]);
        assert_as_before(&host);
    }
}

#[test]
fn a_reboot_makes_the_record_void() {
    let host = host_with_nvme();
    let dying = open_as(&host, 1000, &[]);
    dying.lend(address(NVME), true).unwrap();
    std::mem::forget(dying);
    host.file("proc/sys/kernel/random/boot_id", "boot-2\n");
    let _next = open(&host, &[]);
    let record = std::fs::read_to_string(host.state_dir().join("bindings.json")).unwrap();
    assert!(!record.contains(NVME), "{record}");
}

#[test]
fn a_function_that_was_pulled_out_leaves_the_record() {
    let host = host_with_nvme();
    let bindings = open(&host, &[]);
    bindings.lend(address(NVME), true).unwrap();
    std::fs::remove_file(host.path(&format!("sys/bus/pci/devices/{NVME}"))).unwrap();
    drop(bindings);
    let record = std::fs::read_to_string(host.state_dir().join("bindings.json")).unwrap();
    assert!(!record.contains(NVME), "{record}");
}

#[test]
fn a_function_that_someone_has_open_is_not_taken_from_them() {
    let host = host_with_nvme();
    let bindings = open(&host, &[]);
    bindings.lend(address(NVME), true).unwrap();
    host.process(99, "qemu", "/dev/vfio/12");
    let error = bindings.give_back(address(NVME)).unwrap_err();
    assert!(error.to_string().contains("qemu (process 99)"), "{error}");
    assert_eq!(host.driver_of(NVME).as_deref(), Some("vfio-pci"));
    std::fs::remove_dir_all(host.path("proc/99")).unwrap();
    drop(bindings);
    assert_as_before(&host);
}

#[test]
fn a_write_that_is_refused_leaves_all_as_it_was_and_says_what_helps() {
    let host = host_with_nvme();
    host.refuse("driver_override", ErrorKind::PermissionDenied);
    let bindings = open(&host, &[]);
    let error = bindings.lend(address(NVME), true).unwrap_err();
    assert!(error.to_string().contains("only root"), "{error}");
    host.recover();
    drop(bindings);
    assert_as_before(&host);
}

#[test]
fn a_kernel_that_binds_another_driver_is_an_error_and_undone() {
    let host = host_with_nvme();
    let bindings = open(&host, &[]);
    // What happens when the module goes between the check and the probe.
    host.refuse("drivers_probe", ErrorKind::NotFound);
    bindings.lend(address(NVME), true).unwrap_err();
    host.recover();
    drop(bindings);
    assert_eq!(host.driver_of(NVME).as_deref(), Some("nvme"));
}

#[test]
fn a_damaged_record_is_an_error_that_names_the_file() {
    let host = host_with_nvme();
    std::fs::create_dir_all(host.state_dir()).unwrap();
    for content in ["", "{}", "[]", "{\"version\":2}"] {
        std::fs::write(host.state_dir().join("bindings.json"), content).unwrap();
        let me = process(&host, MY_PID);
        let result = Bindings::open_as(host.host(), &host.state_dir(), &[], me);
        let text = result.map(|_| ()).unwrap_err().to_string();
        assert!(text.contains("bindings.json is damaged"), "{text}");
    }
}
