//! Brings what is exported into line with the configuration, again and again: what is wanted and
//! missing is opened, what is no longer wanted takes no new claims and goes with its last one.
//!
//! A changed export is a removed and an added one of the same name, so it is opened as the
//! configuration has it as soon as nobody has it any more. What cannot be opened is tried again now
//! and then; it holds up nothing else.

use std::sync::Arc;
use std::time::Duration;

use farbus_vfio::soft_nvme::Medium;
use log::{info, warn};

use super::api::{Reloaded, Unopened};
use crate::config::Entry;
use crate::exports::{self, Export, Exports};
use crate::join;
use crate::sources::{Given, Order, Source, SourceError, Stock};

/// How long the end of an export waits for its function to be closed.
const CLOSING: Duration = Duration::from_secs(3);

/// What is exported, and where it came from.
pub(super) struct Catalogue {
    stock: Stock,
    exports: Exports,
    wanted: Vec<Entry>,
    live: Vec<Live>,
}

/// An entry of a configuration, now or formerly, and what came of it.
struct Live {
    entry: Entry,
    exports: Vec<Arc<Export>>,
    given: Given,
    /// Nobody wants it any more.
    retiring: bool,
    /// Why it could not be opened.
    failed: Option<String>,
}

impl Live {
    /// Whether it only says why there is nothing.
    fn is_stand_in(&self) -> bool {
        let nothing = self.exports.iter().all(|export| export.has_no_function());
        self.failed.is_some() && nothing
    }
}

impl Catalogue {
    pub(super) fn new(stock: Stock, exports: Exports) -> Self {
        Self {
            stock,
            exports,
            wanted: Vec::new(),
            live: Vec::new(),
        }
    }

    /// From now on these entries are wanted. Returns what that has changed.
    pub(super) fn want(&mut self, wanted: Vec<Entry>) -> Reloaded {
        let mut told = Reloaded::default();
        let orders: Vec<Order> = wanted.iter().map(|entry| entry.order.clone()).collect();
        self.stock.expect(&orders);
        for live in &mut self.live {
            let name = || live.entry.name.to_string();
            let named = wanted.iter().find(|entry| entry.name == live.entry.name);
            let keep = named == Some(&live.entry);
            if live.retiring != keep {
                continue;
            }
            live.retiring = !keep;
            let why = match named {
                _ if keep => {
                    live.exports.iter().for_each(|export| export.reinstate());
                    continue;
                }
                Some(_) => {
                    told.changed.push(name());
                    "its configuration has changed; it is opened anew when nobody has it any more"
                }
                None => {
                    told.removed.push(name());
                    "it has been taken out of the configuration"
                }
            };
            live.exports.iter().for_each(|export| export.retire(why));
        }
        let known: Vec<_> = self
            .live
            .iter()
            .map(|live| live.entry.name.clone())
            .collect();
        let added = wanted.iter().filter(|entry| !known.contains(&entry.name));
        told.added = added.map(|entry| entry.name.to_string()).collect();
        self.wanted = wanted;
        self.forget_failed();
        self.settle();
        let retiring = self.live.iter().filter(|live| live.retiring);
        told.waiting = retiring.map(|live| live.entry.name.to_string()).collect();
        let failed = self.live.iter().filter_map(|live| {
            Some(Unopened {
                export: live.entry.name.to_string(),
                why: live.failed.clone()?,
            })
        });
        told.failed = failed.collect();
        told
    }

    /// Does what can be done now: ends what is free and not wanted, and opens what is missing.
    pub(super) fn settle(&mut self) {
        let Self {
            stock,
            exports,
            live,
            ..
        } = self;
        live.retain_mut(|live| !live.retiring || !end(live, stock, exports));
        let mut brought = Vec::new();
        for entry in &self.wanted {
            let in_the_way = |live: &Live| {
                live.entry.name == entry.name
                    || live.retiring && same_device(&live.entry.order, &entry.order)
            };
            if !self.live.iter().any(in_the_way) {
                brought.push(open(&mut self.stock, entry));
            }
        }
        let new: Vec<&Export> = brought.iter().flat_map(|(_, exports)| exports).collect();
        exports::ask(&new);
        for (mut live, exports) in brought {
            for export in exports {
                if self.exports.find(export.name()).is_some() {
                    // Its function closes here and now; that it may take long is rare enough.
                    live.failed = Some(format!("there is another export {}", export.name()));
                    warn!(
                        "{}: is not exported: another export has this name",
                        export.name()
                    );
                    continue;
                }
                live.exports.push(self.exports.add(export));
            }
            self.live.push(live);
        }
    }

    /// Whether there is something that [`Self::retry`] may mend.
    pub(super) fn has_failed(&self) -> bool {
        self.live.iter().any(Live::is_stand_in)
    }

    /// Tries again what could not be opened.
    pub(super) fn retry(&mut self) {
        for live in self.live.iter_mut().filter(|live| live.is_stand_in()) {
            match self.stock.bring(&live.entry.order) {
                Err(error) => {
                    let why = chain(error);
                    if live.failed.as_ref() != Some(&why) {
                        warn!("{}: still cannot be exported: {why}", live.entry.name);
                        live.exports
                            .iter()
                            .for_each(|export| export.still_failed(&why));
                        live.failed = Some(why);
                    }
                }
                Ok(brought) => {
                    // A claim of one without a function ends by itself at once.
                    for export in live.exports.drain(..) {
                        let _ = self.exports.remove(&export);
                    }
                    live.given = brought.given;
                    live.failed = None;
                    exports::ask(&brought.exports.iter().collect::<Vec<_>>());
                    for export in brought.exports {
                        live.exports.push(self.exports.add(export));
                    }
                }
            }
        }
    }

    /// Entries that could not be opened are as if they had never been there.
    fn forget_failed(&mut self) {
        for live in &mut self.live {
            live.retiring |= live.is_stand_in();
        }
    }
}

/// Ends an entry that is not wanted, as far as nobody has it; whether all of it has ended.
fn end(live: &mut Live, stock: &mut Stock, exports: &Exports) -> bool {
    let mut closing = Vec::new();
    live.exports.retain(|export| match exports.remove(export) {
        Ok(thread) => {
            closing.extend(thread);
            if live.failed.is_none() {
                info!("{}: is exported no longer", export.name());
            }
            false
        }
        Err(exports::StillClaimed) => true,
    });
    join::within(CLOSING, closing);
    if live.exports.is_empty() {
        stock.take_back(std::mem::take(&mut live.given));
    }
    live.exports.is_empty()
}

/// Opens an entry; when that fails, there is an export in its place that says why.
fn open(stock: &mut Stock, entry: &Entry) -> (Live, Vec<Export>) {
    let mut live = Live {
        entry: entry.clone(),
        exports: Vec::new(),
        given: Given::default(),
        retiring: false,
        failed: None,
    };
    match stock.bring(&entry.order) {
        Ok(brought) => {
            live.given = brought.given;
            (live, brought.exports)
        }
        Err(error) => {
            let why = chain(error);
            warn!("{}: cannot be exported: {why}", entry.name);
            let export = Export::failed(entry.name.clone(), why.clone(), None);
            live.failed = Some(why);
            (live, vec![export])
        }
    }
}

fn chain(error: SourceError) -> String {
    format!("{:#}", anyhow::Error::new(error))
}

/// Whether two orders open the same device, which then has to be closed in between.
fn same_device(one: &Order, other: &Order) -> bool {
    if one.address().is_some() && one.address() == other.address() {
        return true;
    }
    match (one.source(), other.source()) {
        (Source::SoftNvme(one), Source::SoftNvme(other)) => match (&one.medium, &other.medium) {
            (Medium::File(one), Medium::File(other)) => one == other,
            _ => false,
        },
        (Source::VfioUser(one), Source::VfioUser(other)) => one == other,
        // A selector may find what the other has.
        (
            Source::Match { .. },
            Source::Pci { .. } | Source::Match { .. } | Source::Sriov { .. },
        )
        | (Source::Pci { .. } | Source::Sriov { .. }, Source::Match { .. }) => true,
        _ => false,
    }
}
