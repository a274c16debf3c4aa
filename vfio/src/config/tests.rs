//! What the emulated configuration space promises, for images that make sense and for any
//! others.

use proptest::prelude::*;

use super::*;
use crate::function::RegionInfo;

const BAR0: RegionInfo = RegionInfo {
    index: RegionIndex(0),
    size: 0x4000,
};
const PM: u16 = 0x40;
const MSIX: u16 = 0x48;
const EXPRESS: u16 = 0x54;

fn layout() -> MsixLayout {
    MsixLayout {
        vectors: 17,
        table: (RegionIndex(0), 0x2000),
        pba: (RegionIndex(0), 0x3000),
    }
}

fn image() -> Vec<u8> {
    ConfigImage::new(0x4642, 0x0001, 0x01_08_02)
        .revision(3)
        .bar(0, BarKind::Memory64)
        .power_management()
        .msix(layout())
        .express()
        .build()
}

fn space() -> ConfigSpace {
    ConfigSpace::from_image(&image(), &[BAR0]).unwrap()
}

fn read16(space: &ConfigSpace, at: u16) -> u16 {
    let mut data = [0; 2];
    space.read(at, &mut data).unwrap();
    u16::from_le_bytes(data)
}

fn read32(space: &ConfigSpace, at: u16) -> u32 {
    let mut data = [0; 4];
    space.read(at, &mut data).unwrap();
    u32::from_le_bytes(data)
}

fn capability_ids(space: &ConfigSpace) -> Vec<u8> {
    let mut ids = Vec::new();
    let mut at = read16(space, 0x34) as u8;
    while at != 0 {
        let [id, next] = read16(space, u16::from(at)).to_le_bytes();
        ids.push(id);
        at = next;
        assert!(ids.len() < 64, "the chain does not end");
    }
    ids
}

#[test]
fn identity_is_kept_and_pins_and_unknown_capabilities_are_hidden() {
    let mut image = image();
    image[0x2c..0x30].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
    image[0x3d] = 1;
    image[0x0e] = 0x80;
    // A vendor-specific capability in front of the chain, and an extended one.
    (image[0xf0], image[0xf1]) = (0x09, image[0x34]);
    image[0x34] = 0xf0;
    image[0x100..0x104].copy_from_slice(&[0x01, 0x00, 0x01, 0x15]);
    let space = ConfigSpace::from_image(&image, &[BAR0]).unwrap();

    assert_eq!(read32(&space, 0), 0x0001_4642);
    assert_eq!(read32(&space, 8), 0x0108_0203);
    assert_eq!(read32(&space, 0x2c), 0x7856_3412);
    assert_eq!(read32(&space, 0x0c), 0);
    assert_eq!(read16(&space, 0x3c), 0);
    assert_eq!(read32(&space, 0xf0), 0);
    assert_eq!(read32(&space, 0x100), 0);
    assert_eq!(capability_ids(&space), [1, 0x11, 0x10]);
    assert_eq!(space.msix(), Some(layout()));
}

#[test]
fn a_bar_is_sized_by_writing_ones_and_keeps_its_address() {
    let mut space = space();
    space.write(0x10, &[0xff; 8]).unwrap();
    assert_eq!(
        (read32(&space, 0x10), read32(&space, 0x14)),
        (0xffff_c004, 0xffff_ffff)
    );
    space
        .write(0x10, &0x0000_0012_3456_7004u64.to_le_bytes())
        .unwrap();
    assert_eq!(
        (read32(&space, 0x10), read32(&space, 0x14)),
        (0x3456_4004, 0x12)
    );
    // A register without a region stays zero.
    space.write(0x18, &[0xff; 4]).unwrap();
    assert_eq!(read32(&space, 0x18), 0);
}

#[test]
fn rom_io_and_32_bit_bars_are_sized_too() {
    let mut image = ConfigImage::new(1, 2, 0x02_00_00)
        .bar(2, BarKind::Memory32)
        .build();
    image[0x14] = 1;
    let regions = [
        RegionInfo {
            index: RegionIndex(1),
            size: 32,
        },
        RegionInfo {
            index: RegionIndex(2),
            size: 1 << 31,
        },
        RegionInfo {
            index: RegionIndex::ROM,
            size: 0x1_0000,
        },
    ];
    let mut space = ConfigSpace::from_image(&image, &regions).unwrap();
    for at in [0x14, 0x18, 0x30, 4] {
        space.write(at, &[0xff; 4]).unwrap();
    }
    assert_eq!(read32(&space, 0x14), 0xffff_ffe1);
    assert_eq!(read32(&space, 0x18), 0x8000_0000);
    assert_eq!(read32(&space, 0x30), 0xffff_0001);
    assert_eq!(read16(&space, 4), 0x0547);
}

#[test]
fn regions_that_no_register_can_express_are_refused() {
    let image = ConfigImage::new(1, 2, 0x02_00_00)
        .bar(0, BarKind::Memory64)
        .bar(2, BarKind::Memory32)
        .bar(5, BarKind::Memory64)
        .build();
    let cases: &[&[(u8, u64)]] = &[
        &[(0, 0)],
        &[(0, 8)],
        &[(0, 0x3000)],
        &[(0, 0x1000), (0, 0x1000)],
        &[(0, 0x1000), (1, 0x1000)],
        &[(1, 0x1000), (0, 0x1000)],
        &[(2, 1 << 32)],
        &[(5, 0x1000)],
        &[(6, 0x400)],
        &[(6, 0x800), (6, 0x800)],
        &[(7, 0x1000)],
        &[(255, 0x1000)],
    ];
    for case in cases {
        let regions: Vec<_> = case
            .iter()
            .map(|&(index, size)| RegionInfo {
                index: RegionIndex(index),
                size,
            })
            .collect();
        let outcome = ConfigSpace::from_image(&image, &regions);
        assert!(
            matches!(outcome, Err(ConfigError::Region { .. })),
            "{case:?}: {outcome:?}"
        );
    }
}

#[test]
fn images_of_other_things_than_endpoints_are_refused() {
    assert_eq!(
        ConfigSpace::from_image(&[0; 255], &[]).unwrap_err(),
        ConfigError::ImageSize(255)
    );
    assert_eq!(
        ConfigSpace::from_image(&[0xff; 256], &[]).unwrap_err(),
        ConfigError::NoFunction(0xffff)
    );
    let mut bridge = image();
    bridge[0x0e] = 1;
    assert_eq!(
        ConfigSpace::from_image(&bridge, &[BAR0]).unwrap_err(),
        ConfigError::HeaderType(1)
    );
    let mut port = image();
    port[usize::from(EXPRESS) + 2] = 0x42;
    assert!(matches!(
        ConfigSpace::from_image(&port, &[BAR0]),
        Err(ConfigError::Capability {
            name: "PCI Express",
            ..
        })
    ));
}

#[test]
fn msix_must_lie_within_a_memory_bar() {
    let cases: [(u8, u32, u32); 6] = [
        // (vectors, table register, PBA register)
        (17, 0x2000 | 1, 0x3000),
        (17, 0x2000, 0x3000 | 6),
        (17, 0x3ff8, 0x3000),
        (17, 0x2000, 0x4000),
        (17, 0xffff_fff8, 0x3000),
        (17, 0x2000, 0x2100),
    ];
    for (vectors, table, pba) in cases {
        let mut image = image();
        let at = usize::from(MSIX);
        image[at + 2] = vectors - 1;
        image[at + 4..at + 8].copy_from_slice(&table.to_le_bytes());
        image[at + 8..at + 12].copy_from_slice(&pba.to_le_bytes());
        let outcome = ConfigSpace::from_image(&image, &[BAR0]);
        assert!(
            matches!(outcome, Err(ConfigError::Capability { name: "MSI-X", .. })),
            "{table:#x} {pba:#x}"
        );
    }
}

#[test]
fn capability_chains_that_loop_overlap_or_end_outside_are_survived() {
    let mut looping = image();
    looping[usize::from(EXPRESS) + 1] = PM as u8;
    let space = ConfigSpace::from_image(&looping, &[BAR0]).unwrap();
    assert_eq!(capability_ids(&space), [1, 0x11, 0x10]);

    let mut into_header = image();
    into_header[usize::from(PM) + 1] = 0x10;
    let space = ConfigSpace::from_image(&into_header, &[BAR0]).unwrap();
    assert_eq!(capability_ids(&space), [1]);

    let mut overlapping = image();
    overlapping[0x44..0x46].copy_from_slice(&[0x11, 0]);
    overlapping[usize::from(PM) + 1] = 0x44;
    assert!(ConfigSpace::from_image(&overlapping, &[BAR0]).is_err());

    let mut past_the_end = image();
    past_the_end[0xfc..0xfe].copy_from_slice(&[0x10, 0]);
    past_the_end[0x34] = 0xfc;
    assert!(ConfigSpace::from_image(&past_the_end, &[BAR0]).is_err());
}

#[test]
fn writes_say_what_they_set_off() {
    let mut space = space();
    let effect = space.write(4, &[0x06, 0x04]).unwrap();
    assert!(effect.state.memory_enabled && effect.state.bus_master && !effect.flr);
    let effect = space.write(MSIX + 2, &[0xff, 0xff]).unwrap();
    assert!(effect.state.msix_enabled && effect.state.msix_masked);
    assert_eq!(read16(&space, MSIX + 2), 0xc010);
    let effect = space.write(MSIX + 3, &[0x80]).unwrap();
    assert!(effect.state.msix_enabled && !effect.state.msix_masked);
    assert_eq!(
        space.write(PM + 4, &[3]).unwrap().state.power,
        PowerState::D3Hot
    );
    assert_eq!(
        space.write(PM + 4, &[1]).unwrap().state.power,
        PowerState::D3Hot
    );
    assert_eq!(
        space.write(PM + 4, &[0]).unwrap().state.power,
        PowerState::D0
    );
    assert!(!space.write(EXPRESS + 8, &[0xff]).unwrap().flr);
    assert!(space.write(EXPRESS + 8, &[0, 0x80]).unwrap().flr);
    assert_eq!(read16(&space, EXPRESS + 8), 0, "initiate FLR reads as zero");
    // The same bit, in the middle of an unaligned write that straddles registers.
    assert!(space.write(EXPRESS + 7, &[0, 0, 0x80, 0, 0]).unwrap().flr);

    space.reset();
    assert_eq!(read16(&space, 4), 0);
    assert_eq!(read16(&space, EXPRESS + 8), 0x2810);
    assert!(!space.state().msix_enabled);
}

#[test]
fn function_level_reset_is_offered_whatever_the_image_says() {
    let mut image = image();
    image[usize::from(EXPRESS) + 7] = 0;
    let space = ConfigSpace::from_image(&image, &[BAR0]).unwrap();
    assert_eq!(read32(&space, EXPRESS + 4) >> 28 & 1, 1);
    assert_eq!(read16(&space, EXPRESS + 0x12), 0x43);
}

#[test]
fn accesses_past_the_end_are_refused() {
    let mut small = ConfigSpace::from_image(&image()[..256], &[BAR0]).unwrap();
    assert_eq!(small.size(), 256);
    assert!(small.read(0xff, &mut [0; 2]).is_err());
    assert!(small.write(0x100, &[0]).is_err());
    let space = space();
    assert!(space.read(0xffc, &mut [0; 4]).is_ok());
    assert!(space.read(0xffd, &mut [0; 4]).is_err());
    assert!(space.read(0xffff, &mut [0; 1]).is_err());
    assert!(space.read(0, &mut vec![0; 1 << 20]).is_err());
}

/// Images that are mostly noise, but get past the first checks often.
fn any_image() -> impl Strategy<Value = Vec<u8>> {
    let length = prop_oneof![Just(256usize), Just(4096), 250usize..4100];
    (
        length,
        any::<u8>(),
        proptest::collection::vec((0usize..256, any::<u8>()), 0..40),
    )
        .prop_map(|(length, pointer, patches)| {
            let mut image = image();
            image[0x34] = pointer;
            for (at, byte) in patches {
                image[at] = byte;
            }
            // Likely capability ids at likely places.
            for at in (0x80..0x100).step_by(0x14) {
                let id = [0x01, 0x10, 0x11, 0x05][at / 0x14 % 4];
                image[at] = id;
            }
            image.resize(length, 0);
            image
        })
}

fn any_regions() -> impl Strategy<Value = Vec<RegionInfo>> {
    let size = prop_oneof![8 => (4u32..40).prop_map(|n| 1u64 << n), 1 => any::<u64>()];
    proptest::collection::vec((0u8..9, size), 0..4).prop_map(|regions| {
        regions
            .into_iter()
            .map(|(index, size)| RegionInfo {
                index: RegionIndex(index),
                size,
            })
            .collect()
    })
}

proptest! {
    #[test]
    fn no_image_and_no_access_panics(
        image in any_image(),
        regions in any_regions(),
        accesses in proptest::collection::vec(
            (any::<u16>(), proptest::collection::vec(any::<u8>(), 0..70)), 0..30),
    ) {
        if let Ok(mut space) = ConfigSpace::from_image(&image, &regions) {
            let _ = capability_ids(&space);
            for (offset, data) in accesses {
                let inside = usize::from(offset) + data.len() <= usize::from(space.size());
                prop_assert_eq!(space.write(offset, &data).is_ok(), inside);
                prop_assert_eq!(space.read(offset, &mut data.clone()).is_ok(), inside);
            }
        }
    }

    #[test]
    fn read_only_bits_stay_and_a_reset_restores_the_rest(
        writes in proptest::collection::vec(
            (0u16..0x100, proptest::collection::vec(any::<u8>(), 1..9)), 1..30),
    ) {
        let fresh = space();
        let mut space = space();
        for (offset, data) in writes {
            space.write(offset, &data).unwrap();
        }
        for at in 0..LEGACY_SIZE {
            let mask = space.writable[at];
            prop_assert_eq!(space.value[at] & !mask, fresh.value[at] & !mask, "byte {:#x}", at);
        }
        prop_assert_eq!(read32(&space, 0), 0x0001_4642);
        prop_assert_eq!(capability_ids(&space), vec![1, 0x11, 0x10]);
        space.reset();
        prop_assert_eq!(space.value, fresh.value);
    }

    #[test]
    fn every_memory_bar_is_sized_as_its_region_is(shift in 4u32..63, prefetchable: bool) {
        let kind =
            if prefetchable { BarKind::Memory64Prefetchable } else { BarKind::Memory64 };
        let image = ConfigImage::new(1, 2, 0x02_00_00).bar(2, kind).build();
        let region = RegionInfo { index: RegionIndex(2), size: 1 << shift };
        let mut space = ConfigSpace::from_image(&image, &[region]).unwrap();
        space.write(0x18, &[0xff; 8]).unwrap();
        let mut mask = [0; 8];
        space.read(0x18, &mut mask).unwrap();
        let mask = u64::from_le_bytes(mask);
        prop_assert_eq!((!(mask & !0xf)).wrapping_add(1), region.size);
        prop_assert_eq!(mask & 0xf, if prefetchable { 0xc } else { 0x4 });
    }

    #[test]
    fn a_write_in_pieces_is_the_same_write(
        offset in 0u16..0xf8,
        data in proptest::collection::vec(any::<u8>(), 8),
        cut in 0usize..8,
    ) {
        let (mut whole, mut pieces) = (space(), space());
        let effect = whole.write(offset, &data).unwrap();
        let first = pieces.write(offset, &data[..cut]).unwrap();
        let second = pieces.write(offset + cut as u16, &data[cut..]).unwrap();
        prop_assert_eq!(whole.value, pieces.value);
        prop_assert_eq!(effect.flr, first.flr || second.flr);
    }
}
