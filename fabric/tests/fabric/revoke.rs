//! Memory that is revoked while a payload for it arrives is not written any more.

use std::os::fd::AsFd;

use farbus_fabric::{FabricError, Link, Received, Span};
use rustix::event::PollFlags;

use super::support::*;

/// Lets half of a payload arrive, revokes a range, and lets the rest arrive. The payload is
/// `0xff` everywhere, and `spans` cover `len` bytes.
fn revoke_halfway(spans: Vec<Span>, len: usize, revoke: &Span) {
    use std::io::Write;
    let (mut compute, mut socket) = link_and_socket();
    let bytes = completion_bytes(1, &vec![0xff; len]);
    let half = bytes.len() - len / 2;
    let mut sink = target(spans);
    let mut written = 0;
    // Loopback may hand the half over in parts, and large halves do not fit its buffers.
    while written < half {
        written += socket
            .write(&bytes[written..half.min(written + 0x8000)])
            .unwrap();
        wait(&compute, PollFlags::IN);
        while compute.receive(&mut sink).unwrap() != Received::Idle {}
    }
    while rustix::io::ioctl_fionread(compute.descriptor().as_fd()).unwrap() > 0 {
        compute.receive(&mut sink).unwrap();
    }

    compute.revoke(&revoke.memory, revoke.offset, revoke.len);

    write_and_close(socket, bytes[half..].to_vec());
    receive(&mut compute, &mut sink).unwrap();
    assert_eq!(sink.delivered, 1);
    assert!(matches!(
        receive(&mut compute, &mut sink),
        Err(FabricError::Closed)
    ));
}

#[test]
fn revoked_memory_is_not_written_by_the_rest_of_a_payload() {
    let guest = memory(0x10000);
    let spans = vec![
        span(&guest, 0, 0x4000),
        span(&guest, 0x8000, 0x2000),
        span(&guest, 0xc000, 0x2000),
    ];
    // Half of the payload ends at 0x4000; the range covers the end of what has arrived
    // already, and the middle of a span that has not.
    revoke_halfway(
        spans,
        0x8000,
        &span(&guest, 0x3f00, 0x8000 - 0x3f00 + 0x1000),
    );

    let ones = |offset, len| load(&guest, offset, len).iter().all(|byte| *byte == 0xff);
    let zeros = |offset, len| load(&guest, offset, len).iter().all(|byte| *byte == 0);
    assert!(ones(0, 0x4000), "what had arrived stays");
    assert!(zeros(0x8000, 0x1000), "what is revoked is not written");
    assert!(
        ones(0x9000, 0x1000) && ones(0xc000, 0x2000),
        "the rest lands"
    );
    assert!(zeros(0x4000, 0x4000) && zeros(0xa000, 0x2000) && zeros(0xe000, 0x2000));
}

#[test]
fn revoking_the_middle_of_a_span_spares_both_ends() {
    let guest = memory(0x8000);
    let spans = vec![span(&guest, 0, 0x2000), span(&guest, 0x4000, 0x2000)];
    revoke_halfway(spans, 0x4000, &span(&guest, 0x4800, 0x1000));

    let mut expected = vec![0xff; 0x2000];
    expected[0x800..0x1800].fill(0);
    assert_eq!(load(&guest, 0x4000, 0x2000), expected);
}

#[test]
fn revoking_everything_drops_payloads_of_any_length() {
    let guest = memory(0x400000);
    let whole = span(&guest, 0, 0x400000);
    revoke_halfway(vec![whole.clone()], 0x400000, &whole);

    let rest = load(&guest, 0x200000, 0x200000);
    assert!(rest.iter().all(|byte| *byte == 0));
}

#[test]
fn revoking_other_memory_changes_nothing() {
    let (guest, other) = (memory(0x2000), memory(0x2000));
    revoke_halfway(
        vec![span(&guest, 0x1000, 0x1000)],
        0x1000,
        &span(&other, 0, 0x2000),
    );
    assert_eq!(load(&guest, 0x1000, 0x1000), vec![0xff; 0x1000]);

    let guest = memory(0x3000);
    revoke_halfway(
        vec![span(&guest, 0x1000, 0x1000)],
        0x1000,
        &span(&guest, 0, 0x1000),
    );
    revoke_halfway(
        vec![span(&guest, 0x1000, 0x1000)],
        0x1000,
        &span(&guest, 0x2000, 0x1000),
    );
    assert_eq!(load(&guest, 0x1000, 0x1000), vec![0xff; 0x1000]);
}
