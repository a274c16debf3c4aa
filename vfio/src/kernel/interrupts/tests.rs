//! The table of vectors against a kernel that is as strict as Linux is.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::*;

/// What the kernel would do, as far as its rules matter here.
#[derive(Default)]
struct Kernel {
    fixed: bool,
    /// Vectors that it can have at most.
    available: u32,
    state: Mutex<KernelState>,
}

#[derive(Default)]
struct KernelState {
    index: Option<u32>,
    count: u32,
    fds: BTreeMap<u32, RawFd>,
    masked: bool,
    disabled: u32,
}

fn refuse(errno: i32) -> io::Result<()> {
    Err(io::Error::from_raw_os_error(errno))
}

impl IrqSetter for Kernel {
    fn set_irqs(&self, index: u32, start: u32, action: IrqAction<'_>) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let other = state.index.is_some_and(|enabled| enabled != index);
        match action {
            _ if other => refuse(libc::EINVAL),
            IrqAction::Disable if state.index.is_none() => refuse(libc::EINVAL),
            IrqAction::Disable => {
                *state = KernelState {
                    disabled: state.disabled + 1,
                    ..KernelState::default()
                };
                Ok(())
            }
            IrqAction::Mask | IrqAction::Unmask if index != VFIO_PCI_INTX_IRQ_INDEX => {
                refuse(libc::ENOTTY)
            }
            IrqAction::Mask | IrqAction::Unmask if state.index.is_none() => refuse(libc::EINVAL),
            IrqAction::Mask | IrqAction::Unmask => {
                state.masked = matches!(action, IrqAction::Mask);
                Ok(())
            }
            IrqAction::Signal(fds) => {
                let end = start + fds.len() as u32;
                assert!(!fds.is_empty(), "that would mean something else");
                if end > self.available {
                    return refuse(libc::ENOSPC);
                }
                if state.index.is_some() && self.fixed && end > state.count {
                    return refuse(libc::EINVAL);
                }
                state.index = Some(index);
                state.count = state.count.max(end);
                state.fds.extend((start..).zip(fds.iter().copied()));
                Ok(())
            }
        }
    }
}

impl Kernel {
    fn new(fixed: bool) -> Self {
        Self {
            fixed,
            available: 8,
            state: Mutex::default(),
        }
    }

    fn fd(&self, vector: u32) -> RawFd {
        let state = self.state.lock().unwrap();
        state.fds.get(&vector).copied().unwrap_or(-1)
    }

    /// What a function does that raises an interrupt.
    fn raise(&self, interrupts: &Interrupts, kind: InterruptKind, vector: u32) {
        let mut state = interrupts.state.lock().unwrap();
        let vector_state = &state.vectors(kind)[vector as usize];
        assert_eq!(vector_state.fd(), self.fd(vector));
        vector_state.signal();
    }

    fn disabled(&self) -> u32 {
        self.state.lock().unwrap().disabled
    }
}

fn interrupts(fixed: bool) -> Interrupts {
    let irqs = |count| Irqs { count, fixed };
    Interrupts::new(irqs(1), irqs(4), irqs(8))
}

fn events(count: usize) -> Vec<Option<Arc<EventFd>>> {
    let event = || Some(Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()));
    (0..count).map(|_| event()).collect()
}

fn signals(event: &Option<Arc<EventFd>>) -> u64 {
    event.as_ref().unwrap().read().unwrap_or(0)
}

use InterruptKind::{Intx, Msi, Msix};

#[test]
fn vectors_are_added_one_by_one_on_every_kernel_and_none_is_lost_on_the_way() {
    for fixed in [true, false] {
        let (kernel, table) = (Kernel::new(fixed), interrupts(fixed));
        let events = events(8);
        for (at, event) in events.iter().enumerate() {
            let one = std::slice::from_ref(event);
            table.set(&kernel, Msix, at as u32, one).unwrap();
        }
        for (at, event) in events.iter().enumerate() {
            let fd = event.as_ref().unwrap().as_raw_fd();
            assert_eq!(kernel.fd(at as u32), fd, "fixed: {fixed}");
            // What could have been lost is made up for.
            assert_eq!(signals(event) > 0, fixed);
        }
        assert_eq!(kernel.disabled() > 0, fixed);
    }
}

#[test]
fn silencing_some_keeps_the_others_and_silencing_all_disables() {
    for fixed in [true, false] {
        let (kernel, table) = (Kernel::new(fixed), interrupts(fixed));
        let events = events(4);
        table.set(&kernel, Msix, 0, &events).unwrap();
        table.set(&kernel, Msix, 1, &[None, None]).unwrap();
        let fd = |at: usize| events[at].as_ref().unwrap().as_raw_fd();
        assert_eq!([0, 1, 2, 3].map(|at| kernel.fd(at)), [fd(0), -1, -1, fd(3)]);
        // More than were ever set, as one does who is done with a function.
        table.set(&kernel, Msix, 0, &vec![None; 8]).unwrap();
        assert_eq!(kernel.disabled(), 1);
        table.set(&kernel, Msix, 0, &vec![None; 8]).unwrap();
        assert_eq!(kernel.disabled(), 1);
    }
}

#[test]
fn second_kind_is_refused_until_the_first_is_silent() {
    let (kernel, table) = (Kernel::new(true), interrupts(true));
    let events = events(1);
    table.set(&kernel, Msix, 0, &events).unwrap();
    let refused = table.set(&kernel, Msi, 0, &events).unwrap_err();
    assert!(refused.to_string().contains("silence"), "{refused}");
    table.set(&kernel, Msi, 0, &[None]).unwrap();
    table.set(&kernel, Msix, 0, &[None]).unwrap();
    table.set(&kernel, Msi, 0, &events).unwrap();
}

#[test]
fn masked_vector_is_silent_and_signals_once_when_unmasked() {
    let (kernel, table) = (Kernel::new(true), interrupts(true));
    let events = events(2);
    table.set(&kernel, Msix, 0, &events).unwrap();
    table.mask(&kernel, Msix, 1, true).unwrap();
    table.mask(&kernel, Msix, 1, true).unwrap();
    kernel.raise(&table, Msix, 1);
    kernel.raise(&table, Msix, 1);
    kernel.raise(&table, Msix, 0);
    assert_eq!((signals(&events[0]), signals(&events[1])), (1, 0));
    table.mask(&kernel, Msix, 1, false).unwrap();
    assert_eq!(signals(&events[1]), 1);
    table.mask(&kernel, Msix, 1, false).unwrap();
    assert_eq!(signals(&events[1]), 0);
    kernel.raise(&table, Msix, 1);
    assert_eq!(signals(&events[1]), 1);
}

#[test]
fn vector_that_is_masked_first_is_silent_when_it_is_set() {
    let (kernel, table) = (Kernel::new(true), interrupts(true));
    let events = events(1);
    table.mask(&kernel, Msix, 0, true).unwrap();
    table.set(&kernel, Msix, 0, &events).unwrap();
    kernel.raise(&table, Msix, 0);
    assert_eq!(signals(&events[0]), 0);
    table.mask(&kernel, Msix, 0, false).unwrap();
    assert_eq!(signals(&events[0]), 1);
}

#[test]
fn intx_is_masked_by_the_kernel_also_when_that_was_asked_for_before() {
    let (kernel, table) = (Kernel::new(true), interrupts(true));
    let events = events(1);
    table.mask(&kernel, Intx, 0, true).unwrap();
    table.set(&kernel, Intx, 0, &events).unwrap();
    assert_eq!(kernel.fd(0), events[0].as_ref().unwrap().as_raw_fd());
    assert!(kernel.state.lock().unwrap().masked);
    table.mask(&kernel, Intx, 0, false).unwrap();
    assert!(!kernel.state.lock().unwrap().masked);
    // The kernel masks by itself, so that unmasking twice is the rule.
    table.mask(&kernel, Intx, 0, false).unwrap();
}

#[test]
fn failed_growth_leaves_what_there_was() {
    let (mut kernel, table) = (Kernel::new(true), interrupts(true));
    kernel.available = 2;
    let events = events(4);
    table.set(&kernel, Msix, 0, &events[..2]).unwrap();
    assert!(table.set(&kernel, Msix, 2, &events[2..]).is_err());
    for at in [0, 1] {
        let fd = events[at].as_ref().unwrap().as_raw_fd();
        assert_eq!(kernel.fd(at as u32), fd);
        assert_eq!(signals(&events[at]), 1);
    }
    kernel.raise(&table, Msix, 1);
    assert_eq!(signals(&events[1]), 1);
}

#[test]
fn vectors_that_do_not_exist_are_refused() {
    let (kernel, table) = (Kernel::new(true), interrupts(true));
    assert!(table.set(&kernel, Msix, 8, &[None]).is_err());
    assert!(table.set(&kernel, Msix, u32::MAX, &[None, None]).is_err());
    assert!(table.mask(&kernel, Intx, 1, true).is_err());
    assert!(table.set(&kernel, Msi, 4, &[]).is_ok());
}
