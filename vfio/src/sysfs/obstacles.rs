//! What keeps a function from being lent, and what helps.

use std::fmt;
use std::fs::File;
use std::io::Read;

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use crate::PciAddress;

use super::{Host, Member, PciFunction, User, VFIO_DRIVER};

/// What keeps a function from being lent. `Display` is a clause that says what, and
/// [`Obstacle::remedy`] one that says what helps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// It is a bridge.
    Bridge,
    /// Its configuration space reads as all ones. Found only by who lends it.
    NoAnswer(PciAddress),
    /// No IOMMU isolates it.
    NoIommu,
    /// Other functions in its IOMMU group are in use by this host.
    SharedGroup {
        /// The group.
        group: u32,
        /// Those that are in the way.
        members: Vec<Member>,
    },
    /// This host uses it.
    InUse(Vec<User>),
    /// The kernel has no way to reset it.
    NoReset,
    /// The kernel's VFIO driver is not there.
    NoDriver,
}

impl Obstacle {
    /// One word for programs.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::NoAnswer(_) => "no-answer",
            Self::NoIommu => "no-iommu",
            Self::SharedGroup { .. } => "shared-group",
            Self::InUse(_) => "in-use",
            Self::NoReset => "no-reset",
            Self::NoDriver => "no-driver",
        }
    }

    /// What helps, as a clause in the imperative.
    pub fn remedy(&self) -> String {
        match self {
            Self::Bridge => "lend the functions behind it".into(),
            Self::NoAnswer(address) => format!(
                "once it has power and a link, `echo 1 >/sys/bus/pci/devices/{address}/remove` and \
                 then `echo 1 >/sys/bus/pci/rescan` bring it back (docs/runbooks/device-failed.md)"
            ),
            Self::NoIommu => "switch the IOMMU on in the firmware (VT-d, AMD-Vi), and on Intel \
                 add intel_iommu=on to the kernel's command line"
                .into(),
            Self::SharedGroup { members, .. } => format!(
                "unbind {} from this host's drivers as well, or move the device to a slot \
                 whose port has ACS",
                join(members.iter().map(|member| member.address))
            ),
            Self::InUse(users) => {
                let mut remedies: Vec<String> = users.iter().map(User::remedy).collect();
                remedies.dedup();
                join(remedies)
            }
            Self::NoReset => "nothing is known to help: what one tenant leaves in it, the next \
                 would find"
                .into(),
            Self::NoDriver => "load it: modprobe vfio-pci".into(),
        }
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bridge => f.write_str("it is a bridge"),
            Self::NoAnswer(_) => f.write_str(
                "it does not answer: its configuration space reads as all ones, so it has lost its \
                 power or its link",
            ),
            Self::NoIommu => f.write_str("no IOMMU isolates it"),
            Self::SharedGroup { group, members } => {
                let members = members.iter().map(|member| {
                    let driver = member.driver.as_deref().unwrap_or("no driver");
                    format!("{} ({driver})", member.address)
                });
                write!(
                    f,
                    "it shares IOMMU group {group} with {}, which this host uses",
                    join(members)
                )
            }
            Self::InUse(users) => write!(f, "it is in use: {}", join(users)),
            Self::NoReset => f.write_str("the kernel has no way to reset it"),
            Self::NoDriver => write!(f, "the kernel driver {VFIO_DRIVER} is not loaded"),
        }
    }
}

impl Serialize for Obstacle {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Obstacle", 3)?;
        fields.serialize_field("kind", self.kind())?;
        fields.serialize_field("reason", &self.to_string())?;
        fields.serialize_field("remedy", &self.remedy())?;
        fields.end()
    }
}

/// What stands against lending `function`, the gravest first.
pub(super) fn obstacles(host: &Host, function: &PciFunction) -> Vec<Obstacle> {
    if function.class.is_bridge() {
        return vec![Obstacle::Bridge];
    }
    let mut found = Vec::new();
    match function.iommu_group {
        None => found.push(Obstacle::NoIommu),
        Some(group) => {
            let members: Vec<Member> = function
                .group_members
                .iter()
                .filter(|member| member.in_the_way)
                .cloned()
                .collect();
            if !members.is_empty() {
                found.push(Obstacle::SharedGroup { group, members });
            }
        }
    }
    if !function.users.is_empty() {
        found.push(Obstacle::InUse(function.users.clone()));
    }
    if function.reset_methods.is_empty() {
        found.push(Obstacle::NoReset);
    }
    if !function.is_bound_to_vfio() && !host.driver(VFIO_DRIVER).is_dir() {
        found.push(Obstacle::NoDriver);
    }
    found
}

/// Whether a function's configuration space is there. Revision and class tell: the ids of
/// virtual functions are all ones by design (PCIe 4.0 §9.3.4.1.1).
///
/// This is not for inventories: while the kernel resets a function, who reads its configuration
/// space waits, and the kernel may be at that for a minute.
pub(super) fn answers(host: &Host, address: PciAddress) -> bool {
    let mut header = [0; 12];
    let config = File::open(host.function(address).join("config"));
    let read = config.and_then(|mut config| config.read_exact(&mut header));
    // What cannot be read says nothing.
    read.is_err() || header[8..] != [0xff; 4]
}

fn join<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    items.join(", ")
}
