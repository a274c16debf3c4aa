//! One claimant at a time, and what it leaves behind.

use std::io::Write;
use std::net::TcpStream;

use farbus_fabric::FabricError;
use farbus_fabric::session::client;
use farbus_fabric::wire::{ExportName, RefusalCode};
use farbus_vfio::Function;
use farbus_vfio::nvme::{csts, reg};

use super::bed::{BLOCK, Bed};

#[test]
fn second_claimant_is_refused_with_the_name_of_the_first() {
    let bed = Bed::start("size=1MiB");
    let first = bed.attach();
    match bed.claim() {
        Err(FabricError::Refused { code, text }) => {
            assert_eq!(code, RefusalCode::Busy);
            assert!(
                text.as_str().contains("claimed by test at 127.0.0.1"),
                "{text}"
            );
        }
        other => panic!("{:?}", other.map(|claimed| claimed.epoch)),
    }
    let epoch = first.remote.epoch();
    drop(first);
    assert!(bed.claim_when_free().epoch > epoch);
}

#[test]
fn unknown_export_is_refused_with_the_names_of_those_there_are() {
    let bed = Bed::start("size=1MiB");
    let name = ExportName::new("disk1").unwrap();
    let refused = client::claim(
        &bed.address,
        &name,
        "test",
        std::time::Duration::from_secs(5),
    );
    match refused {
        Err(FabricError::Refused { code, text }) => {
            assert_eq!(code, RefusalCode::UnknownExport);
            assert!(text.as_str().contains("disk0"), "{text}");
        }
        other => panic!("{:?}", other.map(|claimed| claimed.epoch)),
    }
}

#[test]
fn vanished_claimant_frees_the_export_and_leaves_a_reset_controller() {
    let bed = Bed::start("size=1MiB");
    let first = bed.attach();
    let mut driver = first.driver(1);
    driver.write(1, 0, BLOCK, &[7; 4096]).unwrap();
    driver.set_feature(2, 0).unwrap();
    // Dropping the function closes the connection without a word.
    drop(driver);
    let claimed = {
        drop(first);
        bed.claim_when_free()
    };
    let second = super::bed::Attached::new(claimed);
    let mut status = [0; 4];
    second
        .remote
        .region_read(farbus_vfio::RegionIndex::BAR0, reg::CSTS, &mut status)
        .unwrap();
    assert_eq!(u32::from_le_bytes(status) & csts::RDY, 0);
    let mut driver = second.driver(1);
    let mut back = vec![0; 4096];
    driver.read(1, 0, BLOCK, &mut back).unwrap();
    assert!(back.iter().all(|byte| *byte == 7));
}

#[test]
fn strangers_at_the_port_hold_up_nobody() {
    let bed = Bed::start("size=1MiB");
    let silent: Vec<_> = (0..20)
        .map(|_| TcpStream::connect(&bed.address).unwrap())
        .collect();
    for noise in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], &[0; 100]] {
        let mut stream = TcpStream::connect(&bed.address).unwrap();
        let _ = stream.write_all(noise);
    }
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    driver.write(1, 0, BLOCK, &[1; 512]).unwrap();
    drop(silent);
}
