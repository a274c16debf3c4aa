//! The first sector of a boot disk: a partition table with one partition, and code that starts
//! what is in its first sector.
//!
//! The code does what every such code does, but for one thing: it reads the sector beside the place
//! where it must run, and copies it there. An emulated CPU (TCG) keeps translations of the code that it has run and drops
//! them when *QEMU* writes to that memory; it does not hear of what another process writes there.
//! With a drive that is such a process, a sector that is read to 0x7c00, where this sector has just
//! run, would be ignored and this code be run again. A copy by the CPU is noticed.

/// Size of the sector.
pub const SECTOR: usize = 512;

/// Where the partition table begins; behind it comes the signature.
const TABLE: usize = 446;
const SIGNATURE: [u8; 2] = [0x55, 0xaa];

const ACTIVE: u8 = 0x80;
const EFI_SYSTEM: u8 = 0xef;

/// Offset of the code that runs after relocation to 0x600.
const RELOCATED: u8 = 29;
/// Offset of the packet that tells BIOS what to read (INT 13h, AH=42h).
const PACKET: u8 = 59;

#[rustfmt::skip]
const CODE: [u8; PACKET as usize] = [
    0xfa,                               // cli
    0x31, 0xc0,                         // xor  ax, ax
    0x8e, 0xd8,                         // mov  ds, ax
    0x8e, 0xc0,                         // mov  es, ax
    0x8e, 0xd0,                         // mov  ss, ax
    0xbc, 0x00, 0x7c,                   // mov  sp, 0x7c00
    0xfb,                               // sti
    0xfc,                               // cld
    0x89, 0xe6,                         // mov  si, sp
    0xbf, 0x00, 0x06,                   // mov  di, 0x600
    0xb9, 0x00, 0x01,                   // mov  cx, 256
    0xf3, 0xa5,                         // rep  movsw
    0xea, RELOCATED, 0x06, 0x00, 0x00,  // jmp  0:relocated
    // relocated:
    0xbe, PACKET, 0x06,                 // mov  si, packet
    0xb4, 0x42,                         // mov  ah, 0x42
    0xcd, 0x13,                         // int  0x13
    0x72, 0x13,                         // jc   failed
    0xbe, 0x00, 0x7e,                   // mov  si, 0x7e00
    0xbf, 0x00, 0x7c,                   // mov  di, 0x7c00
    0xb9, 0x00, 0x01,                   // mov  cx, 256
    0xf3, 0xa5,                         // rep  movsw
    0xbe, 0xbe, 0x07,                   // mov  si, the partition's entry
    0xea, 0x00, 0x7c, 0x00, 0x00,       // jmp  0:0x7c00
    // failed:
    0xcd, 0x18,                         // int  0x18: nothing to boot here
];

/// The sector for a partition that begins at block `start` and has `blocks` blocks. It is active
/// for a BIOS, and an EFI system partition for UEFI.
#[must_use]
pub fn boot_record(start: u32, blocks: u32) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    let packet = usize::from(PACKET);
    sector[..packet].copy_from_slice(&CODE);
    // Size 16, one block, to 0000:7e00.
    sector[packet..packet + 8].copy_from_slice(&[16, 0, 1, 0, 0x00, 0x7e, 0, 0]);
    sector[packet + 8..packet + 12].copy_from_slice(&start.to_le_bytes());

    let entry = &mut sector[TABLE..TABLE + 16];
    entry[0] = ACTIVE;
    entry[4] = EFI_SYSTEM;
    // Cylinders, heads and sectors stay "out of range": everyone uses the block numbers.
    entry[1..4].fill(0xff);
    entry[5..8].fill(0xff);
    entry[8..12].copy_from_slice(&start.to_le_bytes());
    entry[12..16].copy_from_slice(&blocks.to_le_bytes());
    sector[SECTOR - 2..].copy_from_slice(&SIGNATURE);
    sector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_lead_where_they_should() {
        let relocated = usize::from(RELOCATED);
        // The far jump ends where the relocated code begins.
        assert_eq!(CODE[relocated - 5], 0xea);
        // The conditional jump leads to INT 18h at the end.
        let jump = CODE.windows(2).position(|w| w == [0x72, 0x13]).unwrap();
        assert_eq!(CODE[jump + 2 + 0x13..], [0xcd, 0x18]);
    }

    #[test]
    fn record_has_the_partition_and_the_signature() {
        let sector = boot_record(2048, 1000);
        assert_eq!(sector[510..], [0x55, 0xaa]);
        assert_eq!(sector[446], 0x80);
        assert_eq!(sector[454..458], 2048_u32.to_le_bytes());
        assert_eq!(sector[458..462], 1000_u32.to_le_bytes());
    }
}
