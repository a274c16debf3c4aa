//! Get and Set Features (NVMe 1.4 §5.13, §5.21): what exists, what its default is, and which
//! values are refused. No feature can be saved.

#![forbid(unsafe_code)]

use super::health;
use crate::nvme::{Status, SubmissionEntry, feature, select};

/// A host may give this namespace id where a feature has nothing to do with namespaces, and
/// it means "all" where it has.
const ALL_NAMESPACES: u32 = 0xffff_ffff;
/// Default of the over temperature threshold, in Kelvin; Identify's warning threshold.
pub(super) const WARNING_TEMPERATURE: u16 = 343;

/// The current values of one controller.
#[derive(Clone, Debug)]
pub(crate) struct Features {
    arbitration: u32,
    over_temperature: u16,
    under_temperature: u16,
    error_recovery: u32,
    /// The volatile write cache is on.
    pub(crate) write_cache: bool,
    /// I/O queue pairs, as a dword of Number of Queues.
    queues: u32,
    coalescing: u32,
    /// One bit for each vector: coalescing disabled.
    vectors: u64,
    vector_count: u32,
    write_atomicity: u32,
    async_events: u32,
}

impl Features {
    /// All defaults, for a controller with this many I/O queue pairs.
    pub(crate) fn new(queue_pairs: u16) -> Self {
        let zeroes_based = u32::from(queue_pairs) - 1;
        Self {
            // No limit on the commands that are fetched at a time.
            arbitration: 7,
            over_temperature: WARNING_TEMPERATURE,
            under_temperature: 0,
            error_recovery: 0,
            write_cache: true,
            queues: zeroes_based | zeroes_based << 16,
            coalescing: 0,
            vectors: 0,
            vector_count: u32::from(queue_pairs) + 1,
            write_atomicity: 0,
            async_events: 0,
        }
    }

    /// Everything back to its default, as a controller reset does.
    pub(crate) fn reset(&mut self) {
        *self = Self::new((self.vector_count - 1) as u16);
    }

    /// SMART critical warnings that the host wants to hear of.
    pub(super) fn reported_warnings(&self) -> u8 {
        self.async_events as u8
    }

    /// Whether the temperature is past one of its thresholds.
    pub(super) fn is_temperature_critical(&self) -> bool {
        health::TEMPERATURE >= self.over_temperature
            || health::TEMPERATURE <= self.under_temperature
    }

    /// Get Features: the result dword.
    pub(crate) fn get(&self, command: &SubmissionEntry) -> Result<u32, Status> {
        let id = command.dword(10) as u8;
        let is_namespace_specific = id == feature::ERROR_RECOVERY;
        if is_namespace_specific && command.nsid() != 1 {
            return Err(Status::INVALID_NAMESPACE);
        }
        match command.dword(10) >> 8 & 7 {
            select::CURRENT => self.value(command),
            // What cannot be saved has its default for a saved value.
            select::DEFAULT | select::SAVED => {
                Self::new((self.vector_count - 1) as u16).value(command)
            }
            select::CAPABILITIES => {
                self.value(command)?;
                let changeable = 1 << 2;
                Ok(changeable | u32::from(is_namespace_specific) << 1)
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn value(&self, command: &SubmissionEntry) -> Result<u32, Status> {
        let parameter = command.dword(11);
        Ok(match command.dword(10) as u8 {
            feature::ARBITRATION => self.arbitration,
            feature::POWER_MANAGEMENT => 0,
            feature::TEMPERATURE_THRESHOLD => {
                if parameter >> 16 & 0xf != 0 {
                    return Err(Status::INVALID_FIELD);
                }
                match parameter >> 20 & 3 {
                    0 => u32::from(self.over_temperature),
                    1 => u32::from(self.under_temperature),
                    _ => return Err(Status::INVALID_FIELD),
                }
            }
            feature::ERROR_RECOVERY => self.error_recovery,
            feature::VOLATILE_WRITE_CACHE => u32::from(self.write_cache),
            feature::NUMBER_OF_QUEUES => self.queues,
            feature::INTERRUPT_COALESCING => self.coalescing,
            feature::INTERRUPT_VECTOR => {
                let vector = parameter & 0xffff;
                if vector >= self.vector_count {
                    return Err(Status::INVALID_FIELD);
                }
                vector | ((self.vectors >> vector & 1) as u32) << 16
            }
            feature::WRITE_ATOMICITY => self.write_atomicity,
            feature::ASYNC_EVENTS => self.async_events,
            _ => return Err(Status::INVALID_FIELD),
        })
    }

    /// Set Features: the result dword. `has_io_queues` says that I/O queues exist.
    pub(crate) fn set(
        &mut self,
        command: &SubmissionEntry,
        has_io_queues: bool,
    ) -> Result<u32, Status> {
        let id = command.dword(10) as u8;
        let value = command.dword(11);
        // Fails for what does not exist, before anything else is judged. The temperature
        // threshold may be set for all sensors, which `value` does not know.
        if id != feature::TEMPERATURE_THRESHOLD {
            self.value(command)?;
        }
        match (id, command.nsid()) {
            (_, ALL_NAMESPACES) | (feature::ERROR_RECOVERY, 1) => {}
            (feature::ERROR_RECOVERY, _) => return Err(Status::INVALID_NAMESPACE),
            (_, 0) => {}
            _ => return Err(Status::FEATURE_NOT_NAMESPACE_SPECIFIC),
        }
        if command.dword(10) >> 31 == 1 {
            return Err(Status::FEATURE_NOT_SAVEABLE);
        }
        match id {
            feature::ARBITRATION => self.arbitration = value & 0xffff_ff07,
            // Power state 0 is the only one.
            feature::POWER_MANAGEMENT if value & 0x1f != 0 => return Err(Status::INVALID_FIELD),
            feature::POWER_MANAGEMENT => {}
            feature::TEMPERATURE_THRESHOLD => self.set_threshold(value)?,
            // Bit 16 asks for errors from deallocated blocks, which never give any.
            feature::ERROR_RECOVERY if value >> 16 & 1 == 1 => return Err(Status::INVALID_FIELD),
            feature::ERROR_RECOVERY => self.error_recovery = value & 0xffff,
            feature::VOLATILE_WRITE_CACHE => self.write_cache = value & 1 == 1,
            feature::NUMBER_OF_QUEUES => {
                if value & 0xffff == 0xffff || value >> 16 == 0xffff {
                    return Err(Status::INVALID_FIELD);
                }
                if has_io_queues {
                    return Err(Status::COMMAND_SEQUENCE_ERROR);
                }
                // What is allocated may be more than what was asked for (§5.21.1.7).
                return Ok(self.queues);
            }
            // A recommendation to the controller (§5.21.1.8), which signals at once anyway.
            feature::INTERRUPT_COALESCING => self.coalescing = value & 0xffff,
            feature::INTERRUPT_VECTOR => {
                let bit = 1u64 << (value & 0x3f);
                self.vectors = if value >> 16 & 1 == 1 {
                    self.vectors | bit
                } else {
                    self.vectors & !bit
                };
            }
            feature::WRITE_ATOMICITY => self.write_atomicity = value & 1,
            feature::ASYNC_EVENTS => self.async_events = value,
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(0)
    }

    fn set_threshold(&mut self, value: u32) -> Result<(), Status> {
        // Sensor 0 is the composite temperature; 15 means all of them (§5.21.1.4).
        if !matches!(value >> 16 & 0xf, 0 | 0xf) {
            return Err(Status::INVALID_FIELD);
        }
        match value >> 20 & 3 {
            0 => self.over_temperature = value as u16,
            1 => self.under_temperature = value as u16,
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(())
    }
}
