//! Get and Set Features.

use farbus_vfio::nvme::{Status, admin, feature, select};

use crate::bench::{Bench, command};

const ALL: u32 = 0xffff_ffff;

fn get(bench: &mut Bench, id: u8, select: u32, parameter: u32) -> u32 {
    let nsid = u32::from(id == feature::ERROR_RECOVERY);
    let entry = command(
        admin::GET_FEATURES,
        nsid,
        &[u32::from(id) | select << 8, parameter],
    );
    bench.driver.command(0, entry).unwrap() as u32
}

fn set_status(bench: &mut Bench, id: u8, nsid: u32, value: u32) -> Status {
    bench.admin_status(admin::SET_FEATURES, nsid, &[u32::from(id), value])
}

#[test]
fn defaults_are_reported_and_kept_apart_from_current_values() {
    let mut bench = Bench::enabled(512);
    for (id, default, value) in [
        (feature::ARBITRATION, 7, 0x0102_0303),
        (feature::TEMPERATURE_THRESHOLD, 343, 400),
        (feature::VOLATILE_WRITE_CACHE, 1, 0),
        (feature::INTERRUPT_COALESCING, 0, 0x0204),
        (feature::WRITE_ATOMICITY, 0, 1),
        (feature::ASYNC_EVENTS, 0, 0x1f),
    ] {
        assert_eq!(
            get(&mut bench, id, select::CURRENT, 0),
            default,
            "feature {id:#x}"
        );
        assert_eq!(set_status(&mut bench, id, 0, value), Status::SUCCESS);
        assert_eq!(
            get(&mut bench, id, select::CURRENT, 0),
            value,
            "feature {id:#x}"
        );
        assert_eq!(
            get(&mut bench, id, select::DEFAULT, 0),
            default,
            "feature {id:#x}"
        );
        assert_eq!(
            get(&mut bench, id, select::SAVED, 0),
            default,
            "feature {id:#x}"
        );
        assert_eq!(
            get(&mut bench, id, select::CAPABILITIES, 0),
            4,
            "feature {id:#x}"
        );
    }
    bench.driver.enable().unwrap();
    assert_eq!(
        get(&mut bench, feature::ARBITRATION, select::CURRENT, 0),
        7,
        "after a reset"
    );
    assert_eq!(
        get(
            &mut bench,
            feature::VOLATILE_WRITE_CACHE,
            select::CURRENT,
            0
        ),
        1
    );
}

#[test]
fn error_recovery_belongs_to_the_namespace() {
    let mut bench = Bench::enabled(512);
    let id = feature::ERROR_RECOVERY;
    assert_eq!(set_status(&mut bench, id, 1, 0x1234), Status::SUCCESS);
    assert_eq!(get(&mut bench, id, select::CURRENT, 0), 0x1234);
    assert_eq!(get(&mut bench, id, select::CAPABILITIES, 0), 6);
    assert_eq!(set_status(&mut bench, id, ALL, 5), Status::SUCCESS);
    assert_eq!(set_status(&mut bench, id, 0, 5), Status::INVALID_NAMESPACE);
    assert_eq!(set_status(&mut bench, id, 2, 5), Status::INVALID_NAMESPACE);
    assert_eq!(
        set_status(&mut bench, id, 1, 1 << 16),
        Status::INVALID_FIELD,
        "DULBE"
    );
    let nowhere = bench.admin_status(admin::GET_FEATURES, ALL, &[u32::from(id)]);
    assert_eq!(nowhere, Status::INVALID_NAMESPACE);
}

#[test]
fn the_number_of_queues_is_granted_until_queues_exist() {
    let mut bench = Bench::enabled(512);
    assert_eq!(bench.driver.request_queues(4).unwrap(), 16);
    let id = feature::NUMBER_OF_QUEUES;
    assert_eq!(set_status(&mut bench, id, 0, 0xffff), Status::INVALID_FIELD);
    assert_eq!(
        set_status(&mut bench, id, 0, 0xffff << 16),
        Status::INVALID_FIELD
    );
    bench.driver.create_queue_pair(1, 8, None).unwrap();
    assert_eq!(
        set_status(&mut bench, id, 0, 0),
        Status::COMMAND_SEQUENCE_ERROR
    );
    bench.driver.delete_queue_pair(1).unwrap();
    assert_eq!(set_status(&mut bench, id, 0, 0), Status::SUCCESS);
    assert_eq!(get(&mut bench, id, select::CURRENT, 0), 0x000f_000f);
}

#[test]
fn interrupt_vectors_are_configured_one_by_one() {
    let mut bench = Bench::enabled(512);
    let id = feature::INTERRUPT_VECTOR;
    assert_eq!(set_status(&mut bench, id, 0, 1 << 16 | 16), Status::SUCCESS);
    assert_eq!(get(&mut bench, id, select::CURRENT, 16), 1 << 16 | 16);
    assert_eq!(get(&mut bench, id, select::CURRENT, 15), 15);
    assert_eq!(set_status(&mut bench, id, 0, 17), Status::INVALID_FIELD);
    assert_eq!(set_status(&mut bench, id, 0, 0xffff), Status::INVALID_FIELD);
}

#[test]
fn values_and_features_that_do_not_exist_are_refused() {
    let mut bench = Bench::enabled(512);
    for (id, value) in [
        (feature::POWER_MANAGEMENT, 1),
        (feature::TEMPERATURE_THRESHOLD, 1 << 16),
        (feature::TEMPERATURE_THRESHOLD, 2 << 20),
        (0x00, 0),
        (0x03, 0),
        (0x0c, 0),
        (0x0e, 0),
        (0x0f, 0),
        (0x80, 0),
        (0xff, 0),
    ] {
        assert_eq!(
            set_status(&mut bench, id, 0, value),
            Status::INVALID_FIELD,
            "{id:#x}"
        );
    }
    let unknown = bench.admin_status(admin::GET_FEATURES, 0, &[0x0c]);
    assert_eq!(unknown, Status::INVALID_FIELD);
    for select in 4..8 {
        let status = bench.admin_status(
            admin::GET_FEATURES,
            0,
            &[u32::from(feature::ARBITRATION) | select << 8],
        );
        assert_eq!(status, Status::INVALID_FIELD, "select {select}");
    }
    let thresholds = bench.admin_status(
        admin::GET_FEATURES,
        0,
        &[u32::from(feature::TEMPERATURE_THRESHOLD), 3 << 20],
    );
    assert_eq!(thresholds, Status::INVALID_FIELD);
}

#[test]
fn saving_and_wrong_namespaces_are_refused() {
    let mut bench = Bench::enabled(512);
    let id = u32::from(feature::VOLATILE_WRITE_CACHE);
    let save = bench.admin_status(admin::SET_FEATURES, 0, &[id | 1 << 31, 0]);
    assert_eq!(save, Status::FEATURE_NOT_SAVEABLE);
    let specific = bench.admin_status(admin::SET_FEATURES, 1, &[id, 0]);
    assert_eq!(specific, Status::FEATURE_NOT_NAMESPACE_SPECIFIC);
    assert_eq!(
        get(
            &mut bench,
            feature::VOLATILE_WRITE_CACHE,
            select::CURRENT,
            0
        ),
        1
    );
}
