//! What the `Function` seam asks for besides NVMe: configuration space, regions and windows.

use farbus_vfio::driver::DmaMemory;
use farbus_vfio::{DmaAccess, DmaWindow, Function, FunctionError, Iova, RegionIndex};

use crate::bench::Bench;

#[test]
fn it_describes_itself() {
    let bench = Bench::cold(512);
    let info = bench.function.info();
    assert!(info.label.starts_with("soft-nvme ") && info.label.ends_with("disk.img"));
    assert_eq!(info.config_size, 4096);
    assert_eq!(info.region(RegionIndex::BAR0).unwrap().size, 0x4000);
    assert_eq!(info.regions.len(), 1);
    assert_eq!(
        (
            info.interrupts.intx,
            info.interrupts.msi,
            info.interrupts.msix
        ),
        (0, 0, 17)
    );
    assert!(info.resettable);
    let mut identity = [0; 12];
    bench.function.config_read(0, &mut identity).unwrap();
    assert_eq!(identity[..4], [0x42, 0x46, 0x01, 0x00]);
    assert_eq!(identity[9..], [0x02, 0x08, 0x01]);
}

#[test]
fn accesses_outside_of_what_exists_are_refused() {
    let bench = Bench::cold(512);
    let function = &bench.function;
    let out_of_bounds = |outcome| matches!(outcome, Err(FunctionError::OutOfBounds { .. }));
    assert!(out_of_bounds(function.config_read(4095, &mut [0; 2])));
    assert!(out_of_bounds(function.config_write(0xffff, &[0; 4])));
    assert!(out_of_bounds(function.region_read(
        RegionIndex::BAR0,
        0x4000,
        &mut [0; 1]
    )));
    assert!(out_of_bounds(function.region_read(
        RegionIndex::BAR0,
        0x3ffd,
        &mut [0; 4]
    )));
    assert!(out_of_bounds(function.region_write(
        RegionIndex::BAR0,
        u64::MAX,
        &[0; 4]
    )));
    assert!(
        function
            .region_read(RegionIndex(2), 0, &mut [0; 4])
            .is_err()
    );
    assert!(function.region_write(RegionIndex::ROM, 0, &[0; 4]).is_err());
    assert!(
        function
            .region_read(RegionIndex(255), 0, &mut [0; 4])
            .is_err()
    );
    assert!(
        function
            .region_read(RegionIndex::BAR0, 0x4000, &mut [])
            .is_ok()
    );
}

#[test]
fn windows_that_cannot_be_are_refused() {
    let bench = Bench::cold(512);
    let function = &bench.function;
    let memory = DmaMemory::new(Iova(0x10_0000), 0x4000).unwrap();
    let good = memory.window();
    function.map_dma(&good).unwrap();
    let at = |iova, offset, len| DmaWindow {
        iova: Iova(iova),
        offset,
        len,
        ..good.clone()
    };
    for window in [
        at(0x10_0000, 0, 0x1000),   // the same again
        at(0x0f_f000, 0, 0x2000),   // into it from before
        at(0x10_3000, 0, 0x2000),   // out of it
        at(0x10_1000, 0, 0x1000),   // within it
        at(0x0f_0000, 0, 0x4_0000), // longer than its memory
        at(0x20_0000, 0x1000, 0x4000),
        at(0x20_0000, usize::MAX & !0xfff, 0x1000),
        at(0x20_0000, 0, 0),
        at(0x20_0800, 0, 0x1000),
        at(0x20_0000, 0x800, 0x1000),
        at(0x20_0000, 0, 0x800),
        at(1 << 52, 0, 0x1000),
        at((1 << 52) - 0x1000, 0, 0x2000),
        at(!0xfff, 0, 0x1000),
    ] {
        let outcome = function.map_dma(&window);
        assert!(
            matches!(outcome, Err(FunctionError::BadWindow { .. })),
            "{window:?}"
        );
    }
    function.map_dma(&at(0x10_4000, 0, 0x1000)).unwrap();
    function.map_dma(&at(0x0f_f000, 0, 0x1000)).unwrap();
    function
        .map_dma(&at((1 << 52) - 0x1000, 0, 0x1000))
        .unwrap();
}

#[test]
fn windows_are_taken_back_whole_or_not_at_all() {
    let bench = Bench::cold(512);
    let function = &bench.function;
    let memory = DmaMemory::new(Iova(0), 0x4000).unwrap();
    let at = |iova| DmaWindow {
        iova: Iova(iova),
        len: 0x2000,
        access: DmaAccess::Read,
        ..memory.window()
    };
    for iova in [0x10_0000, 0x10_2000, 0x10_8000] {
        function.map_dma(&at(iova)).unwrap();
    }
    for (iova, len) in [
        (0x10_0000, 0x1000),
        (0x10_1000, 0x1000),
        (0x10_1000, 0x3000),
        (0x10_0000, 0x3000),
        (0x10_0000, 0),
        (0x20_0000, 0x1000),
        (u64::MAX, 2),
    ] {
        assert!(
            function.unmap_dma(Iova(iova), len).is_err(),
            "{iova:#x}+{len:#x}"
        );
    }
    function.unmap_dma(Iova(0), 0x10_4000).unwrap();
    function.map_dma(&at(0x10_1000)).unwrap();
    function.unmap_dma(Iova(0x10_1000), 0x10_0000).unwrap();
    assert!(function.unmap_dma(Iova(0x10_8000), 0x2000).is_err());
}
