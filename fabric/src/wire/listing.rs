//! What a device server offers, told to a peer that asks instead of claiming.
//!
//! Entries come in rising order of their names, and an answer is one frame. What does not fit is
//! asked for with the last name of the answer before, so that neither side holds a cursor, and
//! exports that come or go between two questions neither repeat nor hide others.

use super::bounded::utf8;
use super::codec::{Put, Reader, in_range};
use super::{ExportName, Label, MAX_CONTROL, Text, WireError};

/// One export, as its device server describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The name that it is claimed by.
    pub name: ExportName,
    /// PCI class code: base class, subclass and interface, from bit 23 down. 0 if unknown.
    pub class: u32,
    /// PCI vendor id; 0 if unknown.
    pub vendor: u16,
    /// PCI device id; 0 if unknown.
    pub device: u16,
    /// The device's model; empty if it does not say.
    pub model: Label,
    /// The device's serial number; empty if it does not say.
    pub serial: Label,
    /// Bytes that it holds, if it is known to hold any.
    pub capacity: Option<u64>,
    /// Bytes of a logical block, for storage.
    pub block_size: Option<u32>,
    /// The NUMA node of the device server's host that it is near to.
    pub numa_node: Option<u16>,
    /// Whether it can be had.
    pub state: ListedState,
    /// Who has claimed it, as that side names itself; empty if nobody has.
    pub holder: Text,
    /// Why it cannot be had; empty if it can.
    pub why: Text,
}

/// Whether an export can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ListedState {
    /// Nobody has claimed it.
    Free = 0,
    /// Somebody has.
    Claimed = 1,
    /// It has no working function.
    Failed = 2,
    /// It takes no new claims; somebody may still have it.
    Draining = 3,
}

/// One answer to a question for exports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// Exports in strictly rising order of their names.
    pub entries: Vec<Listed>,
    /// Whether there are others, after the last of these.
    pub more: bool,
}

/// No NUMA node.
const NO_NODE: u16 = u16::MAX;
/// Greatest PCI class code.
const MAX_CLASS: u32 = 0xff_ffff;

impl Listing {
    /// Length of a listing without entries.
    pub(super) const HEAD: usize = 4;

    /// As many of the exports as fit one frame, which have to be in rising order.
    pub fn page(exports: impl IntoIterator<Item = Listed>) -> Self {
        let mut listing = Listing::default();
        let mut len = Self::HEAD;
        for entry in exports {
            len += entry.encoded_len();
            if len > MAX_CONTROL {
                listing.more = true;
                break;
            }
            listing.entries.push(entry);
        }
        listing
    }

    pub(super) fn check(&self) -> Result<(), WireError> {
        let entries = self.entries.iter().map(Listed::encoded_len);
        let len = Self::HEAD + entries.sum::<usize>();
        in_range("the length of a listing", len, 0, MAX_CONTROL as u64)?;
        // Otherwise a peer that asks for the rest would ask the same for ever.
        in_range(
            "the number of entries of a listing that has more",
            self.entries.len(),
            self.more.into(),
            u64::MAX,
        )?;
        self.entries.iter().try_for_each(Listed::check)?;
        for pair in self.entries.windows(2) {
            let [first, second] = pair else { continue };
            if first.name >= second.name {
                return Err(WireError::ListingOrder {
                    name: second.name.clone(),
                    previous: first.name.clone(),
                });
            }
        }
        Ok(())
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.put_u16(self.entries.len() as u16);
        out.put_u16(self.more.into());
        self.entries.iter().for_each(|entry| entry.encode(out));
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let count = reader.u16()?;
        let more = reader.u16()?;
        in_range("whether a listing has more", more, 0, 1)?;
        let most = reader.rest().len() / Listed::MIN_LEN;
        in_range("the number of listed exports", count, 0, most as u64)?;
        let mut entries = Vec::with_capacity(count.into());
        for _ in 0..count {
            entries.push(Listed::decode(reader)?);
        }
        Ok(Listing {
            entries,
            more: more == 1,
        })
    }
}

impl Listed {
    /// Length of all that is not a string.
    const FIXED: usize = 24;
    /// Length of an entry whose name is one byte and whose other strings are empty.
    const MIN_LEN: usize = Self::FIXED + 5 * 2 + 1;

    fn strings(&self) -> [&str; 5] {
        [
            self.name.as_str(),
            self.model.as_str(),
            self.serial.as_str(),
            self.holder.as_str(),
            self.why.as_str(),
        ]
    }

    fn encoded_len(&self) -> usize {
        let strings = self.strings().map(|text| 2 + text.len());
        Self::FIXED + strings.iter().sum::<usize>()
    }

    /// "None" has a value of its own on the wire, which is then not to be had otherwise.
    fn check(&self) -> Result<(), WireError> {
        in_range("a class code", self.class, 0, MAX_CLASS.into())?;
        in_range("a capacity", self.capacity.unwrap_or(1), 1, u64::MAX)?;
        in_range("a block size", self.block_size.unwrap_or(1), 1, u64::MAX)?;
        let node = self.numa_node.unwrap_or(0);
        in_range("a NUMA node", node, 0, u64::from(NO_NODE) - 1)
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.capacity.unwrap_or(0));
        out.put_u32(self.block_size.unwrap_or(0));
        out.put_u32(self.class);
        out.put_u16(self.vendor);
        out.put_u16(self.device);
        out.put_u16(self.numa_node.unwrap_or(NO_NODE));
        out.put_u8(self.state as u8);
        out.put_u8(0);
        for text in self.strings() {
            out.put_u16(text.len() as u16);
            out.put_bytes(text.as_bytes());
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let capacity = reader.u64()?;
        let block_size = reader.u32()?;
        let class = reader.u32()?;
        let vendor = reader.u16()?;
        let device = reader.u16()?;
        let numa_node = reader.u16()?;
        let state = ListedState::from_number(reader.u8()?)?;
        reader.reserved::<1>()?;
        let name = utf8("an export name", take_counted(reader)?)?;
        Ok(Listed {
            name: ExportName::new(name)?,
            class,
            vendor,
            device,
            model: Label::from_wire(take_counted(reader)?)?,
            serial: Label::from_wire(take_counted(reader)?)?,
            capacity: (capacity != 0).then_some(capacity),
            block_size: (block_size != 0).then_some(block_size),
            numa_node: (numa_node != NO_NODE).then_some(numa_node),
            state,
            holder: Text::from_wire(take_counted(reader)?)?,
            why: Text::from_wire(take_counted(reader)?)?,
        })
    }
}

impl ListedState {
    fn from_number(number: u8) -> Result<Self, WireError> {
        Ok(match number {
            0 => ListedState::Free,
            1 => ListedState::Claimed,
            2 => ListedState::Failed,
            3 => ListedState::Draining,
            value => {
                return Err(WireError::UnknownCode {
                    what: "state of an export",
                    value: value.into(),
                });
            }
        })
    }
}

fn take_counted<'a>(reader: &mut Reader<'a>) -> Result<&'a [u8], WireError> {
    let len = reader.u16()?;
    reader.bytes(len.into())
}
