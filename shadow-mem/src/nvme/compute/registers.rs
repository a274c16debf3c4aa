//! The controller's registers as the guest sees them: the BAR mirror of an NVMe controller
//! (NVMe 1.4 §3.1). Reads never leave the compute side.

use farbus_vfio::nvme::{cc, reg};

/// The writable registers and the ones that the device changes.
#[derive(Debug)]
pub(super) struct Registers {
    cap: u64,
    vs: u32,
    interrupt_mask: u32,
    pub(super) cc: u32,
    pub(super) csts: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
}

/// What a write to a register asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing but the register itself.
    None,
    /// `CC.EN` rose.
    Enable,
    /// `CC.EN` fell.
    Disable,
    /// `CC` changed in another way, such as a shutdown notification.
    Configure,
}

impl Registers {
    pub(super) fn new(cap: u64, vs: u32) -> Self {
        Self {
            cap,
            vs,
            interrupt_mask: 0,
            cc: 0,
            csts: 0,
            aqa: 0,
            asq: 0,
            acq: 0,
        }
    }

    /// As after power-on.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.cap, self.vs);
    }

    /// What software has set, and what it sees of that.
    pub(super) fn dump(&self) -> [u64; 6] {
        [
            self.interrupt_mask.into(),
            self.cc.into(),
            self.csts.into(),
            self.aqa.into(),
            self.asq,
            self.acq,
        ]
    }

    /// As [`Self::dump`] had it.
    pub(super) fn restore(&mut self, [mask, cc, csts, aqa, asq, acq]: [u64; 6]) {
        self.interrupt_mask = mask as u32;
        self.cc = cc as u32;
        self.csts = csts as u32;
        self.aqa = aqa as u32;
        self.asq = asq;
        self.acq = acq;
    }

    /// A controller reset (NVMe 1.4 §7.3.2): all but the admin queue registers.
    pub(super) fn controller_reset(&mut self) {
        self.interrupt_mask = 0;
    }

    fn dword(&self, offset: u64) -> u32 {
        match offset {
            reg::CAP => self.cap as u32,
            0x04 => (self.cap >> 32) as u32,
            reg::VS => self.vs,
            reg::INTMS | reg::INTMC => self.interrupt_mask,
            reg::CC => self.cc,
            reg::CSTS => self.csts,
            reg::AQA => self.aqa,
            reg::ASQ => self.asq as u32,
            0x2c => (self.asq >> 32) as u32,
            reg::ACQ => self.acq as u32,
            0x34 => (self.acq >> 32) as u32,
            _ => 0,
        }
    }

    /// Fills `data` with the registers from `offset` on; what is not a register reads as 0.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = (self.dword(at & !3) >> (at % 4 * 8)) as u8;
        }
    }

    /// Writes one aligned dword, or two of them at once. Other accesses are undefined by the
    /// specification and ignored here.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Change {
        match (offset % 4, data) {
            (0, &[a, b, c, d]) => self.write_dword(offset, u32::from_le_bytes([a, b, c, d])),
            (0, &[a, b, c, d, e, f, g, h]) if offset % 8 == 0 => {
                let low = self.write_dword(offset, u32::from_le_bytes([a, b, c, d]));
                let high = self.write_dword(offset + 4, u32::from_le_bytes([e, f, g, h]));
                if high == Change::None { low } else { high }
            }
            _ => Change::None,
        }
    }

    fn write_dword(&mut self, offset: u64, value: u32) -> Change {
        // The admin queue may only be moved while the controller is disabled.
        let disabled = self.cc & cc::EN == 0;
        match offset {
            reg::INTMS => self.interrupt_mask |= value,
            reg::INTMC => self.interrupt_mask &= !value,
            reg::CC => {
                let before = std::mem::replace(&mut self.cc, value & 0x00ff_fff1);
                return match (before & cc::EN, value & cc::EN) {
                    (0, 1) => Change::Enable,
                    (1, 0) => Change::Disable,
                    _ if before != self.cc => Change::Configure,
                    _ => Change::None,
                };
            }
            reg::AQA if disabled => self.aqa = value & 0x0fff_0fff,
            reg::ASQ if disabled => set_low(&mut self.asq, value & !0xfff),
            0x2c if disabled => set_high(&mut self.asq, value),
            reg::ACQ if disabled => set_low(&mut self.acq, value & !0xfff),
            0x34 if disabled => set_high(&mut self.acq, value),
            _ => {}
        }
        Change::None
    }

    /// The admin queues: base and number of entries of the submission queue, then of the
    /// completion queue. None if the specification forbids what the guest set.
    pub(super) fn admin_queues(&self) -> Option<[(u64, u32); 2]> {
        let submission = (self.aqa & 0xfff) + 1;
        let completion = (self.aqa >> 16 & 0xfff) + 1;
        // NVMe 1.4 §3.1.9: the minimum size is two entries.
        (submission > 1 && completion > 1)
            .then_some([(self.asq, submission), (self.acq, completion)])
    }

    /// Whether `CC` is one the controller can be enabled with: pages of 4 KiB and the NVM
    /// command set.
    pub(super) fn is_configuration_supported(&self) -> bool {
        self.cc & (cc::MPS_MASK | cc::CSS_MASK) == 0
    }
}

fn set_low(register: &mut u64, value: u32) {
    *register = *register & !0xffff_ffff | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
    *register = *register & 0xffff_ffff | u64::from(value) << 32;
}
