//! What a claim has brought: held against what can be, against the claim before, and written down for
//! the next process.

use farbus_fabric::session::ClaimedLink;
use farbus_fabric::wire::{self, Description, EngineKind};
use farbus_vfio::config::ConfigSpace;
use farbus_vfio::nvme::PAGE_SIZE;
use farbus_vfio::{FunctionInfo, InterruptCounts, RegionIndex, RegionInfo};

use super::error::RemoteError;
use crate::nvme::description::NvmeDescription;
use crate::nvme::record::{ControlReader, ControlWriter, RecordError};
use crate::nvme::share;

/// Most commands that a device server can make us keep room for.
const MAX_TAGS: u16 = 4096;
/// Most buffer shadow that a device server can make us account for.
const MAX_SHADOW: u32 = 1 << 30;
/// Fewer tags than this leave none for I/O.
const MIN_TAGS: u16 = 64;

/// What a claim granted.
#[derive(Clone, Copy)]
pub(super) struct Grant {
    pub(super) shadow_len: u32,
    pub(super) tags: u16,
    pub(super) lanes: u16,
}

impl Grant {
    pub(super) fn of(claimed: &ClaimedLink) -> Self {
        Self {
            shadow_len: claimed.shadow_len,
            tags: claimed.tags,
            lanes: claimed.lanes.len() as u16 + 1,
        }
    }
}

/// The function's parts that a description fixes.
pub(super) fn parse(
    description: &Description,
    grant: Grant,
) -> Result<(Vec<RegionInfo>, ConfigSpace, NvmeDescription), RemoteError> {
    let Grant {
        shadow_len,
        tags,
        lanes,
    } = grant;
    if description.engine != EngineKind::Nvme {
        return Err(RemoteError::NoEngine(description.engine));
    }
    let bad_grant = || RemoteError::BadGrant {
        tags,
        shadow_len,
        lanes,
    };
    if !(MIN_TAGS..=MAX_TAGS).contains(&tags)
        || !(PAGE_SIZE as u32..=MAX_SHADOW).contains(&shadow_len)
    {
        return Err(bad_grant());
    }
    let regions: Vec<_> = description
        .regions
        .iter()
        .map(|region| RegionInfo {
            index: RegionIndex(region.index),
            size: region.size,
        })
        .collect();
    let config = ConfigSpace::from_image(&description.config, &regions)?;
    let nvme = NvmeDescription::decode(&description.blob, shadow_len)?;
    if lanes > 1 && !share::suffices(lanes, tags, shadow_len, nvme.max_transfer) {
        return Err(bad_grant());
    }
    Ok((regions, config, nvme))
}

/// Whether two descriptions are of the same function, in the same form: what a guest's driver
/// has learnt of it must still hold. Other bits of configuration space, such as the state of
/// the device server's own PCIe link, may differ between two claims.
pub(super) fn is_same_function(one: &Description, other: &Description) -> bool {
    // Vendor and device, revision and class, subsystem (PCI 3.0 §6.2.1, §6.2.4).
    let identity = |d: &Description| {
        [0x00..0x04, 0x08..0x0c, 0x2c..0x30].map(|range| d.config.get(range).map(<[u8]>::to_vec))
    };
    identity(one) == identity(other)
        && one.regions == other.regions
        && one.interrupts == other.interrupts
}

pub(super) fn info(
    label: String,
    config: &ConfigSpace,
    regions: Vec<RegionInfo>,
    msix: u32,
) -> FunctionInfo {
    FunctionInfo {
        label,
        config_size: config.size(),
        regions,
        interrupts: InterruptCounts {
            intx: 0,
            msi: 0,
            msix,
        },
        resettable: true,
        iova_ranges: vec![0..=u64::MAX],
    }
}

/// What was claimed, as the record has it.
pub(super) fn encode_claim(description: &Description, grant: Grant) -> Vec<u8> {
    let mut out = ControlWriter::default();
    out.number(grant.shadow_len.into())
        .number(grant.tags.into());
    out.bytes(&description.config).bytes(&description.blob);
    out.number(description.engine as u64);
    let interrupts = description.interrupts;
    for count in [interrupts.intx, interrupts.msi, interrupts.msix] {
        out.number(count.into());
    }
    out.number(description.regions.len() as u64);
    for region in &description.regions {
        out.number(region.index.into()).number(region.size);
    }
    out.finish()
}

pub(super) fn decode_claim(bytes: &[u8]) -> Result<(Description, Grant), RecordError> {
    let mut from = ControlReader(bytes);
    let grant = Grant {
        shadow_len: from.small()?,
        tags: from.small()?,
        lanes: 1,
    };
    let (config, blob) = (from.bytes()?.to_vec(), from.bytes()?.to_vec());
    let engine = match from.number()? {
        engine if engine == EngineKind::Nvme as u64 => EngineKind::Nvme,
        _ => EngineKind::None,
    };
    let interrupts = wire::InterruptCounts {
        intx: from.small()?,
        msi: from.small()?,
        msix: from.small()?,
    };
    let mut regions = Vec::new();
    for _ in 0..from.small::<u8>()? {
        regions.push(wire::Region {
            index: from.small()?,
            size: from.number()?,
        });
    }
    let description = Description {
        config,
        regions,
        interrupts,
        engine,
        blob,
    };
    Ok((description, grant))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;

    fn description() -> Description {
        Description {
            config: (0..=255).collect(),
            regions: vec![wire::Region {
                index: 0,
                size: 1 << 14,
            }],
            interrupts: wire::InterruptCounts {
                intx: 1,
                msi: 2,
                msix: 33,
            },
            engine: EngineKind::Nvme,
            blob: vec![7; 99],
        }
    }

    #[test]
    fn claim_is_read_as_it_was_written_and_never_in_part() {
        let grant = Grant {
            shadow_len: 1 << 20,
            tags: 128,
            lanes: 1,
        };
        let bytes = encode_claim(&description(), grant);

        let (read, granted) = decode_claim(&bytes).unwrap();

        assert_eq!(read, description());
        assert_eq!((granted.shadow_len, granted.tags), (1 << 20, 128));
        for len in 0..bytes.len() {
            assert!(decode_claim(&bytes[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn function_is_another_one_by_its_identity_and_form_alone() {
        let changed = |at: usize| {
            let mut other = description();
            other.config[at] ^= 0xff;
            other
        };
        let mut wider = description();
        wider.regions[0].size *= 2;

        assert!(!is_same_function(&description(), &changed(0x02)));
        assert!(!is_same_function(&description(), &changed(0x2e)));
        assert!(!is_same_function(&description(), &wider));
        assert!(is_same_function(&description(), &changed(0x72)));
    }
}
