//! What keeps a function from being lent, and what helps.

use std::fmt;

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use super::{Host, Member, PciFunction, User, VFIO_DRIVER};

/// What keeps a function from being lent. `Display` is a clause that says what, and
/// [`Obstacle::remedy`] one that says what helps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// It is a bridge.
    Bridge,
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

fn join<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    items.join(", ")
}
