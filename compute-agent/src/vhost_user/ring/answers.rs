//! From requests that were taken to their answers: commands are submitted, and what they come to is
//! put into the used ring.
//!
//! Behind an IOMMU the place of data that was read, or of the answer, may have to be asked for; the
//! request is parked meanwhile.

#![forbid(unsafe_code)]

use farbus_vfio::driver::DriverError;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, Permissions};

use super::{BrokenRing, Ring, Stop, in_space, token};
use crate::vhost_user::drive::{Done, Drive};
use crate::vhost_user::space::{Found, Space};
use crate::vhost_user::work::{Context, Submitted};

impl Ring {
    /// Submits commands while there is room, and answers what waited for its place; whether any
    /// were submitted.
    pub fn advance(
        &mut self,
        context: &Context<'_>,
        drive: &mut Drive,
    ) -> Result<bool, DriverError> {
        in_space!(context, space => self.advance_in(space, context, drive))
    }

    fn advance_in<S: Space>(
        &mut self,
        space: &S,
        context: &Context<'_>,
        drive: &mut Drive,
    ) -> Result<bool, DriverError> {
        if !S::IS_GUESTS && !self.waits {
            self.answer_parked(space, drive)?;
        }
        let mut any = false;
        while let Some(&head) = self.backlog.front() {
            let Some(request) = self.requests.get_mut(usize::from(head)) else {
                self.backlog.pop_front();
                continue;
            };
            while drive.has_room(self.index) {
                let token = |bounced| token(self.index, head, bounced);
                match request.submit(self.index, space, context, drive, token)? {
                    Submitted::Yes => {
                        any = true;
                        self.at_drive += 1;
                    }
                    Submitted::Missing => {
                        self.waits = true;
                        break;
                    }
                    Submitted::Wait | Submitted::Nothing => break,
                }
            }
            if !request.is_submitted() {
                break;
            }
            self.backlog.pop_front();
            if request.is_finished() {
                self.finish_or_break(head, space);
            }
        }
        Ok(any)
    }

    /// Tries again what waited for the place of its data or its answer.
    fn answer_parked<S: Space>(&mut self, space: &S, drive: &mut Drive) -> Result<(), DriverError> {
        for _ in 0..self.parked.len() {
            let Some(head) = self.parked.pop_front() else {
                break;
            };
            if let Some(request) = self.requests.get_mut(usize::from(head)) {
                request.land(space, drive)?;
            }
            self.settle(head, space);
        }
        Ok(())
    }

    /// A command of request `head` is done.
    pub fn completed(
        &mut self,
        head: u16,
        bounced: bool,
        done: &Done,
        context: &Context<'_>,
        drive: &mut Drive,
    ) -> Result<(), DriverError> {
        self.at_drive = self.at_drive.saturating_sub(1);
        let Some(request) = self.requests.get_mut(usize::from(head)) else {
            return Ok(());
        };
        in_space!(context, space => {
            request.completed(done, bounced, space, drive)?;
            self.settle(head, space);
        });
        Ok(())
    }

    /// Answers a request if nothing of it is left to be done.
    fn settle<S: Space>(&mut self, head: u16, space: &S) {
        let Some(request) = self.requests.get(usize::from(head)) else {
            return;
        };
        if request.is_landing() {
            self.park(head);
        // One that has failed early is still in the backlog, which answers it.
        } else if request.is_finished() && !self.backlog.contains(&head) {
            self.finish_or_break(head, space);
        }
    }

    fn park(&mut self, head: u16) {
        self.parked.push_back(head);
        self.waits = true;
    }

    fn finish_or_break<S: Space>(&mut self, head: u16, space: &S) {
        if let Err(error) = self.finish(head, space) {
            self.break_down(&error);
        }
    }

    pub(super) fn finish<S: Space>(&mut self, head: u16, space: &S) -> Result<(), BrokenRing> {
        if !S::IS_GUESTS {
            match self.need_rings_and_status(head, space) {
                Ok(()) => {}
                Err(Stop::Broken(error)) => return Err(error),
                Err(Stop::Missing) => {
                    self.park(head);
                    return Ok(());
                }
            }
        }
        let Some(request) = self.requests.get_mut(usize::from(head)) else {
            return Ok(());
        };
        request.active = false;
        self.outstanding = self.outstanding.saturating_sub(1);
        // Memory that was taken away since takes no status; the used ring says the rest.
        let _ = space.write_obj(request.status, GuestAddress(request.parsed.status));
        let written = request.written().saturating_add(1);
        if let Some(inflight) = &self.inflight {
            inflight.publish(head);
        }
        self.queue.add_used(space, head, written)?;
        if let Some(inflight) = &self.inflight {
            inflight.finish(head, self.queue.next_used());
        }
        self.untold = true;
        Ok(())
    }

    /// Whether a request can be answered.
    fn need_rings_and_status<S: Space>(&mut self, head: u16, space: &S) -> Result<(), Stop> {
        let request = self.requests.get(usize::from(head));
        let status = request.map(|request| request.parsed.status);
        let found = status.map(|status| space.find(status, 1, Permissions::Write));
        self.need_rings(space)?;
        match found {
            Some(Found::Missing) => Err(Stop::Missing),
            _ => Ok(()),
        }
    }

    /// Whether the guest is to be told of answers now.
    pub fn is_to_be_told(&mut self, context: &Context<'_>) -> bool {
        if !std::mem::take(&mut self.untold) {
            return false;
        }
        in_space!(context, space => {
            let _ = space.missed();
            let needs = self.queue.needs_notification(space);
            // Who cannot be asked is told.
            needs.unwrap_or_else(|_| space.missed())
        })
    }

    /// The drive has been reset under the requests: they begin anew.
    pub fn restart(&mut self, context: &Context<'_>) {
        self.backlog.clear();
        self.parked.clear();
        self.at_drive = 0;
        for (head, request) in (0u16..).zip(&mut self.requests) {
            if request.active {
                request.again(context);
                self.backlog.push_back(head);
            }
        }
    }
}
