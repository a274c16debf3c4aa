//! `VFIO_USER_DEVICE_SET_IRQS` with its flags taken apart.

use super::{SetIrqsHead, at_least};
use crate::user::wire::WireError;

const IRQ_DATA_NONE: u32 = 1 << 0;
const IRQ_DATA_BOOL: u32 = 1 << 1;
const IRQ_DATA_EVENTFD: u32 = 1 << 2;
const IRQ_ACTION_MASK: u32 = 1 << 3;
const IRQ_ACTION_UNMASK: u32 = 1 << 4;
const IRQ_ACTION_TRIGGER: u32 = 1 << 5;

/// What `VFIO_USER_DEVICE_SET_IRQS` does to each interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// Silences it.
    Mask,
    /// Lets it through again.
    Unmask,
    /// Signals it.
    Trigger,
}

/// To which interrupts of the range, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqData<'a> {
    /// To all, at once.
    None,
    /// To those whose byte is not 0, at once.
    Bool(&'a [u8]),
    /// The descriptors of the message (one per interrupt, or none at all to take them back)
    /// stand for the action from now on.
    EventFd,
}

/// `VFIO_USER_DEVICE_SET_IRQS`, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetIrqs<'a> {
    /// Which kind of interrupts.
    pub index: u32,
    /// The first interrupt.
    pub start: u32,
    /// How many. 0 with [`IrqData::None`] and [`IrqAction::Trigger`] takes back every
    /// eventfd of the kind.
    pub count: u32,
    /// What to do.
    pub action: IrqAction,
    /// To which.
    pub data: IrqData<'a>,
}

impl<'a> SetIrqs<'a> {
    /// Reads the body.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, WireError> {
        let head = SetIrqsHead::decode(bytes)?;
        at_least(SetIrqsHead::NAME, head.argsz, SetIrqsHead::LEN)?;
        let bad = |why| WireError::BadFlags {
            what: SetIrqsHead::NAME,
            flags: head.flags,
            why,
        };
        let data_bits = IRQ_DATA_NONE | IRQ_DATA_BOOL | IRQ_DATA_EVENTFD;
        let action_bits = IRQ_ACTION_MASK | IRQ_ACTION_UNMASK | IRQ_ACTION_TRIGGER;
        if head.flags & !(data_bits | action_bits) != 0 {
            return Err(bad("are not all defined"));
        }
        let data = match head.flags & data_bits {
            IRQ_DATA_NONE => IrqData::None,
            IRQ_DATA_EVENTFD => IrqData::EventFd,
            IRQ_DATA_BOOL => {
                let data = bytes.get(SetIrqsHead::LEN..).unwrap_or_default();
                if data.len() as u64 != u64::from(head.count) {
                    return Err(WireError::DataLength {
                        what: SetIrqsHead::NAME,
                        said: u64::from(head.count),
                        carried: data.len(),
                    });
                }
                IrqData::Bool(data)
            }
            _ => return Err(bad("must have exactly one DATA bit")),
        };
        let action = match head.flags & action_bits {
            IRQ_ACTION_MASK => IrqAction::Mask,
            IRQ_ACTION_UNMASK => IrqAction::Unmask,
            IRQ_ACTION_TRIGGER => IrqAction::Trigger,
            _ => return Err(bad("must have exactly one ACTION bit")),
        };
        Ok(Self {
            index: head.index,
            start: head.start,
            count: head.count,
            action,
            data,
        })
    }

    /// Writes the body.
    pub fn encode(&self) -> Vec<u8> {
        let (data_flag, data) = match self.data {
            IrqData::None => (IRQ_DATA_NONE, &[][..]),
            IrqData::Bool(data) => (IRQ_DATA_BOOL, data),
            IrqData::EventFd => (IRQ_DATA_EVENTFD, &[][..]),
        };
        let action_flag = match self.action {
            IrqAction::Mask => IRQ_ACTION_MASK,
            IrqAction::Unmask => IRQ_ACTION_UNMASK,
            IrqAction::Trigger => IRQ_ACTION_TRIGGER,
        };
        let head = SetIrqsHead {
            argsz: (SetIrqsHead::LEN + data.len()) as u32,
            flags: data_flag | action_flag,
            index: self.index,
            start: self.start,
            count: self.count,
        };
        let mut bytes = head.encode().to_vec();
        bytes.extend_from_slice(data);
        bytes
    }
}
