//! Composes and starts QEMU machines.
//!
//! Every machine is a q35 without default devices, emulated (TCG), whose memory is a shared memfd
//! so that vfio-user and vhost-user devices can reach it. The test bed listens on three sockets that
//! QEMU connects to: console, command port and QMP. There is no socket file to poll for, and no
//! output is lost before the connection.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::deadline::Deadline;
use crate::error::{Error, IoContext, Result};
use crate::machine::{Machine, Vm};
use crate::process::{Process, describe, describe_status, tail, wait_readable};
use crate::qmp::Qmp;
use crate::scratch::Scratch;
use crate::terminal::Terminal;
use crate::tools::Tools;
use crate::tools::firmware::{Firmware, FirmwareFiles};
use crate::tools::initramfs::Userland;
use crate::tools::kernel::{Kernel, command_line};
use crate::tools::programs::{join, size_mib};

/// QEMU connects within milliseconds of its start, unless a device of its command line waits for a server.
const CONNECT_SECS: u64 = 30;

/// Where the firmware's own messages go, in the machine's directory.
pub(crate) const FIRMWARE_LOG: &str = "firmware.log";

/// A QEMU that gives up closes its sockets a moment before it ends.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A machine to be.
#[derive(Debug, Clone)]
pub struct MachineBuilder {
    name: String,
    boot: Boot,
    userland: Userland,
    memory_mib: u32,
    cpus: u32,
    shared_memory: bool,
    machine_options: String,
    parameters: Vec<String>,
    arguments: Vec<String>,
    programs: Vec<String>,
    ports: u32,
    old_qemu: bool,
}

#[derive(Debug, Clone)]
enum Boot {
    Kernel(Kernel),
    /// An image that has all it needs built in.
    Image(PathBuf),
    /// A disk with a system of its own, without an initramfs.
    System,
    Firmware(Firmware),
}

impl MachineBuilder {
    /// A machine with 2 CPUs and 512 MiB that boots kernel 6.12 with the small userland.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            boot: Boot::Kernel(Kernel::V6_12),
            userland: Userland::Small,
            memory_mib: 512,
            cpus: 2,
            shared_memory: true,
            machine_options: String::new(),
            parameters: Vec::new(),
            arguments: Vec::new(),
            programs: Vec::new(),
            ports: 0,
            old_qemu: false,
        }
    }

    /// Boots this kernel, loaded by QEMU.
    #[must_use]
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.boot = Boot::Kernel(kernel);
        self
    }

    /// Boots this image, loaded by QEMU. It must have built in what the machine needs.
    #[must_use]
    pub fn kernel_image(mut self, image: &Path) -> Self {
        self.boot = Boot::Image(image.to_owned());
        self
    }

    /// Boots the system of a disk that [`system::disk`](crate::tools::system::disk) has made, which may write
    /// to it. Its kernel has no modules.
    #[must_use]
    pub fn system(self, disk: &Path) -> Self {
        let node = json!({
            "driver": "raw",
            "node-name": "system",
            // Nothing outlives the machine, and installing packages flushes all the time.
            "cache": {"no-flush": true},
            "file": {"driver": "file", "filename": disk.display().to_string()},
        });
        let drive = json!({"driver": "nvme", "drive": "system", "serial": "system"});
        let mut machine = self
            .argument("-blockdev")
            .argument(&node.to_string())
            .device(&drive)
            .parameter("root=/dev/nvme0n1")
            .parameter("rw")
            .parameter("init=/lib/systemd/systemd")
            // Its journal has it.
            .parameter("systemd.show_status=0");
        machine.boot = Boot::System;
        machine
    }

    /// Lets this firmware find something to boot.
    #[must_use]
    pub fn firmware(mut self, firmware: Firmware) -> Self {
        self.boot = Boot::Firmware(firmware);
        self
    }

    /// Gives the guest this userland (when QEMU loads the kernel).
    #[must_use]
    pub fn userland(mut self, userland: Userland) -> Self {
        self.userland = userland;
        self
    }

    /// Size of the guest's memory, to which comes room for the workspace's programs.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Memory that QEMU keeps to itself: the mistake that a vfio-user server must recognise.
    #[must_use]
    pub fn private_memory(mut self) -> Self {
        self.shared_memory = false;
        self
    }

    /// Number of virtual CPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Adds options of `-machine`, such as `kernel-irqchip=split`.
    #[must_use]
    pub fn machine_option(mut self, option: &str) -> Self {
        self.machine_options.push(',');
        self.machine_options.push_str(option);
        self
    }

    /// Adds a kernel parameter (when QEMU loads the kernel).
    #[must_use]
    pub fn parameter(mut self, parameter: &str) -> Self {
        self.parameters.push(parameter.to_owned());
        self
    }

    /// Has the guest load these modules (comma-separated) before it takes commands.
    #[must_use]
    pub fn modules(self, modules: &str) -> Self {
        self.parameter(&format!("farbus.modules={modules}"))
    }

    /// Gives the guest one of the workspace's programs (when QEMU loads the kernel).
    #[must_use]
    pub fn program(mut self, name: &str) -> Self {
        self.programs.push(name.to_owned());
        self
    }

    /// Adds a raw argument of QEMU.
    #[must_use]
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    /// Adds a device: `driver`, `id`, `bus` and the driver's properties.
    #[must_use]
    pub fn device(self, device: &Value) -> Self {
        self.argument("-device").argument(&device.to_string())
    }

    /// Adds an empty PCIe root port, with further properties such as `{"hotplug": false}`.
    #[must_use]
    pub fn root_port(mut self, id: &str, properties: &Value) -> Self {
        self.ports += 1;
        let mut port = json!({
            "driver": "pcie-root-port",
            "id": id,
            "chassis": self.ports,
            "slot": self.ports,
        });
        if let (Some(port), Some(more)) = (port.as_object_mut(), properties.as_object()) {
            port.extend(more.clone());
        }
        self.device(&port)
    }

    /// Adds a virtual IOMMU. Devices that are added later are behind it.
    #[must_use]
    pub fn iommu(self) -> Self {
        self.device(&json!({
            "driver": "intel-iommu",
            "intremap": "on",
            "caching-mode": true,
        }))
        .parameter("intel_iommu=on")
        .parameter("iommu.strict=1")
    }

    /// As [`Self::iommu`], one that has devices cache translations, which vhost-user backends do. A
    /// guest that is not strict takes translations back late, and all of them at once.
    #[must_use]
    pub fn device_iommu(self, strict: bool) -> Self {
        self.device(&json!({
            "driver": "intel-iommu",
            "intremap": "on",
            "device-iotlb": true,
        }))
        .parameter("intel_iommu=on")
        .parameter(&format!("iommu.strict={}", u8::from(strict)))
    }

    /// Adds a raw image as block node `id`, for devices that QEMU emulates.
    #[must_use]
    pub fn block_node(self, id: &str, image: &Path) -> Self {
        let node = json!({
            "driver": "raw",
            "node-name": id,
            "discard": "unmap",
            "file": {"driver": "file", "filename": image.display().to_string()},
        });
        self.argument("-blockdev").argument(&node.to_string())
    }

    /// Adds an NVMe drive emulated by QEMU, on a root port of its own.
    #[must_use]
    pub fn emulated_nvme(self, id: &str, image: &Path) -> Self {
        let (port, node) = (format!("rp-{id}"), format!("node-{id}"));
        self.root_port(&port, &Value::Null)
            .block_node(&node, image)
            .device(&json!({
                "driver": "nvme",
                "id": id,
                "bus": port,
                "drive": node,
                "serial": id,
            }))
    }

    /// Adds a device that a vfio-user server implements, on a root port of its own.
    ///
    /// The server must already listen.
    #[must_use]
    pub fn vfio_user(self, id: &str, socket: &Path) -> Self {
        self.vfio_user_behind(id, socket, &Value::Null)
    }

    /// As [`Self::vfio_user`], behind a root port with further properties.
    #[must_use]
    pub fn vfio_user_behind(self, id: &str, socket: &Path, port_properties: &Value) -> Self {
        let port = format!("rp-{id}");
        self.root_port(&port, port_properties).device(&json!({
            "driver": "vfio-user-pci",
            "id": id,
            "bus": port,
            "socket": {"type": "unix", "path": socket.display().to_string()},
        }))
    }

    /// Has QEMU listen for a second QMP client at `socket`, as an agent is given one.
    #[must_use]
    pub fn monitor(self, socket: &Path) -> Self {
        self.argument("-qmp")
            .argument(&format!("unix:{},server=on,wait=off", socket.display()))
    }

    /// Leaves hot-plug to the root ports themselves, where q35 has ACPI do it.
    #[must_use]
    pub fn native_hotplug(self) -> Self {
        self.argument("-global")
            .argument("ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")
    }

    /// Runs Debian 12's QEMU, 7.2, which has no vfio-user.
    #[must_use]
    pub fn old_qemu(mut self) -> Self {
        self.old_qemu = true;
        self
    }

    /// Adds a socket that QEMU connects to, and connects to again when the other side has gone.
    #[must_use]
    pub fn vhost_user_socket(self, id: &str, socket: &Path) -> Self {
        // Seconds were all there was before 9.2.
        let again = if self.old_qemu {
            "reconnect=1"
        } else {
            "reconnect-ms=20"
        };
        let chardev = format!("socket,id={id},path={},{again}", socket.display());
        self.argument("-chardev").argument(&chardev)
    }

    /// Adds a block device that a vhost-user backend implements, on a root port of its own. The
    /// backend must already listen.
    #[must_use]
    pub fn vhost_user_blk(self, id: &str, socket: &Path, queues: u16) -> Self {
        let (port, chardev) = (format!("rp-{id}"), format!("socket-{id}"));
        self.vhost_user_socket(&chardev, socket)
            .root_port(&port, &Value::Null)
            .device(&vhost_user_device(id, &port, &chardev, queues))
    }

    /// As [`Self::vhost_user_blk`], behind the machine's IOMMU.
    #[must_use]
    pub fn vhost_user_blk_behind_iommu(self, id: &str, socket: &Path, queues: u16) -> Self {
        let (port, chardev) = (format!("rp-{id}"), format!("socket-{id}"));
        let mut device = vhost_user_device(id, &port, &chardev, queues);
        if let Some(properties) = device.as_object_mut() {
            for (property, value) in [
                ("iommu_platform", json!(true)),
                ("ats", json!(true)),
                ("disable-legacy", json!("on")),
            ] {
                properties.insert(property.into(), value);
            }
        }
        self.vhost_user_socket(&chardev, socket)
            .root_port(&port, &Value::Null)
            .device(&device)
    }

    /// Starts QEMU and connects to its ports.
    ///
    /// # Errors
    /// When a part is missing, or QEMU refuses its command line; the error has its words.
    pub fn start(&self, tools: &Tools) -> Result<Machine> {
        let scratch = Scratch::new(&self.name)?;
        let listener = |name: &str| {
            UnixListener::bind(scratch.join(name)).context(|| format!("listening on '{name}'"))
        };
        let (qmp, console, port) = (listener("qmp")?, listener("console")?, listener("port")?);

        let stderr = scratch.join("qemu.log");
        let log = File::create(&stderr).context(|| "creating qemu.log".into())?;
        let log_too = log.try_clone().context(|| "duplicating qemu.log".into())?;
        let qemu = if self.old_qemu {
            tools.old_qemu()?
        } else {
            tools.qemu()?
        };
        let mut command = qemu.command();
        self.compose(&mut command, tools, &scratch)?;
        std::fs::write(scratch.join("command"), describe(&command))
            .context(|| "recording QEMU's command line".into())?;
        command.stdin(Stdio::null()).stdout(log).stderr(log_too);
        let mut process = Process::start(&self.name, command)?;

        let connected = (|| {
            let qmp = accept(&qmp, &mut process, &stderr)?;
            let console = accept(&console, &mut process, &stderr)?;
            let port = accept(&port, &mut process, &stderr)?;
            let reader = port
                .try_clone()
                .context(|| "duplicating the command port".into())?;
            let terminal = Terminal::listen(console, reader, &scratch.join("console.log"))?;
            let qmp = Qmp::negotiate(qmp, &scratch.join("qmp.log"))?;
            Ok((qmp, port, terminal))
        })();
        match connected {
            Ok((qmp, port, terminal)) => Ok(Machine::new(
                Vm::new(process, terminal, stderr, scratch),
                qmp,
                port,
            )),
            Err(error) => match process.wait(LAST_WORDS.into()) {
                Ok(status) => Err(refused(&process, status, &stderr)),
                Err(_) => {
                    scratch.keep();
                    Err(error)
                }
            },
        }
    }

    /// Writes the whole command line.
    fn compose(&self, command: &mut Command, tools: &Tools, scratch: &Scratch) -> Result<()> {
        // The kernel unpacks them into a file system of half the memory, with the archive still in the other half.
        let memory_mib = self.memory_mib + 2 * size_mib(&self.programs)?;
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args([
                "-name",
                &self.name,
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                "max",
            ])
            .arg("-machine")
            .arg(format!("q35,memory-backend=mem{}", self.machine_options))
            .arg("-object")
            .arg(format!(
                "memory-backend-memfd,id=mem,size={memory_mib}M,share={}",
                if self.shared_memory { "on" } else { "off" }
            ))
            .args(["-m", &format!("{memory_mib}M")])
            .args(["-smp", &self.cpus.to_string()]);
        command
            .arg("-qmp")
            .arg(format!("unix:{}", scratch.join("qmp").display()));
        for (index, id) in ["console", "port"].into_iter().enumerate() {
            command
                .arg("-chardev")
                .arg(format!(
                    "socket,id={id},path={}",
                    scratch.join(id).display()
                ))
                .arg("-device")
                .arg(format!("isa-serial,chardev={id},index={index}"));
        }
        match &self.boot {
            Boot::Kernel(_) | Boot::Image(_) => {
                let kernel = match &self.boot {
                    Boot::Kernel(kernel) => tools.kernel(*kernel)?,
                    // Its modules are another kernel's, which this one does not look at.
                    _ => tools.kernel(Kernel::V6_12)?,
                };
                let image = match &self.boot {
                    Boot::Image(image) => image,
                    _ => &kernel.image,
                };
                let initramfs = tools.initramfs(&kernel, self.userland)?;
                let initramfs = join(initramfs, &self.programs, scratch)?;
                command
                    .arg("-kernel")
                    .arg(image)
                    .arg("-initrd")
                    .arg(initramfs)
                    .args(["-append", &command_line(&self.parameters)]);
            }
            Boot::System => {
                let kernel = tools.kernel(Kernel::V6_12)?;
                command
                    .arg("-kernel")
                    .arg(kernel.image)
                    .args(["-append", &command_line(&self.parameters)]);
            }
            Boot::Firmware(firmware) => {
                // SeaBIOS tells this port what it finds and does.
                let log = scratch.join(FIRMWARE_LOG);
                command
                    .arg("-chardev")
                    .arg(format!("file,id=firmware,path={}", log.display()))
                    .args(["-device", "isa-debugcon,iobase=0x402,chardev=firmware"]);
                for argument in flash(&tools.firmware(*firmware)?, scratch)? {
                    command.arg(argument);
                }
            }
        }
        command.args(&self.arguments);
        Ok(())
    }
}

/// A block device that a vhost-user backend implements, behind a socket that QEMU has.
#[must_use]
pub fn vhost_user_device(id: &str, bus: &str, chardev: &str, queues: u16) -> Value {
    json!({
        "driver": "vhost-user-blk-pci",
        "id": id,
        "bus": bus,
        "chardev": chardev,
        "num-queues": queues,
    })
}

/// The arguments that put firmware into the machine's flash.
fn flash(files: &FirmwareFiles, scratch: &Scratch) -> Result<Vec<String>> {
    let FirmwareFiles::Flash { code, variables } = files else {
        return Ok(Vec::new());
    };
    let own: PathBuf = scratch.join("variables.fd");
    std::fs::copy(variables, &own).context(|| format!("copying {}", variables.display()))?;
    let drive = |path: &Path, unit: u32, read_only: &str| {
        format!(
            "if=pflash,format=raw,unit={unit},readonly={read_only},file={}",
            path.display()
        )
    };
    Ok(vec![
        "-drive".into(),
        drive(code, 0, "on"),
        "-drive".into(),
        drive(&own, 1, "off"),
    ])
}

/// Takes QEMU's connection; its end instead is an error with its last words.
fn accept(listener: &UnixListener, process: &mut Process, stderr: &Path) -> Result<UnixStream> {
    let deadline = Deadline::secs(CONNECT_SECS);
    let ready = wait_readable(&[listener.as_fd(), process.as_fd()], deadline)?;
    if ready[0] {
        let (stream, _) = listener
            .accept()
            .context(|| "accepting a connection of QEMU".into())?;
        return Ok(stream);
    }
    match process.try_status()? {
        Some(status) => Err(refused(process, status, stderr)),
        None => Err(deadline.missed("QEMU's connection to its ports")),
    }
}

/// The error that says why QEMU ended before it was a machine.
fn refused(process: &Process, status: ExitStatus, stderr: &Path) -> Error {
    Error::MachineExited {
        machine: process.name().to_owned(),
        status: describe_status(status),
        stderr: tail(&std::fs::read_to_string(stderr).unwrap_or_default(), 20),
        console: String::new(),
    }
}
