//! What a function is, as the device side describes it after a claim.

use super::WireError;
use super::codec::{Put, Reader, in_range};

/// Which engine the device side runs, and with it what its blob means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum EngineKind {
    /// None: the function is carried by registers alone.
    None = 0,
    /// NVMe, as a mediated passthrough.
    Nvme = 1,
}

/// A region of the function: a BAR or the expansion ROM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// 0 to 5 are BARs, 6 is the expansion ROM.
    pub index: u8,
    /// Size in bytes.
    pub size: u64,
}

impl Region {
    /// Greatest index.
    pub const MAX_INDEX: u8 = 6;
}

/// How many interrupt vectors of each type a function has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterruptCounts {
    /// INTx pins: 0 or 1.
    pub intx: u32,
    /// MSI vectors.
    pub msi: u32,
    /// MSI-X vectors.
    pub msix: u32,
}

/// A function's description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Image of config space: 256 to 4096 bytes.
    pub config: Vec<u8>,
    /// The regions that exist, at most 7, in rising order of their index.
    pub regions: Vec<Region>,
    /// Interrupt vectors.
    pub interrupts: InterruptCounts,
    /// The engine on the device side.
    pub engine: EngineKind,
    /// What the engine's device half tells its compute half: at most 32 KiB.
    pub blob: Vec<u8>,
}

impl Description {
    /// Least length of the config space image.
    pub const MIN_CONFIG: usize = 256;
    /// Greatest length of the config space image.
    pub const MAX_CONFIG: usize = 4096;
    /// Greatest length of an engine's blob.
    pub const MAX_BLOB: usize = 32 * 1024;

    pub(super) fn check(&self) -> Result<(), WireError> {
        in_range(
            "the length of the config space image",
            self.config.len(),
            Self::MIN_CONFIG as u64,
            Self::MAX_CONFIG as u64,
        )?;
        in_range("the number of interrupt pins", self.interrupts.intx, 0, 1)?;
        // PCIe 6.2 section 6.1.4 has the limits of MSI and MSI-X.
        in_range("the number of MSI vectors", self.interrupts.msi, 0, 32)?;
        in_range("the number of MSI-X vectors", self.interrupts.msix, 0, 2048)?;
        check_blob(&self.blob)?;
        let mut previous = None;
        for Region { index, size } in self.regions.iter().copied() {
            in_range("the index of a region", index, 0, Region::MAX_INDEX.into())?;
            in_range("the size of a region", size, 1, u64::MAX)?;
            if let Some(previous) = previous.filter(|previous| *previous >= index) {
                return Err(WireError::RegionOrder { index, previous });
            }
            previous = Some(index);
        }
        Ok(())
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u16(self.config.len() as u16);
        out.put_u16(self.regions.len() as u16);
        out.put_u32(self.interrupts.intx);
        out.put_u32(self.interrupts.msi);
        out.put_u32(self.interrupts.msix);
        out.put_u16(self.engine as u16);
        out.put_u16(0);
        out.put_u32(self.blob.len() as u32);
        out.put_bytes(&self.config);
        for region in &self.regions {
            out.put_u64(region.index.into());
            out.put_u64(region.size);
        }
        out.put_bytes(&self.blob);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let config_len = reader.u16()?;
        let region_count = reader.u16()?;
        let interrupts = InterruptCounts {
            intx: reader.u32()?,
            msi: reader.u32()?,
            msix: reader.u32()?,
        };
        let engine = match reader.u16()? {
            0 => EngineKind::None,
            1 => EngineKind::Nvme,
            value => {
                return Err(WireError::UnknownCode {
                    what: "engine kind",
                    value: value.into(),
                });
            }
        };
        reader.reserved::<2>()?;
        let blob_len = reader.u32()?;
        let config = reader.bytes(config_len.into())?.to_vec();
        let max_regions = u64::from(Region::MAX_INDEX) + 1;
        in_range("the number of regions", region_count, 0, max_regions)?;
        let mut regions = Vec::with_capacity(region_count.into());
        for _ in 0..region_count {
            let index = reader.u8()?;
            reader.reserved::<7>()?;
            let size = reader.u64()?;
            regions.push(Region { index, size });
        }
        let blob = reader.bytes(blob_len as usize)?.to_vec();
        Ok(Description {
            config,
            regions,
            interrupts,
            engine,
            blob,
        })
    }
}

pub(super) fn check_blob(blob: &[u8]) -> Result<(), WireError> {
    in_range(
        "the length of an engine's blob",
        blob.len(),
        0,
        Description::MAX_BLOB as u64,
    )
}
