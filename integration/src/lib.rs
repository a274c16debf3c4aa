//! The test bed: real virtual machines, with stock kernels and stock drivers, to prove Farbus on.
//!
//! ```no_run
//! use farbus_integration::builder::MachineBuilder;
//! use farbus_integration::deadline::Deadline;
//! use farbus_integration::scratch::Scratch;
//! use farbus_integration::tools::Tools;
//!
//! # fn main() -> farbus_integration::error::Result<()> {
//! let tools = Tools::open()?;
//! let scratch = Scratch::new("example")?;
//! let disk = scratch.disk("disk.img", 64 << 20)?;
//! let machine = MachineBuilder::new("example").emulated_nvme("nv0", &disk).start(&tools)?;
//! let guest = machine.wait_guest(Deadline::secs(60))?;
//! guest.check("nvme id-ctrl /dev/nvme0")?;
//! machine.quit()
//! # }
//! ```
//!
//! - [`tools`] and [`cache`] get what machines are made of, from Debian packages.
//! - [`builder`] and [`machine`] start, watch and end QEMU; [`qmp`] talks to it.
//! - [`guest`] runs commands in the guest; [`verify`] checks its disk, [`measure`] times it.
//! - [`vfio`] makes machines that lend their devices, and binds these.
//! - [`rdma`] makes machines with soft RoCE.
//! - [`claimant`] runs claimants that are no machines.
//! - [`service`] runs the agent as a service, and asks it.
//! - [`daemon`] starts Farbus' own programs; [`procfs`] looks at what they use.
//! - [`thread_usage`] says what a thread has used; [`counting`] tells who allocates.
//! - [`counts`] counts what programs do: system calls, instructions.
//! - [`cloud_hypervisor`] stands in for that VMM's REST interface.
//! - [`report`] says how a test failed, or why it could not run.
//! - [`process`], [`scratch`], [`deadline`] are what the others stand on.

#![deny(unsafe_code)]

pub mod attached;
pub mod builder;
pub mod cache;
pub mod claimant;
pub mod cloud_hypervisor;
#[allow(unsafe_code, reason = "an allocator is unsafe to write")]
pub mod counting;
pub mod counts;
pub mod custody;
pub mod daemon;
pub mod deadline;
pub mod demo;
pub mod error;
pub mod guest;
pub mod machine;
pub mod measure;
pub mod process;
pub mod procfs;
pub mod qmp;
pub mod rdma;
pub mod report;
pub mod scratch;
pub mod service;
mod terminal;
pub mod thread_usage;
pub mod tools;
pub mod verify;
pub mod vfio;
