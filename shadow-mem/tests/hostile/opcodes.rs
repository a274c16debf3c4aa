//! Every opcode, through the device half: what reaches the device is one that may cross, and
//! points only to the engine's own memory (which [`super::fake_nvme`] checks at each doorbell).

use farbus_fabric::wire::{Direction, Placement, QueueId, Tag};
use farbus_vfio::nvme::{SubmissionEntry, admin};

use super::device::Claim;

/// An address that belongs to nobody here, in every field of a command that can hold one.
const ELSEWHERE: u64 = 0xdead_0000;

fn hostile(opcode: u8, queue: u16, dword10: u32) -> SubmissionEntry {
    let mut sqe = SubmissionEntry::new(opcode);
    sqe.set_nsid(1);
    sqe.set_mptr(ELSEWHERE);
    sqe.set_prps(ELSEWHERE, ELSEWHERE + 0x1000);
    sqe.set_dword(10, dword10);
    if queue == 0 {
        sqe.set_dword(13, ELSEWHERE as u32);
    }
    sqe
}

/// Sends a command with each direction and several lengths, and says how often it was taken:
/// with its own, hence once at the most. What is taken is completed.
fn offer(claim: &mut Claim, queue: u16, sqe: SubmissionEntry) -> u32 {
    let mut taken = 0;
    for (direction, data_len) in [
        (Direction::None, 0),
        (Direction::ToDevice, 8),
        (Direction::ToDevice, 16),
        (Direction::ToDevice, 256),
        (Direction::ToDevice, 512),
        (Direction::ToDevice, 4096),
        (Direction::ToDevice, 16 << 10),
        (Direction::FromDevice, 4),
        (Direction::FromDevice, 8),
        (Direction::FromDevice, 16),
        (Direction::FromDevice, 256),
        (Direction::FromDevice, 512),
        (Direction::FromDevice, 4096),
        (Direction::FromDevice, 16 << 10),
    ] {
        let placement = Placement {
            tag: Tag(1),
            queue: QueueId(queue),
            shadow_offset: 0x8000,
            data_len,
            direction,
        };
        if claim.place(&placement, sqe).is_ok() {
            taken += 1;
        }
        let waiting: Vec<_> = claim.device.state().placed.clone();
        for placed in waiting {
            claim
                .device
                .state()
                .complete(placed.queue, placed.sqe.cid());
        }
        claim.completed();
    }
    taken
}

#[test]
fn admin_commands_reach_the_device_with_their_own_data_or_not_at_all() {
    const CARRIED: [u8; 13] = [
        admin::DELETE_SQ,
        admin::CREATE_SQ,
        admin::DELETE_CQ,
        admin::CREATE_CQ,
        admin::GET_LOG_PAGE,
        admin::IDENTIFY,
        admin::ABORT,
        admin::SET_FEATURES,
        admin::GET_FEATURES,
        admin::ASYNC_EVENT,
        admin::SELF_TEST,
        admin::KEEP_ALIVE,
        admin::GET_LBA_STATUS,
    ];
    // A queue that is made and removed on the way, and else Identify Controller, for one.
    const QUEUE: u32 = 3;
    let mut claim = Claim::with_queues();
    for opcode in 0..=255 {
        let dword10 = match opcode {
            admin::CREATE_CQ | admin::CREATE_SQ | admin::DELETE_CQ | admin::DELETE_SQ => {
                QUEUE | 31 << 16
            }
            _ => 1,
        };
        let mut sqe = hostile(opcode, 0, dword10);
        sqe.set_dword(11, QUEUE << 16);
        let taken = offer(&mut claim, 0, sqe);
        assert_eq!(
            taken,
            u32::from(CARRIED.contains(&opcode)),
            "admin opcode {opcode:#x}"
        );
    }
    claim.assert_io_works();
}

#[test]
fn features_reach_the_device_with_their_own_data_or_not_at_all() {
    let mut claim = Claim::with_queues();
    for opcode in [admin::SET_FEATURES, admin::GET_FEATURES] {
        for feature in 0..=255u32 {
            let lent = matches!(feature, 1..=0x18 | 0x80 | 0x81) && feature != 0x0d;
            let taken = offer(&mut claim, 0, hostile(opcode, 0, feature));
            assert_eq!(
                taken,
                u32::from(lent),
                "opcode {opcode:#x}, feature {feature:#x}"
            );
        }
    }
    claim.assert_io_works();
}

#[test]
fn io_commands_reach_the_device_with_their_own_data_or_not_at_all() {
    const CARRIED: [u8; 8] = [0x00, 0x01, 0x02, 0x04, 0x05, 0x08, 0x09, 0x0c];
    let mut claim = Claim::with_queues();
    for opcode in 0..=255 {
        let mut sqe = hostile(opcode, 1, 0);
        // 16 KiB, for which a list of PRPs is needed.
        sqe.set_dword(12, 31);
        let taken = offer(&mut claim, 1, sqe);
        assert_eq!(
            taken,
            u32::from(CARRIED.contains(&opcode)),
            "I/O opcode {opcode:#x}"
        );
    }
    claim.assert_io_works();
}

#[test]
fn fused_commands_and_scatter_lists_do_not_reach_the_device() {
    let mut claim = Claim::with_queues();
    for flags in 1..=255u8 {
        // Bits 5:2 are reserved, and cleared on the way.
        if flags & 0xc3 == 0 {
            continue;
        }
        for (queue, opcode) in [(0, admin::IDENTIFY), (1, 0x02)] {
            let mut sqe = hostile(opcode, queue, 1);
            sqe.0[1] = flags;
            assert_eq!(offer(&mut claim, queue, sqe), 0, "flags {flags:#x}");
        }
    }
    claim.assert_io_works();
}

#[test]
fn rings_are_made_in_the_engines_memory_whatever_the_peer_says() {
    let mut claim = Claim::with_queues();
    for opcode in [admin::CREATE_CQ, admin::CREATE_SQ] {
        // Not contiguous, which would make the ring itself a list of pages.
        let mut sqe = hostile(opcode, 0, 2 | 1023 << 16);
        sqe.set_dword(11, 2 << 16);
        claim.submit(3, 0, sqe).unwrap();
        assert_eq!(claim.completed()[0].status, 0);
    }
    let mut read = super::device::read(8);
    read.set_prps(ELSEWHERE, 0);
    claim.submit(4, 2, read).unwrap();
    claim.device.state().complete(2, 4);
    assert_eq!(claim.completed().len(), 1);
}
