//! What holds for the whole host: IOMMU, interrupts, modules and memory.

use farbus_vfio::sysfs::{Host, IOMMUFD, VFIO_DRIVER};

use super::{Finding, Level, PINNED_PER_EXPORT};

/// `CAP_IPC_LOCK`, capabilities(7): who has it may lock any amount of memory.
const CAP_IPC_LOCK: u64 = 1 << 14;
const MIB: u64 = 1 << 20;

pub(super) fn iommu(host: &Host) -> Finding {
    let units = host.names("sys/class/iommu");
    let groups = host.names("sys/kernel/iommu_groups").len();
    if groups > 0 {
        let units = match &units[..] {
            [] => "the IOMMU".to_owned(),
            units => units.join(", "),
        };
        return Finding::ok("iommu", format!("{units} tells {groups} groups apart"));
    }
    let remedy = "switch the IOMMU on in the firmware (VT-d, AMD-Vi, SMMU), on Intel add \
                  intel_iommu=on to the kernel's command line, and reboot";
    let what = if units.is_empty() {
        "there is no IOMMU, or it is off: a device could reach all memory of this host"
    } else {
        "there is an IOMMU, and it isolates nothing"
    };
    Finding::new("iommu", Level::Problem, what, remedy)
}

/// The kernel does not say it in one place: its interrupt controllers have other names when
/// remapping is on.
pub(super) fn interrupt_remapping(host: &Host) -> Finding {
    const CHECK: &str = "interrupt-remapping";
    let interrupts = host.read("proc/interrupts").unwrap_or_default();
    let has = |name: &str| {
        let mut words = interrupts.split_ascii_whitespace();
        words.any(|word| word.starts_with(name))
    };
    // x86, and arm64's interrupt translation service, which is remapping by design.
    if has("IR-") || has("ITS-") {
        return Finding::ok(
            CHECK,
            "a device can only send the interrupts that it was given",
        );
    }
    let remedy = "switch interrupt remapping (with x2APIC) on in the firmware, and remove \
                  intremap=off and nointremap from the kernel's command line";
    let unsafe_allowed = "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
    if host.attribute(unsafe_allowed).as_deref() == Some("Y") {
        return Finding::new(
            CHECK,
            Level::Warning,
            "interrupt remapping is off, and allow_unsafe_interrupts lets VFIO work without it: \
             a tenant's device can send any interrupt to this host",
            remedy,
        );
    }
    Finding::new(
        CHECK,
        Level::Problem,
        "interrupt remapping is off, and VFIO opens nothing without it",
        remedy,
    )
}

pub(super) fn vfio(host: &Host) -> Vec<Finding> {
    const CHECK: &str = "vfio";
    let mut findings = Vec::new();
    if !host.driver(VFIO_DRIVER).is_dir() {
        findings.push(Finding::new(
            CHECK,
            Level::Problem,
            format!("the kernel driver {VFIO_DRIVER} is not loaded"),
            "load it with modprobe vfio-pci, and at each boot with a line vfio-pci in \
             /etc/modules-load.d/farbus.conf",
        ));
    }
    // Whichever of the two the kernel has makes the IOMMU's mappings.
    let maps = ["sys/module/vfio_iommu_type1", "sys/module/iommufd"];
    if !maps.iter().any(|module| host.path(module).is_dir()) {
        findings.push(Finding::new(
            CHECK,
            Level::Warning,
            "neither vfio_iommu_type1 nor iommufd is loaded; the kernel loads it at the first export \
             if it can",
            "load it with modprobe vfio_iommu_type1",
        ));
    }
    // A kernel may have either way to open functions, or both.
    let has_iommufd = host.path(IOMMUFD).exists();
    if !host.path("dev/vfio/vfio").exists() && !has_iommufd {
        findings.push(Finding::new(
            CHECK,
            Level::Problem,
            "there is no /dev/vfio/vfio",
            "load the module with modprobe vfio; in a container, pass /dev/vfio in",
        ));
    }
    if findings.is_empty() {
        let how = match has_iommufd {
            true => "the modules are loaded; functions are opened by their own nodes, with iommufd",
            false => "the modules are loaded; functions are opened by their groups' nodes",
        };
        findings.push(Finding::ok(CHECK, how));
    }
    findings
}

/// What is mapped for a device is pinned, and counts as locked memory.
pub(super) fn memlock(host: &Host, exports: u64) -> Finding {
    const CHECK: &str = "memlock";
    let needed = exports * PINNED_PER_EXPORT;
    let is_exempt = capabilities(host).is_some_and(|held| held & CAP_IPC_LOCK != 0);
    match memlock_limit(host) {
        _ if is_exempt => Finding::ok(CHECK, "this process may lock any amount of memory"),
        Some(limit) if limit < needed => Finding::new(
            CHECK,
            Level::Problem,
            format!(
                "at most {} MiB may be locked, and {exports} {} up to {} MiB",
                limit / MIB,
                if exports == 1 {
                    "export takes"
                } else {
                    "exports take"
                },
                needed / MIB
            ),
            "set LimitMEMLOCK=infinity in the systemd unit, or ulimit -l unlimited in the shell",
        ),
        Some(limit) => Finding::ok(
            CHECK,
            format!(
                "{} MiB may be locked, enough for {} exports",
                limit / MIB,
                limit / PINNED_PER_EXPORT
            ),
        ),
        None => Finding::ok(CHECK, "any amount of memory may be locked"),
    }
}

fn capabilities(host: &Host) -> Option<u64> {
    let status = host.read("proc/self/status")?;
    let mut lines = status.lines();
    let held = lines.find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(held.trim(), 16).ok()
}

/// The soft limit in bytes; `None` when there is none.
fn memlock_limit(host: &Host) -> Option<u64> {
    let limits = host.read("proc/self/limits")?;
    let mut lines = limits.lines();
    let line = lines.find_map(|line| line.strip_prefix("Max locked memory"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

pub(super) fn huge_pages(host: &Host) -> Finding {
    const CHECK: &str = "huge-pages";
    let text = host.read("proc/meminfo").unwrap_or_default();
    let value = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_ascii_whitespace().next()?.parse().ok()
    };
    match (value("HugePages_Free:"), value("Hugepagesize:")) {
        (Some(free), Some(size)) if free > 0 => {
            Finding::ok(CHECK, format!("{free} of {} MiB are free", size / 1024))
        }
        _ => Finding::new(
            CHECK,
            Level::Note,
            "none are reserved; the buffers of exports do not use them yet",
            "nothing needs to be done",
        ),
    }
}
