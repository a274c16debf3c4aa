//! The two features by which a guest asks for fewer interrupts (NVMe 1.4 §5.21.1.8, §5.21.1.9).
//!
//! They are about the way to the guest, so this half answers them and holds back what they say.
//! The device is not asked: its interrupts go to the device server, which sends on what there is.

use std::time::Duration;

use farbus_vfio::nvme::{Status, SubmissionEntry, admin, feature, select};

use super::ComputeHalf;
use super::interrupts::Coalescing;

/// The unit of the aggregation time.
const TIME_UNIT: Duration = Duration::from_micros(100);
/// Set Features: the setting is to survive power-off. Get Features, capabilities: it can be
/// changed.
const SAVE: u32 = 1 << 31;
const CHANGEABLE: u64 = 1 << 2;
/// Interrupt Vector Configuration: coalescing disable.
const DISABLE: u32 = 1 << 16;

impl ComputeHalf {
    /// Answers Set Features and Get Features of these two; `None` for all else.
    pub(super) fn answer_coalescing(&mut self, sqe: &SubmissionEntry) -> Option<(Status, u64)> {
        let id = sqe.dword(10) as u8;
        if !matches!(
            id,
            feature::INTERRUPT_COALESCING | feature::INTERRUPT_VECTOR
        ) {
            return None;
        }
        let vector = sqe.dword(11) & 0xffff;
        let exempt = self.interrupts.is_exempt(vector);
        if id == feature::INTERRUPT_VECTOR && exempt.is_none() {
            return Some((Status::INVALID_FIELD, 0));
        }
        match sqe.opcode() {
            admin::SET_FEATURES if sqe.dword(10) & SAVE != 0 => {
                Some((Status::FEATURE_NOT_SAVEABLE, 0))
            }
            admin::SET_FEATURES if id == feature::INTERRUPT_COALESCING => {
                self.interrupts.set_coalescing(decode(sqe.dword(11)));
                Some((Status::SUCCESS, 0))
            }
            admin::SET_FEATURES => {
                self.interrupts
                    .set_exempt(vector, sqe.dword(11) & DISABLE != 0);
                Some((Status::SUCCESS, 0))
            }
            admin::GET_FEATURES => {
                let now = match id {
                    feature::INTERRUPT_COALESCING => encode(self.interrupts.coalescing()),
                    _ => vector | if exempt == Some(true) { DISABLE } else { 0 },
                };
                let default = match id {
                    feature::INTERRUPT_COALESCING => 0,
                    _ => vector,
                };
                match sqe.dword(10) >> 8 & 7 {
                    select::CURRENT => Some((Status::SUCCESS, now.into())),
                    select::DEFAULT | select::SAVED => Some((Status::SUCCESS, default.into())),
                    select::CAPABILITIES => Some((Status::SUCCESS, CHANGEABLE)),
                    _ => Some((Status::INVALID_FIELD, 0)),
                }
            }
            _ => None,
        }
    }
}

/// Aggregation threshold, 0's based, and time.
pub(super) fn decode(dword: u32) -> Coalescing {
    Coalescing {
        completions: (dword & 0xff) + 1,
        time: TIME_UNIT * (dword >> 8 & 0xff),
    }
}

pub(super) fn encode(coalescing: Coalescing) -> u32 {
    let time = coalescing.time.as_micros() / TIME_UNIT.as_micros();
    coalescing.completions.saturating_sub(1) | (time as u32) << 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_set_is_what_is_got() {
        for dword in [0, 0x0103, 0xffff, 0x0a00] {
            assert_eq!(encode(decode(dword)), dword);
        }
        assert_eq!(decode(0x0a03).completions, 4);
        assert_eq!(decode(0x0a03).time, Duration::from_millis(1));
    }
}
