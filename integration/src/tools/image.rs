//! A disk that boots by itself: one raw image for SeaBIOS and for OVMF.
//!
//! It has an MBR with one FAT32 partition, which is both the active partition with syslinux (BIOS)
//! and the EFI system partition with systemd-boot (UEFI). Both load the same kernel and initramfs.
//! The image is made without mounting anything: no root rights, no loop devices. Blocks are 512
//! bytes: firmware does not boot it from a drive with others.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::kernel::{KernelFiles, command_line};
use super::mbr::{self, boot_record};
use super::tree::Tree;
use crate::cache::Cache;
use crate::error::{Error, IoContext, Result};
use crate::process::run_tool;

const SECTOR: u64 = mbr::SECTOR as u64;
/// Where the partition begins, as everywhere: at 1 MiB.
const START: u64 = (1 << 20) / SECTOR;
/// FAT32 needs at least 65525 clusters, so a partition below about 34 MiB would be FAT16.
const SIZE: u64 = 96 << 20;

const SYSLINUX: &str = "usr/bin/syslinux";
const MTOOLS: &str = "usr/bin/mtools";
const SYSTEMD_BOOT: &str = "usr/lib/systemd/boot/efi/systemd-bootx64.efi";

/// Makes (once) the image that boots `kernel` with `initramfs`. Copy it before use.
///
/// # Errors
/// When a boot loader is missing or a step of the making fails.
pub fn boot_image(
    cache: &Cache,
    tree: &Tree,
    kernel: &KernelFiles,
    initramfs: &Path,
) -> Result<PathBuf> {
    let recipe = format!(
        "v2 {} {} {SIZE} {:?} {}",
        tree.root().display(),
        initramfs.display(),
        boot_record(0, 0),
        command_line(&[]),
    );
    let entry = cache.entry(&format!("bootdisk-{}", kernel.release), &recipe, |dir| {
        let maker = Maker {
            tree,
            tools: mtools_by_name(tree, &dir.join("bin"))?,
            image: dir.join("disk.img"),
        };
        maker.make(dir, kernel, initramfs)
    })?;
    Ok(entry.join("disk.img"))
}

struct Maker<'a> {
    tree: &'a Tree,
    /// Directory with the mtools programs under their own names.
    tools: PathBuf,
    image: PathBuf,
}

impl Maker<'_> {
    fn make(&self, dir: &Path, kernel: &KernelFiles, initramfs: &Path) -> Result<()> {
        let writing = || format!("writing {}", self.image.display());
        let mut image = File::create(&self.image).context(writing)?;
        image.set_len(SIZE).context(writing)?;

        let sectors = (SIZE / SECTOR - START).to_string();
        let geometry = ["-h", "64", "-s", "32", "-H", &START.to_string()].map(str::to_owned);
        self.mtools("mformat", |format| {
            format
                .args(["-F", "-T", &sectors, "-v", "FARBUS"])
                .args(&geometry)
                .arg("::")
        })?;
        self.mtools("mmd", |mmd| {
            mmd.args(["::/EFI", "::/EFI/BOOT", "::/loader", "::/loader/entries"])
        })?;
        let line = command_line(&[]);
        for (path, content) in [
            (
                "loader/loader.conf",
                "default farbus.conf\ntimeout 0\n".to_owned(),
            ),
            (
                "loader/entries/farbus.conf",
                format!("title Farbus\nlinux /vmlinuz\ninitrd /initrd.img\noptions {line}\n"),
            ),
            (
                "syslinux.cfg",
                format!(
                    "DEFAULT farbus\nPROMPT 0\nLABEL farbus\n LINUX /vmlinuz\n \
                     INITRD /initrd.img\n APPEND {line}\n"
                ),
            ),
        ] {
            let staged = dir.join("staged");
            fs::write(&staged, content).context(|| format!("staging {path}"))?;
            self.copy(&staged, path)?;
        }
        self.copy(&kernel.image, "vmlinuz")?;
        self.copy(initramfs, "initrd.img")?;
        self.copy(&self.tree.file(SYSTEMD_BOOT)?, "EFI/BOOT/BOOTX64.EFI")?;

        let mut syslinux = self.tree.command(SYSLINUX)?;
        syslinux
            .args(["--install", "--offset", &(START * SECTOR).to_string()])
            .arg(&self.image)
            .env("PATH", self.path());
        run_tool(&mut syslinux)?;
        image.seek(SeekFrom::Start(0)).context(writing)?;
        let block = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        let record = boot_record(block(START), block(SIZE / SECTOR - START));
        image.write_all(&record).context(writing)
    }

    fn copy(&self, from: &Path, to: &str) -> Result<()> {
        self.mtools("mcopy", |copy| copy.arg(from).arg(format!("::/{to}")))
    }

    fn mtools(
        &self,
        program: &str,
        arguments: impl FnOnce(&mut Command) -> &mut Command,
    ) -> Result<()> {
        let mut command = Command::new(self.tools.join(program));
        let partition = format!("{}@@{}", self.image.display(), START * SECTOR);
        arguments(
            command
                .args(["-i", &partition])
                .env("MTOOLS_SKIP_CHECK", "1"),
        );
        run_tool(&mut command).map(drop)
    }

    fn path(&self) -> String {
        let system = std::env::var("PATH").unwrap_or_default();
        format!("{}:{system}", self.tools.display())
    }
}

/// Makes scripts that run mtools' parts by their names, which is how syslinux calls them.
fn mtools_by_name(tree: &Tree, dir: &Path) -> Result<PathBuf> {
    fs::create_dir(dir).context(|| format!("making {}", dir.display()))?;
    let (loader, arguments) = tree.launch(MTOOLS)?;
    for name in ["mformat", "mmd", "mcopy", "mattrib", "mmove"] {
        let script = dir.join(name);
        let text = format!(
            "#!/bin/sh\nexec '{}' '{}' -c {name} \"$@\"\n",
            loader.display(),
            arguments.join("' '"),
        );
        let made = fs::write(&script, text)
            .and_then(|()| fs::set_permissions(&script, fs::Permissions::from_mode(0o755)));
        made.context(|| format!("writing {}", script.display()))?;
    }
    Ok(dir.to_owned())
}

/// Copies a boot image to where a machine may write to it.
///
/// # Errors
/// When copying fails.
pub fn copy_image(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).map_err(Error::io(format!(
        "copying {} to {}",
        from.display(),
        to.display()
    )))
}
