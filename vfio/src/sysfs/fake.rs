//! A made-up host for tests: a tree of files like sysfs and procfs, and a kernel that binds
//! drivers and makes virtual functions in it.

#![allow(clippy::unwrap_used, reason = "this module is only built for tests")]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::tempdir::TempDir;

use super::{Host, Kernel};
use crate::PciAddress;

/// A made-up host. Its tree goes when it is dropped.
pub struct FakeHost {
    directory: TempDir,
    kernel: Arc<FakeKernel>,
}

/// What a made-up function is like.
#[derive(Clone, Debug)]
pub struct FakeFunction {
    /// Class code, such as `0x010802`.
    pub class: u32,
    /// The driver that knows the function, and has it at first.
    pub driver: Option<&'static str>,
    /// Its IOMMU group.
    pub group: Option<u32>,
    /// The directory above it, such as `pci0000:00/0000:00:01.0`.
    pub above: &'static str,
}

impl Default for FakeFunction {
    /// An NVMe controller in no group.
    fn default() -> Self {
        Self {
            class: 0x01_08_02,
            driver: Some("nvme"),
            group: None,
            above: "pci0000:00",
        }
    }
}

impl Default for FakeHost {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeHost {
    /// A host with drivers `nvme`, `e1000e`, `pcieport` and `vfio-pci`, and no functions.
    pub fn new() -> Self {
        let directory =
            TempDir::new_with_prefix(std::env::temp_dir().join("farbus-host-")).unwrap();
        let root = fs::canonicalize(directory.as_path()).unwrap();
        let host = Self {
            directory,
            kernel: Arc::new(FakeKernel {
                root,
                native: Mutex::new(BTreeMap::new()),
                writes_left: AtomicUsize::new(usize::MAX),
                refusing: Mutex::new(Vec::new()),
            }),
        };
        for driver in ["nvme", "e1000e", "pcieport", "vfio-pci"] {
            host.directory(&format!("sys/bus/pci/drivers/{driver}"));
        }
        host.directory("sys/bus/pci/devices");
        host.file("proc/sys/kernel/random/boot_id", "boot-1\n");
        host.file("proc/1/mountinfo", "");
        host
    }

    /// The host, as the code under test sees it.
    pub fn host(&self) -> Host {
        Host::with_kernel(self.kernel.root.clone(), self.kernel.clone())
    }

    /// The path of something in the tree.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.kernel.root.join(relative)
    }

    /// Where state may be kept.
    pub fn state_dir(&self) -> PathBuf {
        self.directory.as_path().join("run/farbus")
    }

    /// Adds a function.
    pub fn function(&self, address: &str, function: &FakeFunction) -> PathBuf {
        self.kernel.add(address, function)
    }

    /// Adds or replaces a file.
    pub fn file(&self, relative: &str, content: &str) {
        write(&self.path(relative), content);
    }

    /// Adds a directory.
    pub fn directory(&self, relative: &str) {
        fs::create_dir_all(self.path(relative)).unwrap();
    }

    /// Adds a symbolic link to another path of the tree.
    pub fn link(&self, relative: &str, target: &str) {
        link(&self.path(target), &self.path(relative));
    }

    /// Adds a process that has a file open.
    pub fn process(&self, pid: u32, program: &str, open: &str) {
        self.file(&format!("proc/{pid}/comm"), &format!("{program}\n"));
        self.running(pid);
        link(Path::new(open), &self.path(&format!("proc/{pid}/fd/3")));
    }

    /// Adds a process that runs.
    pub fn running(&self, pid: u32) {
        let zeros = "0 ".repeat(18);
        let stat = format!("{pid} (a (name) S 1) S {zeros}{} 0\n", pid * 10);
        self.file(&format!("proc/{pid}/stat"), &stat);
    }

    /// Adds a disk of a function; `number` is its device number.
    pub fn disk(&self, address: &str, path: &str, number: &str) {
        let directory = format!("sys/bus/pci/devices/{address}/{path}");
        self.file(&format!("{directory}/dev"), &format!("{number}\n"));
        let name = path.rsplit('/').next().unwrap();
        self.file(
            &format!("{directory}/uevent"),
            &format!("MAJOR=259\nDEVNAME={name}\n"),
        );
        self.link(&format!("sys/class/block/{name}"), &directory);
        self.link(&format!("sys/dev/block/{number}"), &directory);
    }

    /// The driver that has a function.
    pub fn driver_of(&self, address: &str) -> Option<String> {
        self.kernel.driver_of(address)
    }

    /// What an attribute holds.
    pub fn attribute(&self, address: &str, name: &str) -> String {
        let path = self.path(&format!("sys/bus/pci/devices/{address}/{name}"));
        fs::read_to_string(path).unwrap().trim().to_owned()
    }

    /// Lets this many writes through and fails all later ones, as if the writer had died.
    pub fn die_after(&self, writes: usize) {
        self.kernel.writes_left.store(writes, Ordering::Relaxed);
    }

    /// Lets all writes through again.
    pub fn recover(&self) {
        self.die_after(usize::MAX);
        self.kernel.refusing().clear();
    }

    /// Fails writes to attributes of this name.
    pub fn refuse(&self, attribute: &'static str, error: io::ErrorKind) {
        self.kernel.refusing().push((attribute, error));
    }
}

struct FakeKernel {
    root: PathBuf,
    /// Which driver knows a function by its id.
    native: Mutex<BTreeMap<String, &'static str>>,
    writes_left: AtomicUsize,
    refusing: Mutex<Vec<(&'static str, io::ErrorKind)>>,
}

impl FakeKernel {
    fn refusing(&self) -> std::sync::MutexGuard<'_, Vec<(&'static str, io::ErrorKind)>> {
        self.refusing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn device(&self, address: &str) -> PathBuf {
        self.root.join("sys/bus/pci/devices").join(address)
    }

    fn driver_of(&self, address: &str) -> Option<String> {
        let target = fs::read_link(self.device(address).join("driver")).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }

    fn add(&self, address: &str, function: &FakeFunction) -> PathBuf {
        let directory = self
            .root
            .join("sys/devices")
            .join(function.above)
            .join(address);
        let put = |name: &str, content: &str| write(&directory.join(name), content);
        put("class", &format!("{:#08x}\n", function.class));
        put("vendor", "0x1b36\n");
        put("device", "0x0010\n");
        put("subsystem_vendor", "0x1af4\n");
        put("subsystem_device", "0x1100\n");
        put("numa_node", "-1\n");
        put("driver_override", "(null)\n");
        put("reset_method", "flr bus\n");
        link(&directory, &self.device(address));
        if let Some(group) = function.group {
            let groups = self.root.join(format!("sys/kernel/iommu_groups/{group}"));
            link(&directory, &groups.join("devices").join(address));
            link(&groups, &directory.join("iommu_group"));
        }
        if let Some(driver) = function.driver {
            let mut native = self.native.lock().unwrap_or_else(PoisonError::into_inner);
            native.insert(address.into(), driver);
            drop(native);
            self.bind(address, driver).unwrap();
        }
        directory
    }

    fn bind(&self, address: &str, driver: &str) -> io::Result<()> {
        let drivers = self.root.join("sys/bus/pci/drivers").join(driver);
        if !drivers.is_dir() || self.driver_of(address).is_some() {
            return Err(io::ErrorKind::NotFound.into());
        }
        link(&drivers, &self.device(address).join("driver"));
        Ok(())
    }

    fn unbind(&self, address: &str) -> io::Result<()> {
        fs::remove_file(self.device(address).join("driver"))
    }

    fn probe(&self, address: &str) -> io::Result<()> {
        if self.driver_of(address).is_some() {
            return Ok(());
        }
        let chosen = fs::read_to_string(self.device(address).join("driver_override"))?;
        let native = self.native.lock().unwrap_or_else(PoisonError::into_inner);
        let driver = match chosen.trim() {
            "(null)" => native.get(address).copied().unwrap_or_default().to_owned(),
            name => name.to_owned(),
        };
        drop(native);
        // Like the kernel, which says nothing when no driver wants it.
        let _ = self.bind(address, &driver);
        Ok(())
    }

    fn set_virtual_functions(&self, physical: &Path, count: usize) -> io::Result<()> {
        let own: PciAddress = name_of(physical).parse().unwrap();
        let there = fs::read_to_string(physical.join("sriov_numvfs"))?;
        for n in 0..there.trim().parse::<usize>().unwrap() {
            let virtfn = physical.join(format!("virtfn{n}"));
            let directory = fs::canonicalize(&virtfn)?;
            fs::remove_file(&virtfn)?;
            fs::remove_file(self.device(&name_of(&directory)))?;
            fs::remove_dir_all(directory)?;
        }
        for n in 0..count {
            let address =
                PciAddress::new(own.domain(), own.bus(), own.device(), n as u8 + 1).unwrap();
            let autoprobe = fs::read_to_string(physical.join("sriov_drivers_autoprobe"))?;
            let directory = self.add(
                &address.to_string(),
                &FakeFunction {
                    group: Some(100 + n as u32),
                    driver: (autoprobe.trim() == "1").then_some("nvme"),
                    ..FakeFunction::default()
                },
            );
            link(physical, &directory.join("physfn"));
            link(&directory, &physical.join(format!("virtfn{n}")));
        }
        write(&physical.join("sriov_numvfs"), &format!("{count}\n"));
        Ok(())
    }
}

impl Kernel for FakeKernel {
    fn write(&self, path: &Path, value: &str) -> io::Result<()> {
        let left = self.writes_left.load(Ordering::Relaxed);
        if left == 0 {
            return Err(io::Error::other("the writer is dead"));
        }
        if left != usize::MAX {
            self.writes_left.store(left - 1, Ordering::Relaxed);
        }
        let attribute = name_of(path);
        if let Some((_, kind)) = self.refusing().iter().find(|(name, _)| *name == attribute) {
            return Err((*kind).into());
        }
        let parent = path.parent().unwrap();
        match attribute.as_str() {
            "driver_override" if value == "\n" => fs::write(path, "(null)\n"),
            "unbind" => self.unbind(value),
            "bind" => self.bind(value, &name_of(parent)),
            "drivers_probe" => self.probe(value),
            "sriov_numvfs" => {
                let physical = fs::canonicalize(parent)?;
                self.set_virtual_functions(&physical, value.parse().unwrap())
            }
            _ => fs::write(path, value),
        }
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

fn write(path: &Path, content: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn link(target: &Path, path: &Path) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    symlink(target, path).unwrap();
}
