//! Guest kernels: Debian's cloud kernels, unpacked from their packages, and for soft RoCE the full
//! ones, which have it.
//!
//! NVMe and ext4 are built into the cloud kernels. What is not (see `MODULES`) goes into a small
//! archive of its own that is joined to the initramfs; the guest loads it with `modprobe`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cpio::Cpio;
use super::packages::{AptRoot, BOOKWORM, Suite, TRIXIE, TRIXIE_BACKPORTS, with_apt};
use super::tree::Tree;
use crate::cache::Cache;
use crate::error::{Error, IoContext, Result};
use crate::process::run_tool;

const CLOUD: &str = "linux-image-cloud-amd64";
const FULL: &str = "linux-image-amd64";

/// Modules that guests can load; those they depend on come along. Some kernels have some built in.
const MODULES: &[&str] = &[
    "vfio_iommu_type1",
    "vfio-pci",
    "virtio_blk",
    "virtio_net",
    "virtio_pci",
    "vfat",
    "nls_cp437",
    "nls_ascii",
];

/// Those of the full kernels: VFIO, a network, and RDMA over it. The soft provider computes
/// checksums by an algorithm that it asks for by name, so nothing depends on that module.
const RDMA_MODULES: &[&str] = &[
    "vfio_iommu_type1",
    "vfio-pci",
    "virtio_net",
    "virtio_pci",
    "ib_uverbs",
    "rdma_rxe",
    "crc32_generic",
];

/// Kernel parameters of every guest; see [`command_line`].
const PARAMETERS: [&str; 6] = [
    "console=ttyS0,115200",
    // The timer check counts ticks against a busy loop, and panics when emulation is late.
    "no_timer_check",
    // Warnings and worse only: each character costs an exit to the emulator.
    "loglevel=4",
    // An oops is a failure of the test, and a panic ends in a line that the console reader knows.
    "oops=panic",
    "panic=0",
    // Emulated CPUs leak nothing, and mitigations are slow to emulate.
    "mitigations=off",
];

/// The kernel command line of a guest with these additional parameters.
///
/// Images that boot by themselves carry the same line.
#[must_use]
pub fn command_line(more: &[String]) -> String {
    let mut words: Vec<&str> = PARAMETERS.to_vec();
    words.extend(more.iter().map(String::as_str));
    words.join(" ")
}

/// A guest kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kernel {
    /// Debian 12's: 6.1.
    V6_1,
    /// Debian 13's: 6.12.
    V6_12,
    /// The newest that Debian 13 can get.
    Backports,
    /// Debian 12's with all its modules, for RDMA.
    Rdma6_1,
    /// Debian 13's with all its modules, for RDMA.
    Rdma6_12,
}

impl Kernel {
    /// The kernels that every change is tested with.
    pub const TESTED: [Self; 2] = [Self::V6_1, Self::V6_12];
    /// Those of machines with soft RoCE.
    pub const RDMA: [Self; 2] = [Self::Rdma6_1, Self::Rdma6_12];

    /// Short name, fit for file names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::Backports => "backports",
            Self::Rdma6_1 => "rdma-6.1",
            Self::Rdma6_12 => "rdma-6.12",
        }
    }

    fn suite(self) -> &'static Suite {
        match self {
            Self::V6_1 | Self::Rdma6_1 => &BOOKWORM,
            Self::V6_12 | Self::Rdma6_12 => &TRIXIE,
            Self::Backports => &TRIXIE_BACKPORTS,
        }
    }

    fn metapackage(self) -> &'static str {
        match self {
            Self::Rdma6_1 | Self::Rdma6_12 => FULL,
            _ => CLOUD,
        }
    }

    fn modules(self) -> &'static [&'static str] {
        match self {
            Self::Rdma6_1 | Self::Rdma6_12 => RDMA_MODULES,
            _ => MODULES,
        }
    }
}

/// A kernel, ready to boot.
#[derive(Debug, Clone)]
pub struct KernelFiles {
    /// The compressed kernel image.
    pub image: PathBuf,
    /// Archive with the loadable modules.
    pub modules: PathBuf,
    /// What `uname -r` says.
    pub release: String,
}

/// Gets a kernel into the cache.
///
/// `busybox` is the static busybox that decompresses modules.
///
/// # Errors
/// When the package cannot be fetched or lacks something.
pub fn kernel(cache: &Cache, kernel: Kernel, busybox: &Path) -> Result<KernelFiles> {
    let (metapackage, modules) = (kernel.metapackage(), kernel.modules());
    let recipe = format!("{metapackage} {:?} {modules:?} v1", kernel.suite());
    let entry = cache.entry(&format!("kernel-{}", kernel.name()), &recipe, |dir| {
        let tree = dir.join("unpacked");
        with_apt(cache, kernel.suite(), |apt| {
            apt.unpack_alone(&kernel_packages(apt, metapackage)?, &tree)
        })?;
        build(&Tree::at(tree.clone()), modules, busybox, dir)?;
        fs::remove_dir_all(&tree).context(|| format!("removing {}", tree.display()))
    })?;
    let release = fs::read_to_string(entry.join("release"))
        .context(|| format!("reading the release of kernel {}", kernel.name()))?;
    Ok(KernelFiles {
        image: entry.join("vmlinuz"),
        modules: entry.join("modules.cpio"),
        release,
    })
}

/// The packages that the metapackage stands for at present: the kernel in one package, or in several
/// (image, base, binary, modules) with newer Debian kernels.
fn kernel_packages(apt: &AptRoot, metapackage: &str) -> Result<Vec<String>> {
    let mut packages = Vec::new();
    let mut unseen = vec![metapackage.to_owned()];
    while let Some(package) = unseen.pop() {
        let parts = [
            "linux-image-",
            "linux-base-",
            "linux-binary-",
            "linux-modules-",
        ];
        let needed = apt.dependencies(&package)?;
        unseen.extend(
            needed
                .into_iter()
                .filter(|name| parts.iter().any(|p| name.starts_with(p))),
        );
        packages.push(package);
    }
    Ok(packages)
}

fn build(tree: &Tree, wanted: &[&str], busybox: &Path, out: &Path) -> Result<()> {
    let modules = tree
        .file("usr/lib/modules")
        .or_else(|_| tree.file("lib/modules"))?;
    let release = fs::read_dir(&modules)
        .context(|| format!("reading {}", modules.display()))?
        .flatten()
        .next()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .ok_or_else(|| Error::Missing {
            what: "a kernel release".into(),
            place: modules.clone(),
        })?;
    let image = tree
        .file(&format!("boot/vmlinuz-{release}"))
        .or_else(|_| tree.file(&format!("usr/lib/modules/{release}/vmlinuz")))?;
    fs::copy(&image, out.join("vmlinuz")).context(|| format!("copying {}", image.display()))?;
    let archive = module_archive(&modules.join(&release), &release, wanted, busybox)?;
    fs::write(out.join("modules.cpio"), archive).context(|| "writing modules.cpio".into())?;
    fs::write(out.join("release"), release).context(|| "writing the kernel's release".into())
}

/// Packs modules with a `modules.dep` that busybox's modprobe understands.
fn module_archive(dir: &Path, release: &str, wanted: &[&str], busybox: &Path) -> Result<Vec<u8>> {
    let mut available = BTreeMap::new();
    index_modules(dir, &mut available)?;
    let built_in: BTreeSet<String> = fs::read_to_string(dir.join("modules.builtin"))
        .unwrap_or_default()
        .lines()
        .map(module_name)
        .collect();

    let target = format!("usr/lib/modules/{release}");
    let mut cpio = Cpio::new();
    let mut dependencies: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut wanted: Vec<String> = wanted.iter().map(|m| module_name(m)).collect();
    while let Some(name) = wanted.pop() {
        if built_in.contains(&name) || dependencies.contains_key(&name) {
            continue;
        }
        let path = available.get(&name).ok_or_else(|| Error::Missing {
            what: format!("kernel module {name}"),
            place: dir.to_owned(),
        })?;
        let content = read_module(path, busybox)?;
        let needs = dependencies_in(&content);
        wanted.extend(needs.iter().cloned());
        cpio.file(&format!("{target}/{name}.ko"), 0o644, &content);
        dependencies.insert(name, needs);
    }

    let mut listing = String::new();
    for name in dependencies.keys() {
        let mut closure = Vec::new();
        collect_dependencies(name, &dependencies, &mut closure);
        listing.push_str(&format!("{name}.ko:"));
        for needed in closure {
            listing.push_str(&format!(" {needed}.ko"));
        }
        listing.push('\n');
    }
    cpio.file(&format!("{target}/modules.dep"), 0o644, listing.as_bytes());
    Ok(cpio.finish())
}

/// Everything that module `name` needs, direct needs first: modprobe loads from the end.
fn collect_dependencies(
    name: &str,
    dependencies: &BTreeMap<String, Vec<String>>,
    closure: &mut Vec<String>,
) {
    for needed in dependencies.get(name).into_iter().flatten() {
        if !dependencies.contains_key(needed) {
            continue;
        }
        closure.retain(|already| already != needed);
        closure.push(needed.clone());
        collect_dependencies(needed, dependencies, closure);
    }
}

/// A module's name from its path or file name: file names use `-` and `_` as they like.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    let stem = file.split(".ko").next().unwrap_or(file);
    stem.replace('-', "_")
}

fn index_modules(dir: &Path, index: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let listing = fs::read_dir(dir).context(|| format!("reading {}", dir.display()))?;
    for entry in listing.flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if path.is_dir() {
            index_modules(&path, index)?;
        } else if name.contains(".ko") {
            index.insert(module_name(&name), path);
        }
    }
    Ok(())
}

fn read_module(path: &Path, busybox: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|e| e == "xz") {
        run_tool(Command::new(busybox).args(["unxz", "-c"]).arg(path))
    } else {
        fs::read(path).context(|| format!("reading {}", path.display()))
    }
}

/// The `depends=` record of a module's `.modinfo` section.
fn dependencies_in(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|w| w == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..].split(|b| *b == 0).next();
    String::from_utf8_lossy(value.unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(module_name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depends_record_is_found_among_others() {
        let section = b"junk\0license=GPL\0depends=vfio-pci-core,vfio\0retpoline=Y\0";
        assert_eq!(dependencies_in(section), ["vfio_pci_core", "vfio"]);
        assert!(dependencies_in(b"\0depends=\0").is_empty());
        assert!(dependencies_in(b"").is_empty());
    }

    #[test]
    fn module_names_are_normalised() {
        assert_eq!(
            module_name("kernel/drivers/vfio/pci/vfio-pci.ko.xz"),
            "vfio_pci"
        );
        assert_eq!(module_name("virtio_net"), "virtio_net");
    }

    #[test]
    fn shared_dependency_comes_after_all_that_need_it() {
        let direct = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let dependencies = BTreeMap::from([
            ("a".to_owned(), direct(&["b", "c"])),
            ("b".to_owned(), direct(&["d"])),
            ("c".to_owned(), direct(&["b"])),
            ("d".to_owned(), direct(&[])),
        ]);
        let mut closure = Vec::new();
        collect_dependencies("a", &dependencies, &mut closure);
        assert_eq!(closure, ["c", "b", "d"]);
    }
}
