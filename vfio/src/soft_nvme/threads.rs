//! The threads of a controller. One carries out admin commands and changes of the controller's
//! state; a few carry out I/O commands, each one command at a time, if the backing can keep
//! them waiting. An admin command thus never waits behind slow I/O, unless it is about that
//! I/O.

#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use super::admin::{self, Outcome};
use super::controller::{Controller, Scratch};
use super::front::{Enable, Task};
use super::queues::{Cq, Shape, Sq};
use super::{lock, size};
use crate::nvme::{Status, cc, csts};

/// Most threads for I/O commands: a file gives little more for more of them.
const MAX_WORKERS: u16 = 4;

/// The threads of one controller; dropping this ends them and waits for that.
pub(super) struct Threads {
    controller: Arc<Controller>,
    handles: Vec<JoinHandle<()>>,
}

impl Threads {
    pub(super) fn start(controller: &Arc<Controller>) -> io::Result<Self> {
        let mut threads = Self {
            controller: Arc::clone(controller),
            handles: Vec::new(),
        };
        threads.spawn("nvme-admin".to_owned(), run_admin)?;
        let workers = if controller.backing.is_immediate() {
            0
        } else {
            controller.queue_pairs.min(MAX_WORKERS)
        };
        for n in 0..workers {
            threads.spawn(format!("nvme-io{n}"), run_io)?;
        }
        Ok(threads)
    }

    fn spawn(&mut self, name: String, run: fn(&Controller)) -> io::Result<()> {
        let controller = Arc::clone(&self.controller);
        self.handles
            .push(Builder::new().name(name).spawn(move || run(&controller))?);
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.controller.front.request_stop();
        self.controller.work.stop();
        for handle in self.handles.drain(..) {
            if handle.join().is_err() {
                log::error!("a thread of a software NVMe controller has panicked");
            }
        }
    }
}

fn run_io(controller: &Controller) {
    let mut scratch = Scratch::new();
    while let Some(queue) = controller.work.pop() {
        controller.step(queue, &mut scratch);
    }
}

fn run_admin(controller: &Controller) {
    let mut scratch = Scratch::new();
    // Only a file can grow.
    let follows = controller.backing.len_by_now().is_some();
    let mut look_at = follows.then(|| Instant::now() + size::INTERVAL);
    loop {
        match controller.front.next_task(look_at) {
            Task::Stop => return,
            Task::Reset => {
                let ticket = controller.front.resets_asked();
                quiesce(controller);
                controller.interrupts.reset();
                controller.front.resets_done(ticket);
            }
            Task::Shutdown => shut_down(controller),
            Task::Disable => quiesce(controller),
            Task::Enable(enable) => start(controller, enable),
            Task::DeliverEvents => deliver_events(controller, &mut scratch),
            Task::RunCommands => run_commands(controller, &mut scratch),
            Task::LookAtSize => {
                controller.look_at_size();
                look_at = Some(Instant::now() + size::INTERVAL);
            }
        }
    }
}

/// Brings the controller to its state after a controller level reset (NVMe 1.4 §7.3.2):
/// commands under way end, queues and features go.
fn quiesce(controller: &Controller) {
    let sqs = controller.queues_mut().clear();
    for sq in &sqs {
        sq.close();
    }
    for sq in &sqs {
        sq.wait_idle();
    }
    controller.events.clear();
    lock(&controller.features).reset();
    controller.write_cache.store(true, Ordering::SeqCst);
    controller.halted.store(false, Ordering::SeqCst);
    controller
        .front
        .set_status(csts::RDY | csts::CFS | csts::SHST_MASK, 0);
}

/// Enables the controller, or says that it cannot be with these settings (§3.1.5).
fn start(controller: &Controller, enable: Enable) {
    let entries = |register: u32| (register & 0xfff) as u16 + 1;
    let (sq_entries, cq_entries) = (entries(enable.aqa), entries(enable.aqa >> 16));
    // Pages of 4 KiB, the NVM command set, round robin: all that `CAP` offers.
    let refused = cc::MPS_MASK | cc::CSS_MASK | cc::AMS_MASK;
    if enable.cc & refused != 0 || sq_entries < 2 || cq_entries < 2 {
        controller.report_fatal(format_args!(
            "it cannot be enabled with CC {:#x} and AQA {:#x}",
            enable.cc, enable.aqa
        ));
        return;
    }
    let cq = Arc::new(Cq::new(
        0,
        Shape {
            base: enable.acq,
            entries: cq_entries,
        },
        Some(0),
    ));
    let sq = Sq::new(
        0,
        Shape {
            base: enable.asq,
            entries: sq_entries,
        },
        Arc::clone(&cq),
    );
    {
        let mut queues = controller.queues_mut();
        queues.insert_cq(cq);
        queues.insert_sq(Arc::new(sq));
    }
    controller.front.set_status(csts::RDY, csts::RDY);
}

/// Lets what is under way finish, and makes it durable (§7.6.2).
fn shut_down(controller: &Controller) {
    controller.halted.store(true, Ordering::SeqCst);
    let sqs: Vec<_> = controller.queues().submission().cloned().collect();
    for sq in sqs {
        sq.wait_idle();
    }
    if controller.flush().is_err() {
        controller.front.set_status(csts::CFS, csts::CFS);
    }
    controller
        .front
        .set_status(csts::SHST_MASK, csts::SHST_COMPLETE);
}

fn run_commands(controller: &Controller, scratch: &mut Scratch) {
    let Some(sq) = controller.sq(0) else { return };
    while let Some((command, _)) = controller.fetch(&sq, &mut scratch.pins) {
        scratch.release();
        let outcome = admin::execute(controller, &command, scratch);
        scratch.release();
        match outcome {
            Ok(Outcome::Done(result)) => {
                controller.complete(&sq, &mut scratch.pins, &command, Status::SUCCESS, result);
            }
            Ok(Outcome::Waiting) => {
                // It may wait for ever, so it must not keep an entry from others.
                sq.cq.unreserve();
                deliver_events(controller, scratch);
            }
            Err(status) => controller.complete(&sq, &mut scratch.pins, &command, status, 0),
        }
        scratch.release();
        sq.finish();
    }
    scratch.release();
}

/// Reports events to the requests that wait for them, as far as there is room.
fn deliver_events(controller: &Controller, scratch: &mut Scratch) {
    let Some(sq) = controller.sq(0) else { return };
    while let Some((cid, result)) = controller.events.next_report(|| sq.cq.reserve()) {
        controller.post(&sq, &mut scratch.pins, cid, Status::SUCCESS, result);
    }
    scratch.release();
}
