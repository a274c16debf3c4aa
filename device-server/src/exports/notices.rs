//! What functions say that nobody has claimed. While one is claimed, its attachment listens.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use farbus_vfio::{Function, Notice};
use log::warn;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::Export;

impl Export {
    /// Has notices told under this id from now on.
    pub(super) fn listen(&self, epoll: &Arc<Epoll>, id: u64) {
        if self.watch.set((epoll.clone(), id)).is_err() {
            return;
        }
        let function = self.lock().function.clone();
        if let Ok(function) = function {
            self.watch(&function);
        }
    }

    /// Has `epoll` say `id` when the function gives a notice.
    pub(super) fn watch(&self, function: &Arc<dyn Function>) {
        let Some((epoll, id)) = self.watch.get() else {
            return;
        };
        for (_, event) in function.notices() {
            // Each signal is told of once: while the function is claimed, nobody reads it here.
            let told = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, *id);
            if let Err(error) = epoll.ctl(ControlOperation::Add, event.as_raw_fd(), told) {
                warn!("{}: a notice is not heard: {error}", self.name.as_str());
            }
        }
    }

    /// Acts on notices, unless a claim does so.
    pub(super) fn look_after(self: &Arc<Self>) {
        let inner = self.lock();
        let (None, Ok(function)) = (&inner.holder, &inner.function) else {
            return;
        };
        let mut wanted_back = false;
        for (notice, event) in function.notices() {
            if event.read().is_err() {
                continue;
            }
            match notice {
                Notice::UnplugRequested => wanted_back = true,
                Notice::ErrorReported => warn!(
                    "{}: {} has reported an uncorrectable PCIe error; it is reset for the next claim",
                    self.name.as_str(),
                    function.info().label
                ),
            }
        }
        drop(inner);
        if wanted_back {
            self.fail("the device server's host unplugs it, or takes it for another driver");
        }
    }
}
