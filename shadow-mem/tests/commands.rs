//! The table of what crosses, and the controller's description.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use farbus_shadow_mem::nvme::description::{
    NamespaceFormat, Namespaces, NvmeDescription, guest_cap,
};
use farbus_shadow_mem::nvme::transfer::{Transfer, of_admin, of_nvm};
use farbus_vfio::nvme::{Status, SubmissionEntry, admin, cap, nvm};
use proptest::prelude::*;

const SHADOW: u32 = 16 << 20;

fn namespaces() -> Namespaces {
    Namespaces::new(vec![
        NamespaceFormat {
            nsid: 7,
            block_shift: 12,
        },
        NamespaceFormat {
            nsid: 1,
            block_shift: 9,
        },
    ])
}

fn command(opcode: u8, nsid: u32, dwords: &[(usize, u32)]) -> SubmissionEntry {
    let mut sqe = SubmissionEntry::new(opcode);
    sqe.set_nsid(nsid);
    for (index, value) in dwords {
        sqe.set_dword(*index, *value);
    }
    sqe
}

#[test]
fn data_of_io_commands_has_the_direction_and_length_of_the_specification() {
    let carried = |sqe| of_nvm(&sqe, &namespaces());
    assert_eq!(
        carried(command(nvm::READ, 1, &[(12, 7)])),
        Ok(Transfer::FromDevice(4096))
    );
    assert_eq!(
        carried(command(nvm::WRITE, 1, &[(12, 0)])),
        Ok(Transfer::ToDevice(512))
    );
    assert_eq!(
        carried(command(nvm::WRITE, 7, &[(12, 1)])),
        Ok(Transfer::ToDevice(8192))
    );
    assert_eq!(
        carried(command(nvm::COMPARE, 1, &[(12, 1)])),
        Ok(Transfer::ToDevice(1024))
    );
    assert_eq!(
        carried(command(nvm::DATASET_MANAGEMENT, 1, &[(10, 3)])),
        Ok(Transfer::ToDevice(64))
    );
    assert_eq!(
        carried(command(nvm::FLUSH, u32::MAX, &[])),
        Ok(Transfer::None)
    );
    assert_eq!(
        carried(command(nvm::WRITE_ZEROES, 1, &[(12, 0xffff)])),
        Ok(Transfer::None)
    );
    for not_lent in [
        nvm::COPY,
        nvm::RESERVATION_REPORT,
        nvm::RESERVATION_REGISTER,
    ] {
        assert_eq!(
            carried(command(not_lent, 1, &[])),
            Err(Status::INVALID_OPCODE)
        );
    }
    assert_eq!(
        carried(command(nvm::READ, 2, &[])),
        Err(Status::INVALID_NAMESPACE)
    );
    assert_eq!(carried(command(0x7d, 1, &[])), Err(Status::INVALID_OPCODE));
    let mut fused = command(nvm::COMPARE, 1, &[]);
    fused.0[1] = 1;
    assert_eq!(carried(fused), Err(Status::INVALID_FIELD));
    let mut sgl = command(nvm::READ, 1, &[]);
    sgl.0[1] = 0x40;
    assert_eq!(carried(sgl), Err(Status::INVALID_FIELD));
}

#[test]
fn data_of_admin_commands_has_the_direction_and_length_of_the_specification() {
    assert_eq!(
        of_admin(&command(admin::IDENTIFY, 0, &[])),
        Ok(Transfer::FromDevice(4096))
    );
    assert_eq!(
        of_admin(&command(admin::GET_LOG_PAGE, 0, &[(10, 127 << 16)])),
        Ok(Transfer::FromDevice(512))
    );
    assert_eq!(
        of_admin(&command(
            admin::GET_LOG_PAGE,
            0,
            &[(10, 0xffff << 16), (11, 0xffff)]
        )),
        Err(Status::INVALID_FIELD)
    );
    assert_eq!(
        of_admin(&command(admin::SET_FEATURES, 0, &[(10, 7)])),
        Ok(Transfer::None)
    );
    assert_eq!(
        of_admin(&command(admin::SET_FEATURES, 0, &[(10, 0x0e)])),
        Ok(Transfer::ToDevice(8))
    );
    assert_eq!(
        of_admin(&command(admin::GET_FEATURES, 0, &[(10, 0x81), (11, 1)])),
        Ok(Transfer::FromDevice(16))
    );
    assert_eq!(
        of_admin(&command(admin::GET_FEATURES, 0, &[(10, 0x300 | 0x81)])),
        Ok(Transfer::None)
    );
    for unknown in [0x00, 0x19, 0x7d, 0x7e, 0xc0, 0xff] {
        assert_eq!(
            of_admin(&command(admin::SET_FEATURES, 0, &[(10, unknown)])),
            Err(Status::INVALID_FIELD)
        );
    }
    for telemetry in [0x07, 0x08, 0x0d] {
        assert_eq!(
            of_admin(&command(admin::GET_LOG_PAGE, 0, &[(10, telemetry)])),
            Err(Status::INVALID_LOG_PAGE)
        );
    }
    for host_memory in [admin::SET_FEATURES, admin::GET_FEATURES] {
        assert_eq!(
            of_admin(&command(host_memory, 0, &[(10, 0x0d)])),
            Err(Status::INVALID_FIELD)
        );
    }
    for not_lent in [
        admin::FIRMWARE_COMMIT,
        admin::FIRMWARE_DOWNLOAD,
        admin::NAMESPACE_MANAGEMENT,
        admin::FORMAT,
        admin::SECURITY_SEND,
        admin::SANITIZE,
        admin::VIRTUALIZATION,
        admin::DOORBELL_BUFFER,
        0xc0,
        0xff,
    ] {
        assert_eq!(
            of_admin(&command(not_lent, 0, &[])),
            Err(Status::INVALID_OPCODE)
        );
    }
}

#[test]
fn guest_cap_hides_what_cannot_cross() {
    let everything = u64::MAX;
    let guest = guest_cap(everything);
    for hidden in [
        cap::CMBS,
        cap::PMRS,
        cap::NSSRS,
        cap::BPS,
        cap::DSTRD_MASK,
        cap::MPSMIN_MASK,
        cap::MPSMAX_MASK,
    ] {
        assert_eq!(guest & hidden, 0);
    }
    assert_eq!(guest & cap::MQES_MASK, 1023);
    assert_eq!(guest & cap::CSS_MASK, cap::CSS_NVM);
    assert_eq!(guest & cap::CQR, cap::CQR);
    assert_eq!(guest_cap(31) & cap::MQES_MASK, 31);
}

proptest! {
    #[test]
    fn description_survives_the_wire(
        device_cap in any::<u64>(),
        vs in any::<u32>(),
        shift in 12u32..=20,
        queue_pairs in 1u16..=64,
        formats in prop::collection::btree_map(any::<u32>(), 9u8..=16, 0..50),
    ) {
        let description = NvmeDescription {
            cap: guest_cap(device_cap),
            vs,
            max_transfer: 1 << shift,
            queue_pairs,
            namespaces: Namespaces::new(formats.into_iter().map(|(nsid, block_shift)| {
                NamespaceFormat { nsid, block_shift }
            }).collect()),
        };
        prop_assert_eq!(NvmeDescription::decode(&description.encode(), SHADOW).unwrap(), description);
    }

    #[test]
    fn any_bytes_decode_to_a_sane_description_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(description) = NvmeDescription::decode(&bytes, SHADOW) {
            prop_assert!(description.max_transfer <= SHADOW);
            prop_assert!(description.namespaces.all().iter().all(|f| (9..=16).contains(&f.block_shift)));
        }
    }

    #[test]
    fn any_command_is_carried_or_answered(bytes in any::<[u8; 32]>(), rest in any::<[u8; 32]>()) {
        let mut sqe = SubmissionEntry([0; 64]);
        sqe.0[..32].copy_from_slice(&bytes);
        sqe.0[32..].copy_from_slice(&rest);
        let _ = of_admin(&sqe);
        let _ = of_nvm(&sqe, &namespaces());
        prop_assert!(SubmissionEntry(sqe.0).blocks() >= 1);
    }
}

#[test]
fn settings_that_would_outlive_a_reset_are_refused() {
    let save = 1 << 31;
    for feature in [1, 4, 6, 0x0e, 0x80] {
        assert_eq!(
            of_admin(&command(admin::SET_FEATURES, 0, &[(10, save | feature)])),
            Err(Status::FEATURE_NOT_SAVEABLE)
        );
    }
}
