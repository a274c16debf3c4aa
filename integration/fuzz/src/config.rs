//! Configuration space made of an image that a peer sent, then accessed by a VMM.

use farbus_vfio::config::{ConfigSpace, EXTENDED_SIZE, LEGACY_SIZE};
use farbus_vfio::{RegionIndex, RegionInfo};

use crate::input::Input;

/// Offset of the first base address register.
const BAR0: usize = 0x10;
const BARS_END: usize = 0x28;

/// Runs one input: regions, an image, accesses.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let regions = regions(&mut input);
    let len = input.pick(&[LEGACY_SIZE, EXTENDED_SIZE, 0, 255, 300, EXTENDED_SIZE + 1]);
    let mut image = vec![0; len];
    // Most of an image is zero; the input says only what is not.
    for _ in 0..input.byte() % 48 {
        let at = usize::from(input.byte());
        let value = input.take::<u32>().to_le_bytes();
        let end = (at + 4).min(image.len());
        if at < end {
            image[at..end].copy_from_slice(&value[..end - at]);
        }
    }
    let Ok(mut space) = ConfigSpace::from_image(&image, &regions) else {
        return;
    };
    assert!([LEGACY_SIZE, EXTENDED_SIZE].contains(&usize::from(space.size())));
    check_msix(&space, &regions);
    let fresh = snapshot(&space);
    while !input.is_empty() {
        access(&mut space, &mut input);
    }
    let last = snapshot(&space);
    assert_eq!(fresh[..4], last[..4], "a write changed the identity");
    assert_eq!(fresh[0x34], last[0x34], "a write moved the capabilities");
    check_bars(&mut space, &regions);
    space.reset();
    assert_eq!(snapshot(&space), fresh, "a reset left something behind");
}

fn regions(input: &mut Input<'_>) -> Vec<RegionInfo> {
    (0..input.byte() % 9)
        .map(|_| RegionInfo {
            index: RegionIndex(input.byte() % 9),
            size: match input.byte() {
                shift @ 0..64 => 1 << shift,
                _ => input.take(),
            },
        })
        .collect()
}

fn snapshot(space: &ConfigSpace) -> Vec<u8> {
    let mut all = vec![0xa5; space.size().into()];
    space
        .read(0, &mut all)
        .expect("all of the space can be read");
    all
}

fn access(space: &mut ConfigSpace, input: &mut Input<'_>) {
    let (offset, len) = (input.take::<u16>(), usize::from(input.byte()));
    let inside = usize::from(offset) + len <= usize::from(space.size());
    if input.flag() {
        let mut data = vec![0; len];
        assert_eq!(space.read(offset, &mut data).is_ok(), inside);
    } else {
        let mut data = input.bytes(len).to_vec();
        data.resize(len, 0);
        let effect = space.write(offset, &data);
        assert_eq!(effect.is_ok(), inside);
        if let Ok(effect) = effect {
            assert_eq!(effect.state, space.state());
        }
    }
}

/// The table and the pending bits lie in regions that exist, and not in each other.
fn check_msix(space: &ConfigSpace, regions: &[RegionInfo]) {
    let Some(layout) = space.msix() else {
        return;
    };
    assert!((1..=2048).contains(&layout.vectors));
    let table = (layout.table, u64::from(layout.vectors) * 16);
    let pba = (layout.pba, u64::from(layout.vectors).div_ceil(64) * 8);
    for ((index, offset), len) in [table, pba] {
        let region = regions.iter().find(|region| region.index == index);
        let size = region.expect("MSI-X in a region that exists").size;
        assert!(offset + len <= size, "{layout:?} exceeds {size:#x} bytes");
    }
}

/// Sizing finds each memory BAR as large as its region, and nothing else that is writable.
fn check_bars(space: &mut ConfigSpace, regions: &[RegionInfo]) {
    for at in (BAR0..BARS_END).step_by(4) {
        space
            .write(at as u16, &[0xff; 4])
            .expect("BARs can be written");
    }
    let bars = snapshot(space)[BAR0..BARS_END].to_vec();
    let register = |index: usize| {
        bars.get(index * 4..index * 4 + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u32::from_le_bytes)
    };
    for region in regions.iter().filter(|region| region.index.0 < 6) {
        let index = usize::from(region.index.0);
        let (low, high) = (register(index), register(index + 1));
        // I/O space is not carried.
        if low & 1 == 1 {
            continue;
        }
        let mask = match low & 0b110 {
            0b100 => u64::from(low & !0xf) | u64::from(high) << 32,
            _ => u64::from(low & !0xf) | !0xffff_ffff,
        };
        assert_eq!(mask.wrapping_neg(), region.size, "{region:?}");
    }
}
