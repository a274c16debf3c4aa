//! `VFIO_USER_DEVICE_SET_IRQS`, in all of its forms.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use farbus_vfio::user::body::{
    IRQ_INDEX_INTX, IRQ_INDEX_MSI, IRQ_INDEX_MSIX, IrqAction, IrqData, NUM_IRQS, SetIrqs,
};
use farbus_vfio::user::event;
use farbus_vfio::{Function, FunctionError, InterruptKind};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vmm_sys_util::eventfd::EventFd;

use super::refusal::Refusal;
use crate::custody::Custody;
use crate::custody::messages::Key;

const KINDS: [InterruptKind; 3] = [InterruptKind::Intx, InterruptKind::Msi, InterruptKind::Msix];

/// The kind of interrupts with this index. Error and request interrupts have none: no
/// function here raises them.
pub(super) fn kind_of(index: u32) -> Option<InterruptKind> {
    match index {
        IRQ_INDEX_INTX => Some(InterruptKind::Intx),
        IRQ_INDEX_MSI => Some(InterruptKind::Msi),
        IRQ_INDEX_MSIX => Some(InterruptKind::Msix),
        _ => None,
    }
}

/// The eventfds of one client. There are never more than interrupts, per use.
#[derive(Debug, Default)]
pub(super) struct Irqs {
    /// What is signalled when an interrupt fires, kept for a trigger by the client.
    triggers: BTreeMap<(InterruptKind, u32), Arc<EventFd>>,
    /// What is signalled when the client masks (true) or unmasks an interrupt.
    mask_events: BTreeMap<(InterruptKind, u32, bool), EventFd>,
    /// Holds what fires for a successor.
    custody: Custody,
}

/// What the eventfds of a kind are kept under, each with its vector.
fn name_of(kind: InterruptKind) -> &'static str {
    match kind {
        InterruptKind::Intx => "intx",
        InterruptKind::Msi => "msi",
        InterruptKind::Msix => "msix",
    }
}

impl Irqs {
    /// Without any; those that come are kept.
    pub(super) fn keep(custody: Custody) -> Self {
        Self {
            custody,
            ..Self::default()
        }
    }

    /// Takes up those that a predecessor had. The ones that are signalled when a client masks are
    /// not among them: no VMM sets any.
    pub(super) fn resume(&mut self, function: &dyn Function) -> Result<(), Refusal> {
        for kind in KINDS {
            for (vector, fd) in self.custody.held_all(name_of(kind)) {
                let vector = u32::try_from(vector).unwrap_or(u32::MAX);
                let event = Arc::new(event::from_owned(fd));
                function.set_interrupts(kind, vector, &[Some(event.clone())])?;
                self.triggers.insert((kind, vector), event);
            }
        }
        Ok(())
    }

    fn forget(&self, kind: InterruptKind, vectors: impl Fn(u32) -> bool) {
        let gone = |(k, vector): &&(InterruptKind, u32)| *k == kind && vectors(*vector);
        let keys = self.triggers.keys().filter(gone);
        let keys: Vec<_> = keys
            .map(|(_, vector)| Key::numbered(name_of(kind), (*vector).into()))
            .collect();
        self.custody.forget(&keys);
    }

    /// Does what a client asks. With `mediated` MSI-X is not the client's to set.
    pub(super) fn set(
        &mut self,
        function: &dyn Function,
        body: &[u8],
        fds: Vec<OwnedFd>,
        mediated: bool,
    ) -> Result<(), Refusal> {
        let ask = SetIrqs::decode(body)?;
        let SetIrqs {
            index,
            start,
            count,
            action,
            data,
        } = ask;
        if index >= NUM_IRQS {
            return Err(Refusal::NoSuchIndex {
                what: "kind of interrupts",
                index,
            });
        }
        let kind = kind_of(index);
        let have = kind.map_or(0, |kind| function.info().interrupts.of(kind));
        let disables = (start, count, action, data) == (0, 0, IrqAction::Trigger, IrqData::None);
        if mediated && kind == Some(InterruptKind::Msix) {
            return if disables {
                Ok(())
            } else {
                Err(Refusal::Mediated)
            };
        }
        if disables {
            return kind.map_or(Ok(()), |kind| self.disable(function, kind));
        }
        let end = start
            .checked_add(count)
            .filter(|end| count > 0 && *end <= have);
        let (Some(kind), Some(end)) = (kind, end) else {
            return Err(Refusal::IrqRange {
                index,
                start,
                count,
                have,
            });
        };
        let range = start..end;
        match data {
            IrqData::EventFd if fds.is_empty() || fds.len() == count as usize => {
                self.set_events(function, kind, range, action, fds)
            }
            IrqData::EventFd => Err(Refusal::IrqFds {
                count,
                fds: fds.len(),
            }),
            IrqData::None => range
                .into_iter()
                .try_for_each(|v| self.act(function, kind, v, action)),
            IrqData::Bool(wanted) => range
                .zip(wanted)
                .filter(|(_, wanted)| **wanted != 0)
                .try_for_each(|(vector, _)| self.act(function, kind, vector, action)),
        }
    }

    /// Takes back every eventfd of the client, as far as the function lets go of them.
    pub(super) fn clear(&mut self, function: &dyn Function) -> Result<(), Refusal> {
        let mut all = Ok(());
        for kind in KINDS {
            all = all.and(self.disable(function, kind));
        }
        all
    }

    fn disable(&mut self, function: &dyn Function, kind: InterruptKind) -> Result<(), Refusal> {
        self.forget(kind, |_| true);
        self.triggers.retain(|(k, _), _| *k != kind);
        self.mask_events.retain(|(k, ..), _| *k != kind);
        let count = function.info().interrupts.of(kind);
        if count == 0 {
            return Ok(());
        }
        let none: Vec<Option<Arc<EventFd>>> = vec![None; count as usize];
        match function.set_interrupts(kind, 0, &none) {
            Ok(()) | Err(FunctionError::Gone(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn set_events(
        &mut self,
        function: &dyn Function,
        kind: InterruptKind,
        range: Range<u32>,
        action: IrqAction,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Refusal> {
        let events = fds
            .into_iter()
            .map(as_eventfd)
            .collect::<Result<Vec<_>, _>>()?;
        if action != IrqAction::Trigger {
            return self.set_mask_events(kind, range, action == IrqAction::Mask, events);
        }
        let mut events: Vec<Option<Arc<EventFd>>> = events
            .into_iter()
            .map(|event| Some(Arc::new(event)))
            .collect();
        let key = |vector: u32| Key::numbered(name_of(kind), vector.into());
        let kept = range.clone().map(key).zip(events.iter().flatten());
        let kept = kept.map(|(key, event)| (key, event::borrow(event)));
        self.custody.keep(kept.collect());
        if events.is_empty() {
            self.forget(kind, |vector| range.contains(&vector));
        }
        events.resize(range.len(), None);
        function.set_interrupts(kind, range.start, &events)?;
        for (vector, event) in range.zip(events) {
            match event {
                Some(event) => self.triggers.insert((kind, vector), event),
                None => self.triggers.remove(&(kind, vector)),
            };
        }
        Ok(())
    }

    fn set_mask_events(
        &mut self,
        kind: InterruptKind,
        range: Range<u32>,
        masked: bool,
        events: Vec<EventFd>,
    ) -> Result<(), Refusal> {
        // Here kernel VFIO differs from the specification: its eventfd is one that the
        // *client* signals to unmask, and QEMU means that. Refused, QEMU unmasks by message.
        if kind == InterruptKind::Intx && !events.is_empty() {
            return Err(Refusal::Unsupported(
                "an eventfd that masks or unmasks INTx",
            ));
        }
        if events.is_empty() {
            self.mask_events
                .retain(|(k, v, m), _| (*k, *m) != (kind, masked) || !range.contains(v));
        }
        for (vector, event) in range.zip(events) {
            self.mask_events.insert((kind, vector, masked), event);
        }
        Ok(())
    }

    /// Acts on one interrupt at once.
    fn act(
        &self,
        function: &dyn Function,
        kind: InterruptKind,
        vector: u32,
        action: IrqAction,
    ) -> Result<(), Refusal> {
        let masked = match action {
            IrqAction::Trigger => {
                signal(self.triggers.get(&(kind, vector)).map(Arc::as_ref));
                return Ok(());
            }
            IrqAction::Mask => true,
            IrqAction::Unmask => false,
        };
        function.mask_interrupt(kind, vector, masked)?;
        signal(self.mask_events.get(&(kind, vector, masked)));
        Ok(())
    }
}

fn signal(event: Option<&EventFd>) {
    // A full counter means that the client has not looked since the last signal, so this
    // one tells it nothing new.
    let _ = event.map(|event| event.write(1));
}

/// Checks that a descriptor is an eventfd, and that writing to it cannot block. Anything
/// else would let a client have us write into, or wait on, whatever it sends.
fn as_eventfd(fd: OwnedFd) -> Result<EventFd, Refusal> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    // Without /proc there is no telling; a client is then believed.
    if let Ok(link) = link.map(|link| link.to_string_lossy().into_owned()) {
        if link != "anon_inode:[eventfd]" {
            return Err(Refusal::NotAnEventFd(link));
        }
    }
    let failed = |errno: rustix::io::Errno| {
        Refusal::Function(FunctionError::Io {
            what: "asking for the mode of an eventfd".into(),
            source: errno.into(),
        })
    };
    // The flag is shared with the client's own descriptor. The VMMs set it themselves.
    let flags = fcntl_getfl(&fd).map_err(failed)?;
    if !flags.contains(OFlags::NONBLOCK) {
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(failed)?;
    }
    Ok(event::from_owned(fd))
}
