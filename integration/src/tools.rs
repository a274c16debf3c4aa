//! Everything a machine is made of: QEMU, kernels, a userland, firmware.
//!
//! All of it comes from Debian packages and is kept in the [`cache`](crate::cache); once it is
//! there, no network is needed.

pub mod clients;
pub mod cpio;
pub mod debian;
pub mod firmware;
pub mod image;
pub mod initramfs;
pub mod kernel;
pub mod mbr;
pub mod packages;
pub mod peers;
pub mod programs;
pub mod qemu;
pub mod sources;
pub mod system;
pub mod tree;
pub mod uml;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use self::clients::BlockClients;
use self::firmware::Firmware;
use self::initramfs::Userland;
use self::kernel::{Kernel, KernelFiles};
use self::packages::{TRIXIE, with_apt};
use self::qemu::Qemu;
use self::tree::Tree;
use self::uml::UserModeLinux;
use crate::cache::Cache;
use crate::error::Result;

/// Programs of the guests, boot loaders and firmware.
const PACKAGES: [&str; 13] = [
    "busybox-static",
    "coreutils",
    "dash",
    "e2fsprogs",
    "fio",
    "iproute2",
    "mtools",
    "nvme-cli",
    "ovmf",
    "pciutils",
    "syslinux",
    "systemd-boot-efi",
    "util-linux",
];

/// Access to the parts of machines; each is fetched when it is first asked for.
#[derive(Debug)]
pub struct Tools {
    cache: Cache,
    tree: Tree,
    qemu: OnceLock<Qemu>,
    old_qemu: OnceLock<Qemu>,
}

impl Tools {
    /// Opens the cache and makes sure that the guests' programs are in it.
    ///
    /// # Errors
    /// When packages are neither cached nor reachable.
    pub fn open() -> Result<Self> {
        let cache = Cache::open()?;
        let recipe = format!("{TRIXIE:?} {PACKAGES:?} v1");
        let entry = cache.entry("guest", &recipe, |dir| {
            with_apt(&cache, &TRIXIE, |apt| {
                apt.unpack_with_dependencies(&PACKAGES, dir)
            })
        })?;
        Ok(Self {
            cache,
            tree: Tree::at(entry),
            qemu: OnceLock::new(),
            old_qemu: OnceLock::new(),
        })
    }

    /// The QEMU to run machines with.
    ///
    /// # Errors
    /// When none is usable and none can be fetched.
    pub fn qemu(&self) -> Result<&Qemu> {
        if let Some(qemu) = self.qemu.get() {
            return Ok(qemu);
        }
        let qemu = Qemu::obtain(&self.cache)?;
        Ok(self.qemu.get_or_init(|| qemu))
    }

    /// Debian 12's QEMU, 7.2, for what has to work with it.
    ///
    /// # Errors
    /// When it is neither cached nor reachable.
    pub fn old_qemu(&self) -> Result<&Qemu> {
        if let Some(qemu) = self.old_qemu.get() {
            return Ok(qemu);
        }
        let qemu = Qemu::of_debian_12(&self.cache)?;
        Ok(self.old_qemu.get_or_init(|| qemu))
    }

    /// A guest kernel.
    ///
    /// # Errors
    /// When it is neither cached nor reachable.
    pub fn kernel(&self, kernel: Kernel) -> Result<KernelFiles> {
        kernel::kernel(&self.cache, kernel, &initramfs::busybox(&self.tree)?)
    }

    /// The initramfs of `userland` for `kernel`.
    ///
    /// # Errors
    /// When it is neither cached nor can be made.
    pub fn initramfs(&self, kernel: &KernelFiles, userland: Userland) -> Result<PathBuf> {
        initramfs::initramfs(&self.cache, &self.tree, kernel, userland)
    }

    /// The firmware files of `firmware`.
    ///
    /// # Errors
    /// When the tree lacks them.
    pub fn firmware(&self, firmware: Firmware) -> Result<firmware::FirmwareFiles> {
        firmware::files(&self.tree, firmware)
    }

    /// Gets everything that the tests need into the cache. Returns whether anything was missing.
    ///
    /// # Errors
    /// When something is neither cached nor reachable.
    pub fn prepare(&self, kernels: &[Kernel], userlands: &[Userland]) -> Result<bool> {
        self.qemu()?;
        self.old_qemu()?;
        BlockClients::obtain()?;
        UserModeLinux::obtain()?;
        for kernel in kernels {
            let files = self.kernel(*kernel)?;
            for userland in userlands {
                self.initramfs(&files, *userland)?;
            }
            if Kernel::TESTED.contains(kernel) {
                self.boot_image(*kernel)?;
            }
        }
        Ok(self.cache.has_built())
    }

    fn boot_image(&self, kernel: Kernel) -> Result<PathBuf> {
        let kernel = self.kernel(kernel)?;
        let initramfs = self.initramfs(&kernel, Userland::Small)?;
        image::boot_image(&self.cache, &self.tree, &kernel, &initramfs)
    }

    /// Puts at `path` a disk image that boots `kernel` under SeaBIOS and under OVMF.
    ///
    /// The image has 512-byte blocks; `path` may be written to.
    ///
    /// # Errors
    /// When it is neither cached nor can be made.
    pub fn boot_disk(&self, kernel: Kernel, path: &Path) -> Result<()> {
        image::copy_image(&self.boot_image(kernel)?, path)
    }

    /// The tree with the boot loaders and the programs that make disk images.
    #[must_use]
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// The cache.
    #[must_use]
    pub fn cache(&self) -> &Cache {
        &self.cache
    }
}
