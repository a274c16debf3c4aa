//! The interrupts of a function, as eventfds.
//!
//! The kernel's rules (`drivers/vfio/pci/vfio_pci_intrs.c`) are not those of
//! [`Function`](crate::Function), and are kept from its users here:
//!
//! - One kind at a time is enabled, with as many vectors as it was enabled with. A kernel before 6.5, and
//!   every one with MSI, does not add vectors later: all are disabled and enabled anew.
//! - MSI and MSI-X vectors cannot be masked. A masked one signals an eventfd of our own.
//! - INTx is masked by the kernel whenever it fires, so that a level-triggered interrupt does not storm:
//!   whoever has served it unmasks it.
//!
//! Where the kernel takes a vector down for a moment in which it might fire, its eventfd is
//! signalled once: whoever listens to an interrupt has to live with one too many, but not
//! with one too few.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Device, IrqAction, Irqs};
use crate::function::{FunctionError, InterruptCounts, InterruptKind};

/// What the kernel is asked for; a device, or a test's notes.
pub(super) trait IrqSetter {
    /// See [`Device::set_irqs`].
    fn set_irqs(&self, index: u32, start: u32, action: IrqAction<'_>) -> io::Result<()>;
}

impl IrqSetter for Device {
    fn set_irqs(&self, index: u32, start: u32, action: IrqAction<'_>) -> io::Result<()> {
        Device::set_irqs(self, index, start, action)
    }
}

#[derive(Clone, Debug, Default)]
enum Mask {
    #[default]
    Open,
    /// By the kernel.
    Masked,
    /// By this eventfd, which the kernel signals instead.
    Parked(Arc<EventFd>),
}

/// One interrupt.
#[derive(Clone, Debug, Default)]
struct Vector {
    event: Option<Arc<EventFd>>,
    mask: Mask,
}

impl Vector {
    /// What the kernel is to signal.
    fn target(&self) -> Option<&EventFd> {
        let event = self.event.as_deref()?;
        match &self.mask {
            Mask::Parked(parked) => Some(parked),
            Mask::Open | Mask::Masked => Some(event),
        }
    }

    fn fd(&self) -> RawFd {
        self.target().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// Signals in place of the function.
    fn signal(&self) {
        if let Some(target) = self.target() {
            // One whose counter is full has been signalled.
            let _ = target.write(1);
        }
    }
}

#[derive(Default)]
struct State {
    /// The kind that is enabled, and for how many vectors.
    enabled: Option<(InterruptKind, u32)>,
    intx: Vec<Vector>,
    msi: Vec<Vector>,
    msix: Vec<Vector>,
}

impl State {
    fn vectors(&mut self, kind: InterruptKind) -> &mut Vec<Vector> {
        match kind {
            InterruptKind::Intx => &mut self.intx,
            InterruptKind::Msi => &mut self.msi,
            InterruptKind::Msix => &mut self.msix,
        }
    }
}

/// All interrupts of a function.
pub(super) struct Interrupts {
    intx: Irqs,
    msi: Irqs,
    msix: Irqs,
    state: Mutex<State>,
}

impl Interrupts {
    pub(super) fn new(intx: Irqs, msi: Irqs, msix: Irqs) -> Self {
        let none = |irqs: Irqs| vec![Vector::default(); irqs.count as usize];
        let state = State {
            enabled: None,
            intx: none(intx),
            msi: none(msi),
            msix: none(msix),
        };
        Self {
            intx,
            msi,
            msix,
            state: Mutex::new(state),
        }
    }

    pub(super) fn counts(&self) -> InterruptCounts {
        InterruptCounts {
            intx: self.intx.count,
            msi: self.msi.count,
            msix: self.msix.count,
        }
    }

    /// See [`crate::Function::set_interrupts`].
    pub(super) fn set(
        &self,
        device: &impl IrqSetter,
        kind: InterruptKind,
        first: u32,
        events: &[Option<Arc<EventFd>>],
    ) -> Result<(), FunctionError> {
        let end = self.check(kind, first, events.len())?;
        let mut state = self.state();
        let silent = events.iter().all(Option::is_none);
        match state.enabled {
            Some((other, _)) if other != kind && silent => return Ok(()),
            Some((other, _)) if other != kind => {
                return Err(FunctionError::Unsupported(format!(
                    "{kind:?} interrupts cannot be used while {other:?} ones are; silence these first"
                )));
            }
            _ => {}
        }
        let range = first as usize..end as usize;
        let Some(vectors) = state.vectors(kind).get_mut(range) else {
            return Ok(());
        };
        let before = vectors.to_vec();
        for (vector, event) in vectors.iter_mut().zip(events) {
            vector.event = event.clone();
        }
        let outcome = self.apply(device, &mut state, kind, first, end);
        outcome.map_err(|source| {
            let vectors = state.vectors(kind).iter_mut().skip(first as usize);
            for (vector, before) in vectors.zip(before) {
                *vector = before;
            }
            if state.enabled.is_none() {
                // More vectors were not to be had, so go back to those that there were.
                let _ = self.apply(device, &mut state, kind, 0, 0);
                state.vectors(kind).iter().for_each(Vector::signal);
            }
            failed(format!("setting {kind:?} vectors {first} to {end}"), source)
        })
    }

    /// See [`crate::Function::mask_interrupt`].
    pub(super) fn mask(
        &self,
        device: &impl IrqSetter,
        kind: InterruptKind,
        number: u32,
        masked: bool,
    ) -> Result<(), FunctionError> {
        self.check(kind, number, 1)?;
        let mut state = self.state();
        let enabled = matches!(state.enabled, Some((enabled, _)) if enabled == kind);
        let verb = if masked { "masking" } else { "unmasking" };
        let fail = |source| failed(format!("{verb} {kind:?} vector {number}"), source);
        let Some(vector) = state.vectors(kind).get_mut(number as usize) else {
            return Ok(());
        };
        if kind == InterruptKind::Intx {
            let action = match masked {
                true => IrqAction::Mask,
                false => IrqAction::Unmask,
            };
            if enabled {
                device.set_irqs(index(kind), 0, action).map_err(fail)?;
            }
            vector.mask = match masked {
                true => Mask::Masked,
                false => Mask::Open,
            };
            return Ok(());
        }
        let mask = match (&vector.mask, masked) {
            (Mask::Open, true) => Mask::Parked(Arc::new(EventFd::new(EFD_NONBLOCK).map_err(fail)?)),
            (Mask::Parked(_), false) => Mask::Open,
            _ => return Ok(()),
        };
        let before = std::mem::replace(&mut vector.mask, mask);
        if enabled && vector.event.is_some() {
            let fds = [vector.fd()];
            if let Err(source) = device.set_irqs(index(kind), number, IrqAction::Signal(&fds)) {
                vector.mask = before;
                return Err(fail(source));
            }
        }
        if let Mask::Parked(parked) = before {
            let pending = parked.read().is_ok();
            // MSI has no pending bits that would have kept what came while the eventfds
            // changed.
            if pending || kind == InterruptKind::Msi {
                vector.signal();
            }
        }
        Ok(())
    }

    /// A panic elsewhere leaves the table sound: every change of it is undone on failure.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn irqs(&self, kind: InterruptKind) -> Irqs {
        match kind {
            InterruptKind::Intx => self.intx,
            InterruptKind::Msi => self.msi,
            InterruptKind::Msix => self.msix,
        }
    }

    /// Returns the end of a range of vectors that exist.
    fn check(&self, kind: InterruptKind, first: u32, count: usize) -> Result<u32, FunctionError> {
        let available = self.irqs(kind).count;
        let end = u64::from(first).saturating_add(count as u64);
        match u32::try_from(end) {
            Ok(end) if end <= available => Ok(end),
            _ => Err(FunctionError::Unsupported(format!(
                "{kind:?} vectors {first} to {end} were asked for, but there are {available}"
            ))),
        }
    }

    /// Brings the kernel in line with the table, of which `first..end` has changed.
    fn apply(
        &self,
        device: &impl IrqSetter,
        state: &mut State,
        kind: InterruptKind,
        first: u32,
        end: u32,
    ) -> io::Result<()> {
        let index = index(kind);
        let enabled = state.enabled.map(|(_, count)| count);
        let vectors = state.vectors(kind);
        let needed = vectors.iter().rposition(|v| v.event.is_some());
        let needed = needed.map_or(0, |last| last as u32 + 1);
        let fds: Vec<RawFd> = vectors.iter().map(Vector::fd).collect();
        let fds = |from: u32, to: u32| fds.get(from as usize..to as usize).unwrap_or_default();
        match enabled {
            None if needed == 0 => return Ok(()),
            Some(_) if needed == 0 => {
                device.set_irqs(index, 0, IrqAction::Disable)?;
                state.enabled = None;
            }
            Some(count) if needed > count && self.irqs(kind).fixed => {
                device.set_irqs(index, 0, IrqAction::Disable)?;
                state.enabled = None;
                device.set_irqs(index, 0, IrqAction::Signal(fds(0, needed)))?;
                state.enabled = Some((kind, needed));
                state.vectors(kind).iter().for_each(Vector::signal);
            }
            Some(count) => {
                // Behind the last one that is needed there is nothing to silence.
                let end = end.min(count.max(needed));
                if first < end {
                    device.set_irqs(index, first, IrqAction::Signal(fds(first, end)))?;
                }
                state.enabled = Some((kind, count.max(needed)));
            }
            None => {
                device.set_irqs(index, 0, IrqAction::Signal(fds(0, needed)))?;
                state.enabled = Some((kind, needed));
                if kind == InterruptKind::Intx
                    && state.intx.iter().any(|v| matches!(v.mask, Mask::Masked))
                {
                    device.set_irqs(index, 0, IrqAction::Mask)?;
                }
            }
        }
        Ok(())
    }
}

fn failed(what: String, source: io::Error) -> FunctionError {
    FunctionError::Io { what, source }
}

fn index(kind: InterruptKind) -> u32 {
    match kind {
        InterruptKind::Intx => VFIO_PCI_INTX_IRQ_INDEX,
        InterruptKind::Msi => VFIO_PCI_MSI_IRQ_INDEX,
        InterruptKind::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
    }
}

#[cfg(test)]
mod tests;
