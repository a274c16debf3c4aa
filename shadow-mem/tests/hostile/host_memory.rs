//! Devices that ask for a host memory buffer get it from the device server, and what a guest is
//! told of a controller is what it can have.

use farbus_vfio::nvme::{PAGE_SIZE, Status, SubmissionEntry, admin, cc, csts};
use farbus_vfio::{DmaAccess, DmaWindow};
use vm_memory::VolatileMemory;

use super::device::{Claim, LIMITS};
use super::fake_nvme::FakeNvme;
use super::guest::{CC_ON, Guest};
use super::wire::configure;

const HOST_MEMORY: u32 = 0x0d;
/// Offsets into Identify Controller (NVMe 1.4 §5.15.2.2, figure 247).
const HMPRE: usize = 272;
const HMMIN: usize = 276;
const MIB: u64 = 1 << 20;

/// A claim on a controller that wants host memory, in MiB.
fn wants(preferred: u64, minimum: u64) -> Claim {
    let device = FakeNvme::new();
    {
        let identity = &mut device.state().identity;
        for (at, len) in [(HMPRE, preferred), (HMMIN, minimum)] {
            let pages = (len * MIB / PAGE_SIZE as u64) as u32;
            identity[at..at + 4].copy_from_slice(&pages.to_le_bytes());
        }
    }
    Claim::of(device)
}

/// What the controller has been told of host memory: the command, and the first descriptor.
fn told(claim: &Claim) -> Vec<(SubmissionEntry, [u8; 16])> {
    let mut told = claim.device.state().set_features.clone();
    told.retain(|(sqe, _)| sqe.dword(10) == HOST_MEMORY);
    told
}

/// The third window, behind buffer shadow and arena.
fn lent(claim: &Claim) -> Option<DmaWindow> {
    claim.device.state().windows.get(2).cloned()
}

fn identify() -> SubmissionEntry {
    let mut sqe = SubmissionEntry::new(admin::IDENTIFY);
    sqe.set_dword(10, 1);
    sqe
}

/// What the guest gets for Identify Controller.
fn identity_for_guest(claim: &mut Claim) -> Vec<u8> {
    claim.submit(3, 0, identify()).unwrap();
    assert_eq!(claim.completed()[0].data_len, PAGE_SIZE as u32);
    let mut page = vec![0; PAGE_SIZE];
    let shadow = &claim.half.shadow().memory;
    shadow
        .get_slice(0, PAGE_SIZE)
        .unwrap()
        .copy_to(&mut page[..]);
    page
}

#[test]
fn controller_that_asks_gets_memory_of_the_device_server() {
    let mut claim = wants(8, 1);
    claim.enable();

    let window = lent(&claim).unwrap();
    assert_eq!(window.len as u64, 8 * MIB);
    assert_eq!(window.access, DmaAccess::ReadWrite);
    let [(sqe, descriptor)] = told(&claim)[..] else {
        panic!("told {} times", told(&claim).len());
    };
    let pages = (8 * MIB / PAGE_SIZE as u64) as u32;
    // Enable; size in pages; one entry in the list.
    assert_eq!([sqe.dword(11), sqe.dword(12), sqe.dword(15)], [1, pages, 1]);
    assert_eq!(descriptor[..8], window.iova.0.to_le_bytes());
    assert_eq!(descriptor[8..], u64::from(pages).to_le_bytes());
}

#[test]
fn memory_is_lent_again_after_each_start() {
    let mut claim = wants(8, 8);
    for _ in 0..2 {
        claim.enable();
        claim.tell(&configure(CC_ON & !cc::EN)).unwrap();
        claim.until_status(0);
    }
    assert_eq!(told(&claim).len(), 2);
}

#[test]
fn controller_that_prefers_more_than_there_is_gets_the_limit() {
    let mut claim = wants(1024, 4);
    claim.enable();
    assert_eq!(lent(&claim).unwrap().len as u64, 32 * MIB);
}

#[test]
fn controller_that_needs_more_than_there_is_gets_none() {
    let mut claim = wants(1024, 64);
    claim.enable();
    assert!(lent(&claim).is_none());
    assert!(told(&claim).is_empty());
}

#[test]
fn controller_that_refuses_the_memory_works_without() {
    let mut claim = wants(8, 1);
    claim.device.state().faults.refuses_host_memory = true;
    claim.enable();
    claim.create_queues();
    claim.assert_io_works();
}

#[test]
fn guest_is_told_that_no_memory_is_wanted() {
    let mut claim = wants(8, 1);
    claim.enable();
    let page = identity_for_guest(&mut claim);
    assert_eq!(page[HMPRE..HMPRE + 8], [0; 8]);
}

#[test]
fn memory_goes_with_the_claim() {
    let claim = wants(8, 1);
    let device = claim.device.clone();
    drop(claim);
    assert!(device.state().windows.is_empty());
}

#[test]
fn guest_cannot_set_the_feature_itself() {
    let mut guest = Guest::enabled();
    for opcode in [admin::SET_FEATURES, admin::GET_FEATURES] {
        let mut sqe = SubmissionEntry::new(opcode);
        sqe.set_dword(10, HOST_MEMORY);
        sqe.set_dword(11, 1);
        guest.submit(0, sqe);
    }
    assert!(guest.wire.take_submitted().is_empty());
    let statuses: Vec<_> = guest.completions(0).iter().map(|e| e.status).collect();
    assert_eq!(statuses, [Status::INVALID_FIELD; 2]);
    assert_eq!(guest.csts(), csts::RDY);
}

#[test]
fn peer_cannot_set_the_feature_either() {
    let mut claim = wants(8, 1);
    claim.enable();
    let mut sqe = SubmissionEntry::new(admin::SET_FEATURES);
    sqe.set_dword(10, HOST_MEMORY);
    assert!(claim.submit(3, 0, sqe).is_err());
    assert_eq!(told(&claim).len(), 1);
}

#[test]
fn controller_with_everything_is_reduced_to_what_crosses() {
    let device = FakeNvme::new();
    device.state().identity.fill(0xff);
    let mut claim = Claim::of(device);
    claim.enable();

    let page = identity_for_guest(&mut claim);

    // Offset, and what is left there of all ones (NVMe 1.4 §5.15.2.2, figure 247).
    let mdts = (LIMITS.max_transfer / PAGE_SIZE as u32).ilog2() as u8;
    let reduced: [(usize, &[u8]); 14] = [
        (76, &[0]),           // CMIC: one controller, one port
        (77, &[mdts]),        // MDTS: what the claim grants
        (256, &[0x10, 0x02]), // OACS: self-test and Get LBA Status
        (259, &[15]),         // AERL: sixteen events
        (261, &[0xe7]),       // LPA: no telemetry, no persistent events
        (264, &[0]),          // AVSCC: no vendor commands
        (HMPRE, &[0; 8]),     // HMPRE, HMMIN
        (328, &[0; 4]),       // SANICAP
        (520, &[0xdf, 0xfe]), // ONCS: no reservations, no Copy
        (524, &[0; 2]),       // FUSES
        (530, &[0]),          // NVSCC: no vendor commands
        (534, &[0; 2]),       // OCFS: no Copy formats
        (536, &[0; 4]),       // SGLS
        (4095, &[0xff]),
    ];
    let mut expected = vec![0xff; PAGE_SIZE];
    for (at, bytes) in reduced {
        expected[at..at + bytes.len()].copy_from_slice(bytes);
    }
    let differs = (0..PAGE_SIZE).find(|at| page[*at] != expected[*at]);
    assert_eq!(differs, None, "the first byte that differs");
}

#[test]
fn other_identify_data_passes_as_it_is() {
    let mut claim = Claim::of(FakeNvme::new());
    claim.enable();
    let mut sqe = identify();
    sqe.set_dword(10, 0);
    sqe.set_nsid(1);
    claim.submit(3, 0, sqe).unwrap();
    claim.completed();
    let mut page = vec![0u8; PAGE_SIZE];
    let shadow = &claim.half.shadow().memory;
    shadow
        .get_slice(0, PAGE_SIZE)
        .unwrap()
        .copy_to(&mut page[..]);
    assert_eq!(page[130], 9);
    assert!(
        page.iter()
            .enumerate()
            .all(|(at, byte)| at == 130 || *byte == 0)
    );
}
