//! The controller registers (NVMe 1.4 §3.1), and what writes to them ask of the admin thread.
//!
//! A register write never waits: enabling, disabling and shutting down are carried out by the
//! admin thread, and software sees them happen in `CSTS`, as the specification has it.

#![forbid(unsafe_code)]

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Instant;

use super::lock;
use crate::nvme::{PAGE_SIZE, cap, cc, csts, reg};

/// Most entries of an I/O queue.
pub(super) const MAX_QUEUE_ENTRIES: u16 = 1024;
/// `CAP.TO`: how long enabling, disabling and shutting down may take, in units of 500 ms.
/// Commands that are under way are waited for, and the disk under the file may be slow.
const TIMEOUT_UNITS: u64 = 60;
/// NVMe 1.4.0 (§3.1.2).
pub(super) const VERSION: u32 = 0x0001_0400;
/// The bits of `CC` that are not reserved.
const CC_BITS: u32 = 0x00ff_fff1;
/// Shutdown status: under way (NVMe 1.4 §3.1.6).
const SHST_OCCURRING: u32 = 1 << 2;
/// Bytes of the register file that mean something.
const REGISTERS: usize = 0x40;

/// What software set up when it enabled the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Enable {
    pub(super) cc: u32,
    pub(super) aqa: u32,
    pub(super) asq: u64,
    pub(super) acq: u64,
}

/// What the admin thread is to do, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    Stop,
    Reset,
    Shutdown,
    Disable,
    Enable(Enable),
    DeliverEvents,
    RunCommands,
    /// Nothing else is to be done, and it is time.
    LookAtSize,
}

#[derive(Default)]
struct Requests {
    stop: bool,
    reset: bool,
    shutdown: bool,
    disable: bool,
    enable: Option<Enable>,
    deliver: bool,
    commands: bool,
}

impl Requests {
    fn take(&mut self) -> Option<Task> {
        if self.stop {
            return Some(Task::Stop);
        }
        let flags = [
            (&mut self.reset, Task::Reset),
            (&mut self.shutdown, Task::Shutdown),
            (&mut self.disable, Task::Disable),
        ];
        for (flag, task) in flags {
            if std::mem::take(flag) {
                return Some(task);
            }
        }
        if let Some(enable) = self.enable.take() {
            return Some(Task::Enable(enable));
        }
        if std::mem::take(&mut self.deliver) {
            return Some(Task::DeliverEvents);
        }
        std::mem::take(&mut self.commands).then_some(Task::RunCommands)
    }
}

#[derive(Default)]
struct State {
    cc: u32,
    csts: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    requests: Requests,
    resets_asked: u64,
    resets_done: u64,
}

/// The registers and the admin thread's to-do list.
#[derive(Default)]
pub(super) struct Front {
    state: Mutex<State>,
    task: Condvar,
    reset_done: Condvar,
}

impl Front {
    /// Reads from `offset` on (bytes below 0x1000); what is not a register is zero.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        let file = self.register_file();
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = file.get(offset + n).copied().unwrap_or(0);
        }
    }

    fn register_file(&self) -> [u8; REGISTERS] {
        let mut file = [0; REGISTERS];
        let mut put = |at: u64, bytes: &[u8]| {
            for (to, from) in file.iter_mut().skip(at as usize).zip(bytes) {
                *to = *from;
            }
        };
        let capabilities = u64::from(MAX_QUEUE_ENTRIES - 1)
            | cap::CQR
            | TIMEOUT_UNITS << cap::TO_SHIFT
            | cap::CSS_NVM;
        let state = lock(&self.state);
        put(reg::CAP, &capabilities.to_le_bytes());
        put(reg::VS, &VERSION.to_le_bytes());
        put(reg::CC, &state.cc.to_le_bytes());
        put(reg::CSTS, &state.csts.to_le_bytes());
        put(reg::AQA, &state.aqa.to_le_bytes());
        put(reg::ASQ, &state.asq.to_le_bytes());
        put(reg::ACQ, &state.acq.to_le_bytes());
        file
    }

    /// Writes the aligned dword at `offset`. Registers that are read only, reserved, or
    /// without meaning here (`INTMS` and `INTMC` are for pin interrupts and MSI, §3.1.3) take
    /// no notice.
    pub(super) fn write_dword(&self, offset: u64, value: u32) {
        let mut state = lock(&self.state);
        match offset {
            reg::CC => self.write_cc(state, value & CC_BITS),
            reg::AQA => state.aqa = value & 0x0fff_0fff,
            reg::ASQ => set_low(&mut state.asq, value & !(PAGE_SIZE as u32 - 1)),
            reg::ACQ => set_low(&mut state.acq, value & !(PAGE_SIZE as u32 - 1)),
            at if at == reg::ASQ + 4 => set_high(&mut state.asq, value),
            at if at == reg::ACQ + 4 => set_high(&mut state.acq, value),
            _ => {}
        }
    }

    fn write_cc(&self, mut state: MutexGuard<'_, State>, new: u32) {
        let old = std::mem::replace(&mut state.cc, new);
        if new & cc::SHN_MASK != 0 && old & cc::SHN_MASK != new & cc::SHN_MASK {
            state.csts = (state.csts & !csts::SHST_MASK) | SHST_OCCURRING;
            state.requests.shutdown = true;
        }
        match (old & cc::EN != 0, new & cc::EN != 0) {
            (false, true) => {
                let State { aqa, asq, acq, .. } = *state;
                state.requests.enable = Some(Enable {
                    cc: new,
                    aqa,
                    asq,
                    acq,
                });
            }
            (true, false) => {
                state.requests.enable = None;
                state.requests.disable = true;
            }
            _ => {}
        }
        self.task.notify_one();
    }

    /// `CC` as it is now.
    pub(super) fn cc(&self) -> u32 {
        lock(&self.state).cc
    }

    /// Replaces the bits of `CSTS` that are in `mask`.
    pub(super) fn set_status(&self, mask: u32, bits: u32) {
        let mut state = lock(&self.state);
        state.csts = (state.csts & !mask) | (bits & mask);
    }

    /// The admin submission queue may hold commands.
    pub(super) fn request_commands(&self) {
        lock(&self.state).requests.commands = true;
        self.task.notify_one();
    }

    /// There may be events to report, and room to do so.
    pub(super) fn request_delivery(&self) {
        lock(&self.state).requests.deliver = true;
        self.task.notify_one();
    }

    /// The admin thread is to end, once it has done what it is doing.
    pub(super) fn request_stop(&self) {
        lock(&self.state).requests.stop = true;
        self.task.notify_one();
    }

    /// Clears all registers and waits until the admin thread has reset the rest.
    pub(super) fn reset(&self) {
        let mut state = lock(&self.state);
        let stop = state.requests.stop;
        state.requests = Requests {
            stop,
            reset: true,
            ..Requests::default()
        };
        (state.cc, state.csts, state.aqa, state.asq, state.acq) = (0, 0, 0, 0, 0);
        state.resets_asked += 1;
        let ticket = state.resets_asked;
        self.task.notify_one();
        while state.resets_done < ticket {
            state = self
                .reset_done
                .wait(state)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// How many resets were asked for; to be passed to [`Self::resets_done`] after one.
    pub(super) fn resets_asked(&self) -> u64 {
        lock(&self.state).resets_asked
    }

    /// All resets up to this one are done.
    pub(super) fn resets_done(&self, ticket: u64) {
        let mut state = lock(&self.state);
        state.resets_done = state.resets_done.max(ticket);
        self.reset_done.notify_all();
    }

    /// Waits for something to do. After `look_at` there is the size to look at, if it is given.
    pub(super) fn next_task(&self, look_at: Option<Instant>) -> Task {
        let mut state = lock(&self.state);
        loop {
            if let Some(task) = state.requests.take() {
                return task;
            }
            let Some(look_at) = look_at else {
                state = self
                    .task
                    .wait(state)
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                continue;
            };
            let left = look_at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Task::LookAtSize;
            }
            let waited = self.task.wait_timeout(state, left);
            state = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }
}

fn set_low(register: &mut u64, value: u32) {
    *register = (*register & !0xffff_ffff) | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
    *register = (*register & 0xffff_ffff) | u64::from(value) << 32;
}
