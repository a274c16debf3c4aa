//! What virtual functions of an NVMe controller need before they work: queues and interrupts of
//! their physical function's, and to be put online (NVMe 1.4 §8.5, Virtualization Enhancements).
//!
//! Controllers without that give their virtual functions what they have by themselves; for
//! those nothing is done here.

use log::{info, warn};

use crate::nvme::admin;
use crate::nvme_port::{AdminCommands, AdminError};

const CNS_CONTROLLER: u8 = 0x01;
const CNS_PRIMARY: u8 = 0x14;
const CNS_SECONDARIES: u8 = 0x15;
/// Optional Admin Command Support: bit 7, Virtualization Management (Identify Controller, bytes
/// 256 and 257).
const OACS: usize = 256;
const OACS_VIRTUALIZATION: u8 = 1 << 7;
/// Entries of 32 bytes behind a header of the same size.
const ENTRY: usize = 32;
const MAX_ENTRIES: usize = 127;

/// Actions of Virtualization Management (§5.22).
const OFFLINE: u32 = 7;
const ASSIGN: u32 = 8;
const ONLINE: u32 = 9;

/// A controller with an admin queue and one for I/O.
const LEAST: u16 = 2;
/// More than this no guest is given.
const MOST: u16 = 64;

/// The two kinds of resources, by their number in commands, and where the primary controller's
/// capabilities (figure 252) have their counts.
#[derive(Clone, Copy)]
struct Resource {
    number: u32,
    name: &'static str,
    /// Bit of the resource types that can be assigned (CRT).
    bit: u8,
    /// Offset of the total number of flexible ones (VQFRT, VIFRT); the assigned ones are 4, the
    /// most for one secondary controller 12 bytes behind.
    total: usize,
}

const QUEUES: Resource = Resource {
    number: 0,
    name: "queues",
    bit: 1,
    total: 32,
};
const INTERRUPTS: Resource = Resource {
    number: 1,
    name: "interrupts",
    bit: 2,
    total: 64,
};

/// A secondary controller (figure 254).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Secondary {
    id: u16,
    is_online: bool,
    function: u16,
    queues: u16,
    interrupts: u16,
}

/// Why virtual functions do not get what they need.
#[derive(Debug, thiserror::Error)]
pub(super) enum VirtualizationError {
    #[error("{what} failed")]
    Command {
        what: String,
        #[source]
        source: AdminError,
    },
    #[error(
        "the controller has no {what} left for {count} virtual functions ({total} flexible ones, {taken} of \
         them taken); ask for fewer, or take some from others (nvme virt-mgmt)"
    )]
    TooFew {
        what: &'static str,
        count: u16,
        total: u32,
        taken: u32,
    },
    #[error("the controller lists no secondary controller for virtual function {0}")]
    NotListed(u16),
}

/// The secondary controllers of virtual functions `1 ..= count` that have to be given something:
/// empty when the controller manages that by itself.
pub(super) fn needy(port: &dyn AdminCommands, count: u16) -> Result<Vec<u16>, VirtualizationError> {
    let controller = identify(port, CNS_CONTROLLER)?;
    if byte(&controller, OACS) & OACS_VIRTUALIZATION == 0 {
        return Ok(Vec::new());
    }
    let secondaries = secondaries(port)?;
    let mut ids = Vec::new();
    for function in 1..=count {
        let secondary = secondaries.iter().find(|s| s.function == function);
        let secondary = secondary.ok_or(VirtualizationError::NotListed(function))?;
        if !secondary.is_online {
            ids.push(secondary.id);
        }
    }
    Ok(ids)
}

/// Shares the controller's flexible queues and interrupts among secondary controllers, and puts
/// these online. Their virtual functions must be there.
pub(super) fn provide(port: &dyn AdminCommands, ids: &[u16]) -> Result<(), VirtualizationError> {
    if ids.is_empty() {
        return Ok(());
    }
    let primary = identify(port, CNS_PRIMARY)?;
    let mut shares = Vec::new();
    for resource in [QUEUES, INTERRUPTS] {
        // What cannot be assigned is there without that.
        if byte(&primary, 4) & resource.bit != 0 {
            shares.push((resource, share(&primary, resource, ids.len() as u16)?));
        }
    }
    for id in ids {
        for (resource, share) in &shares {
            manage(port, *id, ASSIGN, resource.number, *share)?;
        }
        manage(port, *id, ONLINE, 0, 0)?;
    }
    let shares = shares
        .iter()
        .map(|(r, share)| format!("{share} {}", r.name));
    info!(
        "virtual functions that got {} each: {}",
        shares.collect::<Vec<_>>().join(" and "),
        ids.len()
    );
    Ok(())
}

/// Takes secondary controllers offline, and gives back what they had. Goes on after failures,
/// since there is nothing better to do.
pub(super) fn take_back(port: &dyn AdminCommands, ids: &[u16]) {
    for id in ids {
        let steps = [
            (OFFLINE, 0),
            (ASSIGN, QUEUES.number),
            (ASSIGN, INTERRUPTS.number),
        ];
        for (action, resource) in steps {
            if let Err(error) = manage(port, *id, action, resource, 0) {
                warn!("secondary controller {id}: {error}");
            }
        }
    }
}

/// How many of a resource each of `count` gets.
fn share(primary: &[u8], resource: Resource, count: u16) -> Result<u16, VirtualizationError> {
    let total = dword(primary, resource.total);
    let taken = dword(primary, resource.total + 4);
    let most = word(primary, resource.total + 12);
    let left = total.saturating_sub(taken) / u32::from(count.max(1));
    let share = left.min(most.into()).min(MOST.into()) as u16;
    if share < LEAST {
        return Err(VirtualizationError::TooFew {
            what: resource.name,
            count,
            total,
            taken,
        });
    }
    Ok(share)
}

fn secondaries(port: &dyn AdminCommands) -> Result<Vec<Secondary>, VirtualizationError> {
    let list = identify(port, CNS_SECONDARIES)?;
    let count = usize::from(byte(&list, 0)).min(MAX_ENTRIES);
    let entries = (1..=count).map(|n| n * ENTRY);
    Ok(entries
        .map(|at| Secondary {
            id: word(&list, at),
            is_online: byte(&list, at + 4) & 1 != 0,
            function: word(&list, at + 8),
            queues: word(&list, at + 10),
            interrupts: word(&list, at + 12),
        })
        .collect())
}

fn identify(port: &dyn AdminCommands, cns: u8) -> Result<Vec<u8>, VirtualizationError> {
    port.identify(cns, 0)
        .map_err(|source| VirtualizationError::Command {
            what: format!("asking the controller what it is (Identify {cns:#x})"),
            source,
        })
}

fn manage(
    port: &dyn AdminCommands,
    id: u16,
    action: u32,
    resource: u32,
    count: u16,
) -> Result<(), VirtualizationError> {
    let cdw10 = u32::from(id) << 16 | resource << 8 | action;
    port.run(admin::VIRTUALIZATION, cdw10, count.into())
        .map(drop)
        .map_err(|source| VirtualizationError::Command {
            what: match action {
                OFFLINE => format!("taking secondary controller {id} offline"),
                ONLINE => format!("putting secondary controller {id} online"),
                _ => {
                    format!("assigning {count} of resource {resource} to secondary controller {id}")
                }
            },
            source,
        })
}

fn byte(data: &[u8], at: usize) -> u8 {
    data.get(at).copied().unwrap_or(0)
}

fn word(data: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([byte(data, at), byte(data, at + 1)])
}

fn dword(data: &[u8], at: usize) -> u32 {
    u32::from(word(data, at)) | u32::from(word(data, at + 2)) << 16
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// A controller with eight flexible queues and interrupts, at most five for one, and with two
    /// secondary controllers.
    struct Made {
        oacs: u8,
        online: [bool; 2],
        /// Status of every Virtualization Management command.
        status: u16,
        done: RefCell<Vec<(u32, u32)>>,
    }

    fn made() -> Made {
        Made {
            oacs: OACS_VIRTUALIZATION,
            online: [false; 2],
            status: 0,
            done: RefCell::default(),
        }
    }

    impl AdminCommands for Made {
        fn identify(&self, cns: u8, _: u16) -> Result<Vec<u8>, AdminError> {
            let mut page = vec![0; 4096];
            match cns {
                CNS_CONTROLLER => page[OACS] = self.oacs,
                CNS_PRIMARY => {
                    page[4] = 3;
                    for at in [QUEUES.total, INTERRUPTS.total] {
                        page[at] = 8;
                        page[at + 12] = 5;
                    }
                }
                _ => {
                    page[0] = 2;
                    for n in 0..2 {
                        let at = (n + 1) * ENTRY;
                        page[at] = n as u8 + 1;
                        page[at + 4] = self.online[n].into();
                        page[at + 8] = n as u8 + 1;
                    }
                }
            }
            Ok(page)
        }

        fn run(&self, opcode: u8, cdw10: u32, cdw11: u32) -> Result<u32, AdminError> {
            assert_eq!(opcode, admin::VIRTUALIZATION);
            self.done.borrow_mut().push((cdw10, cdw11));
            match self.status {
                0 => Ok(0),
                status => Err(AdminError::Status(status)),
            }
        }
    }

    #[test]
    fn virtual_functions_get_equal_shares_and_give_them_back() {
        let made = made();
        assert_eq!(needy(&made, 2).unwrap(), [1, 2]);
        provide(&made, &[1, 2]).unwrap();
        let expected = [
            (0x1_0008, 4),
            (0x1_0108, 4),
            (0x1_0009, 0),
            (0x2_0008, 4),
            (0x2_0108, 4),
            (0x2_0009, 0),
        ];
        assert_eq!(made.done.take(), expected);
        take_back(&made, &[2]);
        assert_eq!(
            made.done.take(),
            [(0x2_0007, 0), (0x2_0008, 0), (0x2_0108, 0)]
        );
        provide(&made, &[1]).unwrap();
        assert_eq!(
            made.done.take()[0],
            (0x1_0008, 5),
            "no more than one may have"
        );
    }

    #[test]
    fn controllers_that_manage_by_themselves_are_left_alone() {
        let mut made = made();
        made.online[0] = true;
        assert_eq!(needy(&made, 2).unwrap(), [2]);
        made.oacs = 0;
        assert!(needy(&made, 2).unwrap().is_empty());
        provide(&made, &[]).unwrap();
        assert_eq!(made.done.take(), Vec::new());
    }

    #[test]
    fn too_few_resources_and_refusals_are_sentences() {
        let mut made = made();
        let text = provide(&made, &[1, 2, 3, 4, 5]).unwrap_err().to_string();
        assert!(text.contains("no queues left for 5"), "{text}");
        assert!(matches!(
            needy(&made, 3),
            Err(VirtualizationError::NotListed(3))
        ));
        made.status = 0x121;
        let error = provide(&made, &[1]).unwrap_err();
        assert!(error.to_string().contains("assigning 5"), "{error}");
        // All steps are tried, whatever comes of them.
        made.done.take();
        take_back(&made, &[1, 2]);
        assert_eq!(made.done.take().len(), 6);
    }

    #[test]
    fn pages_that_are_too_short_or_lie_are_survived() {
        assert_eq!(dword(&[1, 2], 1), 2);
        assert!(share(&[], QUEUES, 0).is_err());
        assert!(share(&[0xff; 64], QUEUES, 1).is_err());
    }
}
