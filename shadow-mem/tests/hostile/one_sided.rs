//! Links whose sides write into each other's memory: commands name the guest memory that their data
//! goes to, and the device half writes there and nowhere else.

use farbus_fabric::wire::{Placement, SubmitBatch};
use farbus_fabric::{FabricError, RemoteSpan, Sink};

use farbus_vfio::nvme::nvm;

use super::device::{Claim, placement, read as device_read};
use super::guest::{Guest, block_io, read, write};

fn span(address: u64, len: u32) -> RemoteSpan {
    RemoteSpan { address, len }
}

/// A read of a page that goes to these segments.
fn place(
    claim: &mut Claim,
    placement: &Placement,
    segments: &[RemoteSpan],
) -> Result<(), FabricError> {
    let mut batch = SubmitBatch::new();
    batch.push(placement, &device_read(8).0, segments)?;
    claim.half.deliver(&batch.header(), batch.control())
}

fn one_sided_claim() -> Claim {
    let claim = Claim::with_queues();
    claim.wire.set_one_sided();
    claim
}

#[test]
fn data_goes_to_the_segments_that_its_command_named() {
    let mut claim = one_sided_claim();
    let segments = [span(0x1_0e00, 512), span(0x9_0000, 3584)];
    place(&mut claim, &placement(3, 1, 0x2000, 4096), &segments).unwrap();
    place(
        &mut claim,
        &placement(4, 1, 0x3000, 4096),
        &[span(0x5000, 4096)],
    )
    .unwrap();

    claim.device.state().complete(1, 4);
    claim.device.state().complete(1, 3);
    claim.completed();

    assert_eq!(
        claim.wire.take_remote(),
        [span(0x5000, 4096), segments[0], segments[1]]
    );
}

#[test]
fn data_that_has_nowhere_to_go_ends_the_connection() {
    let mut claim = one_sided_claim();
    place(&mut claim, &placement(3, 1, 0, 4096), &[]).unwrap();
    claim.device.state().complete(1, 3);

    let refused = claim.half.pump(&mut claim.session);

    assert!(
        matches!(refused, Err(FabricError::Violation { .. })),
        "{refused:?}"
    );
}

#[test]
fn more_segments_than_the_data_has_pages_for_are_refused() {
    let mut claim = one_sided_claim();
    let three = [span(0x1000, 4094), span(0x9000, 1), span(0xb000, 1)];

    let refused = place(&mut claim, &placement(3, 1, 0, 4096), &three);

    assert!(
        matches!(refused, Err(FabricError::Violation { .. })),
        "{refused:?}"
    );
    assert!(claim.device.state().placed.is_empty());
}

#[test]
fn commands_name_guest_memory_and_places_in_the_shadow() {
    let mut guest = Guest::with_queues();
    guest.wire.set_one_sided();
    guest.submit(1, read(1));
    guest.pump();
    let segments = guest.wire.take_segments();
    assert_eq!(segments.iter().map(|s| s.len).sum::<u32>(), 4096);
    assert!(guest.wire.take_remote().is_empty());

    guest.submit(1, write(2));
    guest.pump();
    let sent = guest.wire.take_submitted();
    let placement = sent.last().unwrap().placement;
    assert_eq!(
        guest.wire.take_remote(),
        [span(placement.shadow_offset.into(), placement.data_len)]
    );
    assert!(
        guest.wire.take_segments().is_empty(),
        "data that is sent lands nowhere here"
    );
}

#[test]
fn memory_in_one_piece_is_named_once() {
    let mut guest = Guest::with_queues();
    guest.wire.set_one_sided();
    // Two pages, the second of which lies behind the first.
    guest.submit(1, block_io(nvm::READ, 1, 16));
    guest.pump();
    let segments = guest.wire.take_segments();
    assert_eq!(segments.len(), 1, "{segments:x?}");
}
