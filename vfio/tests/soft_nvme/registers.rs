//! Registers, enabling, disabling, shutting down and resetting.

use std::time::Duration;

use farbus_vfio::nvme::{cc, csts, reg};
use farbus_vfio::{Function, RegionIndex};

use crate::bench::{Bench, until};

const SIZES: u32 = 6 << cc::IOSQES_SHIFT | 4 << cc::IOCQES_SHIFT;

fn enable_with(bench: &Bench, aqa: u32, configuration: u32) {
    bench.driver.write32(reg::AQA, aqa).unwrap();
    bench
        .driver
        .write32(reg::CC, configuration | cc::EN)
        .unwrap();
}

#[test]
fn capabilities_and_version_are_those_of_nvme_1_4() {
    let bench = Bench::cold(512);
    let capabilities = bench.driver.read64(reg::CAP).unwrap();
    assert_eq!(capabilities & 0xffff, 1023, "MQES");
    assert_eq!(capabilities >> 16 & 1, 1, "CQR");
    assert!(
        capabilities >> 24 & 0xff >= 10,
        "TO of at least five seconds"
    );
    assert_eq!(capabilities >> 32 & 0xf, 0, "DSTRD");
    assert_eq!(capabilities >> 36 & 1, 0, "NSSRS");
    assert_eq!(capabilities >> 37 & 0xff, 1, "CSS");
    assert_eq!(capabilities >> 48, 0, "MPSMIN, MPSMAX, PMRS, CMBS");
    assert_eq!(bench.driver.read32(reg::VS).unwrap(), 0x0001_0400);
    assert_eq!(bench.driver.read32(reg::CSTS).unwrap(), 0);
}

#[test]
fn read_only_and_reserved_registers_take_no_notice_of_writes() {
    let bench = Bench::cold(512);
    let before = bench.driver.read64(reg::CAP).unwrap();
    for offset in [reg::CAP, reg::VS, reg::CSTS, reg::NSSR, reg::CMBLOC, 0x800] {
        bench.driver.write32(offset, 0xffff_ffff).unwrap();
    }
    assert_eq!(bench.driver.read64(reg::CAP).unwrap(), before);
    assert_eq!(bench.driver.read32(reg::CSTS).unwrap(), 0);
    for offset in [reg::NSSR, reg::CMBLOC, reg::CMBSZ, 0x800] {
        assert_eq!(bench.driver.read32(offset).unwrap(), 0);
    }
}

#[test]
fn wide_registers_can_be_written_in_halves_or_at_once() {
    let bench = Bench::cold(512);
    bench
        .driver
        .write64(reg::ASQ, 0x0012_3456_789a_bfff)
        .unwrap();
    assert_eq!(
        bench.driver.read64(reg::ASQ).unwrap(),
        0x0012_3456_789a_b000
    );
    bench.driver.write32(reg::ACQ + 4, 0x12).unwrap();
    bench.driver.write32(reg::ACQ, 0x3456_7000).unwrap();
    assert_eq!(bench.driver.read64(reg::ACQ).unwrap(), 0x12_3456_7000);
    // CMBLOC is behind ACQ: nothing spills over.
    assert_eq!(bench.driver.read32(reg::CMBLOC).unwrap(), 0);
    bench.driver.write32(reg::AQA, 0xffff_ffff).unwrap();
    assert_eq!(bench.driver.read32(reg::AQA).unwrap(), 0x0fff_0fff);
}

#[test]
fn narrow_and_unaligned_accesses_read_bytes_and_write_nothing() {
    let bench = Bench::cold(512);
    let mut bytes = [0; 3];
    bench
        .function
        .region_read(RegionIndex::BAR0, 0x09, &mut bytes)
        .unwrap();
    assert_eq!(bytes, [0x04, 0x01, 0x00]);
    for (offset, data) in [(0x14, &[1u8][..]), (0x16, &[0xff; 4]), (0x14, &[0xff; 3])] {
        bench
            .function
            .region_write(RegionIndex::BAR0, offset, data)
            .unwrap();
    }
    assert_eq!(bench.driver.read32(reg::CC).unwrap(), 0);
}

#[test]
fn enabling_disabling_and_enabling_again_works() {
    let mut bench = Bench::enabled(512);
    for _ in 0..20 {
        bench.driver.disable().unwrap();
        assert_eq!(bench.driver.read32(reg::CSTS).unwrap(), 0);
        bench.driver.enable().unwrap();
        assert_eq!(bench.driver.read32(reg::CSTS).unwrap(), csts::RDY);
    }
}

#[test]
fn settings_that_are_not_offered_make_the_controller_fatal_until_it_is_disabled() {
    let good = 31 | 31 << 16;
    let cases = [
        (good, 1 << 7),   // pages of 8 KiB
        (good, 1 << 4),   // another command set
        (good, 6 << 4),   // all command sets
        (good, 1 << 11),  // weighted round robin
        (0x0000_001f, 0), // a completion queue of one entry
        (0x001f_0000, 0), // a submission queue of one entry
    ];
    for (aqa, configuration) in cases {
        let mut bench = Bench::cold(512);
        enable_with(&bench, aqa, configuration | SIZES);
        bench.await_fatal();
        assert_eq!(bench.driver.read32(reg::CSTS).unwrap() & csts::RDY, 0);
        bench.driver.write32(reg::CC, 0).unwrap();
        until("the end of fatal status", || !bench.is_fatal());
        bench.driver.enable().unwrap();
    }
}

#[test]
fn a_shutdown_completes_and_a_reset_leads_back() {
    for abrupt in [false, true] {
        let mut bench = Bench::ready(4096);
        bench.assert_works();
        if abrupt {
            let configuration = bench.driver.read32(reg::CC).unwrap();
            bench
                .driver
                .write32(reg::CC, configuration | 2 << 14)
                .unwrap();
            until("shutdown", || {
                bench.driver.read32(reg::CSTS).unwrap() & csts::SHST_MASK == csts::SHST_COMPLETE
            });
        } else {
            bench.driver.shutdown().unwrap();
        }
        bench.recover();
        assert_eq!(bench.driver.read32(reg::CSTS).unwrap(), csts::RDY);
        bench.assert_works();
    }
}

#[test]
fn a_controller_that_was_never_enabled_can_be_shut_down() {
    let mut bench = Bench::cold(512);
    bench.driver.shutdown().unwrap();
}

#[test]
fn a_function_reset_clears_registers_and_configuration_space() {
    let mut bench = Bench::ready(4096);
    bench
        .function
        .config_write(0x10, &[0, 0, 0x12, 0x34])
        .unwrap();
    bench.function.reset().unwrap();
    let mut bytes = [0; 8];
    bench.function.config_read(0x10, &mut bytes).unwrap();
    assert_eq!(bytes, [4, 0, 0, 0, 0, 0, 0, 0]);
    assert!(
        bench
            .function
            .region_read(RegionIndex::BAR0, 0, &mut bytes)
            .is_err()
    );

    bench.driver.reset().unwrap();
    for offset in [reg::CC, reg::CSTS, reg::AQA, reg::ASQ, reg::ACQ] {
        assert_eq!(
            bench.driver.read32(offset).unwrap(),
            0,
            "register {offset:#x}"
        );
    }
    bench.recover();
    bench.assert_works();
}

#[test]
fn a_function_level_reset_through_configuration_space_does_the_same() {
    let mut bench = Bench::ready(4096);
    let express = capability(&bench, 0x10);
    bench
        .function
        .config_write(express + 8, &[0, 0x80])
        .unwrap();
    assert!(
        bench.driver.read32(reg::CC).is_err(),
        "memory space must be off"
    );
    bench.function.config_write(4, &[6, 0]).unwrap();
    assert_eq!(bench.driver.read32(reg::CC).unwrap(), 0);
    bench.recover();
    bench.assert_works();
}

#[test]
fn a_sleeping_function_answers_no_register() {
    let bench = Bench::enabled(512);
    let power = capability(&bench, 0x01);
    bench.function.config_write(power + 4, &[3]).unwrap();
    assert!(bench.driver.read32(reg::CSTS).is_err());
    bench.function.config_write(power + 4, &[0]).unwrap();
    assert_eq!(bench.driver.read32(reg::CSTS).unwrap(), csts::RDY);
}

#[test]
fn a_disabled_controller_ignores_doorbells() {
    let mut bench = Bench::cold(512);
    for queue in [0, 1, 16, 17, 1000] {
        bench.driver.ring_sq(queue, 3).unwrap();
        bench.driver.ring_cq(queue, 3).unwrap();
    }
    std::thread::sleep(Duration::from_millis(20));
    assert!(!bench.is_fatal());
    bench.driver.enable().unwrap();
}

/// Where a capability is.
fn capability(bench: &Bench, id: u8) -> u16 {
    let mut at = [0];
    bench.function.config_read(0x34, &mut at).unwrap();
    loop {
        let offset = u16::from(at[0]);
        assert_ne!(offset, 0, "no capability {id:#x}");
        let mut header = [0; 2];
        bench.function.config_read(offset, &mut header).unwrap();
        if header[0] == id {
            return offset;
        }
        at[0] = header[1];
    }
}
