use std::io::ErrorKind;

use super::super::*;
use super::{FakeHost, NVME, address, host_with_nvme};
use crate::PciAddress;

fn host_with_sriov() -> FakeHost {
    let host = host_with_nvme();
    let directory = format!("sys/bus/pci/devices/{NVME}");
    host.file(&format!("{directory}/sriov_totalvfs"), "4\n");
    host.file(&format!("{directory}/sriov_numvfs"), "0\n");
    host.file(&format!("{directory}/sriov_drivers_autoprobe"), "1\n");
    host
}

fn open(host: &FakeHost, keep: &[PciAddress]) -> Bindings {
    Bindings::open(host.host(), &host.state_dir(), keep).unwrap()
}

#[test]
fn virtual_functions_are_made_without_a_driver_and_removed_at_the_end() {
    let host = host_with_sriov();
    let bindings = open(&host, &[]);
    let made = bindings.create_virtual_functions(address(NVME), 2).unwrap();
    assert_eq!(made, [address("0000:01:00.1"), address("0000:01:00.2")]);
    assert_eq!(host.driver_of("0000:01:00.1"), None);
    assert_eq!(host.attribute(NVME, "sriov_drivers_autoprobe"), "1");
    bindings.lend(made[0], true).unwrap();
    assert_eq!(host.driver_of("0000:01:00.1").as_deref(), Some("vfio-pci"));
    drop(bindings);
    assert_eq!(host.attribute(NVME, "sriov_numvfs"), "0");
}

#[test]
fn functions_that_were_there_before_are_used_and_stay() {
    let host = host_with_sriov();
    let numvfs = host.path(&format!("sys/bus/pci/devices/{NVME}/sriov_numvfs"));
    host.host().write(&numvfs, "2").unwrap();
    let bindings = open(&host, &[]);
    assert_eq!(
        bindings
            .create_virtual_functions(address(NVME), 2)
            .unwrap()
            .len(),
        2
    );
    let error = bindings
        .create_virtual_functions(address(NVME), 3)
        .unwrap_err();
    assert!(error.to_string().contains("it has 2 already"), "{error}");
    drop(bindings);
    assert_eq!(host.attribute(NVME, "sriov_numvfs"), "2");
}

#[test]
fn more_than_the_function_offers_is_refused_with_the_limit() {
    let host = host_with_sriov();
    let bindings = open(&host, &[]);
    for count in [0, 5] {
        let error = bindings
            .create_virtual_functions(address(NVME), count)
            .unwrap_err();
        assert!(error.to_string().contains("1 to 4"), "{error}");
    }
}

#[test]
fn a_driver_without_support_is_named() {
    let host = host_with_sriov();
    host.refuse("sriov_numvfs", ErrorKind::NotFound);
    let error = open(&host, &[])
        .create_virtual_functions(address(NVME), 2)
        .unwrap_err();
    assert!(error.to_string().contains("driver nvme cannot"), "{error}");
    assert_eq!(host.attribute(NVME, "sriov_drivers_autoprobe"), "1");
}

#[test]
fn a_function_without_sriov_is_refused() {
    let host = host_with_nvme();
    let error = open(&host, &[])
        .create_virtual_functions(address(NVME), 2)
        .unwrap_err();
    assert!(
        error.to_string().contains("does not offer SR-IOV"),
        "{error}"
    );
}

#[test]
fn a_physical_function_with_virtual_ones_is_in_use() {
    let host = host_with_sriov();
    let bindings = open(&host, &[]);
    bindings.create_virtual_functions(address(NVME), 2).unwrap();
    let error = bindings.lend(address(NVME), true).unwrap_err();
    assert!(error.to_string().contains("2 virtual functions"), "{error}");
}

#[test]
fn after_a_crash_functions_that_are_not_wanted_again_are_removed() {
    let host = host_with_sriov();
    // This test's own process is not on the made-up host, and so counts as dead.
    let dying = open(&host, &[]);
    let made = dying.create_virtual_functions(address(NVME), 2).unwrap();
    dying.lend(made[1], true).unwrap();
    std::mem::forget(dying);
    let kept = open(&host, &[address(NVME)]);
    assert_eq!(host.attribute(NVME, "sriov_numvfs"), "2");
    assert_eq!(host.driver_of("0000:01:00.2").as_deref(), Some("vfio-pci"));
    assert_eq!(
        kept.create_virtual_functions(address(NVME), 2).unwrap(),
        made
    );
    std::mem::forget(kept);
    let _not_wanted = open(&host, &[]);
    assert_eq!(host.attribute(NVME, "sriov_numvfs"), "0");
}

#[test]
fn after_a_crash_functions_stay_while_one_of_them_is_wanted_by_itself() {
    let host = host_with_sriov();
    let dying = open(&host, &[]);
    let made = dying.create_virtual_functions(address(NVME), 2).unwrap();
    dying.lend(made[0], true).unwrap();
    dying.lend(made[1], true).unwrap();
    std::mem::forget(dying);
    let next = open(&host, &[made[1]]);
    assert_eq!(host.driver_of("0000:01:00.1"), None);
    next.lend(made[1], false).unwrap();
    drop(next);
    assert_eq!(host.attribute(NVME, "sriov_numvfs"), "0");
}
