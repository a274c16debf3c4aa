//! A guest whose driver is behind an IOMMU that the VMM emulates (`VIRTIO_F_ACCESS_PLATFORM`).
//!
//! Rings and requests then name I/O virtual addresses. What these are mapped to the VMM says when
//! it is asked, and takes back when the guest does ([`message`]); [`tlb`] keeps it, [`asks`] what
//! was asked. [`view`] is guest memory as seen through that: each access finds the translation as
//! it is at that moment, or has it asked for, and whoever needed it waits ([`super::ring`]).
//! Nothing keeps a translation beyond a step of the event loop, and the drive is given none: data
//! goes through bounce buffers. So an invalidation is in force when it is answered, and is answered
//! at once, whatever is under way at the drive.

#![forbid(unsafe_code)]

pub mod asks;
mod fuzz;
pub mod message;
pub mod tlb;
pub mod view;

use std::cell::{Cell, RefCell};

use log::debug;

use self::asks::{Ask, Asks, NotAsked};
use self::message::Said;
use self::tlb::{Iotlb, Mapped};
use super::memory::{self, Guest};

pub use self::fuzz::fuzz_iotlb;

/// What has happened, for the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Translations that the VMM has given.
    pub updates: u64,
    /// Times that it has taken some back.
    pub invalidations: u64,
    /// Questions.
    pub misses: u64,
    /// Questions to which there is no translation.
    pub refusals: u64,
}

/// What the VMM's IOMMU maps, as far as it is known here.
#[derive(Debug, Default)]
pub struct Iommu {
    tlb: Iotlb,
    /// What finds nothing has it asked for, which changes nothing that anybody else could see.
    asks: RefCell<Asks>,
    /// An access has found nothing that may be there yet.
    missed: Cell<bool>,
    /// Changes with every translation, so that who has found one knows whether to look again.
    generation: u64,
    /// Something may be found that was missing.
    news: bool,
    counts: Counts,
}

impl Iommu {
    /// Does what the VMM says; false if that cannot be.
    pub fn hear(&mut self, said: Said, guest: &Guest) -> bool {
        match said {
            Said::Update {
                first,
                last,
                user,
                access,
            } => {
                if !memory::has_user_range(guest, user, last - first) {
                    debug!("the VMM maps {first:#x} to memory that it has not shared");
                    return false;
                }
                self.tlb.insert(first, last, user, access);
                self.asks.get_mut().mapped(first, last, access);
                self.counts.updates += 1;
                self.news = true;
            }
            Said::Invalidate { first, last } => {
                self.tlb.remove(first, last);
                self.counts.invalidations += 1;
            }
        }
        self.generation += 1;
        true
    }

    /// The VMM has answered the oldest question.
    pub fn answered(&mut self, refuses: bool) -> Result<(), NotAsked> {
        let asks = self.asks.get_mut();
        let oldest = asks.oldest();
        let now = oldest.and_then(|ask| self.tlb.find(ask.address));
        asks.answered(refuses, now)?;
        if let Some(ask) = oldest.filter(|ask| asks.is_refused(*ask)) {
            debug!(
                "the VMM maps nothing at {:#x} for {:?}",
                ask.address, ask.access
            );
            self.counts.refusals += 1;
        }
        self.news = true;
        Ok(())
    }

    /// The next question to put to the VMM.
    pub fn next_ask(&self) -> Option<Ask> {
        self.asks.borrow().next()
    }

    /// It was put.
    pub fn asked(&mut self) {
        self.asks.get_mut().put();
        self.counts.misses += 1;
    }

    /// Whether something may be found now that was missing, since [`Self::take_news`].
    pub fn has_news(&self) -> bool {
        self.news
    }

    /// Whether something may be found now that was missing, since the last call.
    pub fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    /// Whoever waited has looked.
    pub fn forget_refused(&mut self) {
        self.asks.get_mut().forget_refused();
    }

    /// Forgets all translations: they have to be asked for again.
    pub fn flush(&mut self) {
        self.tlb.clear();
        self.generation += 1;
    }

    /// As after a reset of the device: nobody waits for anything.
    pub fn abandon(&mut self) {
        self.flush();
        self.asks.get_mut().abandon();
    }

    /// There is another way to ask: what was asked on the old one is not answered any more.
    pub fn ask_anew(&mut self) {
        self.asks.get_mut().reset();
        self.news = true;
    }

    /// What has happened so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    fn find(&self, address: u64) -> Option<Mapped> {
        self.tlb.find(address)
    }
}
