//! What the device is, and access to its regions.

use farbus_vfio::user::body::{
    DEVICE_PCI, DEVICE_RESET, DeviceInfo, IRQ_AUTOMASKED, IRQ_EVENTFD, IRQ_MASKABLE, IrqInfo,
    MultiWrite, NUM_IRQS, NUM_REGIONS, REGION_INDEX_CONFIG, REGION_READ, REGION_WRITE,
    RegionAccess, RegionInfo, at_least,
};
use farbus_vfio::{Function, InterruptKind, RegionIndex};

use super::irqs::kind_of;
use super::msix::Mediator;
use super::refusal::Refusal;

/// `VFIO_USER_DEVICE_GET_INFO`.
pub(super) fn device_info(function: &dyn Function, body: &[u8]) -> Result<DeviceInfo, Refusal> {
    let ask = DeviceInfo::decode(body)?;
    at_least(DeviceInfo::NAME, ask.argsz, DeviceInfo::LEN)?;
    let reset = if function.info().resettable {
        DEVICE_RESET
    } else {
        0
    };
    Ok(DeviceInfo {
        argsz: DeviceInfo::LEN as u32,
        flags: DEVICE_PCI | reset,
        num_regions: NUM_REGIONS,
        num_irqs: NUM_IRQS,
    })
}

/// `VFIO_USER_DEVICE_GET_REGION_INFO`. A region that the function does not have exists and
/// has size 0. None can be mapped: a mapped doorbell would have to be polled, and QEMU would
/// no longer post writes to any region.
pub(super) fn region_info(function: &dyn Function, body: &[u8]) -> Result<RegionInfo, Refusal> {
    let ask = RegionInfo::decode(body)?;
    at_least(RegionInfo::NAME, ask.argsz, RegionInfo::LEN)?;
    if ask.index >= NUM_REGIONS {
        return Err(Refusal::NoSuchIndex {
            what: "region",
            index: ask.index,
        });
    }
    let size = region_size(function, ask.index);
    let flags = match ask.index {
        _ if size == 0 => 0,
        index if index == u32::from(RegionIndex::ROM.0) => REGION_READ,
        _ => REGION_READ | REGION_WRITE,
    };
    Ok(RegionInfo {
        argsz: RegionInfo::LEN as u32,
        flags,
        index: ask.index,
        cap_offset: 0,
        size,
        offset: 0,
    })
}

/// `VFIO_USER_DEVICE_GET_IRQ_INFO`. Error and request interrupts exist and number 0. MSI-X is
/// not marked as "no resize": QEMU then enables vectors one by one, as the guest does.
pub(super) fn irq_info(function: &dyn Function, body: &[u8]) -> Result<IrqInfo, Refusal> {
    let ask = IrqInfo::decode(body)?;
    at_least(IrqInfo::NAME, ask.argsz, IrqInfo::LEN)?;
    if ask.index >= NUM_IRQS {
        return Err(Refusal::NoSuchIndex {
            what: "kind of interrupts",
            index: ask.index,
        });
    }
    let kind = kind_of(ask.index);
    let count = kind.map_or(0, |kind| function.info().interrupts.of(kind));
    let pin = if kind == Some(InterruptKind::Intx) {
        IRQ_MASKABLE | IRQ_AUTOMASKED
    } else {
        0
    };
    Ok(IrqInfo {
        argsz: IrqInfo::LEN as u32,
        flags: IRQ_EVENTFD | pin,
        index: ask.index,
        count,
    })
}

fn region_size(function: &dyn Function, index: u32) -> u64 {
    let info = function.info();
    if index == REGION_INDEX_CONFIG {
        return u64::from(info.config_size);
    }
    region_index(index)
        .and_then(|index| info.region(index))
        .map_or(0, |region| region.size)
}

fn region_index(index: u32) -> Option<RegionIndex> {
    u8::try_from(index)
        .ok()
        .filter(|index| *index < RegionIndex::COUNT)
        .map(RegionIndex)
}

/// A place in the function that an access may go to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    Config(u16),
    Region(RegionIndex, u64),
}

/// Checks an access of `count` bytes.
pub(super) fn place(
    function: &dyn Function,
    region: u32,
    offset: u64,
    count: u32,
) -> Result<Place, Refusal> {
    let outside = Refusal::OutOfRegion {
        region,
        offset,
        count,
    };
    let fits = offset
        .checked_add(u64::from(count))
        .is_some_and(|end| end <= region_size(function, region));
    match (region_index(region), u16::try_from(offset)) {
        (Some(index), _) if fits => Ok(Place::Region(index, offset)),
        (None, Ok(offset)) if fits && region == REGION_INDEX_CONFIG => Ok(Place::Config(offset)),
        _ => Err(outside),
    }
}

/// Reads `data` from a place. What a mediator keeps is not the function's.
pub(super) fn read(
    function: &dyn Function,
    mediator: Option<&Mediator>,
    place: Place,
    data: &mut [u8],
) -> Result<(), Refusal> {
    if data.is_empty() {
        return Ok(());
    }
    match (place, mediator) {
        (Place::Config(offset), mediator) => {
            function.config_read(offset, data)?;
            if let Some(mediator) = mediator {
                mediator.disguise(offset, data);
            }
        }
        (Place::Region(index, offset), None) => function.region_read(index, offset, data)?,
        (Place::Region(index, offset), Some(mediator)) => {
            if !mediator.has_all_of(index, offset, data.len()) {
                function.region_read(index, offset, data)?;
            }
            mediator.read(index, offset, data);
        }
    }
    Ok(())
}

/// Writes `data` to where `access` says.
pub(super) fn write(
    function: &dyn Function,
    mediator: Option<&mut Mediator>,
    access: RegionAccess,
    data: &[u8],
) -> Result<(), Refusal> {
    let place = place(function, access.region, access.offset, data.len() as u32)?;
    if data.is_empty() {
        return Ok(());
    }
    match (place, mediator) {
        (Place::Config(offset), mediator) => {
            function.config_write(offset, data)?;
            if let Some(mediator) = mediator {
                mediator.config_written(function, offset, data);
            }
        }
        (Place::Region(RegionIndex::ROM, _), _) => {
            return Err(Refusal::Unsupported("writing the ROM"));
        }
        (Place::Region(index, offset), Some(mediator))
            if mediator.has_all_of(index, offset, data.len()) =>
        {
            mediator.write(function, index, offset, data)?;
        }
        (Place::Region(index, offset), _) => function.region_write(index, offset, data)?,
    }
    Ok(())
}

/// Does one of several writes.
pub(super) fn write_one(
    function: &dyn Function,
    mediator: Option<&mut Mediator>,
    one: &MultiWrite,
) -> Result<(), Refusal> {
    let data = one.bytes().ok_or(Refusal::CoalescedTooLong(one.count))?;
    let access = RegionAccess {
        offset: one.offset,
        region: one.region,
        count: one.count,
    };
    write(function, mediator, access, data)
}
